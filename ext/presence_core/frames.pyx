"""RFC 6455 framing, server side: a stream of bytes in, whole messages and control frames out.

It owns the bytes of an unfinished frame or message, and nothing at a message boundary. It knows no sockets, no time and
no Python objects below the test seam. No extension is ever negotiated, so all reserved bits are errors.

Every check is made at the byte that settles it, in byte order. So the events and the error depend on the stream alone,
never on how it was cut into pieces, and a peer learns of a bad or too long message before it has sent the rest.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree, PyMem_RawMalloc, PyMem_RawRealloc
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from presence_core.frame_header cimport (
    CLIENT_HEADER_MAX_BYTES,
    CLOSE_INVALID_DATA,
    CLOSE_NO_STATUS,
    CLOSE_PROTOCOL_ERROR,
    CONTROL_BIT,
    FIN_BIT,
    HEADER_DONE,
    HEADER_MORE,
    HEADER_NO_MEMORY,
    LENGTH_16,
    LENGTH_64,
    frame_header,
    header_bytes,
    is_close_code,
    parse_header,
    read_length,
)
from presence_core.payload cimport is_utf8, unmask, utf8_feed, utf8_state

cdef enum:
    MESSAGE_MIN_BYTES = 256  # first allocation for a message whose length is not known yet

cdef struct frame_partial:
    uint8_t *message        # payloads of the data frames so far, unmasked
    size_t message_bytes
    size_t capacity
    uint64_t received       # payload bytes of the current frame
    frame_header frame      # the current one
    bint in_payload         # its header is complete
    bint finished           # the event that points in here was returned: the next call frees it all
    uint8_t message_opcode  # CONTINUATION: no message is under way
    uint64_t fragments      # of the message under way, completed
    utf8_state utf8
    uint8_t kept            # bytes in `header`
    uint8_t header[CLIENT_HEADER_MAX_BYTES]
    uint8_t control[FRAME_CONTROL_MAX_BYTES]


# Memory: a partial exists only between the first byte of a frame and the last byte of its message.

cdef inline frame_partial *take_partial(frame_decoder *decoder) noexcept nogil:
    if decoder.partial == NULL:
        decoder.partial = <frame_partial *>PyMem_RawCalloc(1, sizeof(frame_partial))
    return decoder.partial


cdef bint reserve(frame_partial *partial, size_t more_bytes, size_t max_message_bytes) noexcept nogil:
    """Room for more payload: grown by doubling as bytes arrive, never to more than the message can still become."""
    cdef size_t needed = partial.message_bytes + more_bytes
    cdef size_t capacity = 2 * partial.capacity
    cdef size_t bound = max_message_bytes
    cdef uint8_t *message
    if needed <= partial.capacity:
        return True
    if partial.frame.final:
        bound = partial.message_bytes + <size_t>(partial.frame.payload_bytes - partial.received)
    if capacity < MESSAGE_MIN_BYTES:
        capacity = MESSAGE_MIN_BYTES
    if capacity > bound:
        capacity = bound
    if capacity < needed:
        capacity = needed
    message = <uint8_t *>PyMem_RawRealloc(partial.message, capacity)
    if message == NULL:
        return False
    partial.message = message
    partial.capacity = capacity
    return True


cdef void decoder_init(frame_decoder *decoder) noexcept nogil:
    """A decoder at a message boundary."""
    decoder.partial = NULL


cdef void decoder_free(frame_decoder *decoder) noexcept nogil:
    """Give back what it holds, in any state; it is then as new."""
    if decoder.partial != NULL:
        PyMem_RawFree(decoder.partial.message)
        PyMem_RawFree(decoder.partial)
        decoder.partial = NULL


cdef size_t decoder_memory(const frame_decoder *decoder) noexcept nogil:
    """Bytes allocated for the unfinished frame or message; 0 at a message boundary."""
    if decoder.partial == NULL:
        return 0
    return sizeof(frame_partial) + decoder.partial.capacity


# Decoding.

cdef inline decode_status fail(frame_event *event, unsigned int close_code) noexcept nogil:
    event.close_code = <uint16_t>close_code
    return DECODE_ERROR


cdef decode_status complete_control(
    frame_event *event, uint8_t opcode, const uint8_t *payload, size_t size
) noexcept nogil:
    event.opcode = opcode
    event.payload = payload
    event.size = size
    if opcode != OPCODE_CLOSE:
        return DECODE_EVENT
    if size < 2:
        event.close_code = CLOSE_NO_STATUS
        return DECODE_EVENT
    event.close_code = <uint16_t>read_length(payload, 2)
    event.payload = payload + 2
    event.size = size - 2
    if not is_close_code(event.close_code):
        return fail(event, CLOSE_PROTOCOL_ERROR)
    if not is_utf8(event.payload, event.size):
        return fail(event, CLOSE_INVALID_DATA)
    return DECODE_EVENT


cdef decode_status take_whole(
    frame_decoder *decoder, const frame_header *frame, uint8_t *payload, frame_event *event
) noexcept nogil:
    """A control frame or a message of one frame, whole in the input: unmasked there, nothing is copied."""
    cdef size_t size = <size_t>frame.payload_bytes
    unmask(payload, size, frame.mask, 0)
    if decoder.partial != NULL:
        if decoder.partial.message_opcode == OPCODE_CONTINUATION:
            decoder_free(decoder)  # it held the first bytes of this header only
        else:
            decoder.partial.kept = 0
    if frame.opcode & CONTROL_BIT:
        return complete_control(event, frame.opcode, payload, size)
    if frame.opcode == OPCODE_TEXT and not is_utf8(payload, size):
        return fail(event, CLOSE_INVALID_DATA)
    event.opcode = frame.opcode
    event.payload = payload
    event.size = size
    return DECODE_EVENT


cdef inline int parse_next(
    const frame_partial *partial, const uint8_t *data, size_t size, size_t max_message_bytes, frame_header *frame
) noexcept nogil:
    if partial == NULL:
        return parse_header(data, size, OPCODE_CONTINUATION, 0, max_message_bytes, frame)
    return parse_header(data, size, partial.message_opcode, partial.message_bytes, max_message_bytes, frame)


cdef int read_header(
    frame_decoder *decoder,
    size_t max_message_bytes,
    const uint8_t *data,
    size_t size,
    size_t *used,
    frame_header *frame,
) noexcept nogil:
    """As parse_header(), or HEADER_NO_MEMORY: keeps what there is of an incomplete header."""
    cdef frame_partial *partial = decoder.partial
    cdef int outcome
    cdef size_t more
    if partial == NULL or partial.kept == 0:
        outcome = parse_next(partial, data + used[0], size - used[0], max_message_bytes, frame)
        if outcome == HEADER_DONE:
            used[0] += frame.size
        if outcome != HEADER_MORE or used[0] == size:
            return outcome
        partial = take_partial(decoder)
        if partial == NULL:
            return HEADER_NO_MEMORY
    while used[0] < size:
        more = header_bytes(partial.header, partial.kept) - partial.kept
        if more > size - used[0]:
            more = size - used[0]
        memcpy(partial.header + partial.kept, data + used[0], more)
        partial.kept += <uint8_t>more
        used[0] += more
        outcome = parse_next(partial, partial.header, partial.kept, max_message_bytes, frame)
        if outcome != HEADER_MORE:
            return outcome
    return HEADER_MORE


cdef inline bint is_whole(const frame_header *frame) noexcept nogil:
    """Whether the frame is an event by itself, given that all of it is here."""
    if frame.opcode & CONTROL_BIT:
        return True
    return frame.final and frame.opcode != OPCODE_CONTINUATION


cdef bint begin_payload(frame_decoder *decoder, const frame_header *frame) noexcept nogil:
    """Make ready to store the payload of a frame; false: no memory."""
    cdef frame_partial *partial = take_partial(decoder)
    if partial == NULL:
        return False
    partial.frame = frame[0]
    partial.received = 0
    partial.in_payload = True
    if not frame.opcode & CONTROL_BIT and frame.opcode != OPCODE_CONTINUATION:
        partial.message_opcode = frame.opcode
    return True


cdef decode_status complete_frame(frame_partial *partial, frame_event *event) noexcept nogil:
    """The end of a frame that was stored: DECODE_NEED_MORE when its message goes on."""
    partial.in_payload = False
    partial.kept = 0
    if partial.frame.opcode & CONTROL_BIT:
        partial.finished = partial.message_opcode == OPCODE_CONTINUATION
        return complete_control(event, partial.frame.opcode, partial.control, <size_t>partial.frame.payload_bytes)
    if not partial.frame.final:
        partial.fragments += 1
        event.excess += partial.fragments > FRAGMENTS_FREE
        return DECODE_NEED_MORE
    if partial.utf8.missing:
        return fail(event, CLOSE_INVALID_DATA)
    partial.finished = True
    event.opcode = partial.message_opcode
    event.payload = partial.message if partial.message_bytes else partial.control
    event.size = partial.message_bytes
    return DECODE_EVENT


cdef decode_status read_payload(
    frame_partial *partial, size_t max_message_bytes, const uint8_t *data, size_t size, size_t *used, frame_event *event
) noexcept nogil:
    """Store what there is of the current frame's payload."""
    cdef frame_header *frame = &partial.frame
    cdef size_t count = size - used[0]
    cdef uint8_t *stored
    if count > frame.payload_bytes - partial.received:
        count = <size_t>(frame.payload_bytes - partial.received)
    if count:
        if frame.opcode & CONTROL_BIT:
            stored = partial.control + <size_t>partial.received
        else:
            if not reserve(partial, count, max_message_bytes):
                return DECODE_NO_MEMORY
            stored = partial.message + partial.message_bytes
            partial.message_bytes += count
        memcpy(stored, data + used[0], count)
        unmask(stored, count, frame.mask, partial.received)
        partial.received += count
        used[0] += count
        if not frame.opcode & CONTROL_BIT and partial.message_opcode == OPCODE_TEXT:
            if not utf8_feed(&partial.utf8, stored, count):
                return fail(event, CLOSE_INVALID_DATA)
    if partial.received < frame.payload_bytes:
        return DECODE_NEED_MORE
    return complete_frame(partial, event)


