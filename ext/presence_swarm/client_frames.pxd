# Frames, client side (RFC 6455 section 5): masked ones out, unmasked ones in. Pure functions of bytes.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from presence_core.frame_header cimport (
    CONTROL_BIT,
    FIN_BIT,
    LENGTH_16,
    LENGTH_64,
    LENGTH_BITS,
    MASK_BIT,
    OPCODE_BITS,
    RESERVED_BITS,
    read_length,
)
from presence_core.frames cimport FRAME_CONTROL_MAX_BYTES
from presence_core.payload cimport unmask

cdef enum:
    CLIENT_FRAME_HEADER_BYTES = 14
    CONTROL_FRAME_BYTES = 131  # the longest

cdef enum server_frame_status:
    SERVER_FRAME_MORE = 0
    SERVER_FRAME_WHOLE = 1
    SERVER_FRAME_BAD = 2  # masked, fragmented, reserved bits or too long: nothing that the gateway sends

cdef struct server_frame:
    uint8_t opcode
    const uint8_t *payload  # into the input
    size_t size
    size_t taken            # bytes of the whole frame


cdef inline server_frame_status read_server_frame(
    const uint8_t *data, size_t size, size_t max_bytes, server_frame *frame
) noexcept nogil:
    cdef size_t header = 2
    cdef uint64_t length
    if size < 2:
        return SERVER_FRAME_MORE
    if data[0] & RESERVED_BITS or not data[0] & FIN_BIT or data[1] & MASK_BIT:
        return SERVER_FRAME_BAD
    length = data[1] & LENGTH_BITS
    if length == LENGTH_16:
        header = 4
    elif length == LENGTH_64:
        header = 10
    if size < header:
        return SERVER_FRAME_MORE
    if header > 2:
        length = read_length(data + 2, <unsigned int> header - 2)
    frame.opcode = data[0] & OPCODE_BITS
    if length > max_bytes or frame.opcode & CONTROL_BIT and length > FRAME_CONTROL_MAX_BYTES:
        return SERVER_FRAME_BAD
    if size - header < length:
        return SERVER_FRAME_MORE
    frame.payload = data + header
    frame.size = <size_t> length
    frame.taken = header + <size_t> length
    return SERVER_FRAME_WHOLE


cdef inline size_t write_client_frame(
    uint8_t *out, uint8_t opcode, const uint8_t *payload, size_t size, uint32_t mask
) noexcept nogil:
    """One final, masked frame of at most 65,535 bytes; `out` has room for the payload and its header."""
    cdef size_t at = 2
    out[0] = FIN_BIT | opcode
    if size < LENGTH_16:
        out[1] = <uint8_t> (MASK_BIT | size)
    else:
        out[1] = MASK_BIT | LENGTH_16
        out[2] = <uint8_t> (size >> 8)
        out[3] = <uint8_t> (size & 0xFF)
        at = 4
    memcpy(out + at, &mask, 4)
    memcpy(out + at + 4, payload, size)
    unmask(out + at + 4, size, out + at, 0)
    return at + 4 + size
