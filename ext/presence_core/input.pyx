"""What a connection sends: reading, decoding, messages, pings and pongs, close frames, violations, limits.

Knows nothing of rooms or of what a handler makes of a message.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.string cimport memcmp, memcpy

from presence_core.closing cimport drop, fail, finish, start_closing
from presence_core.deadlines cimport schedule_ping
from presence_core.frames cimport (
    DECODE_ERROR,
    DECODE_EVENT,
    DECODE_NEED_MORE,
    FRAME_CONTROL_MAX_BYTES,
    FRAME_HEADER_MAX_BYTES,
    OPCODE_CLOSE,
    OPCODE_PING,
    OPCODE_PONG,
    decode_status,
    decoder_next,
    frame_event,
    frame_write_header,
)
from presence_core.histogram cimport histogram_observe
from presence_core.hub cimport (
    BEAT_PONG,
    CODE_INTERNAL_ERROR,
    CODE_LOST,
    Connection,
    FRAGMENTS_PER_TOKEN,
    Hub,
    READ_BUFFER_BYTES,
    STATE_CLOSE_RECEIVED,
    STATE_CLOSING,
    STATE_OPEN,
)
from presence_core.notices cimport failed, tell_limit
from presence_core.output cimport watch, write
from presence_core.system cimport (
    EPOLLOUT,
    EPOLL_CTL_MOD,
    MSG_DONTWAIT,
    NS_PER_MS,
    SHUT_WR,
    monotonic_ns,
    recv,
    shutdown,
)

from presence_core.names import LIMIT_MESSAGES, LIMIT_PINGS


cdef int receive(Hub hub, Connection c) except -1:
    cdef ssize_t received = recv(c.fd, hub.read_buffer, READ_BUFFER_BYTES, MSG_DONTWAIT)
    if received > 0:
        if c.deaf:
            return 0
        try:
            return decode(hub, c, hub.read_buffer, <size_t> received)
        except MemoryError:
            drop(hub, c, CODE_INTERNAL_ERROR)
            return 0
    if received < 0 and (errno == EAGAIN or errno == EINTR):
        return 0
    drop(hub, c, CODE_LOST if c._state == STATE_OPEN else c.close_code)
    return 0


cdef int decode(Hub hub, Connection c, uint8_t *data, size_t size) except -1:
    cdef size_t at = 0, used = 0
    cdef frame_event event
    cdef decode_status status
    while c._state == STATE_OPEN or c._state == STATE_CLOSING:
        used = 0
        status = decoder_next(&c.decoder, hub.max_message_bytes, data + at, size - at, &used, &event)
        at += used
        hub.frames_in += event.frames
        if event.excess and c._state == STATE_OPEN and not pay_fragments(hub, c, event.excess):
            tell_limit(hub, c, LIMIT_MESSAGES)
            if c._state != STATE_CLOSING:  # then the decoder is as it was, and the event too
                return 0
        if status == DECODE_NEED_MORE:
            return 0
        if status == DECODE_EVENT:
            on_frame(hub, c, &event)
        elif status == DECODE_ERROR:
            return on_violation(hub, c, event.close_code)
        else:
            return on_violation(hub, c, CODE_INTERNAL_ERROR)
    return 0


cdef int on_frame(Hub hub, Connection c, const frame_event *event) except -1:
    cdef object data
    if event.opcode == OPCODE_CLOSE:
        return on_peer_close(hub, c, event.close_code)
    if c._state != STATE_OPEN:  # behind our close frame nothing else counts
        return 0
    if event.opcode == OPCODE_PONG:
        return on_pong(hub, c, event)
    if not take_tokens(hub, c, event.opcode == OPCODE_PING, 1):
        return tell_limit(hub, c, LIMIT_PINGS if event.opcode == OPCODE_PING else LIMIT_MESSAGES)
    if event.opcode == OPCODE_PING:
        return send_pong(hub, c, event)
    hub.messages_in += 1
    data = PyBytes_FromStringAndSize(<const char *> event.payload, <Py_ssize_t> event.size)
    try:
        hub.handler.on_message(c, data, event.opcode)
    except BaseException as error:
        failed(hub, c, error)
    return 0


cdef int send_pong(Hub hub, Connection c, const frame_event *event) except -1:
    cdef uint8_t[FRAME_HEADER_MAX_BYTES + FRAME_CONTROL_MAX_BYTES] frame
    cdef size_t header = frame_write_header(frame, OPCODE_PONG, event.size)
    memcpy(&frame[header], event.payload, event.size)
    write(hub, c, PyBytes_FromStringAndSize(<char *> frame, <Py_ssize_t> (header + event.size)))
    return 0


cdef int on_pong(Hub hub, Connection c, const frame_event *event) except -1:
    cdef uint64_t round_trip_ns
    if c.beat != BEAT_PONG or event.size != sizeof(c.nonce) or memcmp(event.payload, &c.nonce, sizeof(c.nonce)):
        hub.stray_pongs += 1
        return 0 if take_tokens(hub, c, True, 1) else tell_limit(hub, c, LIMIT_PINGS)
    round_trip_ns = monotonic_ns() - c.ping_sent_ns
    c._rtt_us = <uint32_t> min(round_trip_ns // 1000 + 1, <uint64_t> 0xFFFFFFFF)
    histogram_observe(&hub.round_trip, round_trip_ns)
    hub.pongs_in += 1
    schedule_ping(hub, c)
    return 0


cdef bint pay_fragments(Hub hub, Connection c, uint32_t count) noexcept:
    """A message may come in pieces, of any size and without end: many of them cost as much as messages do."""
    return take_tokens(hub, c, False, <float> count / FRAGMENTS_PER_TOKEN)


@cython.overflowcheck(False)  # the milliseconds wrap after 49 days
cdef bint take_tokens(Hub hub, Connection c, bint control, float count) noexcept:
    """Of the bucket for messages and their fragments, or for pings and unasked pongs; False: it has not as many."""
    cdef uint32_t now_ms = <uint32_t> (monotonic_ns() // NS_PER_MS)
    cdef float passed_s = <float> (<uint32_t> (now_ms - c.bucket_ms)) / 1000
    c.bucket_ms = now_ms
    c.message_tokens = min(hub.message_burst, c.message_tokens + passed_s * hub.messages_per_s)
    c.ping_tokens = min(hub.ping_burst, c.ping_tokens + passed_s * hub.pings_per_s)
    if control:
        if c.ping_tokens < count:
            return False
        c.ping_tokens -= count
    else:
        if c.message_tokens < count:
            return False
        c.message_tokens -= count
    return True


cdef int on_violation(Hub hub, Connection c, int code) except -1:
    """_Fail the connection_ (RFC 6455 section 7.1.7): our close frame and the end of our stream; its own is not read on.

    What still comes is taken and forgotten until the peer has closed too: closing at once would reset the connection,
    and the close frame with it.
    """
    if c._state != STATE_OPEN:
        drop(hub, c, c.close_code)
        return 0
    c.deaf = True
    fail(hub, c, code)
    if c._state == STATE_CLOSING and c.waiting.head == NULL:
        shutdown(c.fd, SHUT_WR)
    try:
        hub.handler.on_violation(c, code)
    except BaseException as error:
        failed(hub, c, error)
    return 0


cdef int on_peer_close(Hub hub, Connection c, int code) except -1:
    if c._state == STATE_CLOSING:  # the answer to ours: the handshake is complete
        drop(hub, c, c.close_code)
        return 0
    c.close_code = code
    start_closing(hub, c, STATE_CLOSE_RECEIVED)
    # Nothing more is read: without this the end of the stream would wake the loop again and again.
    if watch(hub, c, EPOLLOUT if c.polling_out else 0, EPOLL_CTL_MOD) < 0:
        drop(hub, c, code)
        return 0
    try:
        hub.handler.on_close(c, code)
    except BaseException as error:
        failed(hub, c, error)
        finish(hub, c)
    return 0
