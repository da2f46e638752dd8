"""Structured logs on stderr: one line per event, for this package and for the libraries alike.

Owns: the form of a line, the limit on lines that the outside can cause, and the removal of secrets.
Knows nothing of what is logged. Never raises into the code that logs: a closed stderr loses lines, not connections.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Hashable
from typing import Any, Final, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

__all__ = ["RateLimit", "RateLimited", "configure", "get", "redact"]

LIMIT_INTERVAL_S: Final = 1.0
MAX_LIMITED_KEYS: Final = 1_024

HIDDEN: Final = "[hidden]"
_SECRET_KEYS = frozenset(
    ["api_token", "api_tokens", "authorization", "cookie", "jwt", "password", "secret", "signing_key", "token"]
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
_URL_PASSWORD = re.compile(r"(?i)(?<=[?&]password=)[^\s&'\"]+")
_TOKEN = re.compile(r"\beyJ[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*){0,2}")
_BEARER = re.compile(r"(?i)\bbearer\s+[^\s'\",]+")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def get(name: str) -> FilteringBoundLogger:
    """Returns the logger of a component; it may be made at import, `configure` takes effect on it later.

    `limited=True` in a call marks a line that the outside can cause: one a second for each event name.
    """
    return cast("FilteringBoundLogger", structlog.get_logger(component=name))


class RateLimit:
    """Admits one line per key and interval, and counts what it held back. Its memory is bounded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, interval_s: float = LIMIT_INTERVAL_S) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._seen: dict[Hashable, tuple[float, int]] = {}  # key → when the next line may pass, lines held back

    def admit(self, key: Hashable) -> int | None:
        """Returns how many lines of this key were held back before this one, or None when this one is too."""
        now = self._clock()
        next_at, suppressed = self._seen.get(key, (now, 0))
        if now < next_at:
            self._seen[key] = (next_at, suppressed + 1)
            return None
        if key not in self._seen and len(self._seen) >= MAX_LIMITED_KEYS:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = (now + self._interval_s, 0)
        return suppressed


class RateLimited:
    """The processor behind `limited=True`; the line that passes carries `suppressed`, if any were held back."""

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit

    def __call__(self, _logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
        if event_dict.pop("limited", False):
            suppressed = self._limit.admit(event_dict.get("event"))
            if suppressed is None:
                raise structlog.DropEvent
            if suppressed:
                event_dict["suppressed"] = suppressed
        return event_dict


class _LibraryLimit(logging.Filter):
    """Every line of a library is limited: what makes it log is out of our hands."""

    def __init__(self, limit: RateLimit) -> None:
        super().__init__()
        self._limit = limit

    def filter(self, record: logging.LogRecord) -> bool:
        suppressed = self._limit.admit((record.name, record.levelno, str(record.msg)[:100]))
        if suppressed:
            record.suppressed = suppressed
        return suppressed is not None


class _Lines:
    """Writes finished lines to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # closed or full: nobody is left to tell
            return

    debug = info = warning = error = critical = exception = msg


def redact(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    """Hides secrets: by their keys, and credentials in URLs, tokens and Bearer values inside texts."""
    return {key: HIDDEN if key in _SECRET_KEYS else _redact_value(value) for key, value in event_dict.items()}


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return _redact_text(value)
    if isinstance(value, bytes):
        return _redact_text(value.decode(errors="replace"))
    if isinstance(value, dict):
        return {k: HIDDEN if str(k).lower() in _SECRET_KEYS else _redact_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact_value(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _redact_text(str(value))


def _redact_text(text: str) -> str:
    for pattern in (_URL_CREDENTIALS, _URL_PASSWORD, _TOKEN, _BEARER):
        text = pattern.sub(HIDDEN, text)
    return text


def _escape_controls(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    """Keeps text from outside from forging lines or driving the terminal; a traceback keeps its line breaks."""
    for key, value in event_dict.items():
        if isinstance(value, str) and key != "exception":
            event_dict[key] = _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", value)
    return event_dict


def configure(
    level: str = "info",
    fmt: Literal["auto", "json", "console"] = "auto",
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Sends every log line of the process to `stream` (stderr) in one form; may be called again."""
    target = sys.stderr if stream is None else stream
    terminal = target.isatty()
    as_json = fmt == "json" or (fmt == "auto" and not terminal)
    renderer: Processor = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=terminal, pad_event_to=24)
    )
    stamp: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    escape: list[Processor] = [] if as_json else [_escape_controls]
    finish: list[Processor] = [structlog.processors.format_exc_info, redact, *escape, renderer]
    least = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[RateLimited(RateLimit(clock)), *stamp, *finish],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=lambda *_: _Lines(target),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.addFilter(_LibraryLimit(RateLimit(clock)))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(allow=["suppressed"]), _name_library, *stamp],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *finish],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    # Libraries are chatty at "info"; some name whole URLs there.
    root.setLevel(logging.DEBUG if least == logging.DEBUG else max(least, logging.WARNING))


def _name_library(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    record = event_dict.get("_record")
    if record is not None:
        event_dict["component"] = record.name
    return event_dict
