"""The logs: their form, the limit on what the outside can cause, what they hide, and what a reader cannot do to them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from presence import log
from presence.log import MAX_LIMITED_KEYS, MAX_TEXT_CHARACTERS, RateLimit, configure, get

TOKEN = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 5_000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def own_configuration() -> Iterator[None]:
    """What `configure` changes is the whole process's: put it back."""
    root = logging.getLogger()
    handlers, level, configuration = root.handlers, root.level, structlog.get_config()
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.configure(**configuration)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def logged(**values: Any) -> dict[str, Any]:
    """One event as a line of JSON."""
    stream = io.StringIO()
    configure(stream=stream)
    get("test").info("happened", **values)
    (line,) = lines(stream)
    return line


# --- form


def test_json_where_it_is_not_a_terminal() -> None:
    line = logged(agents=3, healthy=True, where=None, items=("a", 1))
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "happened",
        "level": "info",
        "component": "test",
        "agents": 3,
        "healthy": True,
        "where": None,
        "items": ["a", 1],
    }


def test_words_on_a_terminal() -> None:
    stream = Terminal()
    configure(stream=stream)
    get("test").info("happened", agents=3)
    assert "happened" in stream.getvalue()
    with pytest.raises(ValueError):
        json.loads(stream.getvalue())


@pytest.mark.parametrize(("fmt", "stream"), [("json", Terminal()), ("console", io.StringIO())])
def test_the_form_can_be_chosen(fmt: Any, stream: io.StringIO) -> None:
    configure(fmt=fmt, stream=stream)
    get("test").info("happened")
    assert stream.getvalue().startswith("{") is (fmt == "json")


def test_the_level() -> None:
    stream = io.StringIO()
    configure("warning", stream=stream)
    get("test").info("no")
    get("test").warning("yes")
    logging.getLogger("library").info("no")
    logging.getLogger("library").warning("yes")
    assert [line["event"] for line in lines(stream)] == ["yes", "yes"]


def test_libraries_log_in_the_same_form() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    logging.getLogger("some.library").warning("%s of %d", "one", 2)
    (line,) = lines(stream)
    assert (line["component"], line["level"], line["event"]) == ("some.library", "warning", "one of 2")


def test_a_traceback_is_part_of_its_line() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    try:
        raise ValueError(f"no {TOKEN}")
    except ValueError as error:
        get("test").error("failed", exc_info=error)
        logging.getLogger("library").exception("failed")
    for line in lines(stream):
        assert line["exception"].startswith("Traceback")
        assert line["exception"].endswith("ValueError: no [hidden]")


# --- limit


def test_one_limited_line_a_second_and_what_was_held_back() -> None:
    stream, clock = io.StringIO(), Clock()
    configure(stream=stream, clock=clock)
    logger = get("test")
    for _ in range(5):
        logger.warning("refused", limited=True)
    logger.warning("other", limited=True)
    clock.now += 0.999
    logger.warning("refused", limited=True)
    clock.now += 0.001
    logger.warning("refused", limited=True)
    clock.now += 1
    logger.warning("refused", limited=True)
    got = [(line["event"], line.get("suppressed")) for line in lines(stream)]
    assert got == [("refused", None), ("other", None), ("refused", 5), ("refused", None)]
    assert "limited" not in stream.getvalue()


def test_a_line_that_is_not_limited_always_passes() -> None:
    stream = io.StringIO()
    configure(stream=stream, clock=Clock())
    for _ in range(20):
        get("test").info("happened")
    assert len(lines(stream)) == 20


def test_a_library_is_limited_by_place_whatever_its_words() -> None:
    stream, clock = io.StringIO(), Clock()
    configure(stream=stream, clock=clock)
    library = logging.getLogger("library")
    for number in range(1_000):
        library.warning(f"Task-{number} failed")
        if number == 998:
            clock.now += 1
    got = [(line["event"], line.get("suppressed")) for line in lines(stream)]
    assert got == [("Task-0 failed", None), ("Task-999 failed", 998)]