cdef decode_status decoder_next(
    frame_decoder *decoder, size_t max_message_bytes, uint8_t *data, size_t size, size_t *used, frame_event *event
) noexcept nogil:
    """Decode up to one event from `data`, which it may unmask in place; `used` says how much of it is done with.

    Call it until it returns DECODE_NEED_MORE: the memory of an event that was put together from pieces is freed by the
    call after it. At a message boundary a frame that is whole in `data` costs no allocation.
    """
    cdef frame_header frame
    cdef int outcome
    cdef decode_status status
    used[0] = 0
    event.opcode = OPCODE_CONTINUATION
    event.close_code = 0
    event.frames = 0
    event.excess = 0
    event.payload = NULL
    event.size = 0
    if decoder.partial != NULL and decoder.partial.finished:
        decoder_free(decoder)
    while True:
        if decoder.partial == NULL or not decoder.partial.in_payload:
            outcome = read_header(decoder, max_message_bytes, data, size, used, &frame)
            if outcome == HEADER_MORE:
                return DECODE_NEED_MORE
            if outcome == HEADER_NO_MEMORY:
                return DECODE_NO_MEMORY
            if outcome != HEADER_DONE:
                return fail(event, <unsigned int>outcome)
            event.frames += 1
            if frame.payload_bytes <= size - used[0] and is_whole(&frame):
                used[0] += <size_t>frame.payload_bytes
                return take_whole(decoder, &frame, data + used[0] - <size_t>frame.payload_bytes, event)
            if not begin_payload(decoder, &frame):
                return DECODE_NO_MEMORY
        status = read_payload(decoder.partial, max_message_bytes, data, size, used, event)
        if status != DECODE_NEED_MORE or decoder.partial.in_payload:
            return status


