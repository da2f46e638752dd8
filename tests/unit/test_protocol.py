"""The agents' JSON dialect."""

import json
import uuid
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from presence import protocol, reasons
from presence.errors import SessionError
from presence.protocol import ConnectRequest, Refresh, parse_request
from presence.reasons import SERIALIZATION_FAILED, UNSUPPORTED_REQUEST, Reason

# Other work on the machine must not fail a test.
no_deadline = settings(deadline=None)

CLASSROOM = uuid.UUID("0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10")


def connect_request(**changes: Any) -> dict[str, Any]:
    payload = {"token": "a.b.c", "classroom_id": str(CLASSROOM), "agent_label": "web"} | changes
    return {"type": "connect_request", "payload": {k: v for k, v in payload.items() if v is not ...}}


def refusal(data: bytes) -> SessionError:
    with pytest.raises(SessionError) as caught:
        parse_request(data)
    return caught.value


# --- requests


def test_a_connect_request_is_parsed() -> None:
    assert parse_request(json.dumps(connect_request()).encode()) == ConnectRequest("a.b.c", CLASSROOM, "web")


def test_a_refresh_is_parsed() -> None:
    assert parse_request(b'{"type":"refresh","payload":{"token":"a.b.c"}}') == Refresh("a.b.c")


def test_extra_fields_are_ignored_and_the_last_of_a_repeated_one_counts() -> None:
    data = b'{"type":"nope","v":2,"type":"refresh","payload":{"token":1,"token":"t","extra":[{}]},"more":null}'
    assert parse_request(data) == Refresh("t")


@pytest.mark.parametrize("label", ["w", "Web-App_2", "x" * 64, "-", "_"])
def test_good_labels(label: str) -> None:
    request = parse_request(json.dumps(connect_request(agent_label=label)).encode())
    assert isinstance(request, ConnectRequest)
    assert request.agent_label == label


@pytest.mark.parametrize(
    "label", ["", "x" * 65, "a.b", "a b", "web\n", "\nweb", "wéb", "web*", "web>", "a/b", "\u0660", "web\0"]
)
def test_bad_labels(label: str) -> None:
    assert refusal(json.dumps(connect_request(agent_label=label)).encode()).reason is SERIALIZATION_FAILED


def test_a_uuid_of_any_case_is_the_same_uuid() -> None:
    for text in (str(CLASSROOM).upper(), "0192F0c1-7A3e-7c55-B5a1-3d0f4b1f9a10"):
        request = parse_request(json.dumps(connect_request(classroom_id=text)).encode())
        assert isinstance(request, ConnectRequest)
        assert request.classroom_id == CLASSROOM


@pytest.mark.parametrize(
    "text",
    [
        "",
        CLASSROOM.hex,
        "{" + str(CLASSROOM) + "}",
        f"urn:uuid:{CLASSROOM}",
        f"{CLASSROOM}\n",
        f" {CLASSROOM}",
        str(CLASSROOM)[:-1],
        str(CLASSROOM) + "0",
        str(CLASSROOM).replace("0192", "zzzz"),
        str(CLASSROOM).replace("0192", "٠192"),
        str(CLASSROOM).replace("-", "_"),
    ],
)
def test_a_uuid_has_one_form(text: str) -> None:
    assert refusal(json.dumps(connect_request(classroom_id=text)).encode()).reason is SERIALIZATION_FAILED
    assert protocol.parse_uuid(text) is None


@pytest.mark.parametrize("field", ["token", "classroom_id", "agent_label"])
@pytest.mark.parametrize("value", [..., None, 1, 1.5, True, [], ["web"], {}], ids=repr)
def test_fields_that_are_missing_or_no_strings(field: str, value: object) -> None:
    error = refusal(json.dumps(connect_request(**{field: value})).encode())
    assert error.reason is SERIALIZATION_FAILED
    assert field in error.title


@pytest.mark.parametrize("request_type", ["connect_request", "refresh"])
@pytest.mark.parametrize("payload", ["", b',"payload":null', b',"payload":[]', b',"payload":"x"', b',"payload":1'])
def test_a_payload_that_is_missing_or_no_object(request_type: str, payload: bytes | str) -> None:
    rest = payload.encode() if isinstance(payload, str) else payload
    assert refusal(b'{"type":"%b"%b}' % (request_type.encode(), rest)).reason is SERIALIZATION_FAILED


