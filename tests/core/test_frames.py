"""Frames by the text of RFC 6455: its examples, every error and its code, UTF-8, limits, memory, and the encoder."""

from __future__ import annotations

import pytest
from client_frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, client_frame, close_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from presence_core.frames import Decoder, ProtocolError, bench_decode, bench_encode, encode_close, encode_frame

Event = tuple[int, bytes, int]
EURO = "€".encode()


def decode(data: bytes, max_message_bytes: int = 65536) -> list[Event]:
    return Decoder(max_message_bytes).feed(data)


def feed_bytewise(decoder: Decoder, data: bytes) -> list[Event]:
    return [event for byte in data for event in decoder.feed(bytes([byte]))]


def code_of(data: bytes, max_message_bytes: int = 65536) -> int:
    """The close code of the error in a stream, the same for the whole stream and for single bytes."""
    with pytest.raises(ProtocolError) as whole:
        decode(data, max_message_bytes)
    with pytest.raises(ProtocolError) as bytewise:
        feed_bytewise(Decoder(max_message_bytes), data)
    assert bytewise.value.close_code == whole.value.close_code
    return whole.value.close_code


def error_at(data: bytes, max_message_bytes: int = 65536) -> int | None:
    """The length of the shortest prefix that is an error."""
    decoder = Decoder(max_message_bytes)
    for at, byte in enumerate(data):
        try:
            decoder.feed(bytes([byte]))
        except ProtocolError:
            return at + 1
    return None


# RFC 6455 section 5.7: the examples that a client may send


def test_rfc_a_single_frame_masked_text_message() -> None:
    assert decode(bytes.fromhex("8185 37fa213d 7f9f4d5158")) == [(TEXT, b"Hello", 0)]


def test_rfc_a_fragmented_text_message() -> None:
    data = client_frame(TEXT, b"Hel", final=False) + client_frame(CONTINUATION, b"lo")
    assert data[:2] == bytes.fromhex("0183")
    assert decode(data) == [(TEXT, b"Hello", 0)]


def test_rfc_masked_pong_and_its_ping() -> None:
    assert decode(bytes.fromhex("8a85 37fa213d 7f9f4d5158")) == [(PONG, b"Hello", 0)]
    assert decode(client_frame(PING, b"Hello")) == [(PING, b"Hello", 0)]


