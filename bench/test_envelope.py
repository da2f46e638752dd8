"""From a publisher's event to the frame that goes to all members: payloads of 16 B, 190 B and 4 KB of JSON.

`presence` is what the gateway does: it checks that the payload is JSON and puts its bytes into the envelope as they are. Beside
it, the envelope built as objects: parsed and written again by orjson and by the standard library.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from conftest import Loop, Report
from presence.protocol import encode_event, is_json
from presence_core.frames import OPCODE_TEXT, encode_frame

SIZES = [16, 190, 4096]
EVENT_ID = "0192f0c1-1"
SUBJECT = "classrooms.0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10.chat"
COUNT = 2_000

FrameOf = Callable[[bytes], bytes]


def payload_of(size: int) -> bytes:
    """A chat message; the longer ones are lists of them."""
    message = {"from": "alice", "text": "Does anyone have the answer to the third question?", "at": 1732444800}
    if size < 100:
        return b'{"hand":"raised"}'[:size] if size >= 17 else b'{"hand":1}'.ljust(size)
    count = max(1, size // len(orjson.dumps(message)))
    return orjson.dumps([message] * count).ljust(size)


def by_presence(payload: bytes) -> bytes:
    assert is_json(payload)
    return encode_frame(OPCODE_TEXT, encode_event(EVENT_ID, SUBJECT, payload))


def envelope(payload: Any) -> dict[str, Any]:
    return {"type": "event", "id": EVENT_ID, "subject": SUBJECT, "payload": payload}


def by_orjson(payload: bytes) -> bytes:
    return encode_frame(OPCODE_TEXT, orjson.dumps(envelope(orjson.loads(payload))))


def by_json(payload: bytes) -> bytes:
    return encode_frame(OPCODE_TEXT, json.dumps(envelope(json.loads(payload)), separators=(",", ":")).encode())


BY: dict[str, FrameOf] = {"presence": by_presence, "orjson": by_orjson, "json": by_json}


def events(frame_of: FrameOf, payload: bytes) -> Loop:
    def loop() -> float:
        begun_ns = time.perf_counter_ns()
        for _ in range(COUNT):
            frame_of(payload)
        return (time.perf_counter_ns() - begun_ns) / COUNT

    return loop


@pytest.mark.benchmark(group="envelope")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who", BY)
def test_envelope(ns_each: Report, who: str, size: int) -> None:
    payload = payload_of(size)
    header = b'{"type":"event","id":"0192f0c1-1","subject":'
    assert BY[who](payload).find(header) in {2, 4}
    ns_each(events(BY[who], payload))