def test_different_faults_at_one_place_of_a_library_are_all_told() -> None:
    stream = io.StringIO()
    configure(stream=stream, clock=Clock())
    for error in (ValueError("a"), KeyError("b"), ValueError("c")):
        logging.getLogger("library").error("failed", exc_info=error)
    assert [line["exception"] for line in lines(stream)] == ["ValueError: a", "KeyError: 'b'"]


def test_the_memory_of_the_limit_is_bounded() -> None:
    limit = RateLimit(Clock())
    for number in range(3 * MAX_LIMITED_KEYS):
        assert limit.admit(number) == 0
    assert len(limit._seen) == MAX_LIMITED_KEYS
    assert limit.admit(3 * MAX_LIMITED_KEYS - 1) is None


def test_a_line_is_bounded() -> None:
    line = logged(text="x" * 10**6, items=["y" * 10**6])
    assert line["text"] == "x" * MAX_TEXT_CHARACTERS + "…"
    assert len(json.dumps(line)) < 3 * MAX_TEXT_CHARACTERS


# --- secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {TOKEN} refused", "token [hidden] refused"),
        (f"x_{TOKEN}", "x_[hidden]"),
        (f"/ws?token={TOKEN}&a=1", "/ws?token=[hidden]&a=1"),
        ("eyJhbGciOiJFUzI1NiJ9", "[hidden]"),
        ("eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOi", "[hidden]"),
        ("Authorization: Bearer s3cret", "Authorization: [hidden]"),
        ("authorization: bearer   s3cret, next", "authorization: [hidden], next"),
        ("nats://user:s3cret@host:4222", "nats://[hidden]@host:4222"),
        ("nats://s3cret@host", "nats://[hidden]@host"),
        ("nats://a:s3cret@one,nats://b:s3cret@two", "nats://[hidden]@one,nats://[hidden]@two"),
        ("postgresql://user:s3cr@et@host/x", "postgresql://[hidden]@host/x"),
        ("postgresql://host/x?user=a&password=s3cret&b=1", "postgresql://host/x?user=a&password=[hidden]&b=1"),
        ("https://host/x?access_token=s3cret", "https://host/x?access_token=[hidden]"),
        ("https://host/@name", "https://host/@name"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_secrets_in_a_text_are_hidden(text: str, shown: str) -> None:
    line = logged(text=text, items=[text], inside={"a": {"b": text}}, data=text.encode(), error=ValueError(text))
    assert line["text"] == line["data"] == line["error"] == shown
    assert line["items"] == [shown]
    assert line["inside"] == {"a": {"b": shown}}


@pytest.mark.parametrize(
    "key",
    ["token", "Token", "api_token", "api_tokens", "Authorization", "password", "PGPASSWORD", "client_secret", "Cookie"],
)
def test_secrets_are_hidden_by_their_key(key: str) -> None:
    line = logged(**{key: "s3cret"}, inside={key: ["s3cret"]})
    assert line[key] == line["inside"][key] == "[hidden]"


def test_secrets_of_libraries_are_hidden() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    logging.getLogger("library").warning("connecting to %s", "nats://user:s3cret@host")
    assert lines(stream)[0]["event"] == "connecting to nats://[hidden]@host"


# --- text from outside

FORGED = 'bob\r\n{"event":"forged"}\x1b[2J\x9b1m\u2028\u202e'


def test_controls_forge_no_line_of_json() -> None:
    assert logged(agent=FORGED)["agent"] == FORGED  # escaped by JSON itself: one line
    stream = io.StringIO()
    configure(stream=stream)
    get("test").info(FORGED)
    logging.getLogger("library").warning(FORGED)
    assert [line["event"] for line in lines(stream)] == [FORGED, FORGED]
    assert all(character.isprintable() or character == "\n" for character in stream.getvalue())


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["no terminal", "terminal"])
def test_controls_forge_no_line_of_words(stream: io.StringIO) -> None:
    configure(fmt="console", stream=stream)
    get("test").info(FORGED, agent=FORGED, inside={"a": FORGED})
    logging.getLogger("library").warning(FORGED)
    text = stream.getvalue()
    assert len(text.splitlines()) == 2
    assert not set(text) & set("\r\x9b\u2028\u202e")
    assert "\x1b[2J" not in text


