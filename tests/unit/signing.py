"""Keys, key sets and tokens, good and bad, for the tests of authentication."""

import base64
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from presence.authn import Authenticator
from presence.errors import SessionError
from presence.reasons import UNAUTHENTICATED

NOW = 1_700_000_000.0
CLASSROOM = uuid.UUID("0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10")

EC_KEY = ec.generate_private_key(ec.SECP256R1())
OTHER_EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
ED_KEY = ed25519.Ed25519PrivateKey.generate()

KEYS: dict[str, Any] = {
    "ES256": EC_KEY,
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "ES256K": ec.generate_private_key(ec.SECP256K1()),
    "RS256": RSA_KEY,
    "RS384": RSA_KEY,
    "RS512": RSA_KEY,
    "PS256": RSA_KEY,
    "PS384": RSA_KEY,
    "PS512": RSA_KEY,
    "EdDSA": ED_KEY,
}


@dataclass(frozen=True)
class Settings:
    auth_keys: str | None
    auth_algorithms: tuple[str, ...] = ("ES256",)
    auth_audience: str | None = "school.example"


def jwk_of(private_key: Any, **members: Any) -> dict[str, Any]:
    key = private_key.public_key()
    family: Any = OKPAlgorithm
    if isinstance(key, ec.EllipticCurvePublicKey):
        family = ECAlgorithm
    elif isinstance(key, rsa.RSAPublicKey):
        family = RSAAlgorithm
    return {**family.to_jwk(key, as_dict=True), **members}


def jwk_set(*jwks: dict[str, Any]) -> bytes:
    return json.dumps({"keys": jwks}).encode()


def pem_of(private_key: Any) -> bytes:
    return private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def claims(**changes: Any) -> dict[str, Any]:
    good = {"sub": "alice", "aud": "school.example", "exp": int(NOW) + 3600, "classrooms": [str(CLASSROOM)]}
    return {name: value for name, value in (good | changes).items() if value is not ...}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(header: Any, payload: Any, key: Any = EC_KEY, algorithm: str = "ES256") -> str:
    """A token with exactly this header and payload, as no library would make it."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)]
    signing_input = ".".join(b64(part) for part in parts)
    signature = jwt.get_algorithm_by_name(algorithm).sign(signing_input.encode(), key)
    return f"{signing_input}.{b64(signature)}"


def token(key: Any = EC_KEY, algorithm: str = "ES256", kid: Any = "k1", /, **changes: Any) -> str:
    header = {"alg": algorithm, "typ": "JWT"} | ({} if kid is ... else {"kid": kid})
    return sign(header, claims(**changes), key, algorithm)


async def opened(keys: bytes, tmp_path: Path, **settings_changes: Any) -> Authenticator:
    path = tmp_path / "keys"
    path.write_bytes(keys)
    return await Authenticator.open(Settings(str(path), **settings_changes), now=lambda: NOW)


async def refusal(authenticator: Authenticator, bad_token: str) -> str:
    with pytest.raises(SessionError) as caught:
        await authenticator.authenticate(bad_token)
    assert caught.value.reason is UNAUTHENTICATED
    return caught.value.title
