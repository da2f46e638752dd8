"""RFC 6455 as a public conformance suite asks for it, case by case, against the echo server over real sockets.

The numbers are those of the Autobahn test suite's cases 1 to 7 and 9. What the server sends is read by wsproto; what it is
sent, wrong as it may be on purpose, is made by client_frames. `bench/echo_server.py --no-limits` is what a suite is pointed at.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, client_frame, close_payload
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, Pong

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 20.0
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
ECHO_16_MIB = 16 << 20

Heard = tuple[str, bytes] | tuple[str, int]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    command = [sys.executable, str(ROOT / "bench" / "echo_server.py"), "--port", "0", "--no-limits"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        match = re.search(r"listening on (\d+)", server.stdout.readline())
        assert match is not None
        yield int(match[1])
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


class Client:
    """One connection; `heard` is what has come, messages put together."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(REQUEST)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.socket.recv(1)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
        self.codec = Connection(ConnectionType.CLIENT)
        self.heard: list[Heard] = []
        self._message: list[bytes] = []

    def hear(self) -> bool:
        """Read once; False at the end of the stream."""
        data = self.socket.recv(1 << 20)
        if not data:
            return False
        self.codec.receive_data(data)
        for event in self.codec.events():
            if isinstance(event, Message):
                self._message.append(event.data if isinstance(event, BytesMessage) else event.data.encode())
                if event.message_finished:
                    kind = "binary" if isinstance(event, BytesMessage) else "text"
                    self.heard.append((kind, b"".join(self._message)))
                    self._message = []
            elif isinstance(event, CloseConnection):
                self.heard.append(("close", event.code))
            elif isinstance(event, (Ping, Pong)):
                self.heard.append((type(event).__name__.lower(), bytes(event.payload)))
            else:
                raise AssertionError(event)  # noqa: TRY004
        return True

    def hear_until(self, count: int) -> list[Heard]:
        while len(self.heard) < count:
            assert self.hear(), self.heard
        return self.heard

    def hear_the_end(self) -> list[Heard]:
        while self.hear():
            pass
        return self.heard


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    connection = Client(port)
    yield connection
    connection.socket.close()