@pytest.mark.parametrize(("size", "prefix"), [(256, "82fe0100"), (65536, "82ff0000000000010000")])
def test_rfc_binary_messages_with_extended_lengths(size: int, prefix: str) -> None:
    payload = bytes(range(256)) * (size // 256)
    data = client_frame(BINARY, payload)
    assert data.startswith(bytes.fromhex(prefix))
    assert decode(data) == [(BINARY, payload, 0)]


def test_rfc_server_examples_are_what_the_encoder_writes() -> None:
    assert encode_frame(TEXT, "Hello") == bytes.fromhex("810548656c6c6f")
    assert encode_frame(PING, b"Hello") == bytes.fromhex("890548656c6c6f")
    assert encode_frame(BINARY, bytes(256))[:4] == bytes.fromhex("827e0100")
    assert encode_frame(BINARY, bytes(65536))[:10] == bytes.fromhex("827f0000000000010000")


# Messages


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 8, 9, 63, 125, 126, 127, 128, 4095, 65535, 65536, 70000])
@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_every_length_however_fragmented_and_cut(size: int, pieces: int) -> None:
    payload = bytes(i * 7 % 251 for i in range(size))
    step = -(-size // pieces) or 1
    parts = [payload[i : i + step] for i in range(0, size, step)] or [b""]
    data = b"".join(
        client_frame(BINARY if i == 0 else CONTINUATION, part, final=i == len(parts) - 1, key=bytes([i, 200, 3, 255]))
        for i, part in enumerate(parts)
    )
    for cut in {0, 1, 2, 5, 6, 7, 13, 14, 15, len(data) // 2, len(data) - 1}:
        decoder = Decoder(80_000)
        assert decoder.feed(data[:cut]) + decoder.feed(data[cut:]) == [(BINARY, payload, 0)]
        assert decoder.memory_bytes == 0
        assert decoder.frames == len(parts)


def test_control_frames_between_fragments() -> None:
    data = (
        client_frame(TEXT, b"a", final=False)
        + client_frame(PING, b"1")
        + client_frame(CONTINUATION, b"", final=False)
        + client_frame(PONG, b"2")
        + client_frame(PING)
        + client_frame(CONTINUATION, b"b")
    )
    expected = [(PING, b"1", 0), (PONG, b"2", 0), (PING, b"", 0), (TEXT, b"ab", 0)]
    assert decode(data) == expected
    decoder = Decoder()
    assert feed_bytewise(decoder, data) == expected
    assert decoder.memory_bytes == 0


def test_many_messages_in_one_piece() -> None:
    data = b"".join(client_frame(TEXT, str(i).encode()) for i in range(1000))
    assert decode(data) == [(TEXT, str(i).encode(), 0) for i in range(1000)]


def test_each_frame_header_counts_also_the_empty_ones() -> None:
    decoder = Decoder()
    decoder.feed(client_frame(TEXT, final=False) + client_frame(CONTINUATION, final=False) * 50)
    assert decoder.frames == 51
    decoder.feed(client_frame(PING)[:-1])
    assert decoder.frames == 51
    assert decoder.feed(client_frame(PING)[-1:]) == [(PING, b"", 0)]
    assert decoder.frames == 52


# Close frames


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999])
def test_close_codes_that_a_peer_may_send(code: int) -> None:
    data = client_frame(CLOSE, close_payload(code, EURO))
    assert decode(data) == [(CLOSE, EURO, code)]
    assert encode_close(code, EURO) == bytes([0x88, 5]) + close_payload(code, EURO)


@pytest.mark.parametrize("code", [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535])
def test_close_codes_that_never_travel(code: int) -> None:
    # wsproto refuses 1014 too; IANA's registry has it since 2016 (bad gateway), and `websockets` agrees.
    assert code_of(client_frame(CLOSE, close_payload(code))) == 1002
    with pytest.raises(ValueError, match="must not be sent"):
        encode_close(code, b"x")


def test_a_close_frame_may_be_empty_but_not_have_one_byte() -> None:
    assert decode(client_frame(CLOSE)) == [(CLOSE, b"", 1005)]
    assert code_of(client_frame(CLOSE, b"\x03")) == 1002
    assert error_at(client_frame(CLOSE, b"\x03")) == 2


def test_the_code_of_a_close_frame_is_judged_before_its_reason() -> None:
    assert code_of(client_frame(CLOSE, close_payload(1000, b"\xff"))) == 1007
    assert code_of(client_frame(CLOSE, close_payload(1000, EURO[:2]))) == 1007
    assert code_of(client_frame(CLOSE, close_payload(999, b"\xff"))) == 1002


def test_nothing_is_read_behind_a_close_frame() -> None:
    decoder = Decoder()
    data = client_frame(TEXT, b"a", final=False) + client_frame(CLOSE, close_payload(1000)) + b"\xff" * 20
    assert decoder.feed(data) == [(CLOSE, b"", 1000)]
    assert decoder.finished
    assert decoder.feed(b"\xff") == []
    assert decoder.memory_bytes == 0


# Errors of the protocol: 1002, at the byte that settles it


@pytest.mark.parametrize("reserved", range(1, 8))
@pytest.mark.parametrize("opcode", [CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG])
def test_reserved_bits(reserved: int, opcode: int) -> None:
    data = client_frame(opcode, reserved=reserved)
    assert code_of(data) == 1002
    assert error_at(data) == 1


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
@pytest.mark.parametrize("final", [True, False])
def test_reserved_opcodes(opcode: int, final: bool) -> None:
    data = client_frame(opcode, final=final)
    assert code_of(data) == 1002
    assert error_at(data) == 1
    with pytest.raises(ValueError, match="opcode"):
        encode_frame(opcode, b"")


