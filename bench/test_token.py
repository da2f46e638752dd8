"""The check of an ES256 token that opens one classroom and thirty: from the token's text to who the agent is.

`presence` is the gateway's authenticator. Beside it PyJWT's own `decode`, with the key chosen by the token's key id as a JWK
Set asks for, and the signature's verification alone, which is OpenSSL's and which nobody can do without.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from conftest import Loop, Report
from presence.authn import Authenticator
from sockets import AUDIENCE, KEY_ID, Tokens

SIZES = [1, 30]  # classrooms that the token opens
COUNT = 300


@dataclass(frozen=True)
class Settings:
    auth_keys: str | None
    auth_algorithms: tuple[str, ...] = ("ES256",)
    auth_audience: str | None = AUDIENCE


def timed(check: Callable[[], object]) -> float:
    begun_ns = time.perf_counter_ns()
    for _ in range(COUNT):
        check()
    return (time.perf_counter_ns() - begun_ns) / COUNT


@contextmanager
def by_presence(tokens: Tokens, token: str) -> Iterator[Loop]:
    with asyncio.Runner() as runner:
        authenticator = runner.run(Authenticator.open(Settings(tokens.path)))

        async def check_all() -> float:
            begun_ns = time.perf_counter_ns()
            for _ in range(COUNT):
                await authenticator.authenticate(token)
            return (time.perf_counter_ns() - begun_ns) / COUNT

        yield lambda: runner.run(check_all())
        runner.run(authenticator.close())


@contextmanager
def by_pyjwt(tokens: Tokens, token: str) -> Iterator[Loop]:
    keys = jwt.PyJWKSet.from_json(Path(tokens.path).read_text())

    def check() -> object:
        key = keys[jwt.get_unverified_header(token)["kid"]]
        return jwt.decode(token, key, algorithms=["ES256"], audience=AUDIENCE, options={"require": ["exp", "sub"]})

    assert check()
    yield lambda: timed(check)


@contextmanager
def by_openssl(tokens: Tokens, token: str) -> Iterator[Loop]:
    signing_input, _, signature = token.rpartition(".")
    raw = jwt.utils.base64url_decode(signature)
    der = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    key, data, algorithm = tokens.key.public_key(), signing_input.encode(), ec.ECDSA(SHA256())
    yield lambda: timed(lambda: key.verify(der, data, algorithm))


BY = {"presence": by_presence, "PyJWT": by_pyjwt, "signature alone": by_openssl}


@pytest.mark.benchmark(group="token check")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who", BY)
def test_token(ns_each: Report, tmp_path: Path, who: str, size: int) -> None:
    tokens = Tokens(str(tmp_path))
    token = tokens.token("alice", [str(uuid.uuid4()) for _ in range(size)])
    assert jwt.get_unverified_header(token)["kid"] == KEY_ID
    with BY[who](tokens, token) as loop:
        ns_each(loop)
