"""Who an agent is: from a token to an identity, or a refusal.

Owns: what a token must look like and say, and the keys it is checked with (read at the start; a URL again when a token
names a key id that is not known). Knows nothing of classrooms, sockets or sessions. No part of a token leaves this
module but the identity: titles and log lines name the class of failure only.

PyJWT reads the keys and makes the signature checks. The compact form (RFC 7515, 3.1) is taken apart here: beside 43 us
for the ES256 check itself, PyJWT's own decoding costs 35 us a token (the key id has to be read first), this one 8.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Protocol
from uuid import UUID

import orjson

from presence.errors import ConfigError, SessionError, StartError, Unavailable
from presence.identity import Identity, agent_id_of
from presence.keyset import KeySet, KeySetError
from presence.log import get
from presence.metrics import Metrics
from presence.outbound import ExchangeFailed, Outbound
from presence.protocol import parse_uuid
from presence.reasons import UNAUTHENTICATED

__all__ = ["Authenticator", "Identity", "agent_id_of"]

MAX_TOKEN_BYTES: Final = 16_384
MAX_KEY_SET_BYTES: Final = 262_144
READ_TIMEOUT_S: Final = 5.0
REREAD_INTERVAL_S: Final = 60.0

# A token is often used in the second it was made, by a clock that may be ahead of this one. `exp` has no leeway: the
# connection is closed at that very time, so a token accepted after it would only be thrown out again.
NOT_BEFORE_LEEWAY_S: Final = 5.0
MAX_NUMERIC_DATE: Final = 253_402_300_800  # the year 10000

COMPACT_FORM: Final = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]*)")
# Visible ASCII: both go into NATS headers, whose readers do not agree on anything beyond it.
NAME: Final = re.compile(r"[!-~]{1,200}")

log = get("authn")


class AuthnSettings(Protocol):
    """The settings that are read here."""

    @property
    def auth_keys(self) -> str | None: ...
    @property
    def auth_algorithms(self) -> tuple[str, ...]: ...
    @property
    def auth_audience(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class SignedToken:
    """A token taken apart, nothing of it verified yet."""

    algorithm: object
    kid: str | None
    signing_input: bytes
    claims: bytes
    signature: bytes


class Authenticator:
    """Checks tokens. Made by `open`; `close` ends a reading of the keys that is under way."""

    def __init__(
        self, keys: KeySet, settings: AuthnSettings, source: KeySource | None, now: Callable[[], float]
    ) -> None:
        self._keys = keys
        self._algorithms = frozenset(settings.auth_algorithms)
        self._audience = settings.auth_audience
        self._source = source
        self._now = now

    @classmethod
    async def open(
        cls,
        settings: AuthnSettings,
        *,
        metrics: Metrics | None = None,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> Authenticator:
        """Reads the keys; raises ConfigError or StartError with one line when there are none to be had."""
        if settings.auth_keys is None:
            raise ConfigError("auth_keys is needed: the path or URL of a JWK Set, or the path of a PEM public key")
        if settings.auth_keys.lower().startswith(("http://", "https://")):
            source = KeySource(settings.auth_keys, settings.auth_algorithms, metrics or Metrics(), monotonic)
            return cls(await source.open(), settings, source, now)
        return cls(_read_key_file(Path(settings.auth_keys), settings.auth_algorithms), settings, None, now)

    async def authenticate(self, token: str) -> Identity:
        """The identity in a token; waits only while keys are being read again.

        Raises SessionError: UNAUTHENTICATED, or UNAVAILABLE when the key set that might hold the token's key could not
        be read. About 55 us for ES256.
        """
        signed = _take_apart(token)
        algorithm = signed.algorithm
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            _refuse("Algorithm not allowed")
        if not self._is_genuine(signed, algorithm):
            await self._retry_with_new_keys(signed, algorithm)
        return self._identify(_json_object(signed.claims))

    async def close(self) -> None:
        if self._source is not None:
            await self._source.close()

    def _is_genuine(self, signed: SignedToken, algorithm: str) -> bool:
        return self._keys.verify(signed.kid, algorithm, signed.signing_input, signed.signature)

    async def _retry_with_new_keys(self, signed: SignedToken, algorithm: str) -> None:
        if self._source is not None and not self._keys.knows(signed.kid):
            self._keys = await self._source.reread()
            if self._is_genuine(signed, algorithm):
                return
            if self._source.failing and not self._keys.knows(signed.kid):
                raise Unavailable("The signing keys cannot be read now")
        _refuse("Wrong signature" if self._keys.find(signed.kid, algorithm) else "Unknown key")

    def _identify(self, claims: dict[str, Any]) -> Identity:
        """RFC 7519, 4.1; the signature is good, what it signs may still be anything."""
        now = self._now()
        expires_at = _numeric_date(claims, "exp")
        if expires_at is None:
            _refuse("The token has no exp")
        if expires_at <= now:
            _refuse("Token expired")
        not_before = _numeric_date(claims, "nbf")
        if not_before is not None and not_before > now + NOT_BEFORE_LEEWAY_S:
            _refuse("Token not yet valid")
        sub = claims.get("sub")
        if not isinstance(sub, str) or NAME.fullmatch(sub) is None:
            _refuse("The token has no usable sub")
        return Identity(sub, self._audience_of(claims.get("aud")), expires_at, _classrooms_of(claims.get("classrooms")))

    def _audience_of(self, aud: object) -> str:
        audiences = aud if isinstance(aud, list) else [aud]
        if self._audience is not None:
            if self._audience not in audiences:
                _refuse("Wrong audience")
            return self._audience
        if len(audiences) != 1 or not isinstance(audiences[0], str) or NAME.fullmatch(audiences[0]) is None:
            _refuse("The token has no usable aud")
        return audiences[0]


class KeySource:
    """A JWK Set behind a URL: one reading at a time however many wait for it, at most one re-reading a minute."""

    def __init__(self, url: str, algorithms: tuple[str, ...], metrics: Metrics, monotonic: Callable[[], float]) -> None:
        self._url = url
        self._algorithms = algorithms
        self._metrics = metrics
        self._monotonic = monotonic
        self._outbound = Outbound(timeout_s=READ_TIMEOUT_S, max_bytes=MAX_KEY_SET_BYTES)
        self._keys: KeySet
        self._reading: asyncio.Task[None] | None = None
        self._reread_at = float("-inf")
        self.failing = False

    async def open(self) -> KeySet:
        """The first reading; raises StartError."""
        try:
            self._keys = await self._read()
        except (ExchangeFailed, KeySetError) as error:
            await self._outbound.close()
            raise StartError(f"auth_keys: cannot use the key set at its URL: {error}") from None
        return self._keys

    async def reread(self) -> KeySet:
        """The newest keys; what was read less than a minute ago is not read again."""
        if self._reading is None and self._monotonic() - self._reread_at >= REREAD_INTERVAL_S:
            self._reread_at = self._monotonic()
            self._reading = asyncio.create_task(self._reread(), name="key set")
        if self._reading is not None:
            # Not awaited itself: a waiter that gives up must not end the reading for the others.
            await asyncio.wait([self._reading])
        return self._keys

    async def _reread(self) -> None:
        try:
            self._keys = await self._read()
            self.failing = False
        except (ExchangeFailed, KeySetError) as error:
            self.failing = True
            log.warning("key_set_unreadable", why=str(error))
        finally:
            self._reading = None

    async def _read(self) -> KeySet:
        try:
            keys = KeySet.parse(await self._fetch(), self._algorithms)
        except (ExchangeFailed, KeySetError):
            self._metrics.key_reads.labels("failure").inc()
            raise
        self._metrics.key_reads.labels("success").inc()
        return keys

    async def _fetch(self) -> bytes:
        status, body = await self._outbound.exchange("GET", self._url)
        if status != 200:
            raise ExchangeFailed(f"status {status}")
        return body

    async def close(self) -> None:
        self.failing = True
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        await self._outbound.close()


def _read_key_file(path: Path, algorithms: tuple[str, ...]) -> KeySet:
    try:
        return KeySet.parse(path.read_bytes(), algorithms)
    except OSError as error:
        raise ConfigError(f"auth_keys: cannot read {path}: {error.strerror}") from None
    except KeySetError as error:
        raise ConfigError(f"auth_keys: cannot use {path}: {error}") from None


def _take_apart(token: str) -> SignedToken:
    form = COMPACT_FORM.fullmatch(token) if len(token) <= MAX_TOKEN_BYTES else None
    if form is None:
        _refuse("Malformed token")
    header_part, claims_part, signature_part = form.groups()
    header = _json_object(_decode(header_part))
    kid = header.get("kid")
    # RFC 7515, 4.1.11: an extension that must be understood is not, here. Keys in the header are never looked at.
    if not isinstance(kid, str | None) or "crit" in header:
        _refuse("Malformed token")
    signature = _decode(signature_part)
    # The last character has unused bits: one token, one spelling.
    if base64.urlsafe_b64encode(signature).rstrip(b"=") != signature_part.encode():
        _refuse("Malformed token")
    signing_input = token[: form.end(2)].encode()
    return SignedToken(header.get("alg"), kid, signing_input, _decode(claims_part), signature)


def _decode(part: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except binascii.Error:
        _refuse("Malformed token")


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        _refuse("Malformed token")
    return value


def _numeric_date(claims: dict[str, Any], name: Literal["exp", "nbf"]) -> float | None:
    """Seconds since 1970, fractions allowed (RFC 7519, 2)."""
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_NUMERIC_DATE:
        _refuse(f"The token has no usable {name}")
    return float(value)


def _classrooms_of(claim: object) -> frozenset[UUID] | Literal["*"] | None:
    """A claim that is not exactly a list of UUIDs or "*" grants nothing: the token is good, it just opens no door."""
    if claim == "*":
        return "*"
    if not isinstance(claim, list):
        return None
    classrooms = [parse_uuid(entry) for entry in claim]
    return None if None in classrooms else frozenset(entry for entry in classrooms if entry is not None)


def _refuse(title: str) -> NoReturn:
    raise SessionError(UNAUTHENTICATED, title)