@pytest.mark.parametrize("opcode", [TEXT, BINARY, CLOSE, PING, PONG])
def test_a_client_must_mask(opcode: int) -> None:
    data = client_frame(opcode, key=None)
    assert code_of(data) == 1002
    assert error_at(data) == 2


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_control_frames_are_short_and_whole(opcode: int) -> None:
    assert error_at(client_frame(opcode, b"", final=False)) == 1
    for size in (126, 65536):
        data = client_frame(opcode, bytes(size))
        assert code_of(data) == 1002
        assert error_at(data) == 2
    assert code_of(client_frame(opcode, final=False)) == 1002


@pytest.mark.parametrize(("size", "length_bytes"), [(0, 2), (125, 2), (0, 8), (125, 8), (126, 8), (65535, 8)])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_lengths_take_the_fewest_bytes(opcode: int, size: int, length_bytes: int) -> None:
    # RFC 6455 section 5.2: "the minimal number of bytes MUST be used". wsproto agrees, `websockets` lets it pass.
    data = client_frame(opcode, bytes(size), length_bytes=length_bytes)
    assert code_of(data) == 1002
    assert error_at(data) == 2 + length_bytes


@pytest.mark.parametrize("declared", [2**63, 2**63 + 5, 2**64 - 1])
def test_the_top_bit_of_a_length_is_zero(declared: int) -> None:
    data = client_frame(BINARY, b"", declared=declared)
    assert code_of(data) == 1002
    assert error_at(data) == 10


def test_the_order_of_messages_and_fragments() -> None:
    begun = client_frame(TEXT, b"a", final=False)
    assert code_of(client_frame(CONTINUATION, b"a")) == 1002
    assert code_of(client_frame(CONTINUATION, b"a", final=False)) == 1002
    assert code_of(client_frame(TEXT, b"a") + client_frame(CONTINUATION, b"a")) == 1002
    for opcode in (TEXT, BINARY):
        for final in (True, False):
            data = begun + client_frame(opcode, b"b", final=final)
            assert code_of(data) == 1002
            assert error_at(data) == len(begun) + 1
    assert code_of(begun + client_frame(CONTINUATION, b"b") + client_frame(CONTINUATION, b"c")) == 1002


def test_what_came_before_the_error_is_not_lost() -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError) as error:
        decoder.feed(client_frame(TEXT, b"a") + client_frame(PING, b"b") + b"\xff")
    assert error.value.events == [(TEXT, b"a", 0), (PING, b"b", 0)]
    assert error.value.close_code == 1002
    assert decoder.finished
    assert decoder.feed(client_frame(TEXT, b"a")) == []


# Limits: 1009


@pytest.mark.parametrize("limit", [0, 1, 125, 126, 65535, 65536])
def test_the_longest_message_and_one_byte_more(limit: int) -> None:
    assert decode(client_frame(BINARY, bytes(limit)), limit) == [(BINARY, bytes(limit), 0)]
    data = client_frame(BINARY, bytes(limit + 1))
    assert code_of(data, limit) == 1009
    # The header is enough: not a byte of the payload is awaited.
    assert error_at(data, limit) == len(data) - (limit + 1) - 4


def test_the_limit_is_of_the_message_not_of_the_frame() -> None:
    begun = client_frame(TEXT, b"a" * 60, final=False) + client_frame(PING, b"p" * 125)
    whole = begun + client_frame(CONTINUATION, b"a" * 40)
    assert decode(whole, 100)[-1] == (TEXT, b"a" * 100, 0)
    for final in (True, False):
        data = begun + client_frame(CONTINUATION, b"a" * 41, final=final)
        assert code_of(data, 100) == 1009
        assert error_at(data, 100) == len(begun) + 2
    empty = whole[: len(begun)] + client_frame(CONTINUATION, b"a" * 40, final=False) + client_frame(CONTINUATION)
    assert decode(empty, 100)[-1] == (TEXT, b"a" * 100, 0)


def test_control_frames_have_no_part_in_the_limit() -> None:
    assert decode(client_frame(PING, b"p" * 125), 10) == [(PING, b"p" * 125, 0)]


