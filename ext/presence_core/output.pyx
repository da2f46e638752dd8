"""What a connection is sent: at once, or from its backlog when the socket takes more.

Knows nothing of what the frames say.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t
from libc.string cimport memset
from posix.uio cimport iovec

from presence_core.backlog cimport backlog_consume, backlog_fill, backlog_push, backlog_truncate
from presence_core.bulk cimport BULK_MAX, bulk_add, bulk_send
from presence_core.closing cimport drop
from presence_core.hub cimport (
    BACKLOG_VECTORS,
    CODE_INTERNAL_ERROR,
    CODE_LOST,
    Connection,
    Hub,
    NOTICE_BACKLOG,
    STATE_CLOSING,
    STATE_FINISHING,
    STATE_OPEN,
)
from presence_core.notices cimport notify
from presence_core.system cimport (
    EPOLLIN,
    EPOLLOUT,
    EPOLL_CTL_MOD,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SHUT_WR,
    epoll_ctl,
    epoll_event,
    msghdr,
    send,
    sendmsg,
    shutdown,
)


cdef int write(Hub hub, Connection c, bytes frames) noexcept:
    """Send, or queue behind what waits already. -1: the connection is gone."""
    cdef size_t size = <size_t> PyBytes_GET_SIZE(frames)
    cdef ssize_t sent
    if c.overflowed or size == 0:
        return 0
    if c.waiting.head == NULL:
        sent = send(c.fd, PyBytes_AS_STRING(frames), size, MSG_NOSIGNAL | MSG_DONTWAIT)
        return after_send(hub, c, frames, sent if sent >= 0 else -errno)
    if c._state == STATE_OPEN and c.waiting.pending_bytes + size > hub.max_backlog_bytes:
        # One item may pass the bound when nothing waited before it: a large event to a healthy member.
        refuse_backlog(hub, c)
        return 0
    return keep_rest(hub, c, frames, 0)


cdef int after_send(Hub hub, Connection c, bytes frames, ssize_t sent) noexcept:
    """`sent` bytes are with the kernel, or it is the negative errno; the rest waits. -1: the connection is gone."""
    hub.sends_out += 1
    if sent < 0:
        if sent != -EAGAIN and sent != -EINTR:
            drop(hub, c, CODE_LOST if c._state == STATE_OPEN else c.close_code)
            return -1
        sent = 0
    hub.bytes_out += <size_t> sent
    return 0 if sent == PyBytes_GET_SIZE(frames) else keep_rest(hub, c, frames, <size_t> sent)


cdef int keep_rest(Hub hub, Connection c, bytes frames, size_t sent) noexcept:
    if backlog_push(&c.waiting, <PyObject *> frames, sent) < 0 or poll_output(hub, c, True) < 0:
        drop(hub, c, CODE_INTERNAL_ERROR)
        return -1
    return 0


# --- the same bytes to many: `write`, but for the call

cdef bint can_take(Connection c) noexcept:
    """Whether `write` would send at once."""
    return c.waiting.head == NULL and not c.overflowed


cdef void add_to_bulk(Hub hub, Connection c, bytes frames) noexcept:
    """`write_together` must follow before anything else can close a descriptor or let the frames go."""
    hub.in_bulk[hub.ring.count] = <PyObject *> c
    bulk_add(&hub.ring, c.fd, PyBytes_AS_STRING(frames), <size_t> PyBytes_GET_SIZE(frames))


cdef void write_together(Hub hub, bytes frames) noexcept:
    cdef ssize_t[BULK_MAX] results
    cdef uint32_t i, count = hub.ring.count
    if count == 0:
        return
    bulk_send(&hub.ring, results)
    for i in range(count):
        after_send(hub, <Connection> hub.in_bulk[i], frames, results[i])


cdef void refuse_backlog(Hub hub, Connection c) noexcept:
    """Free what waits at once, but for the rest of a frame that is partly sent; the handler closes it soon."""
    hub.backlogs_refused += 1
    if backlog_truncate(&c.waiting) < 0:
        drop(hub, c, CODE_INTERNAL_ERROR)
        return
    c.overflowed = True
    notify(hub, c, NOTICE_BACKLOG)


cdef int flush(Hub hub, Connection c) noexcept:
    cdef iovec[BACKLOG_VECTORS] vectors
    cdef msghdr message
    cdef ssize_t sent
    memset(&message, 0, sizeof(message))
    message.msg_iov = vectors
    while c.waiting.head != NULL:
        message.msg_iovlen = <size_t> backlog_fill(&c.waiting, vectors, BACKLOG_VECTORS)
        sent = sendmsg(c.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        hub.sends_out += 1
        if sent < 0:
            if errno == EAGAIN or errno == EINTR:
                return 0
            drop(hub, c, CODE_LOST if c._state == STATE_OPEN else c.close_code)
            return -1
        hub.bytes_out += <size_t> sent
        backlog_consume(&c.waiting, <size_t> sent)
    if c._state == STATE_FINISHING:
        drop(hub, c, c.close_code)
        return 0
    if c.deaf:
        shutdown(c.fd, SHUT_WR)
    if poll_output(hub, c, False) < 0:
        drop(hub, c, CODE_INTERNAL_ERROR)
        return -1
    return 0


cdef int poll_output(Hub hub, Connection c, bint wanted) noexcept:
    if c.polling_out == wanted:
        return 0
    c.polling_out = wanted
    return watch(hub, c, input_events(hub, c) | (EPOLLOUT if wanted else 0), EPOLL_CTL_MOD)


cdef uint32_t input_events(Hub hub, Connection c) noexcept:
    return EPOLLIN if c._state == STATE_OPEN or c._state == STATE_CLOSING else 0


cdef int watch(Hub hub, Connection c, uint32_t events, int operation) noexcept:
    cdef epoll_event event
    event.events = events
    event.data.ptr = <void *> c
    return epoll_ctl(hub.epoll_fd, operation, c.fd, &event)