@pytest.mark.parametrize("token", [b"null", b"7", b'["a"]', b"{}"])
def test_a_refresh_needs_a_token(token: bytes) -> None:
    assert refusal(b'{"type":"refresh","payload":{"token":%b}}' % token).reason is SERIALIZATION_FAILED
    assert refusal(b'{"type":"refresh","payload":{}}').reason is SERIALIZATION_FAILED


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"hello",
        b"{",
        b'{"type":"refresh"',
        b"{'type':'refresh'}",
        b'{"type":"refresh","payload":{"token":"a"}}x',
        b'\xef\xbb\xbf{"type":"refresh","payload":{"token":"a"}}',
        b'{"type":"refresh","payload":{"token":"\xff\xfe"}}',
        b'{"type":"refresh","payload":{"token":"\xed\xa0\x80"}}',
        b'{"type":"refresh","payload":{"token":"\\ud800"}}',
        b'{"type":"refresh","payload":{"token":NaN}}',
        b"\x00\x01\x02",
        b"null",
        b"1",
        b'"connect_request"',
        b"[]",
        b'[{"type":"connect_request"}]',
        b"{}",
        b'{"payload":{}}',
        b'{"type":null}',
        b'{"type":1}',
        b'{"type":["connect_request"]}',
        b'{"type":{}}',
        b"[" * 60_000,
        b"[" * 30_000 + b"]" * 30_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"type":"refresh","payload":' + b'{"a":' * 2_000 + b"1" + b"}" * 2_001,
    ],
    ids=lambda data: repr(data[:50]),
)
def test_what_is_malformed(data: bytes) -> None:
    assert refusal(data).reason is SERIALIZATION_FAILED


@pytest.mark.parametrize("request_type", ["", "connect", "Connect_Request", "connect_request ", "event", "ping", "é"])
def test_requests_that_are_not_known(request_type: str) -> None:
    for message in ({"type": request_type}, {"type": request_type, "payload": 7}):
        assert refusal(json.dumps(message).encode()).reason is UNSUPPORTED_REQUEST


def test_no_refusal_repeats_what_came() -> None:
    for changes in ({"token": 12345}, {"classroom_id": "SECRET"}, {"agent_label": "SE CRET"}):
        assert "SECRET" not in refusal(json.dumps(connect_request(**changes)).encode()).title.replace(" ", "")
    assert "SECRET" not in refusal(b'{"type":"SECRET"}').title


def parses_or_refuses(data: bytes) -> None:
    outcome: Reason | type
    try:
        outcome = type(parse_request(data))
    except SessionError as error:
        outcome = error.reason
    assert outcome in (ConnectRequest, Refresh, SERIALIZATION_FAILED, UNSUPPORTED_REQUEST)


@no_deadline
@given(st.binary(max_size=300))
@example(b"\xff")
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    parses_or_refuses(data)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner))
near_requests = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["connect_request", "refresh"]) | values,
        "payload": values
        | st.fixed_dictionaries(
            {},
            optional={
                "token": values,
                "classroom_id": values | st.uuids().map(str),
                "agent_label": values | st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
            },
        ),
    },
)


@no_deadline
@given(values | near_requests, st.booleans())
def test_no_json_raises_anything_else(message: object, ascii_only: bool) -> None:
    parses_or_refuses(json.dumps(message, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))