def test_a_declared_length_that_cannot_be() -> None:
    assert code_of(client_frame(BINARY, b"", declared=2**63 - 1)) == 1009
    assert code_of(client_frame(TEXT, b"a", final=False) + client_frame(CONTINUATION, b"", declared=2**63 - 1)) == 1009


# UTF-8: 1007, at the byte that settles it (cases as in section 6 of the Autobahn suite)

VALID_UTF8 = [
    "κόσμε",
    "\x00",
    "\x7f\x80",
    "߿ࠀ",
    "￿𐀀",
    "\ud7ff\ue000\ufffd",
    "\ufffe\uffff",
    "\U0001fffe\U0010ffff",
    "Hello-µ@ßöäüàá-UTF-8!!",
]
INVALID_UTF8 = [
    "80",
    "bf",
    "c0af",
    "c180",
    "c1bf",
    "c2",
    "c241",
    "df",
    "e0",
    "e080af",
    "e09fbf",
    "e0a0",
    "e0a041",
    "eda080",
    "edadbf",
    "edbfbf",
    "eda080edb080",
    "efbf",
    "f0",
    "f08080af",
    "f08fbfbf",
    "f090",
    "f09080",
    "f0908041",
    "f48fbf",
    "f4908080",
    "f5808080",
    "f888808080",
    "fc8480808080",
    "fe",
    "ff",
    "cebae1bdb9cf83cebcceb5eda080656469746564",
    "cebae1bdb9cf83cebcceb5f4908080656469746564",
]


@pytest.mark.parametrize("text", VALID_UTF8)
@pytest.mark.parametrize("padding", [0, 3, 7, 8, 9, 64])
def test_valid_utf8(text: str, padding: int) -> None:
    payload = b"-" * padding + text.encode() + b"-" * padding
    assert decode(client_frame(TEXT, payload)) == [(TEXT, payload, 0)]
    for cut in range(len(payload) + 1):
        data = client_frame(TEXT, payload[:cut], final=False) + client_frame(CONTINUATION, payload[cut:])
        assert decode(data) == [(TEXT, payload, 0)]


@pytest.mark.parametrize("text", INVALID_UTF8)
@pytest.mark.parametrize("padding", [0, 3, 7, 8, 9, 64])
def test_invalid_utf8(text: str, padding: int) -> None:
    payload = b"-" * padding + bytes.fromhex(text)
    assert code_of(client_frame(TEXT, payload)) == 1007
    for cut in range(len(payload) + 1):
        data = client_frame(TEXT, payload[:cut], final=False) + client_frame(CONTINUATION, payload[cut:])
        assert code_of(data) == 1007
    assert decode(client_frame(BINARY, payload)) == [(BINARY, payload, 0)]
    assert decode(client_frame(PING, payload)) == [(PING, payload, 0)]


# What an unfinished character can be completed with: one of these always fits, if anything does.
COMPLETIONS = [b"", *(bytes([first]) + b"\x80" * more for first in (0x80, 0x90, 0xA0) for more in range(3))]


def is_valid(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def first_invalid_byte(payload: bytes) -> int | None:
    # Not Python's incremental decoder: it notices a surrogate one byte later than it could.
    for size in range(1, len(payload) + 1):
        if not any(is_valid(payload[:size] + completion) for completion in COMPLETIONS):
            return size
    return None


def check_utf8(payload: bytes) -> None:
    """An unfinished text frame is refused at the first byte that nothing could make valid."""
    data = client_frame(TEXT, payload, declared=len(payload) + 1)
    header_bytes = len(data) - len(payload)
    expected = first_invalid_byte(payload)
    found = error_at(data)
    assert found == (None if expected is None else header_bytes + expected)
    if expected is not None:
        with pytest.raises(ProtocolError):
            decode(data[:found])
        assert decode(data[: found - 1]) == []


def test_utf8_every_two_bytes_and_every_boundary_of_three_and_four() -> None:
    edges = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xFF]
    leads = [0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5]
    for first in range(256):
        for second in edges:
            check_utf8(bytes([first, second]))
    for lead in leads:
        for second in edges:
            for third in edges:
                check_utf8(bytes([lead, second, third, 0x80]))


