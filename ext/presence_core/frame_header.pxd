# Headers of frames that a client sends (RFC 6455 section 5.2): pure functions of the bytes there are so far.

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from presence_core.frames cimport (
    FRAME_CONTROL_MAX_BYTES,
    OPCODE_BINARY,
    OPCODE_CLOSE,
    OPCODE_CONTINUATION,
    OPCODE_PONG,
)

cdef enum:
    CLOSE_PROTOCOL_ERROR = 1002
    CLOSE_NO_STATUS = 1005
    CLOSE_INVALID_DATA = 1007
    CLOSE_MESSAGE_TOO_BIG = 1009

cdef enum:
    CLIENT_HEADER_MAX_BYTES = 14
    FIN_BIT = 0x80
    RESERVED_BITS = 0x70
    OPCODE_BITS = 0x0F
    CONTROL_BIT = 0x08
    MASK_BIT = 0x80
    LENGTH_BITS = 0x7F
    LENGTH_16 = 126
    LENGTH_64 = 127

cdef enum:  # outcomes of reading a header, beside the codes to close with
    HEADER_MORE = 0
    HEADER_DONE = 1
    HEADER_NO_MEMORY = 2

cdef struct frame_header:
    uint8_t opcode
    bint final              # of its message
    uint8_t mask[4]
    uint8_t size            # bytes of the header itself
    uint64_t payload_bytes


cdef inline bint is_close_code(unsigned int code) noexcept nogil:
    """Whether an endpoint may send it: RFC 6455 section 7.4 and IANA's registry; 1004 to 1006 and 1015 never travel."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


cdef inline size_t header_bytes(const uint8_t *data, size_t size) noexcept nogil:
    """Bytes of the header, as far as `size` bytes of it tell."""
    if size < 2:
        return 2
    cdef unsigned int length = data[1] & LENGTH_BITS
    return 14 if length == LENGTH_64 else 8 if length == LENGTH_16 else 6


cdef inline bint is_first_byte_valid(uint8_t byte, uint8_t message_opcode) noexcept nogil:
    cdef uint8_t opcode = byte & OPCODE_BITS
    if byte & RESERVED_BITS:
        return False
    if opcode & CONTROL_BIT:
        return opcode <= OPCODE_PONG and (byte & FIN_BIT) != 0
    if opcode == OPCODE_CONTINUATION:
        return message_opcode != OPCODE_CONTINUATION
    return opcode <= OPCODE_BINARY and message_opcode == OPCODE_CONTINUATION


cdef inline bint is_second_byte_valid(uint8_t byte, uint8_t opcode) noexcept nogil:
    cdef uint8_t length = byte & LENGTH_BITS
    if not byte & MASK_BIT:
        return False
    if opcode & CONTROL_BIT and length > FRAME_CONTROL_MAX_BYTES:
        return False
    return not (opcode == OPCODE_CLOSE and length == 1)


cdef inline uint64_t read_length(const uint8_t *data, unsigned int count) noexcept nogil:
    cdef uint64_t length = 0
    cdef unsigned int i
    for i in range(count):
        length = length << 8 | data[i]
    return length


cdef inline int parse_header(
    const uint8_t *data,
    size_t size,
    uint8_t message_opcode,
    size_t message_bytes,
    size_t max_message_bytes,
    frame_header *frame,
) noexcept nogil:
    """HEADER_DONE and the header, HEADER_MORE, or the code to close with: for the first byte that is wrong.

    `message_opcode` and `message_bytes` are of the message under way; CONTINUATION: there is none.
    """
    cdef size_t needed = header_bytes(data, size)
    if size >= 1 and not is_first_byte_valid(data[0], message_opcode):
        return CLOSE_PROTOCOL_ERROR
    if size < 2:
        return HEADER_MORE
    frame.opcode = data[0] & OPCODE_BITS
    frame.final = (data[0] & FIN_BIT) != 0
    if not is_second_byte_valid(data[1], frame.opcode):
        return CLOSE_PROTOCOL_ERROR
    if size < needed - 4:
        return HEADER_MORE
    frame.payload_bytes = data[1] & LENGTH_BITS
    if frame.payload_bytes == LENGTH_16:
        frame.payload_bytes = read_length(data + 2, 2)
        if frame.payload_bytes < LENGTH_16:
            return CLOSE_PROTOCOL_ERROR  # a shorter encoding exists
    elif frame.payload_bytes == LENGTH_64:
        frame.payload_bytes = read_length(data + 2, 8)
        if frame.payload_bytes >> 16 == 0 or frame.payload_bytes >> 63 != 0:
            return CLOSE_PROTOCOL_ERROR
    if not frame.opcode & CONTROL_BIT and (
        message_bytes > max_message_bytes or frame.payload_bytes > max_message_bytes - message_bytes
    ):
        return CLOSE_MESSAGE_TOO_BIG
    if size < needed:
        return HEADER_MORE
    memcpy(frame.mask, data + needed - 4, 4)
    frame.size = <uint8_t>needed
    return HEADER_DONE
