"""Bad input over real sockets against the whole gateway: the right message, the right close code, nobody else disturbed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from raw import Raw, dialled, frame
from running import Agent, Overheard, Running, Signer, running_gateway
from websockets.frames import Opcode

from presence import reasons
from presence.reasons import Reason
from waiting import SCALE, eventually, within

CONNECTED = [("agent.enter", "web.bystander.presence")]


class Classroom:
    """A gateway and, in the classroom that the others attack, an agent that must not notice."""

    def __init__(self, gateway: Running, overheard: Overheard, bystander: Agent, session_id: int) -> None:
        self.gateway = gateway
        self.overheard = overheard
        self.bystander = bystander
        self.session_id = session_id
        self.events = 0

    async def is_undisturbed(self) -> None:
        """Only the bystander is left: in the hub, in the database, and for all that the classroom was told."""
        await eventually(lambda: len(self.gateway.app.hub) == 1 and not len(self.gateway.app.steps))
        self.events += 1
        await self.gateway.publish("chat", self.events)
        assert (await self.bystander.hear())["payload"] == self.events
        assert [row["id"] for row in await self.gateway.rows()] == [self.session_id]
        assert await self.gateway.history() == []
        assert self.overheard.events() == CONNECTED

    async def refuses(self, what: object, data: bytes, reason: Reason) -> None:
        """A new connection that sends this is told the reason and closed for it."""
        async with dialled(self.gateway.app.gateway.port) as (client,):
            await (await client.upgrade()).send(data)
            await self.hears_the_end(what, client, reason)
        await self.is_undisturbed()

    async def hears_the_end(self, what: object, client: Raw, reason: Reason) -> None:
        messages, code = await client.refused()
        assert (what, len(messages), code) == (what, 1, reason.close_code), messages
        payload = messages[0]["payload"]
        assert (messages[0]["type"], payload.pop("title") != "") == ("unrecoverable_session_error", True)
        expected = {"type": reason.type, "status": reason.status, "reconnect": False, "reconnect_after_ms": 0}
        assert (what, payload) == (what, expected)

    async def closes(self, what: str, data: bytes, code: int) -> None:
        """A new connection that sends this is closed with this code, and told nothing else."""
        async with dialled(self.gateway.app.gateway.port) as (client,):
            await (await client.upgrade()).send(data)
            assert (what, *await client.refused()) == (what, [], code)
        await self.is_undisturbed()


@pytest.fixture
async def classroom(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Classroom]:
    async with running_gateway(tmp_path, nats_url, database_url, auth_audience="presence") as gateway:
        overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
        bystander, success = await gateway.join("bystander")
        yield Classroom(gateway, overheard, bystander, success["session_id"])


# --- connect requests


def without(payload: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in payload.items() if name != field}


def malformed_requests(payload: dict[str, Any]) -> dict[str, Any]:
    """Everything that can be wrong with a message whose payload would be good; texts go out as they are."""

    def with_payload(changed: Any) -> dict[str, Any]:
        return {"type": "connect_request", "payload": changed}

    odd: list[Any] = [None, True, 1, "connect_request", [], {}]
    good, good_id = json.dumps(with_payload(payload)), payload["classroom_id"]
    wrong_values: dict[str, list[Any]] = {
        "token": [None, 1, ["a"], {}, True],
        "classroom_id": [
            None,
            1,
            "",
            "room-1",
            [good_id],
            good_id.replace("-", ""),
            f"{{{good_id}}}",
            f"urn:uuid:{good_id}",
            good_id + "\n",
        ],
        "agent_label": [None, 1, "", "x" * 65, "a.b", "a b", "web\n", "w\u00e9b", "*", ">", "a\u0000"],
    }
    return {
        "nothing": "",
        "a blank": " ",
        "no JSON": "hello",
        "half of it": good[:-1],
        "two of it": good + good,
        "a byte order mark": "\ufeff" + good,
        "NaN": good.replace('"web"', "NaN"),
        "half a surrogate pair": good.replace('"web"', '"\\ud800"'),
        "a control character": good.replace('"web"', '"w\x01b"'),
        "deep nesting": "[" * 60_000,
        "a list": [with_payload(payload)],
        **{f"just {value}": value for value in odd},
        **{f"type {value}": {"type": value, "payload": payload} for value in (None, 1, *odd[4:])},
        "no type": {"payload": payload},
        "no payload": {"type": "connect_request"},
        **{f"payload {value}": with_payload(value) for value in odd},
        **{f"no {field}": with_payload(without(payload, field)) for field in wrong_values},
        **{
            f"{field} {value!r}": with_payload({**payload, field: value})
            for field, values in wrong_values.items()
            for value in values
        },
        "a refresh without a token": {"type": "refresh", "payload": {}},
    }


async def test_every_malformed_connect_request_is_told_so(classroom: Classroom) -> None:
    requests = malformed_requests(classroom.gateway.request("mallory")["payload"])
    assert len(requests) > 50
    for what, request in requests.items():
        data = frame(request if isinstance(request, str) else json.dumps(request))
        await classroom.refuses(what, data, reasons.SERIALIZATION_FAILED)


async def test_messages_that_are_not_expected_are_told_so(classroom: Classroom) -> None:
    request = classroom.gateway.request("mallory")
    unexpected = {
        "a type that is not known": frame(json.dumps({**request, "type": "CONNECT_REQUEST"})),
        "an empty type": frame(json.dumps({**request, "type": ""})),
        "what only the gateway says": frame(json.dumps({"type": "event", "payload": {}})),
        "a refresh before the session": frame(json.dumps({"type": "refresh", "payload": request["payload"]})),
        "a binary frame": frame(json.dumps(request), Opcode.BINARY),
        "an empty binary frame": frame(b"", Opcode.BINARY),
        "a binary message in fragments": frame(b"{", Opcode.BINARY, fin=False) + frame(b"}", Opcode.CONT),
    }
    for what, data in unexpected.items():
        await classroom.refuses(what, data, reasons.UNSUPPORTED_REQUEST)


async def test_a_second_connect_request_ends_the_connection_before_and_after_success(classroom: Classroom) -> None:
    gateway = classroom.gateway
    request = frame(json.dumps(gateway.request("mallory", classroom_id="00000000-0000-4000-8000-000000000001")))
    await classroom.refuses("both at once", request + request, reasons.UNSUPPORTED_REQUEST)
    async with dialled(gateway.app.gateway.port) as (client,):
        await (await client.upgrade()).send(request)
        session_id = (await client.hear())["payload"]["session_id"]
        await client.send(request)
        await classroom.hears_the_end("after success", client, reasons.UNSUPPORTED_REQUEST)
    assert await gateway.reason_of(session_id) == "unsupported_request"
    assert [row["id"] for row in await gateway.rows()] == [classroom.session_id]


# --- tokens


def part(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(header: Any, claims: Any, sign: Callable[[bytes], bytes] = lambda _: b"") -> str:
    signed = f"{part(header)}.{part(claims)}"
    return f"{signed}.{part(sign(signed.encode()))}"


def bad_tokens(signer: Signer) -> dict[str, str]:
    now = time.time()
    claims = {"sub": "mallory", "aud": "presence", "exp": now + 3600, "classrooms": "*"}
    public = signer.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    jwks = signer.path.read_bytes()
    x = json.loads(jwks)["keys"][0]["x"].encode()

    def hs256(key: bytes) -> str:
        header = {"alg": "HS256", "typ": "JWT", "kid": "test"}
        return forged(header, claims, lambda signed: hmac.new(key, signed, hashlib.sha256).digest())

    other = ec.generate_private_key(ec.SECP256R1())
    good = signer.token("mallory")
    header, payload, signature = good.split(".")
    return {
        "none": "",
        "garbage": "garbage",
        "dots": "..",
        "four parts": good + ".x",
        "a blank behind": good + " ",
        "a line break behind": good + "\n",
        "not ASCII": good.replace(".", ".\u00e9", 1),
        "very long": "a." * 20_000,
        "a header that is no JSON": f"{part(b'x')}.{payload}.{signature}",
        "a header that is a list": f"{part([])}.{payload}.{signature}",
        "no signature": f"{header}.{payload}.",
        "another signature": f"{header}.{payload}.{part(bytes(64))}",
        "another payload": f"{header}.{part({**claims, 'sub': 'bystander'})}.{signature}",
        "alg none": forged({"alg": "none", "typ": "JWT"}, claims),
        "alg None with the key's id": forged({"alg": "None", "kid": "test"}, claims),
        "no alg": forged({"typ": "JWT", "kid": "test"}, claims),
        "HS256 with the public key": hs256(public),
        "HS256 with the key set": hs256(jwks),
        "HS256 with the key's x": hs256(x),
        "HS256 with nothing": hs256(b""),
        "another key": jwt.encode(claims, other, "ES256", {"kid": "test"}),
        "another key in its header": jwt.encode(
            claims, other, "ES256", {"jwk": json.loads(jwt.algorithms.ECAlgorithm.to_jwk(other.public_key()))}
        ),
        "an unknown kid": jwt.encode(claims, signer.pem, "ES256", {"kid": "nobody"}),
        "a kid that is a path": jwt.encode(claims, other, "ES256", {"kid": "../../dev/null"}),
        "a critical extension": jwt.encode(claims, signer.pem, "ES256", {"kid": "test", "crit": ["b64"]}),
        "claims that are a list": jwt.api_jws.encode(b"[]", signer.pem, "ES256", {"kid": "test"}),
        "expired": signer.token("mallory", ttl_s=-1),
        "expired long ago": signer.token("mallory", exp=0),
        "no exp": signer.token("mallory", exp=None),
        "exp in words": signer.token("mallory", exp="tomorrow"),
        "exp NaN": jwt.api_jws.encode(json.dumps({**claims, "exp": float("nan")}).encode(), signer.pem, "ES256"),
        "no sub": signer.token("mallory", sub=None),
        "a sub that is a number": jwt.api_jws.encode(json.dumps({**claims, "sub": 7}).encode(), signer.pem, "ES256"),
        "an empty sub": signer.token(""),
        "a sub with a line break": signer.token("mallory\r\nIs-Internal: true"),
        "no aud": signer.token("mallory", aud=None),
        "another audience": signer.token("mallory", aud="elsewhere"),
        "other audiences": signer.token("mallory", aud=["elsewhere", "presence2"]),
        "not yet": signer.token("mallory", nbf=now + 60),
        "nbf in words": signer.token("mallory", nbf="now"),
    }


async def test_every_bad_token_is_unauthenticated(classroom: Classroom, capfd: pytest.CaptureFixture[str]) -> None:
    gateway = classroom.gateway
    for what, token in bad_tokens(gateway.signer).items():
        request = gateway.request("mallory")
        request["payload"]["token"] = token
        await classroom.refuses(what, frame(json.dumps(request)), reasons.UNAUTHENTICATED)
    assert "eyJ" not in "".join(capfd.readouterr())
    good = gateway.request("mallory", classroom_id="00000000-0000-4000-8000-000000000001")
    async with dialled(gateway.app.gateway.port) as (client,):
        await (await client.upgrade()).send(frame(json.dumps(good)))
        assert (await client.hear())["type"] == "connect_success"


async def test_a_classroom_that_the_token_does_not_open_is_denied(classroom: Classroom) -> None:
    gateway = classroom.gateway
    other = "00000000-0000-4000-8000-000000000001"
    for grant in (None, [], [other], "all", {"*": True}, ["*"], [gateway.classroom_id, 1], gateway.classroom_id, True):
        request = gateway.request("mallory", classrooms=grant)
        await classroom.refuses(grant, frame(json.dumps(request)), reasons.ACCESS_DENIED)


# --- frames


async def test_frames_that_break_the_rules_are_closed_with_the_right_code(classroom: Classroom) -> None:
    good = json.dumps(classroom.gateway.request("mallory"))
    half = good.encode()[: len(good) // 2]
    broken = {
        "not masked": (frame(good, mask=False), 1002),
        "a reserved bit": (b"\xc1" + frame(good)[1:], 1002),
        "a reserved opcode": (b"\x83" + frame(good)[1:], 1002),
        "a continuation of nothing": (frame(good, Opcode.CONT), 1002),
        "a second message inside a first": (frame(half, fin=False) + frame(half), 1002),
        "a ping in fragments": (b"\x09" + frame(b"x", Opcode.PING)[1:], 1002),
        "a long ping": (b"\x89\xfe\x00\x7e" + bytes(4 + 126), 1002),
        "a length that is not the shortest": (b"\x81\xfe\x00\x05" + bytes(4 + 5), 1002),
        "a close frame of one byte": (frame(b"\x03", Opcode.CLOSE), 1002),
        "a close code that nobody may send": (frame(b"\x03\xed", Opcode.CLOSE), 1002),
        "no UTF-8": (frame(good.encode().replace(b"web", b"w\xffb")), 1007),
        "UTF-8 of a surrogate": (frame(b"\xed\xa0\x80"), 1007),
        "half a character at the end": (frame(good.encode() + b"\xc3"), 1007),
        "no UTF-8 in a fragment": (frame(b"\xe9\x80\x80", fin=False) + frame(b"\x80", Opcode.CONT), 1007),
        "no UTF-8 in a close frame": (frame(b"\x03\xe8\xff", Opcode.CLOSE), 1007),
        "one byte too many": (frame(good + " " * (65_537 - len(good))), 1009),
        "2^63 - 1 bytes to come": (b"\x81\xff\x7f" + b"\xff" * 7 + bytes(4), 1009),
        "too much in fragments": (
            frame("{" + " " * 999, fin=False) + frame(b" " * 999, Opcode.CONT, fin=False) * 65,
            1009,
        ),
    }
    for what, (data, code) in broken.items():
        await classroom.closes(what, data, code)


async def test_the_largest_message_and_one_with_many_empty_fragments_are_read(classroom: Classroom) -> None:
    request = json.dumps(
        classroom.gateway.request("mallory", classroom_id="00000000-0000-4000-8000-000000000001")
    ).encode()
    pieces = frame(request, fin=False) + frame(b"", Opcode.CONT, fin=False) * 10_000 + frame(b"", Opcode.CONT)
    for data in (frame(request + b" " * (65_536 - len(request))), pieces):
        async with dialled(classroom.gateway.app.gateway.port) as (client,):
            await (await client.upgrade()).send(data)
            assert (await client.hear())["type"] == "connect_success"


# --- floods


async def test_a_flood_before_the_session_is_rate_limited(classroom: Classroom) -> None:
    floods = {
        "pings": frame(b"", Opcode.PING) * 1_000,
        "pongs that nobody asked for": frame(b"x", Opcode.PONG) * 1_000,
        "pings inside a message": frame("{", fin=False) + frame(b"x", Opcode.PING) * 1_000,
    }
    for what, data in floods.items():
        await classroom.refuses(what, data, reasons.RATE_LIMITED)


async def test_a_flood_in_the_session_ends_it_and_no_other(classroom: Classroom) -> None:
    gateway = classroom.gateway
    refresh = json.dumps({"type": "refresh", "payload": {"token": gateway.signer.token("mallory")}}).encode()
    fragments = b"".join(frame(bytes([byte]), Opcode.CONT, fin=False) for byte in refresh[1:])
    floods = {
        "messages": frame(refresh) * 200,
        "messages in fragments": (frame(refresh[:1], fin=False) + fragments + frame(b"", Opcode.CONT)) * 200,
        "pings": frame(b"x" * 125, Opcode.PING) * 200,
        "pongs": frame(b"", Opcode.PONG) * 200,
    }
    for number, (what, data) in enumerate(floods.items()):
        request = gateway.request("mallory", classroom_id=f"00000000-0000-4000-8000-{number:012d}")
        async with dialled(gateway.app.gateway.port) as (client,):
            await (await client.upgrade()).send(frame(json.dumps(request)))
            session_id = (await client.hear())["payload"]["session_id"]
            await client.send(data)
            await classroom.hears_the_end(what, client, reasons.RATE_LIMITED)
        assert (what, await gateway.reason_of(session_id)) == (what, "rate_limited")
    assert [row["id"] for row in await gateway.rows()] == [classroom.session_id]
    await gateway.publish("chat", "still here")
    assert (await classroom.bystander.hear())["payload"] == "still here"


async def test_a_few_pings_and_unasked_pongs_are_no_flood(classroom: Classroom) -> None:
    async with dialled(classroom.gateway.app.gateway.port) as (client,):
        await client.upgrade()
        await client.send(frame(b"unasked", Opcode.PONG) * 9 + frame(b"", Opcode.PONG) + frame(b"here?", Opcode.PING))
        assert await client.frame() == (Opcode.PONG, b"here?")
        await client.send(frame(json.dumps(classroom.gateway.request("alice"))))
        assert (await client.hear())["type"] == "connect_success"


async def test_everything_bad_at_once_disturbs_nobody(classroom: Classroom) -> None:
    """Two hundred bad agents at the same time: the bystander's events come as if they were not there."""
    port = classroom.gateway.app.gateway.port
    token = classroom.gateway.signer.token("mallory", aud="elsewhere")
    request = classroom.gateway.request("mallory")
    request["payload"]["token"] = token
    bad = [frame(json.dumps(request)), frame("{"), frame("x", mask=False), frame(b"\xff"), frame(b"", Opcode.PING) * 99]

    async def attack(client: Raw, data: bytes) -> None:
        await (await client.upgrade()).send(data)
        await client.ended()

    async with dialled(port, 200) as clients:
        attacks = asyncio.gather(*(attack(client, bad[number % 5]) for number, client in enumerate(clients)))
        while not attacks.done():
            classroom.events += 1
            await classroom.gateway.publish("chat", classroom.events)
            heard = await classroom.bystander.hear(1.0)
            assert heard["payload"] == classroom.events
            await asyncio.sleep(0)
        await within(attacks, 5.0 * SCALE)
    await classroom.is_undisturbed()
