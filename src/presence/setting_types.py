"""The types of the settings: ranges and formats, each with the words that say what is wrong.

Owns the check of one value at a time. Knows nothing of names, sources, or of two values that must fit together.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

__all__ = [
    "Algorithms",
    "ApiTokens",
    "AuthKeys",
    "Bytes",
    "Count",
    "DatabaseUrl",
    "Folder",
    "Host",
    "HttpUrl",
    "Label",
    "NatsUrl",
    "Origins",
    "Port",
    "Rate",
    "Seconds",
    "SubjectPrefix",
    "refusal",
]

ASYMMETRIC_ALGORITHMS = frozenset(
    ["ES256", "ES256K", "ES384", "ES512", "EdDSA", "PS256", "PS384", "PS512", "RS256", "RS384", "RS512"]
)

_SUBJECT_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOST = re.compile(r"[\w.:%-]{1,253}")
_DATABASE_PARTS = re.compile(r"(?P<user>[^/?#]*@)?(?P<hosts>[^/?#]*)(?P<path>.*)", re.DOTALL)


def refusal(why: str, *, setting: str | None = None) -> PydanticCustomError:
    """Returns the error for a value that is refused; `setting` names it where the check sees more than one.

    The text goes in as a value: braces in it are not read as a template.
    """
    return PydanticCustomError("refused", "{why}", {"why": why, "setting": setting})


def _split_list(value: object) -> object:
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    return value


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):  # Python takes true for 1
        raise refusal("should be a number")
    return value


def _parse_url(value: str) -> SplitResult:
    try:
        parts = urlsplit(value)
        _ = parts.port  # parsed on access: a port that is no number is found here
        (parts.hostname or "").encode("idna")  # what the resolver will do; it refuses "a..b"
    except ValueError:  # its text may quote a part of a password
        raise refusal("is not a valid URL") from None
    if not value.isprintable() or " " in value:
        raise refusal("is not a valid URL")
    return parts


def _check_nats_url(value: str) -> str:
    for url in value.split(","):
        parts = _parse_url(url.strip())
        if parts.scheme not in ("nats", "tls", "ws", "wss") or not parts.hostname:
            raise refusal("must look like nats://host:4222 (several separated by commas)")
    return value


def _check_database_url(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if scheme not in ("postgresql", "postgres") or not separator:
        raise refusal("must look like postgresql://user@host:5432/database")
    place, user, path = _DATABASE_PARTS.fullmatch(rest).group("hosts", "user", "path")  # type: ignore[union-attr]
    for host in place.split(","):  # several: the one that can be written to is used
        parts = _parse_url(f"{scheme}://{user or ''}{host}{path}")
    cache_sizes = parse_qs(parts.query, keep_blank_values=True).get("statement_cache_size", ["0"])
    if not all(size.isdecimal() for size in cache_sizes):
        raise refusal("has a statement_cache_size that is not a whole number")
    return value


def _check_http_url(value: str) -> str:
    parts = _parse_url(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise refusal("must be an http:// or https:// URL")
    return value


def _check_auth_keys(value: str) -> str:
    return _check_http_url(value) if "://" in value else str(_check_path(value))


def _check_path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise refusal("must be a path")
    return value


def _check_host(value: str) -> str:
    try:
        value.encode("idna")  # what the resolver will do
    except UnicodeError:
        raise refusal("must be an address or a host name") from None
    if _HOST.fullmatch(value) is None:
        raise refusal("must be an address or a host name")
    return value


def _check_algorithms(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise refusal("must name at least one algorithm")
    for name in value:
        if name not in ASYMMETRIC_ALGORITHMS:
            allowed = ", ".join(sorted(ASYMMETRIC_ALGORITHMS))
            raise refusal(f"{name!r} is not an asymmetric signature algorithm; choose from {allowed}")
    return value


def _check_origins(value: tuple[str, ...]) -> tuple[str, ...]:
    for origin in value:
        parts = _parse_url(origin)
        bare = parts.hostname and parts.scheme in ("http", "https") and origin.lower() == _origin_of(parts)
        if origin != "*" and not bare:
            raise refusal(f"{origin!r} is not an origin; write it as https://school.example, or * for all")
    return tuple(origin.lower() for origin in value)


def _origin_of(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc.lower().rpartition('@')[2]}"


def _check_subject_prefix(value: str) -> str:
    tokens = value.split(".")
    if not all(_SUBJECT_TOKEN.fullmatch(token) for token in tokens):
        raise refusal("must be tokens of letters, digits, '_' and '-', joined by dots")
    if tokens[0] == "presence":
        raise refusal("must not start with 'presence': the replicas talk to each other there")
    return value


def _check_api_tokens(value: tuple[str, ...]) -> tuple[str, ...]:
    for token in value:
        if not 16 <= len(token) <= 512 or not token.isascii() or not token.isprintable() or " " in token:
            raise refusal("every token must be 16 to 512 printable ASCII characters without blanks")
    return value


def _check_label(value: str) -> str:
    if not value.isprintable() or not 1 <= len(value) <= 200:
        raise refusal("must be 1 to 200 printable characters")
    return value


_Int = Annotated[int, BeforeValidator(_refuse_bool)]
_Float = Annotated[float, BeforeValidator(_refuse_bool)]
Port = Annotated[_Int, Field(ge=0, le=65_535)]
Seconds = Annotated[_Float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Rate = Annotated[_Float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]
Count = Annotated[_Int, Field(ge=1, le=10_000_000)]
Bytes = Annotated[_Int, Field(ge=128, le=2**30)]
Folder = Annotated[Path, BeforeValidator(_check_path)]
Host = Annotated[str, AfterValidator(_check_host)]
Label = Annotated[str, AfterValidator(_check_label)]
NatsUrl = Annotated[str, AfterValidator(_check_nats_url)]
DatabaseUrl = Annotated[str, AfterValidator(_check_database_url)]
HttpUrl = Annotated[str, AfterValidator(_check_http_url)]
AuthKeys = Annotated[str, AfterValidator(_check_auth_keys)]
SubjectPrefix = Annotated[str, AfterValidator(_check_subject_prefix)]

# NoDecode: an environment variable holds "a,b", not JSON.
_Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)]
Algorithms = Annotated[_Names, AfterValidator(_check_algorithms)]
Origins = Annotated[_Names, AfterValidator(_check_origins)]
ApiTokens = Annotated[_Names, AfterValidator(_check_api_tokens)]