@no_deadline
@given(st.text(st.characters(codec="utf-8")), st.uuids(), st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_every_good_request_comes_through(token: str, classroom_id: uuid.UUID, label: str) -> None:
    message = connect_request(token=token, classroom_id=str(classroom_id), agent_label=label)
    assert parse_request(json.dumps(message).encode()) == ConnectRequest(token, classroom_id, label)


# --- replies


def test_success() -> None:
    reply = protocol.encode_success(2**62, "web.alice.example", 30_000, 5_000)
    payload = {
        "session_id": 2**62,
        "agent_id": "web.alice.example",
        "ping_interval_ms": 30_000,
        "pong_timeout_ms": 5_000,
    }
    assert json.loads(reply) == {"type": "connect_success", "payload": payload}


@pytest.mark.parametrize("missed", [0, 17, None])
def test_gap(missed: int | None) -> None:
    assert json.loads(protocol.encode_gap(missed)) == {"type": "gap", "payload": {"missed": missed}}


@pytest.mark.parametrize("reason", reasons.BY_TYPE.values(), ids=lambda reason: reason.type)
def test_errors(reason: Reason) -> None:
    message = json.loads(protocol.encode_error(reason, None, 1_250))
    assert message["type"] == f"{'recoverable' if reason.reconnect else 'unrecoverable'}_session_error"
    assert message["payload"] == {
        "type": reason.type,
        "title": reason.title,
        "status": reason.status,
        "reconnect": reason.reconnect,
        "reconnect_after_ms": 1_250,
    }


def test_an_error_may_have_its_own_title() -> None:
    assert json.loads(protocol.encode_error(reasons.CLOSED, "Why “not”?\n", 0))["payload"]["title"] == "Why “not”?\n"


@pytest.mark.parametrize(
    "payload",
    [
        b'{"a":1}',
        b' {\t"a" :\r\n 1 , "b":[ ] } \n',
        b"123456789012345678901234567890.50e+10",
        b"-0.0",
        b"1e400",
        b'{"a":1,"a":2,"a":3}',
        '"ünïcödé 😀"'.encode(),
        b'"\\u00fc\\ud83d\\ude00\\/"',
        b'"\\ud800"',
        b"null",
        b"[]",
        b'"}"',
    ],
)
def test_an_events_payload_is_not_touched(payload: bytes) -> None:
    assert protocol.is_json(payload)
    event = protocol.encode_event("id-1", "classrooms.x.chat", payload)
    assert event == b'{"type":"event","id":"id-1","subject":"classrooms.x.chat","payload":' + payload + b"}"
    assert json.loads(event)["payload"] == json.loads(payload)


@no_deadline
@given(st.text(), st.text(), values)
def test_events_are_json_whatever_their_names_are(event_id: str, subject: str, payload: object) -> None:
    event = json.loads(protocol.encode_event(event_id, subject, json.dumps(payload).encode()))
    assert event["payload"] == payload
    assert event["id"] == event_id.encode("utf-8", "replace").decode()
    assert event["subject"] == subject.encode("utf-8", "replace").decode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b" ",
        b"hello",
        b"{",
        b'{"a":1}}',
        b'{"a":1} {"b":2}',
        b"{'a':1}",
        b"NaN",
        b"-Infinity",
        b'{"a":Infinity}',
        b"01",
        b"1.",
        b"+1",
        b"tru",
        b'"\n"',
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b'{"a":1,}',
        b'"\\x"',
        b"1e400}",
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
    ],
    ids=lambda payload: repr(payload[:30]),
)
def test_what_is_not_json(payload: bytes) -> None:
    assert not protocol.is_json(payload)


@no_deadline
@given(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
def test_is_json_never_raises_and_agrees_with_the_standard_library(payload: bytes) -> None:
    try:
        json.loads(payload.decode(), parse_constant=lambda _: 1 / 0)
        expected = True
    except (ValueError, ZeroDivisionError):
        expected = False
    assert protocol.is_json(payload) is expected


def test_agents_entering_and_leaving() -> None:
    at = datetime(2026, 1, 31, 10, 30, 0, 123456, tzinfo=timezone(timedelta(hours=1)))
    expected = {"type": "agent.enter", "agent_id": "web.alice.example", "session_id": 4711}
    enter = json.loads(protocol.encode_agent_enter("web.alice.example", 4711, at))
    assert enter == expected | {"at": "2026-01-31T10:30:00.123456+01:00"}
    leave = json.loads(protocol.encode_agent_leave("web.alice.example", 4711, at.astimezone(UTC)))
    assert leave == expected | {"type": "agent.leave", "at": "2026-01-31T09:30:00.123456Z"}