def chopped(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def fragments(opcode: int, *parts: bytes) -> bytes:
    frames = [
        client_frame(CONTINUATION if at else opcode, part, final=at == len(parts) - 1) for at, part in enumerate(parts)
    ]
    return b"".join(frames)


CLOSE_1000 = client_frame(CLOSE, close_payload(1000))
TEXT_A, TEXT_B = client_frame(TEXT, b"a"), client_frame(TEXT, b"b")
PING_P, PONG_P = client_frame(PING, b"p"), client_frame(PONG, b"p")
GREEK, MAX_UTF8 = "κόσμε".encode(), "\U0010ffff".encode()


def echoed() -> dict[str, tuple[bytes, list[Heard]]]:
    """What is answered, and with what; then the connection closes with 1000."""
    sizes = (0, 125, 126, 127, 128, 65_535, 65_536)
    cases: dict[str, tuple[bytes, list[Heard]]] = {}
    for at, size in enumerate(sizes, 1):
        cases[f"1.1.{at}"] = (client_frame(TEXT, b"*" * size), [("text", b"*" * size)])
        cases[f"1.2.{at}"] = (client_frame(BINARY, b"\xfe" * size), [("binary", b"\xfe" * size)])
    for at, payload in enumerate((b"", b"Hello", b"\x00\xff\xfe\xfd", b"\xfe" * 125), 1):
        cases[f"2.{at}"] = (client_frame(PING, payload), [("pong", payload)])
    cases |= {
        "2.7": (client_frame(PONG), []),
        "2.8": (PONG_P, []),
        "2.9": (PONG_P + PING_P, [("pong", b"p")]),
        "2.10": (b"".join(client_frame(PING, b"%d" % n) for n in range(10)), [("pong", b"%d" % n) for n in range(10)]),
        "5.3": (fragments(TEXT, b"one", b"two"), [("text", b"onetwo")]),
        "5.6": (
            client_frame(TEXT, b"one", final=False) + PING_P + client_frame(CONTINUATION, b"two"),
            [("pong", b"p"), ("text", b"onetwo")],
        ),
        "5.19": (
            (client_frame(TEXT, b"1", final=False) + client_frame(CONTINUATION, b"2", final=False) + PING_P)
            + (client_frame(CONTINUATION, b"3", final=False) + PING_P + client_frame(CONTINUATION, b"4")),
            [("pong", b"p"), ("pong", b"p"), ("text", b"1234")],
        ),
        "6.1.1": (client_frame(TEXT), [("text", b"")]),
        "6.1.2": (fragments(TEXT, b"", b"", b""), [("text", b"")]),
        "6.1.3": (fragments(TEXT, b"", b"middle", b""), [("text", b"middle")]),
        "6.2.1": (client_frame(TEXT, "Hello-µ@ßöäüàá-UTF-8!!".encode()), [("text", "Hello-µ@ßöäüàá-UTF-8!!".encode())]),
        "6.2.3": (fragments(TEXT, *chopped("µ@ßöä€😀".encode(), 1)), [("text", "µ@ßöä€😀".encode())]),
        "6.5.1": (client_frame(TEXT, GREEK), [("text", GREEK)]),
        "6.7-6.9": (
            b"".join(client_frame(TEXT, chr(n).encode()) for n in (0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000)),
            [("text", chr(n).encode()) for n in (0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000)],
        ),
        "6.9.4": (client_frame(TEXT, MAX_UTF8), [("text", MAX_UTF8)]),
        "6.11": (
            client_frame(TEXT, "\ud7ff\ue000\ufffd".encode()),
            [("text", "\ud7ff\ue000\ufffd".encode())],
        ),
        "6.22": (client_frame(TEXT, "\ufdd0\ufffe\U0001ffff".encode()), [("text", "\ufdd0\ufffe\U0001ffff".encode())]),
    }
    return cases


ECHOED = echoed()


@pytest.mark.parametrize("case", ECHOED)
@pytest.mark.parametrize("chop", [None, 997, 1])
def test_what_is_answered(client: Client, case: str, chop: int | None) -> None:
    """Whole, or in pieces of a few bytes or of one (cases 1.1.8, 2.6, 2.11, 5.4 and others)."""
    data, answer = ECHOED[case]
    if chop == 1 and len(data) > 2_000:
        chop = 97
    for piece in chopped(data + CLOSE_1000, chop or len(data) + len(CLOSE_1000)):
        client.socket.sendall(piece)
    assert client.hear_the_end() == [*answer, ("close", 1000)]


def violations() -> dict[str, tuple[bytes, list[Heard], int]]:
    """What fails the connection: what is answered before, and the close code."""
    cases: dict[str, tuple[bytes, list[Heard], int]] = {
        "2.5": (client_frame(PING, b"\xfe" * 126), [], 1002),
        "5.1": (client_frame(PING, b"p", final=False) + client_frame(CONTINUATION, b"q"), [], 1002),
        "5.2": (client_frame(PONG, b"p", final=False) + client_frame(CONTINUATION, b"q"), [], 1002),
        "5.9": (client_frame(CONTINUATION, b"x") + TEXT_A, [], 1002),
        "5.12": (client_frame(CONTINUATION, b"x", final=False) + TEXT_A, [], 1002),
        "5.15": (
            fragments(TEXT, b"1", b"2") + client_frame(CONTINUATION, b"3", final=False) + TEXT_A,
            [("text", b"12")],
            1002,
        ),
        "5.18": (client_frame(TEXT, b"1", final=False) + client_frame(TEXT, b"2"), [], 1002),
        "6.4.1": (client_frame(TEXT, GREEK + b"\xf4\x90", final=False), [], 1007),
        "7.3.2": (client_frame(CLOSE, b"a"), [], 1002),
        "7.3.6": (client_frame(CLOSE, close_payload(1000, b"*" * 124)), [], 1002),
        "7.5.1": (
            client_frame(
                CLOSE, close_payload(1000, GREEK + b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80")
            ),
            [],
            1007,
        ),
        "not masked": (client_frame(TEXT, b"x", key=None), [], 1002),
    }
    for reserved in range(1, 8):
        bad = client_frame(TEXT, b"x", reserved=reserved)
        cases[f"3.{reserved}"] = (TEXT_A + bad + PING_P, [("text", b"a")], 1002)
    for at, opcode in enumerate((3, 4, 5, 6, 7), 1):
        cases[f"4.1.{at}"] = (TEXT_A + client_frame(opcode, b"x") + PING_P, [("text", b"a")], 1002)
    for at, opcode in enumerate((11, 12, 13, 14, 15), 1):
        cases[f"4.2.{at}"] = (TEXT_A + client_frame(opcode, b"x") + PING_P, [("text", b"a")], 1002)
    invalid = {
        "6.3": GREEK + b"\xed\xa0\x80edited",
        "6.6": b"\xce\xba\xe1\xbd",
        "6.8": b"\xf8\x88\x80\x80\x80",
        "6.10": b"\xf7\xbf\xbf\xbf",
        "6.12": b"\x80",
        "6.13": b"".join(bytes([lead, 0x20]) for lead in range(0xC0, 0xE0)),
        "6.14": b"\xe0\x80",
        "6.15": b"\xc0\xe0\x80",
        "6.16": b"\xff",
        "6.17": b"\xc0\xaf",
        "6.18": b"\xf0\x8f\xbf\xbf",
        "6.19": b"\xc0\x80",
        "6.20": b"\xed\xad\xbf",
        "6.21": b"\xed\xa0\x80\xed\xb0\x80",
        "6.23": b"\xf4\x90\x80\x80",
    }
    for case, payload in invalid.items():
        cases[case] = (client_frame(TEXT, payload), [], 1007)
        cases[f"{case}, byte by byte"] = (fragments(TEXT, *chopped(payload, 1)), [], 1007)
    for code in (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65_535):
        cases[f"7.9, {code}"] = (client_frame(CLOSE, close_payload(code)), [], 1002)
    return cases


VIOLATIONS = violations()


@pytest.mark.parametrize("case", VIOLATIONS)
@pytest.mark.parametrize("chop", [None, 1])
def test_what_fails_the_connection(client: Client, case: str, chop: int | None) -> None:
    data, answer, code = VIOLATIONS[case]
    for piece in chopped(data, chop or len(data)):
        client.socket.sendall(piece)
    assert client.hear_the_end() == [*answer, ("close", code)]


def test_a_text_fails_at_the_byte_that_settles_it(client: Client) -> None:
    """Cases 6.4.3 and 6.4.4: the rest of the frame has not come, and is not waited for."""
    client.socket.sendall(client_frame(TEXT, GREEK + b"\xf4\x90", declared=1000))
    assert client.hear_the_end() == [("close", 1007)]


CLOSES: dict[str, tuple[bytes, int]] = {
    "7.3.1": (b"", 1005),
    "7.3.3": (close_payload(1000), 1000),
    "7.3.4": (close_payload(1000, b"Hello World!"), 1000),
    "7.3.5": (close_payload(1000, b"*" * 123), 1000),
    **{
        f"7.7, {code}": (close_payload(code), code)
        for code in (*range(1000, 1004), *range(1007, 1012), 3000, 3999, 4000, 4999)
    },
}


@pytest.mark.parametrize("case", CLOSES)
def test_how_a_close_is_answered(client: Client, case: str) -> None:
    payload, code = CLOSES[case]
    behind = PING_P + TEXT_A  # cases 7.1.3 to 7.1.5: nothing counts behind it
    client.socket.sendall(TEXT_B + client_frame(CLOSE, payload) + behind)
    assert client.hear_the_end() == [("text", b"b"), ("close", code)]


def test_a_close_in_the_middle_of_a_message(client: Client) -> None:
    """Case 7.1.6, and a message that is never finished."""
    client.socket.sendall(client_frame(TEXT, b"1", final=False) + CLOSE_1000 + client_frame(CONTINUATION, b"2"))
    assert client.hear_the_end() == [("close", 1000)]


# --- 9: limits


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("fragment", [None, 64, 1 << 20], ids=["whole", "fragments of 64 B", "fragments of 1 MiB"])
def test_sixteen_mebibytes(client: Client, opcode: int, fragment: int | None) -> None:
    """Cases 9.1 to 9.4, up to the largest."""
    if fragment is None:
        data = client_frame(opcode, b"*" * ECHO_16_MIB, key=bytes(4))
    else:
        middle = client_frame(CONTINUATION, b"*" * fragment, final=False)
        first = client_frame(opcode, b"*" * fragment, final=False)
        data = first + middle * (ECHO_16_MIB // fragment - 2) + client_frame(CONTINUATION, b"*" * fragment)
    client.socket.sendall(data)
    [(kind, payload)] = client.hear_until(1)
    assert kind == ("text" if opcode == TEXT else "binary")
    assert payload == b"*" * ECHO_16_MIB


def test_one_byte_more_is_too_much(client: Client) -> None:
    client.socket.sendall(client_frame(BINARY, b"", declared=ECHO_16_MIB + 1))
    assert client.hear_the_end() == [("close", 1009)]


@pytest.mark.parametrize("chop", [64, 512])
def test_a_mebibyte_in_chops(client: Client, chop: int) -> None:
    """Cases 9.5 and 9.6."""
    for piece in chopped(client_frame(TEXT, b"*" * (1 << 20)), chop):
        client.socket.sendall(piece)
    assert client.hear_until(1) == [("text", b"*" * (1 << 20))]


@pytest.mark.parametrize("size", [0, 16, 64, 256, 1024, 4096])
def test_a_thousand_round_trips(client: Client, size: int) -> None:
    """Cases 9.7 and 9.8."""
    for opcode, kind in ((TEXT, "text"), (BINARY, "binary")):
        frame = client_frame(opcode, b"*" * size)
        for _ in range(500):
            client.socket.sendall(frame)
            assert client.hear_until(1) == [(kind, b"*" * size)]
            client.heard.clear()
