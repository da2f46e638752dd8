"""The agents' JSON dialect: requests parsed, replies encoded, agent.enter and agent.leave too.

Owns: the shape of every message on the wire and what counts as malformed. Pure functions from bytes to values and back.
Knows nothing of frames, sockets, sessions, tokens' contents or time. A second dialect is a second file like this one.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NoReturn
from uuid import UUID

import orjson

from presence.errors import SessionError
from presence.reasons import SERIALIZATION_FAILED, UNSUPPORTED_REQUEST, Reason

__all__ = [
    "ConnectRequest",
    "Refresh",
    "encode_agent_enter",
    "encode_agent_leave",
    "encode_error",
    "encode_event",
    "encode_gap",
    "encode_success",
    "is_json",
    "parse_request",
    "parse_uuid",
]

# No dot: it separates the label from the rest of the agent's identity.
AGENT_LABEL: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
CANONICAL_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """An agent asks to enter a classroom."""

    token: str
    classroom_id: UUID
    agent_label: str


@dataclass(frozen=True, slots=True)
class Refresh:
    """A connected agent renews its token."""

    token: str


def parse_request(data: bytes) -> ConnectRequest | Refresh:
    """The request in one text message; fields that are not known are ignored, of a repeated one the last counts.

    Raises SessionError: SERIALIZATION_FAILED when it is malformed, UNSUPPORTED_REQUEST when its `type` is not known.
    The caller bounds the length; the cost is linear in it.
    """
    try:
        message = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise SessionError(SERIALIZATION_FAILED, "The message is not JSON") from None
    if not isinstance(message, dict):
        raise SessionError(SERIALIZATION_FAILED, "The message is not a JSON object")
    request_type = message.get("type")
    if request_type == "connect_request":
        return _parse_connect_request(_payload_of(message))
    if request_type == "refresh":
        return Refresh(_text(_payload_of(message), "token"))
    if isinstance(request_type, str):
        raise SessionError(UNSUPPORTED_REQUEST)
    raise SessionError(SERIALIZATION_FAILED, "type must be a string")


def _parse_connect_request(payload: dict[str, Any]) -> ConnectRequest:
    token = _text(payload, "token")
    classroom_id = parse_uuid(payload.get("classroom_id"))
    if classroom_id is None:
        raise SessionError(SERIALIZATION_FAILED, "classroom_id must be a UUID")
    agent_label = _text(payload, "agent_label")
    if AGENT_LABEL.fullmatch(agent_label) is None:
        raise SessionError(SERIALIZATION_FAILED, "agent_label must be 1 to 64 letters, digits, _ or -")
    return ConnectRequest(token, classroom_id, agent_label)


def _payload_of(message: dict[str, Any]) -> dict[str, Any]:
    payload = message.get("payload")
    if not isinstance(payload, dict):
        raise SessionError(SERIALIZATION_FAILED, "payload must be an object")
    return payload


def _text(payload: dict[str, Any], field: str) -> str:
    value = payload.get(field)
    if not isinstance(value, str):
        raise SessionError(SERIALIZATION_FAILED, f"{field} must be a string")
    return value


def parse_uuid(value: object) -> UUID | None:
    """The UUID of a text in the canonical form (8-4-4-4-12, any case), None for everything else."""
    if not isinstance(value, str) or CANONICAL_UUID.fullmatch(value) is None:
        return None
    return UUID(value)


def encode_success(session_id: int, agent_id: str, ping_interval_ms: int, pong_timeout_ms: int) -> bytes:
    """The answer to a connect_request that went through."""
    payload = {
        "session_id": session_id,
        "agent_id": agent_id,
        "ping_interval_ms": ping_interval_ms,
        "pong_timeout_ms": pong_timeout_ms,
    }
    return orjson.dumps({"type": "connect_success", "payload": payload})


def encode_event(event_id: str, subject: str, payload: bytes) -> bytes:
    """One classroom event; `payload` must be JSON (see `is_json`) and goes out byte for byte as it was published."""
    return b'{"type":"event","id":%b,"subject":%b,"payload":%b}' % (_json_text(event_id), _json_text(subject), payload)


def encode_gap(missed: int | None) -> bytes:
    """Events were lost on the way: this many, or an unknown number."""
    return orjson.dumps({"type": "gap", "payload": {"missed": missed}})


def encode_error(reason: Reason, title: str | None, reconnect_after_ms: int) -> bytes:
    """The message before a close frame; without a title the reason's own is used."""
    payload = {
        "type": reason.type,
        "title": reason.title if title is None else title,
        "status": reason.status,
        "reconnect": reason.reconnect,
        "reconnect_after_ms": reconnect_after_ms,
    }
    error_type = "recoverable_session_error" if reason.reconnect else "unrecoverable_session_error"
    return orjson.dumps({"type": error_type, "payload": payload})


def encode_agent_enter(agent_id: str, session_id: int, at: datetime) -> bytes:
    """What the classroom is told when an agent has entered."""
    return _encode_agent_event("agent.enter", agent_id, session_id, at)


def encode_agent_leave(agent_id: str, session_id: int, at: datetime) -> bytes:
    """What the classroom is told when an agent has left."""
    return _encode_agent_event("agent.leave", agent_id, session_id, at)


def _encode_agent_event(event_type: str, agent_id: str, session_id: int, at: datetime) -> bytes:
    event = {"type": event_type, "agent_id": agent_id, "session_id": session_id, "at": at}
    return orjson.dumps(event, option=orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z)


def _json_text(text: str) -> bytes:
    try:
        return orjson.dumps(text)
    except orjson.JSONEncodeError:
        # A header that was not UTF-8 decodes to lone surrogates: show them as "?", lose no event for them.
        return orjson.dumps(text.encode("utf-8", "replace").decode())


def is_json(payload: bytes) -> bool:
    """Whether a publisher's payload is one JSON text (RFC 8259) in UTF-8, nested no deeper than about 1,000."""
    try:
        orjson.loads(payload)
    except orjson.JSONDecodeError:
        return _is_json_beyond_orjson(payload)
    return True


def _is_json_beyond_orjson(payload: bytes) -> bool:
    """orjson wants values that Python can hold: 1e400 and a lone \\ud800 are JSON all the same."""
    try:
        json.loads(payload.decode(), parse_float=_ignore, parse_int=_ignore, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _ignore(_number: str) -> None:
    return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