@given(
    st.lists(
        st.one_of(
            st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass")),
            st.binary(max_size=3),
            st.just(b"ascii, more than one word of it"),
        ),
        max_size=6,
    ).map(b"".join)
)
@settings(max_examples=300, deadline=None)
def test_utf8_is_judged_as_python_does(payload: bytes) -> None:
    check_utf8(payload)


# Memory


def test_nothing_is_held_at_a_message_boundary() -> None:
    message = client_frame(TEXT, b"x" * 300)
    data = message + client_frame(PING, b"p") + message[:-1]
    decoder = Decoder()
    for at, byte in enumerate(data):
        decoder.feed(bytes([byte]))
        boundary = at + 1 in (len(message), len(data) - len(message) + 1)
        assert (decoder.memory_bytes == 0) is boundary
    assert decoder.feed(message[-1:]) == [(TEXT, b"x" * 300, 0)]
    assert decoder.memory_bytes == 0


def test_memory_follows_what_came_not_what_was_declared() -> None:
    decoder = Decoder(1 << 30)
    decoder.feed(client_frame(BINARY, b"", declared=1 << 30))
    assert decoder.memory_bytes < 512
    decoder.feed(bytes(10_000))
    assert decoder.memory_bytes < 2 * 10_000 + 512
    small = Decoder()
    small.feed(client_frame(BINARY, b"x" * 40)[:-1])
    assert small.memory_bytes < 256 + 40


def test_memory_never_passes_the_limit() -> None:
    decoder = Decoder(1000)
    decoder.feed(client_frame(BINARY, b"", final=False))
    for _ in range(1000):
        decoder.feed(client_frame(CONTINUATION, b"x", final=False))
        assert decoder.memory_bytes <= 1000 + 256
    assert decoder.feed(client_frame(CONTINUATION)) == [(BINARY, b"x" * 1000, 0)]
    assert decoder.memory_bytes == 0


# The encoder's errors, and the seam


def test_what_cannot_be_encoded() -> None:
    for opcode in (CLOSE, PING, PONG):
        assert len(encode_frame(opcode, bytes(125))) == 127
        with pytest.raises(ValueError, match="125"):
            encode_frame(opcode, bytes(126))
    for opcode in (-1, 0, 16, 129):
        with pytest.raises(ValueError, match="opcode"):
            encode_frame(opcode, b"")
    with pytest.raises(UnicodeEncodeError):
        encode_frame(TEXT, "\ud800")
    with pytest.raises(TypeError):
        encode_frame(TEXT, 5)  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        encode_frame(TEXT, memoryview(b"abcd")[::2])
    with pytest.raises(ValueError, match="123"):
        encode_close(1000, bytes(124))
    with pytest.raises(ValueError, match="UTF-8"):
        encode_close(1000, b"\xff")
    with pytest.raises(ValueError, match="must not be sent"):
        encode_close(-1)


def test_close_frames_without_a_code() -> None:
    assert encode_close(1005) == bytes([0x88, 0])
    assert len(encode_close(4500, b"r" * 123)) == 127


@pytest.mark.parametrize("payload", [b"abc", bytearray(b"abc"), memoryview(b"xabc")[1:], "abc"])
def test_every_kind_of_payload(payload: bytes | bytearray | memoryview | str) -> None:
    assert encode_frame(TEXT, payload) == b"\x81\x03abc"


def test_the_decoder_takes_bytes_only() -> None:
    with pytest.raises(TypeError):
        Decoder().feed("a")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Decoder().feed(None)  # type: ignore[arg-type]


def test_the_benchmark_loops_run() -> None:
    assert bench_decode(client_frame(TEXT, b"abc"), 3) > 0
    assert bench_encode(TEXT, b"abc", 3) > 0
    with pytest.raises(ValueError, match="whole"):
        bench_decode(client_frame(TEXT, b"abc")[:-1], 3)
