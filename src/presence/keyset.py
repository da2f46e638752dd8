"""The keys that may have signed a token: parsed once, found by key id and algorithm.

Owns: reading a JWK Set (RFC 7517) or a PEM public key, which algorithms a key fits, and the check of one signature.
Knows nothing of tokens, claims, files, HTTP or time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final

import jwt
import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import Algorithm

from presence.errors import PresenceError

__all__ = ["KeySet", "KeySetError"]

# A token without a key id is checked with this many keys at most: each costs a signature check.
MAX_TRIES: Final = 4
MIN_RSA_BITS: Final = 2048  # RFC 7518, 3.3

ALGORITHMS_BY_CURVE: Final = {
    "secp256r1": ("ES256",),
    "secp384r1": ("ES384",),
    "secp521r1": ("ES512",),
    "secp256k1": ("ES256K",),
}
RSA_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# Any algorithm of the family makes PyJWT read the key; which ones the key fits is decided by the key itself.
READ_AS: Final = {"EC": "ES256", "RSA": "RS256", "OKP": "EdDSA"}
PUBLIC_MEMBERS: Final[tuple[str, ...]] = ("kty", "crv", "x", "y", "n", "e")


class KeySetError(PresenceError):
    """These bytes hold no key that can be used; the text says why in a few words."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One public key and the algorithms it may be used with."""

    kid: str | None
    key: Any
    algorithms: tuple[str, ...]


class KeySet:
    """Immutable; a new reading makes a new one."""

    def __init__(self, keys: Collection[SigningKey]) -> None:
        self._kids = frozenset(key.kid for key in keys if key.kid is not None)
        self._by_kid: dict[tuple[str | None, str], list[Any]] = defaultdict(list)  # under None: those without an id
        self._all: dict[str, list[Any]] = defaultdict(list)
        self._algorithms: dict[str, Algorithm] = {}
        for signing_key in keys:
            for name in signing_key.algorithms:
                self._by_kid[signing_key.kid, name].append(signing_key.key)
                self._all[name].append(signing_key.key)
                self._algorithms[name] = jwt.get_algorithm_by_name(name)

    @classmethod
    def parse(cls, data: bytes, algorithms: Collection[str]) -> KeySet:
        """Keys that fit none of `algorithms` are left out; raises KeySetError when none remains."""
        found = [_parse_pem(data)] if data.lstrip().startswith(b"-----BEGIN") else list(_parse_jwk_set(data))
        usable = [
            SigningKey(key.kid, key.key, fitting)
            for key in found
            if (fitting := tuple(name for name in key.algorithms if name in algorithms))
        ]
        if not usable:
            raise KeySetError("no key fits an allowed algorithm")
        return cls(usable)

    def knows(self, kid: str | None) -> bool:
        """Whether a key of this id is here; never so for a token that names none."""
        return kid in self._kids

    def find(self, kid: str | None, algorithm: str) -> list[Any]:
        """The keys that may have signed: those of this id, else those without an id; without an id all of them."""
        if kid is None:
            return self._all.get(algorithm, [])[:MAX_TRIES]
        return self._by_kid.get((kid if kid in self._kids else None, algorithm), [])[:MAX_TRIES]

    def verify(self, kid: str | None, algorithm: str, signing_input: bytes, signature: bytes) -> bool:
        """Whether one of the keys that fit made the signature. About 45 us for ES256, nearly all of it in OpenSSL."""
        keys = self.find(kid, algorithm)
        return any(self._algorithms[algorithm].verify(signing_input, key, signature) for key in keys)


def _parse_pem(data: bytes) -> SigningKey:
    if b"PRIVATE KEY" in data:
        raise KeySetError("it is a private key; the public one belongs here")
    try:
        key = load_pem_public_key(data.strip())
    except (ValueError, UnsupportedAlgorithm):
        raise KeySetError("it is not a PEM public key") from None
    return SigningKey(None, key, _algorithms_of(key))


def _parse_jwk_set(data: bytes) -> Iterator[SigningKey]:
    try:
        key_set = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise KeySetError("it is neither a JWK Set nor a PEM public key") from None
    if not isinstance(key_set, dict) or not isinstance(key_set.get("keys"), list):
        raise KeySetError("it is not a JWK Set: no array of keys")
    for jwk in key_set["keys"]:
        # RFC 7517, 5: keys that are not understood are ignored.
        if isinstance(jwk, dict) and (key := _parse_jwk(jwk)) is not None:
            yield key


def _parse_jwk(jwk: dict[str, Any]) -> SigningKey | None:
    kid, alg, kty = jwk.get("kid"), jwk.get("alg"), jwk.get("kty")
    if not isinstance(kid, str | None) or not isinstance(kty, str) or kty not in READ_AS or not _may_verify(jwk):
        return None
    # A private key that was published by mistake is read as the public key that it contains.
    public: dict[str, Any] = {member: jwk[member] for member in PUBLIC_MEMBERS if member in jwk}
    try:
        key = jwt.PyJWK(public, algorithm=READ_AS[kty]).key
    except (jwt.PyJWTError, UnsupportedAlgorithm):
        return None
    fitting = _algorithms_of(key)
    return SigningKey(kid, key, fitting if alg is None else tuple(name for name in fitting if name == alg))


def _may_verify(jwk: dict[str, Any]) -> bool:
    key_ops = jwk.get("key_ops", ["verify"])
    return jwk.get("use", "sig") == "sig" and isinstance(key_ops, list) and "verify" in key_ops


def _algorithms_of(key: object) -> tuple[str, ...]:
    if isinstance(key, EllipticCurvePublicKey):
        return ALGORITHMS_BY_CURVE.get(key.curve.name, ())
    if isinstance(key, RSAPublicKey):
        return RSA_ALGORITHMS if key.key_size >= MIN_RSA_BITS else ()
    if isinstance(key, Ed25519PublicKey | Ed448PublicKey):
        return ("EdDSA",)
    return ()