def test_a_traceback_on_a_terminal_keeps_its_lines_and_forges_none() -> None:
    stream = Terminal()
    configure(stream=stream)
    try:
        raise ValueError("bad\n2026-01-01 [info] forged\x1b[2J")
    except ValueError as error:
        get("test").error("failed", exc_info=error)
    first, *rest = stream.getvalue().splitlines()
    assert "failed" in first
    assert len(rest) > 3
    assert rest[-1] == "    2026-01-01 [info] forged\\x1b[2J"


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError


def test_what_cannot_be_shown_does_not_reach_the_code_that_logs() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    line = logged(value=Unspeakable(), endless=endless, surrogate="\ud800", keys={1: "a", b"x": "b"})
    assert line["value"] == "<Unspeakable without a text: RuntimeError>"
    assert line["surrogate"] == "\ud800"
    assert line["keys"]["1"] == "a"


def test_a_library_line_with_wrong_arguments_is_one_line_without_them() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    logging.getLogger("library").warning("%d", "s3cret")
    (line,) = lines(stream)
    assert line["event"] == "cannot be logged: TypeError"


# --- a reader that is not there


def test_a_closed_stream_loses_lines_and_nothing_else() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    stream.close()
    get("test").info("happened")
    logging.getLogger("library").warning("happened")
    configure(stream=stream)
    get("test").info("happened")


@contextlib.contextmanager
def piped() -> Iterator[tuple[io.TextIOWrapper, int]]:
    """A stream into a pipe, and the descriptor of its reader."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        try:
            yield stream, reader
        finally:
            with contextlib.suppress(OSError):
                os.close(reader)


def read_all(reader: int) -> str:
    data = b""
    while select.select([reader], [], [], 0)[0]:
        data += os.read(reader, 1 << 20)
    return data.decode()


def test_a_reader_that_has_gone_loses_lines_and_nothing_else() -> None:
    with piped() as (stream, reader):
        configure(stream=stream)
        os.close(reader)
        get("test").info("happened")
        logging.getLogger("library").warning("happened")


@pytest.mark.parametrize("size", [100, 6_000])
def test_a_reader_that_does_not_keep_up_is_not_waited_for(size: int) -> None:
    """If it were, this test would not end: nobody reads while the pipe is being filled many times over."""
    with piped() as (stream, reader):
        configure(stream=stream)
        logger = get("test")
        for number in range(2_000):
            logger.info("happened", number=number, text="x" * size)
        told = read_all(reader).splitlines()
        numbers = [json.loads(line)["number"] for line in told if line.endswith("}")]
        assert numbers == list(range(len(numbers)))
        assert 0 < len(numbers) < 2_000
        # Afterwards it is told how many are missing, and goes on.
        logger.info("happened", number=2_000)
        rest = [json.loads(line) for line in read_all(reader).splitlines() if line]
        assert [line["event"] for line in rest] == ["log_lines_lost", "happened"]
        assert rest[0]["count"] == 2_000 - len(numbers)
        assert rest[1]["number"] == 2_000
        logger.info("happened", number=2_001)
        assert json.loads(read_all(reader))["number"] == 2_001


def test_lost_lines_are_told_in_words_where_the_others_are() -> None:
    with piped() as (stream, reader):
        configure(fmt="console", stream=stream)
        for _ in range(2_000):
            get("test").info("happened", text="x" * 100)
        read_all(reader)
        get("test").info("happened")
        assert read_all(reader).lstrip("\n").startswith("log_lines_lost count=")


def test_a_long_line_goes_through_a_pipe_whole() -> None:
    with piped() as (stream, reader):
        configure(stream=stream)
        get("test").info("happened", text="x" * 8_000, more="y" * 8_000)
        assert len(json.loads(read_all(reader))["more"]) == 8_000


def test_the_public_functions() -> None:
    assert log.escape_controls("a\nb\x1b\u202e") == "a\\nb\\x1b\\u202e"
    assert log.redact_text("ok") == "ok"
