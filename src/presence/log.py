"""Structured logs on stderr: one line per event, for this package and for the libraries alike.

Owns: the form of a line, the limit on lines that the outside can cause, and the removal of secrets.
Knows nothing of what is logged. Never raises into the code that logs and never waits for whoever reads: a closed or a
stuck stderr loses lines, not connections.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable, Hashable
from typing import Any, Final, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

__all__ = ["RateLimit", "RateLimited", "configure", "escape_controls", "get", "redact", "redact_text"]

LIMIT_INTERVAL_S: Final = 1.0
MAX_LIMITED_KEYS: Final = 1_024
MAX_TEXT_CHARACTERS: Final = 8_192  # of one value; of a traceback, its end
MAX_DEPTH: Final = 6

HIDDEN: Final = "[hidden]"
_SECRET_KEYS = frozenset(["api_tokens", "authorization", "cookie", "jwt", "signing_key"])
_SECRET_ENDINGS = ("password", "secret", "token")
_URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/'\"]+(?=@)")
_URL_SECRET = re.compile(r"(?i)(?<=[?&])(\w*(?:password|secret|token))=[^\s&'\"]+")
_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*){0,2}")
_BEARER = re.compile(r"(?i)\bbearer\s+[^\s'\",]+")
# C0 and C1, and what ends a line or turns its direction in Unicode's view.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


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
    """Every line of a library is limited, by its place in the code: what makes it log is out of our hands."""

    def __init__(self, limit: RateLimit) -> None:
        super().__init__()
        self._limit = limit

    def filter(self, record: logging.LogRecord) -> bool:
        # Not by its text: that may hold a task's name or an address and be another one each time.
        kind = record.exc_info[0] if record.exc_info else None
        suppressed = self._limit.admit((record.name, record.levelno, record.lineno, kind))
        if suppressed:
            record.suppressed = suppressed
        return suppressed is not None


class _Lines:
    """Writes finished lines to a stream. A reader that has gone, or does not keep up, loses them; they are counted."""

    def __init__(self, stream: TextIO, lost_line: Callable[[int], str]) -> None:
        self._stream = stream
        self._lost_line = lost_line
        self._lost = 0
        self._torn = False  # the last line could not be finished
        self._poll: select.poll | None = None
        try:
            self._fd = stream.fileno()
        except (OSError, ValueError):  # not a file: it takes everything at once
            return
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def msg(self, line: str) -> None:
        text = f"{self._lost_line(self._lost)}\n{line}\n" if self._lost else f"{line}\n"
        try:
            written = self._write(text)
        except (OSError, ValueError):  # closed: nobody is left to tell
            written = False
        self._lost = 0 if written else self._lost + 1

    def _write(self, text: str) -> bool:
        if self._poll is None:
            self._stream.write(text)
            self._stream.flush()
            return True
        data = (b"\n" if self._torn else b"") + text.encode(errors="backslashreplace")
        for start in range(0, len(data), select.PIPE_BUF):
            # Where poll finds room, that many bytes fit: the write does not wait.
            if not self._poll.poll(0):
                self._torn = self._torn or start > 0
                return False
            os.write(self._fd, data[start : start + select.PIPE_BUF])
        self._torn = False
        return True

    debug = info = warning = error = critical = exception = msg


class _LibraryHandler(logging.Handler):
    """Writes the lines of libraries; what cannot be formatted says so, without its arguments."""

    def __init__(self, lines: _Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:
            record.msg, record.args, record.exc_info = f"cannot be logged: {type(error).__name__}", None, None
            line = self.format(record)
        self._lines.msg(line)


def redact(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    """Hides secrets: by their keys, and credentials in URLs, tokens and Bearer values inside texts."""
    return {key: HIDDEN if _is_secret(key) else _redact_value(value, key=key) for key, value in event_dict.items()}


def _is_secret(key: object) -> bool:
    name = str(key).lower()
    return name in _SECRET_KEYS or name.endswith(_SECRET_ENDINGS)


def _redact_value(value: Any, depth: int = 0, key: str = "") -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth < MAX_DEPTH and isinstance(value, dict):
        return {str(k): HIDDEN if _is_secret(k) else _redact_value(v, depth + 1) for k, v in value.items()}
    if depth < MAX_DEPTH and isinstance(value, list | tuple | set | frozenset):
        return [_redact_value(item, depth + 1) for item in value]
    text = _text_of(value)
    if len(text) > MAX_TEXT_CHARACTERS:
        text = f"…{text[-MAX_TEXT_CHARACTERS:]}" if key == "exception" else f"{text[:MAX_TEXT_CHARACTERS]}…"
    return redact_text(text)


def _text_of(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__} without a text: {type(error).__name__}>"


def redact_text(text: str) -> str:
    """Returns the text without credentials in URLs, tokens and Bearer values."""
    text = _URL_SECRET.sub(rf"\1={HIDDEN}", text)
    for pattern in (_URL_CREDENTIALS, _TOKEN, _BEARER):
        text = pattern.sub(HIDDEN, text)
    return text


def escape_controls(text: str) -> str:
    """Returns the text as one line that cannot drive a terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _escape(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    """Keeps text from outside from forging lines or driving the terminal."""
    for key, value in event_dict.items():
        if isinstance(value, str):
            # A traceback keeps its lines; indented, none of them can pass for one of ours.
            lines = value.split("\n") if key == "exception" else [value]
            event_dict[key] = "\n    ".join(map(escape_controls, lines))
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
    terminal = not target.closed and target.isatty()
    as_json = fmt == "json" or (fmt == "auto" and not terminal)
    renderer: Processor = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=terminal, pad_event_to=24, exception_formatter=structlog.dev.plain_traceback
        )
    )
    stamp: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    escape: list[Processor] = [] if as_json else [_escape]
    finish: list[Processor] = [structlog.processors.format_exc_info, redact, *escape, renderer]
    least = logging.getLevelNamesMapping()[level.upper()]
    lines = _Lines(target, _lost_in_json if as_json else _lost_in_words)
    structlog.configure(
        processors=[RateLimited(RateLimit(clock)), *stamp, *finish],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=False,
    )
    handler = _LibraryHandler(lines)
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


def _lost_in_json(count: int) -> str:
    return json.dumps({"event": "log_lines_lost", "count": count, "level": "warning"})


def _lost_in_words(count: int) -> str:
    return f"log_lines_lost count={count}"
