"""Which keys are taken from a file, and which are left out."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwt.algorithms import ECAlgorithm
from signing import (
    EC_KEY,
    ED_KEY,
    KEYS,
    OTHER_EC_KEY,
    RSA_KEY,
    Settings,
    b64,
    jwk_of,
    jwk_set,
    opened,
    pem_of,
    refusal,
    token,
)

from presence.authn import Authenticator
from presence.errors import ConfigError


def private_pem() -> bytes:
    return EC_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (b"", "neither a JWK Set nor a PEM public key"),
        (b"hello", "neither a JWK Set nor a PEM public key"),
        (b"[]", "no array of keys"),
        (b"{}", "no array of keys"),
        (b'{"keys":{}}', "no array of keys"),
        (b'{"keys":[]}', "no key fits an allowed algorithm"),
        (json.dumps(jwk_of(EC_KEY)).encode(), "no array of keys"),
        (private_pem(), "it is a private key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "it is not a PEM public key"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "it is not a PEM public key"),
        (pem_of(RSA_KEY), "no key fits an allowed algorithm"),
        (jwk_set(jwk_of(RSA_KEY)), "no key fits an allowed algorithm"),
    ],
)
async def test_files_without_a_usable_key(keys: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        await opened(keys, tmp_path)
    assert str(caught.value).startswith(f"auth_keys: cannot use {tmp_path}")
    assert "\n" not in str(caught.value)


async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auth_keys: cannot read .*: No such file or directory"):
        await Authenticator.open(Settings(str(tmp_path / "none.json")))
    with pytest.raises(ConfigError, match="Is a directory"):
        await Authenticator.open(Settings(str(tmp_path)))
    with pytest.raises(ConfigError, match="auth_keys is needed"):
        await Authenticator.open(Settings(None))


@pytest.mark.parametrize(
    "unusable",
    [
        {"kty": "oct", "k": b64(b"secret" * 8), "kid": "k1", "alg": "HS256"},
        {"kty": "oct", "k": b64(b"secret" * 8), "kid": "k1", "alg": "ES256"},
        jwk_of(EC_KEY, kid="k1", use="enc"),
        jwk_of(EC_KEY, kid="k1", key_ops=["sign"]),
        jwk_of(EC_KEY, kid="k1", key_ops="verify"),
        jwk_of(EC_KEY, kid="k1", alg="ES384"),
        jwk_of(EC_KEY, kid="k1", alg="RS256"),
        jwk_of(EC_KEY, kid="k1", alg="HS256"),
        jwk_of(EC_KEY, kid="k1", alg="none"),
        jwk_of(EC_KEY, kid="k1", alg=["ES256"]),
        jwk_of(EC_KEY, kid=1),
        jwk_of(EC_KEY, kid="k1", kty="RSA"),
        jwk_of(EC_KEY, kid="k1", kty="OKP"),
        jwk_of(EC_KEY, kid="k1", kty=["EC"]),
        jwk_of(EC_KEY, kid="k1", kty=None),
        jwk_of(EC_KEY, kid="k1", crv="P-384"),
        jwk_of(EC_KEY, kid="k1", crv=["P-256"]),
        jwk_of(EC_KEY, kid="k1", x=7),
        jwk_of(EC_KEY, kid="k1", x="AAAA"),
        jwk_of(EC_KEY, kid="k1", x=b64(bytes(32)), y=b64(b"\1" * 32)),  # not on the curve
        jwk_of(ED_KEY, kid="k1", crv="X25519"),
        jwk_of(rsa.generate_private_key(65537, 1024), kid="k1"),
        {"kty": "EC", "kid": "k1"},
        "no object",
        None,
        7,
    ],
    ids=lambda unusable: str(unusable)[:60],
)
async def test_keys_that_cannot_be_used_are_left_out(unusable: Any, tmp_path: Path) -> None:
    authenticator = await opened(
        jwk_set(unusable, jwk_of(OTHER_EC_KEY, kid="k2")), tmp_path, auth_algorithms=tuple(KEYS)
    )
    assert (await authenticator.authenticate(token(OTHER_EC_KEY, "ES256", "k2"))).sub == "alice"
    assert await refusal(authenticator, token()) == "Unknown key"


async def test_a_private_key_in_the_set_is_read_as_its_public_one(tmp_path: Path) -> None:
    keys = jwk_set({**ECAlgorithm.to_jwk(EC_KEY, as_dict=True), "kid": "k1"})
    assert (await (await opened(keys, tmp_path)).authenticate(token())).sub == "alice"
