"""Bytes that arrive at a link: the answer to the upgrade, then frames, whole or in pieces.

Owns what is kept of a frame that is not whole. Knows nothing of what a frame says.

An arrival is the kernel's time stamp of the bytes (SO_TIMESTAMPNS), so that a swarm that reads late measures right all the
same; how late it reads is a figure of its own. Of bytes read together the stamp is the last one's: never too early.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from presence_core.frames cimport OPCODE_CLOSE, OPCODE_PING, OPCODE_TEXT
from presence_core.system cimport EPOLLERR, EPOLLHUP, EPOLLOUT, monotonic_ns
from presence_swarm.client_frames cimport SERVER_FRAME_BAD, SERVER_FRAME_MORE, read_server_frame, server_frame
from presence_swarm.durations cimport durations_add
from presence_swarm.hearing cimport on_close_frame, on_message, on_ping
from presence_swarm.life cimport (
    CODE_LOST,
    IS_PLAIN,
    LINK_CLOSED,
    LINK_DIALLING,
    LINK_UPGRADING,
    LINK_WAITING,
    MESSAGE_MAX_BYTES,
    READ_BYTES,
    end_link,
    link,
    on_answer,
    on_dialled,
    refuse,
    swarm,
)
from presence_swarm.sockets cimport receive_stamped


cdef size_t take_frames(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil:
    """Everything that is whole; returns the bytes taken. The link may be closed behind it."""
    cdef server_frame frame
    cdef size_t taken = 0
    cdef int status
    while line.state >= LINK_WAITING:
        status = read_server_frame(data + taken, size - taken, MESSAGE_MAX_BYTES, &frame)
        if status == SERVER_FRAME_MORE:
            break
        if status == SERVER_FRAME_BAD:
            s.now.violations += 1
            end_link(s, line, CODE_LOST, at_ns)
            break
        taken += frame.taken
        s.now.frames += 1
        s.now.payload_bytes += frame.size
        s.now.heard_last_ns = max(s.now.heard_last_ns, at_ns)
        if frame.opcode == OPCODE_TEXT and line.owner.behaviour != IS_PLAIN:
            on_message(s, line, frame.payload, frame.size, at_ns)
        elif frame.opcode == OPCODE_PING:
            on_ping(s, line, frame.payload, frame.size, at_ns)
        elif frame.opcode == OPCODE_CLOSE:
            on_close_frame(s, line, &frame, at_ns)
    return taken


cdef bint keep(link *line, const uint8_t *data, size_t size) noexcept nogil:
    """What is not whole waits for the rest, in memory of its own."""
    free(line.partial)
    line.partial = NULL
    line.partial_bytes = 0
    if size == 0:
        return True
    line.partial = <uint8_t *> malloc(size)
    if line.partial == NULL:
        return False
    memcpy(line.partial, data, size)
    line.partial_bytes = size
    return True


cdef void receive(swarm *s, link *line) noexcept nogil:
    cdef uint64_t stamp_ns = 0, now_ns
    cdef size_t kept = line.partial_bytes, size, taken = 0
    cdef ssize_t got
    if kept:
        memcpy(s.buffer, line.partial, kept)
    got = receive_stamped(line.fd, s.buffer + kept, READ_BYTES, &stamp_ns)
    now_ns = monotonic_ns()
    if got < 0 and (errno == EAGAIN or errno == EINTR):
        return
    if got <= 0:
        if line.state == LINK_UPGRADING:
            refuse(s, line)
        else:
            end_link(s, line, CODE_LOST, now_ns)
        return
    if stamp_ns > s.clock_offset_ns:
        stamp_ns = min(stamp_ns - s.clock_offset_ns, now_ns)  # the offset was taken a moment before
        durations_add(&s.now.lag, now_ns - stamp_ns)
    else:
        stamp_ns = now_ns
    s.now.bytes += <uint64_t> got
    size = kept + <size_t> got
    if line.state == LINK_UPGRADING:
        taken = on_answer(s, line, s.buffer, size, stamp_ns)
    if line.state >= LINK_WAITING:
        taken += take_frames(s, line, s.buffer + taken, size - taken, stamp_ns)
    if line.state != LINK_CLOSED and not keep(line, s.buffer + taken, size - taken):
        s.errno_seen = errno
        end_link(s, line, CODE_LOST, now_ns)


cdef void on_link_ready(swarm *s, link *line, uint32_t events) noexcept nogil:
    if line.state == LINK_CLOSED:
        return  # by an earlier event of this turn
    if line.state == LINK_DIALLING:
        if events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
            on_dialled(s, line)
        return
    receive(s, line)
