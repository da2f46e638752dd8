# RFC 6455 framing, server side: bytes in, messages out; no sockets, no Python objects below the test seam.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cpdef enum:
    OPCODE_CONTINUATION = 0x0
    OPCODE_TEXT = 0x1
    OPCODE_BINARY = 0x2
    OPCODE_CLOSE = 0x8
    OPCODE_PING = 0x9
    OPCODE_PONG = 0xA

cdef enum:
    FRAME_HEADER_MAX_BYTES = 10    # of a server's (unmasked) frame
    FRAME_CONTROL_MAX_BYTES = 125  # payload of a control frame, RFC 6455 section 5.5
    FRAGMENTS_FREE = 256           # so many fragments of a message, empty ones too, are nothing special

cdef enum decode_status:
    DECODE_NEED_MORE = 0  # all input was consumed, nothing is complete
    DECODE_EVENT = 1      # one message or control frame; call again with the rest of the input
    DECODE_ERROR = 2      # protocol violation: event.close_code says which; the decoder must not be fed again
    DECODE_NO_MEMORY = 3  # the partial message could not be stored; the decoder must not be fed again

cdef struct frame_partial  # what is kept of an unfinished message or frame, private to frames.pyx

cdef struct frame_decoder:
    frame_partial *partial  # NULL at a message boundary: an idle connection holds no memory here

cdef struct frame_event:
    uint8_t opcode          # TEXT, BINARY, CLOSE, PING or PONG (a message's first opcode)
    uint16_t close_code     # CLOSE: the peer's code, 1005 when it sent none; DECODE_ERROR: the code to close with
    uint32_t frames         # frame headers completed during this call, whatever it returned
    uint32_t excess         # fragments completed during it, beyond the first FRAGMENTS_FREE of their message
    # Unmasked; CLOSE: the reason, without the code. Valid until the next decoder call or decoder_free.
    const uint8_t *payload
    size_t size             # bytes

cdef void decoder_init(frame_decoder *decoder) noexcept nogil
cdef void decoder_free(frame_decoder *decoder) noexcept nogil
cdef size_t decoder_memory(const frame_decoder *decoder) noexcept nogil
cdef decode_status decoder_next(
    frame_decoder *decoder, size_t max_message_bytes, uint8_t *data, size_t size, size_t *used, frame_event *event
) noexcept nogil

cdef size_t frame_write_header(uint8_t *out, uint8_t opcode, uint64_t payload_bytes) noexcept nogil
cpdef bytes encode_frame(int opcode, payload)
cpdef bytes encode_close(int code, bytes reason=*)