# Encoding: a server's frames are final and not masked.

cdef size_t frame_write_header(uint8_t *out, uint8_t opcode, uint64_t payload_bytes) noexcept nogil:
    """Write the header of an unfragmented frame, at most FRAME_HEADER_MAX_BYTES; returns its size in bytes."""
    cdef unsigned int length_bytes, i
    out[0] = FIN_BIT | opcode
    if payload_bytes < LENGTH_16:
        out[1] = <uint8_t>payload_bytes
        return 2
    length_bytes = 2 if payload_bytes < 65536 else 8
    out[1] = LENGTH_16 if length_bytes == 2 else LENGTH_64
    for i in range(length_bytes):
        out[2 + i] = <uint8_t>(payload_bytes >> (8 * (length_bytes - 1 - i)))
    return 2 + length_bytes


cdef bytes build_frame(int opcode, const void *payload, Py_ssize_t size):
    cdef uint8_t[FRAME_HEADER_MAX_BYTES] header
    cdef size_t prefix
    cdef bytes frame
    if opcode not in (OPCODE_TEXT, OPCODE_BINARY, OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG):
        raise ValueError(f"no frame has opcode {opcode}")
    if opcode & CONTROL_BIT and size > FRAME_CONTROL_MAX_BYTES:
        raise ValueError(f"a control frame carries at most {FRAME_CONTROL_MAX_BYTES} bytes, not {size}")
    prefix = frame_write_header(header, <uint8_t>opcode, <uint64_t>size)
    frame = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>prefix + size)
    memcpy(PyBytes_AS_STRING(frame), header, prefix)
    if size:
        memcpy(PyBytes_AS_STRING(frame) + prefix, payload, <size_t>size)
    return frame


cpdef bytes encode_frame(int opcode, payload):
    cdef Py_ssize_t size = 0
    cdef const char *text
    cdef Py_buffer view
    if isinstance(payload, bytes):
        return build_frame(opcode, PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload))
    if isinstance(payload, str):
        text = PyUnicode_AsUTF8AndSize(payload, &size)
        return build_frame(opcode, text, size)
    PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
    try:
        return build_frame(opcode, view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


cpdef bytes encode_close(int code, bytes reason=b""):
    cdef uint8_t[FRAME_CONTROL_MAX_BYTES] payload
    cdef Py_ssize_t size = len(reason)
    if code == CLOSE_NO_STATUS and size == 0:
        return encode_frame(OPCODE_CLOSE, reason)
    if code < 0 or not is_close_code(<unsigned int>code):
        raise ValueError(f"close code {code} must not be sent")
    if size > FRAME_CONTROL_MAX_BYTES - 2:
        raise ValueError(f"a close reason has at most {FRAME_CONTROL_MAX_BYTES - 2} bytes, not {size}")
    if not is_utf8(<const uint8_t *>PyBytes_AS_STRING(reason), <size_t>size):
        raise ValueError("a close reason is UTF-8")
    payload[0] = <uint8_t>(code >> 8)
    payload[1] = <uint8_t>(code & 0xFF)
    memcpy(payload + 2, PyBytes_AS_STRING(reason), <size_t>size)
    return build_frame(OPCODE_CLOSE, payload, size + 2)


# The Python seam, for tests and benchmarks: the hub uses the functions above.

class ProtocolError(Exception):
    def __init__(self, close_code, events):
        super().__init__(f"the peer broke the protocol: close with {close_code}")
        self.close_code = close_code
        self.events = events


cdef class Decoder:
    cdef frame_decoder decoder
    cdef size_t max_message_bytes
    cdef readonly uint64_t frames
    cdef readonly bint finished

    def __cinit__(self, size_t max_message_bytes=65536):
        decoder_init(&self.decoder)
        self.max_message_bytes = max_message_bytes

    def __dealloc__(self):
        decoder_free(&self.decoder)

    def feed(self, bytes data not None):
        cdef size_t size = <size_t>PyBytes_GET_SIZE(data)
        # An allocation of exactly this size, so that AddressSanitizer sees a read past the input.
        cdef uint8_t *scratch = <uint8_t *>PyMem_RawMalloc(size if size else 1)
        if scratch == NULL:
            raise MemoryError
        try:
            memcpy(scratch, PyBytes_AS_STRING(data), size)
            return self.decode(scratch, size)
        finally:
            PyMem_RawFree(scratch)

    cdef list decode(self, uint8_t *data, size_t size):
        cdef list events = []
        cdef frame_event event
        cdef decode_status status
        cdef size_t used, at = 0
        while not self.finished:
            status = decoder_next(&self.decoder, self.max_message_bytes, data + at, size - at, &used, &event)
            at += used
            self.frames += event.frames
            if status == DECODE_NEED_MORE:
                break
            if status == DECODE_EVENT:
                events.append((event.opcode, (<const char *>event.payload)[:event.size], event.close_code))
            self.finished = status != DECODE_EVENT or event.opcode == OPCODE_CLOSE
            if self.finished:
                decoder_free(&self.decoder)
            if status == DECODE_ERROR:
                raise ProtocolError(event.close_code, events)
            if status == DECODE_NO_MEMORY:
                raise MemoryError
        return events

    @property
    def memory_bytes(self):
        return decoder_memory(&self.decoder)


# Benchmarks: a C loop each, since a Python call costs more than what is measured.

cdef inline uint64_t clock_ns() noexcept nogil:
    cdef timespec at
    clock_gettime(CLOCK_MONOTONIC, &at)
    return <uint64_t>at.tv_sec * 1_000_000_000 + <uint64_t>at.tv_nsec


def bench_decode(bytes frame not None, size_t rounds):
    cdef size_t size = <size_t>PyBytes_GET_SIZE(frame)
    cdef uint8_t *scratch = <uint8_t *>PyMem_RawMalloc(size if size else 1)
    cdef frame_decoder decoder
    cdef frame_event event
    cdef size_t used, _
    cdef size_t decoded = 0
    cdef uint64_t begun_ns
    if scratch == NULL:
        raise MemoryError
    decoder_init(&decoder)
    begun_ns = clock_ns()
    for _ in range(rounds):
        memcpy(scratch, PyBytes_AS_STRING(frame), size)  # decoding unmasks in place
        decoded += decoder_next(&decoder, size, scratch, size, &used, &event) == DECODE_EVENT
    begun_ns = clock_ns() - begun_ns
    decoder_free(&decoder)
    PyMem_RawFree(scratch)
    if decoded != rounds:
        raise ValueError("not one whole frame")
    return begun_ns / <double>rounds


def bench_encode(int opcode, bytes payload not None, size_t rounds):
    cdef uint64_t begun_ns = clock_ns()
    cdef size_t _
    for _ in range(rounds):
        encode_frame(opcode, payload)
    return (clock_ns() - begun_ns) / <double>rounds
