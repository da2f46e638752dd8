"""The hub: sockets, frames, deadlines and rooms on one epoll descriptor, with one handler object to call back.

Owns the descriptors handed to it, every deadline of theirs, what waits to be written and the order of events in a room.
Knows nothing of classrooms, NATS or SQL, nor of asyncio: whoever drives it watches ``fileno()`` and calls ``turn``.
Python is called for each message, limit, deadline and closed connection; never for a delivery, a ping or a pong.

Three rules keep memory safe. A connection is an object: the hub holds one reference from ``adopt`` until ``on_closed`` has
returned, and gives it back only when the events of the turn have been worked off; a ``close`` of the hub inside a turn ends
with it. Loops over timers, members or queues never call Python: they note what is to be told, and ``run_notices`` tells it
when the loop is over. And whatever may run a finaliser is let go last, when all else is in order.

No callback ends a turn: what it raises ends its connection, and what is no Exception is raised again behind the turn. A
connection that memory does not suffice for is dropped, nobody else notices.
"""

import os

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc, PyMem_RawRealloc
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF, Py_XINCREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.math cimport ceil, isnan
from libc.string cimport memcmp, memcpy, memmove, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, itimerspec, timespec
from posix.uio cimport iovec
from posix.unistd cimport close, read
from posix.unistd cimport write as write_fd

from presence_core.backlog cimport (
    backlog_clear,
    backlog_consume,
    backlog_fill,
    backlog_init,
    backlog_push,
    backlog_truncate,
)
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
    decoder_free,
    decoder_init,
    decoder_next,
    encode_close,
    frame_write_header,
)
from presence_core.histogram cimport histogram_observe, histogram_read
from presence_core.members cimport (
    members_add,
    members_begin_pass,
    members_free,
    members_in_pass,
    members_init,
    members_next,
    members_remove,
)
from presence_core.wheel cimport (
    WHEEL_NEVER,
    wheel_entry_init,
    wheel_init,
    wheel_next,
    wheel_pop,
    wheel_start,
    wheel_stop,
)

cdef extern from "<sys/epoll.h>" nogil:
    """
    #include <sys/eventfd.h>
    #include <sys/socket.h>
    #include <sys/timerfd.h>
    """
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    enum: EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)
    enum: EFD_NONBLOCK, EFD_CLOEXEC
    int eventfd(unsigned int initval, int flags)
    enum: TFD_NONBLOCK, TFD_CLOEXEC, TFD_TIMER_ABSTIME
    int timerfd_create(int clockid, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new_value, itimerspec *old_value)
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    enum: MSG_NOSIGNAL, MSG_DONTWAIT, SHUT_WR
    int shutdown(int fd, int how)
    ssize_t send(int fd, const void *buf, size_t n, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t recv(int fd, void *buf, size_t n, int flags)

cdef enum:
    NS_PER_MS = 1_000_000
    PING_FRAME_BYTES = 10       # two of header, eight of nonce
    EVENTS_KEPT = 16            # an empty room keeps no more memory for events than this
    NOTICES_ALL = 31
    TIMER_SLICE_NS = 4_000_000  # after a long stall everything is due at once: sockets get their turn in between
    CODE_NONE = 1005            # RFC 6455 section 7.4.1: the close frame had no code
    CODE_LOST = 1006            # and: there was no close frame
    CODE_INTERNAL_ERROR = 1011
    CODE_GOING_AWAY = 1001
    CODE_POLICY_VIOLATION = 1008

# What Python calls the constants of the .pxd.
DEADLINE_ALARM = "alarm"
DEADLINE_PONG = "pong"
LIMIT_BACKLOG = "backlog"
LIMIT_MESSAGES = "messages"
LIMIT_PINGS = "pings"
cdef double ALARM_MAX_MS = 2.0**48  # further away there is nothing to tell apart
cdef bytes EMPTY_CLOSE_FRAME = b"\x88\x00"
STATE_NAMES = ("new", "open", "closing", "close_received", "finishing", "closed")


cdef inline uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1_000_000_000 + <uint64_t> now.tv_nsec


cdef void report(object error) noexcept:
    """To sys.unraisablehook, as all that a function raises which must not."""
    raise error


def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds: what ``Room.broadcast`` takes as ``received_ns``."""
    return monotonic_ns()


# --- rooms ----------------------------------------------------------------------------------------------------------

cdef int events_push(event_list *events, room_event *event) except -1:
    """Append; the references of ``event`` are the list's from then on. Raises MemoryError, and changes nothing."""
    cdef size_t capacity
    cdef room_event *items
    if events.start and events.end == events.capacity:  # reclaim what has been taken from the front
        memmove(events.items, events.items + events.start, (events.end - events.start) * sizeof(room_event))
        events.end -= events.start
        events.start = 0
    if events.end == events.capacity:
        capacity = events.capacity * 2 if events.capacity else 4
        items = <room_event *> PyMem_RawRealloc(events.items, capacity * sizeof(room_event))
        if items == NULL:
            raise MemoryError
        events.items = items
        events.capacity = capacity
    events.items[events.end] = event[0]
    events.end += 1
    return 0


cdef void events_drop_first(event_list *events) noexcept:
    """Its objects go last: a finaliser may push to this list."""
    cdef room_event event = events.items[events.start]
    events.start += 1
    if events.start == events.end:
        events.start = events.end = 0
        if events.capacity > EVENTS_KEPT:
            events_free(events)
    Py_DECREF(<object> event.frame)
    Py_XDECREF(event.exclude)
    Py_XDECREF(event.only)


cdef void events_free(event_list *events) noexcept:
    PyMem_RawFree(events.items)
    memset(events, 0, sizeof(event_list))


@cython.final
cdef class Room:
    """Connections that hear the same events, each in the same order. Made by ``Hub.new_room``."""

    def __cinit__(self):
        members_init(&self.members)
        memset(&self.events, 0, sizeof(event_list))

    def __dealloc__(self):
        members_free(&self.members)
        self.forget_events()
        events_free(&self.events)

    def __len__(self):
        return <Py_ssize_t> self.members.count

    def broadcast(self, bytes frame not None, *, Connection exclude=None, Connection only=None, received_ns=None) -> bool:
        cdef uint64_t received = monotonic_ns() if received_ns is None else received_ns
        if self.members.count == 0:
            return True
        if self.queued_bytes and self.queued_bytes + <size_t> PyBytes_GET_SIZE(frame) > self.hub.max_room_queue_bytes:
            self.overflowed = True
            self.hub.events_refused += 1
            return False
        self.enqueue(
            frame,
            NULL if exclude is None else <PyObject *> exclude,
            NULL if only is None else <PyObject *> only,
            received,
        )
        return True

    cdef int enqueue(self, bytes frame, PyObject *exclude, PyObject *only, uint64_t received_ns) except -1:
        cdef room_event event
        event.frame = <PyObject *> frame
        event.exclude = exclude
        event.only = only
        event.received_ns = received_ns
        event.number = self.next_number
        events_push(&self.events, &event)
        Py_INCREF(frame)
        Py_XINCREF(exclude)
        Py_XINCREF(only)
        self.next_number += 1
        self.queued_bytes += <size_t> PyBytes_GET_SIZE(frame)
        self.hub.events_queued += 1
        self.hub.activate(self)
        return 0

    cdef void begin_pass(self) noexcept:
        """Take what waits, up to BATCH_MAX_BYTES, and join it into what most members get in one send."""
        cdef size_t i, size, taken = 0, count = 0
        cdef size_t waiting = self.events.end - self.events.start
        while count < waiting:
            size = <size_t> PyBytes_GET_SIZE(<object> self.events.items[self.events.start + count].frame)
            if count and taken + size > BATCH_MAX_BYTES:
                break
            taken += size
            count += 1
        try:
            self.common = self.join(count)
        except MemoryError:  # one event alone needs none
            count = 1
            taken = <size_t> PyBytes_GET_SIZE(<object> self.events.items[self.events.start].frame)
            if self.events.items[self.events.start].only == NULL:
                self.common = <bytes> self.events.items[self.events.start].frame
        self.batched = count
        self.queued_bytes -= taken
        self.name(1)
        members_begin_pass(&self.members)

    cdef bytes join(self, size_t count):
        """The first events as those get them whom none of them names; None: nothing."""
        cdef list shared = []
        cdef size_t i
        for i in range(self.events.start, self.events.start + count):
            if self.events.items[i].only == NULL:
                shared.append(<object> self.events.items[i].frame)
        if not shared:
            return None
        return shared[0] if len(shared) == 1 else b"".join(shared)

    cdef void name(self, int by) noexcept:
        """Mark those whom an event of the batch names: only they, and newcomers, are served event by event."""
        cdef size_t i
        cdef room_event *event
        for i in range(self.batched):
            event = &self.events.items[self.events.start + i]
            if event.exclude != NULL:
                (<Connection> event.exclude).named += by
            if event.only != NULL:
                (<Connection> event.only).named += by

    cdef void end_pass(self, uint64_t now_ns) noexcept:
        cdef uint64_t received
        self.name(-1)
        self.common = None
        while self.batched:
            received = self.events.items[self.events.start].received_ns
            histogram_observe(&self.hub.delivery, now_ns - received if now_ns > received else 0)
            self.batched -= 1
            events_drop_first(&self.events)

    cdef void forget_events(self) noexcept:
        """Those of a pass under way too: the room is at its end, or its hub is."""
        self.name(-1)
        self.common = None
        self.batched = 0
        self.queued_bytes = 0
        while self.events.end:
            events_drop_first(&self.events)


# --- connections ----------------------------------------------------------------------------------------------------

cdef class Connection:
    """One socket. Subclass it (with ``__slots__``) to hang a session on it; ``Hub.adopt`` brings it to life."""

    def __cinit__(self):
        self.fd = -1
        wheel_entry_init(&self.beat_entry)
        wheel_entry_init(&self.alarm_entry)
        self.beat_entry.kind = ENTRY_BEAT
        self.alarm_entry.kind = ENTRY_ALARM
        decoder_init(&self.decoder)
        backlog_init(&self.waiting)
        self.membership.owner = <void *> self
        self.registration.owner = <void *> self

    def __dealloc__(self):
        decoder_free(&self.decoder)
        backlog_clear(&self.waiting)

    @property
    def state(self) -> str:
        return STATE_NAMES[self._state]

    @property
    def is_open(self) -> bool:
        return self._state == STATE_OPEN

    @property
    def room(self):
        return self._room

    @property
    def backlog_bytes(self) -> int:
        return self.waiting.pending_bytes

    @property
    def round_trip_s(self):
        return self._rtt_us / 1e6 if self._rtt_us else None

    def send(self, bytes frames not None) -> bool:
        if self._state != STATE_OPEN:
            return False
        self.hub.write(self, frames)
        return self._state == STATE_OPEN and not self.overflowed

    def join(self, Room room not None) -> None:
        if self._state != STATE_OPEN:
            raise ValueError("only an open connection can join a room")
        if room.hub is not self.hub:
            raise ValueError("the room belongs to another hub")
        if self._room is not None:
            raise ValueError("the connection is in a room already")
        if members_add(&room.members, &self.membership) < 0:
            raise MemoryError
        self._room = room
        self.joined_number = room.next_number

    def leave(self) -> None:
        leave_room(self)

    def start_heartbeat(self) -> None:
        if self._state != STATE_OPEN:
            return
        self.beat = BEAT_PING
        self.ping_due_tick = self.hub.tick() + 1 + self.hub.random() % self.hub.ping_interval_ticks
        wheel_start(&self.hub.timers, &self.beat_entry, self.ping_due_tick)
        self.hub.arm()

    def set_alarm(self, delay_ms) -> None:
        cdef double delay
        cdef uint64_t ticks
        if self._state != STATE_OPEN:
            return
        if delay_ms is None:
            self.notices &= NOTICES_ALL ^ NOTICE_ALARM
            wheel_stop(&self.hub.timers, &self.alarm_entry)
            return
        delay = delay_ms
        if isnan(delay):
            raise ValueError("a delay is a number")
        ticks = <uint64_t> ceil(min(max(delay, 0.0), ALARM_MAX_MS) / TICK_MS)
        self.notices &= NOTICES_ALL ^ NOTICE_ALARM  # one that has fired and is not told yet is this one's past
        # One tick more: the tick under way has partly passed, and a deadline never fires early.
        wheel_start(&self.hub.timers, &self.alarm_entry, self.hub.tick() + ticks + 1)
        self.hub.arm()

    def close(self, int code=1000, bytes reason not None=b"", bytes message=None) -> bool:
        if self._state == STATE_CLOSE_RECEIVED:
            self.hub.finish(self)
            return False
        if self._state != STATE_OPEN:
            return False
        self.hub.begin_close(self, code, reason, message)
        return True

    def finish(self) -> None:
        if self._state == STATE_CLOSE_RECEIVED:
            self.hub.finish(self)

    def abort(self) -> None:
        if STATE_NEW < self._state < STATE_CLOSED:
            self.hub.drop(self, CODE_LOST)


cdef void leave_room(Connection c) noexcept:
    """The room may go with its last member, and run a finaliser: callers that are in the middle of something hold it."""
    cdef Room room = c._room
    if room is not None:
        members_remove(&room.members, &c.membership)
        c._room = None


cdef size_t BEAT_OFFSET, ALARM_OFFSET


cdef int measure_offsets() except -1:
    """Where the wheel entries lie in a Connection: the way back from an expired entry to its object."""
    global BEAT_OFFSET, ALARM_OFFSET
    cdef Connection probe = Connection()
    BEAT_OFFSET = <size_t> &probe.beat_entry - <size_t> <PyObject *> probe
    ALARM_OFFSET = <size_t> &probe.alarm_entry - <size_t> <PyObject *> probe
    return 0


measure_offsets()


# --- the hub --------------------------------------------------------------------------------------------------------

cdef class Hub:
    """See the .pyi for what the arguments mean."""

    def __cinit__(self):
        self.epoll_fd = self.timer_fd = self.event_fd = -1
        self.armed_tick = WHEEL_NEVER
        members_init(&self.everyone)
        self.read_buffer = NULL

    def __init__(
        self,
        handler,
        *,
        size_t max_message_bytes=65_536,
        size_t max_backlog_bytes=262_144,
        size_t max_room_queue_bytes=8_388_608,
        ping_interval_ms=30_000,
        pong_timeout_ms=5_000,
        close_timeout_ms=2_000,
        slice_us=1_000,
        messages_per_s=10.0,
        message_burst=50,
        pings_per_s=2.0,
        ping_burst=20,
        seed=None,
    ):
        if self.epoll_fd != -1:
            raise RuntimeError("a hub is initialised once")
        if not (0 < pong_timeout_ms < ping_interval_ms and close_timeout_ms > 0):
            raise ValueError("timeouts are positive, and the pong timeout is shorter than the ping interval")
        self.handler = handler
        self.max_message_bytes = max_message_bytes
        self.max_backlog_bytes = max_backlog_bytes
        self.max_room_queue_bytes = max_room_queue_bytes
        self.ping_interval_ticks = max(1, round(ping_interval_ms / TICK_MS))
        self.pong_timeout_ticks = max(1, round(pong_timeout_ms / TICK_MS))
        self.close_timeout_ticks = max(1, round(close_timeout_ms / TICK_MS))
        self.slice_ns = slice_us * 1000
        self.messages_per_s = messages_per_s
        self.message_burst = message_burst
        self.pings_per_s = pings_per_s
        self.ping_burst = ping_burst
        self.random_state = (int.from_bytes(os.urandom(8)) if seed is None else seed) | 1
        self.start_ns = monotonic_ns()
        wheel_init(&self.timers, 0)
        self.read_buffer = <uint8_t *> PyMem_RawMalloc(READ_BUFFER_BYTES)
        if self.read_buffer == NULL:
            raise MemoryError
        self.open_descriptors()

    cdef int open_descriptors(self) except -1:
        cdef epoll_event event
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        self.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.epoll_fd < 0 or self.timer_fd < 0 or self.event_fd < 0:
            raise OSError(errno, os.strerror(errno))
        event.events = EPOLLIN
        event.data.ptr = &self.timer_fd
        if epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, self.timer_fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        event.data.ptr = &self.event_fd
        if epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, self.event_fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        return 0

    cdef void close_descriptors(self) noexcept:
        if self.epoll_fd >= 0:
            close(self.epoll_fd)
        if self.timer_fd >= 0:
            close(self.timer_fd)
        if self.event_fd >= 0:
            close(self.event_fd)
        self.epoll_fd = self.timer_fd = self.event_fd = -1

    def __dealloc__(self):
        self.close_descriptors()
        members_free(&self.everyone)
        PyMem_RawFree(self.read_buffer)

    def __len__(self):
        return <Py_ssize_t> self.everyone.count

    def fileno(self) -> int:
        return self.epoll_fd

    def new_room(self, tag=None) -> Room:
        cdef Room room = Room.__new__(Room)
        room.hub = self
        room.tag = tag
        return room

    def members(self) -> list:
        return [<Connection> self.everyone.items[i].owner for i in range(self.everyone.count)]

    def adopt(self, Connection c not None, int fd, bytes head not None=b"") -> None:
        cdef bint inside = self.turning
        cdef int error
        if c._state != STATE_NEW or self.epoll_fd < 0 or self.closing:
            close(fd)
            raise ValueError("a connection is adopted once, by an open hub")
        if members_add(&self.everyone, &c.registration) < 0:
            close(fd)
            raise MemoryError
        c.hub = self
        c.fd = fd
        if self.watch(c, EPOLLIN, EPOLL_CTL_ADD) < 0:
            error = errno
            members_remove(&self.everyone, &c.registration)
            c.fd = -1
            close(fd)
            raise OSError(error, os.strerror(error))
        Py_INCREF(c)  # until on_closed has returned
        c._state = STATE_OPEN
        self.open_count += 1
        c.message_tokens = self.message_burst
        c.ping_tokens = self.ping_burst
        c.bucket_ms = <uint32_t> (monotonic_ns() // NS_PER_MS)
        self.turning = True  # as in a turn: a turn inside would read on before the head is decoded
        try:
            self.open(c, head)
        finally:
            self.turning = inside
            if not inside:
                self.end_turn()
        if not inside:
            self.raise_held()

    cdef int open(self, Connection c, bytes head) except -1:
        """Tell the handler, then decode what came in the same packets as the upgrade request."""
        cdef size_t size = <size_t> PyBytes_GET_SIZE(head)
        cdef uint8_t *copy
        try:
            self.handler.on_open(c)
        except BaseException as error:
            self.failed(c, error)
        if size == 0:
            return 0
        copy = <uint8_t *> PyMem_RawMalloc(size)  # frames are unmasked in place
        if copy == NULL:
            self.drop(c, CODE_INTERNAL_ERROR)
            return 0
        memcpy(copy, PyBytes_AS_STRING(head), size)
        try:
            self.decode(c, copy, size)
        except MemoryError:
            self.drop(c, CODE_INTERNAL_ERROR)
        finally:
            PyMem_RawFree(copy)
        return 0

    def on_readable(self) -> None:
        self.turn(0)

    def run_once(self, int timeout_ms=-1) -> None:
        self.turn(timeout_ms)

    def close(self) -> None:
        cdef size_t i
        if self.polling:
            raise RuntimeError("another thread waits in this hub")
        if self.epoll_fd < 0 or self.closing:
            return
        self.closing = True
        for i in range(self.everyone.count):  # nobody is added any more, and nobody removed before on_closed
            self.drop(<Connection> self.everyone.items[i].owner, CODE_LOST)
        if not self.turning:
            self.end_turn()
            self.raise_held()

    cdef int finish_close(self) except -1:
        cdef Room room
        self.turning = True
        try:
            while self.notice_head != NULL:
                self.run_notices()
        finally:
            self.turning = False
            while self.ring_head is not None:
                room = self.take_room()
                room.forget_events()
            self.close_descriptors()
        return 0

    def stats(self) -> dict:
        return {
            "gauges": {
                "connections_open": self.open_count,
                "connections_closing": <Py_ssize_t> self.everyone.count - self.open_count,
                "timers": self.timers.count,
            },
            "counters": {
                "frames_received": self.frames_in,
                "messages_received": self.messages_in,
                "sends": self.sends_out,
                "bytes_sent": self.bytes_out,
                "pings_sent": self.pings_out,
                "pongs_received": self.pongs_in,
                "pongs_unexpected": self.stray_pongs,
                "room_events_queued": self.events_queued,
                "room_events_refused": self.events_refused,
                "backlogs_refused": self.backlogs_refused,
            },
            "histograms": {
                "ping_lateness_seconds": histogram_read(&self.ping_lateness),
                "deadline_lateness_seconds": histogram_read(&self.deadline_lateness),
                "delivery_seconds": histogram_read(&self.delivery),
                "round_trip_seconds": histogram_read(&self.round_trip),
            },
        }

    # --- the turn

    cdef int turn(self, int timeout_ms) except -1:
        cdef epoll_event[EVENTS_PER_TURN] events
        cdef int i, count
        cdef void *source
        cdef uint64_t expirations
        if self.turning or self.polling or self.epoll_fd < 0:
            raise RuntimeError("a turn inside a turn, or of a closed hub")
        self.polling = True
        with nogil:
            count = epoll_wait(self.epoll_fd, events, EVENTS_PER_TURN, timeout_ms)
        self.polling = False
        if count < 0:
            if errno != EINTR:
                raise OSError(errno, os.strerror(errno))
            count = 0
        self.turning = True
        try:
            self.run_timers()
            for i in range(count):
                source = events[i].data.ptr
                if source == &self.timer_fd:
                    read(self.timer_fd, &expirations, sizeof(expirations))
                    self.armed_tick = WHEEL_NEVER
                elif source != &self.event_fd:
                    self.on_events(<Connection> source, events[i].events)
            if self.ring_head is not None:
                self.fan_out()
            self.run_notices()
        finally:
            self.turning = False
            self.end_turn()
        return self.raise_held()

    cdef int end_turn(self) except -1:
        return self.finish_close() if self.closing else self.settle()

    cdef int raise_held(self) except -1:
        cdef object error = self.held
        if error is not None:
            self.held = None
            raise error
        return 0

    cdef int settle(self) except -1:
        """Leave the descriptors as the work that is left needs them."""
        cdef uint64_t count
        if self.ring_head is not None or self.notice_head != NULL:
            self.wake()
        elif self.awake:
            read(self.event_fd, &count, sizeof(count))
            self.awake = False
        return self.set_timer(wheel_next(&self.timers))

    cdef void wake(self) noexcept:
        cdef uint64_t one = 1
        if not self.awake and not self.turning:  # at the end of a turn, settle sees what is left
            self.awake = write_fd(self.event_fd, &one, sizeof(one)) == sizeof(one)

    cdef int arm(self) except -1:
        """After a deadline was started outside a turn; inside one, settle does it once for all."""
        cdef uint64_t tick
        if not self.turning:
            tick = wheel_next(&self.timers)
            if tick < self.armed_tick:
                self.set_timer(tick)
        return 0

    cdef int set_timer(self, uint64_t tick) except -1:
        cdef itimerspec spec
        cdef uint64_t at_ns
        if tick == self.armed_tick:
            return 0
        memset(&spec, 0, sizeof(spec))
        if tick != WHEEL_NEVER:
            at_ns = self.start_ns + tick * TICK_MS * NS_PER_MS
            spec.it_value.tv_sec = at_ns // 1_000_000_000
            spec.it_value.tv_nsec = at_ns % 1_000_000_000
        if timerfd_settime(self.timer_fd, TFD_TIMER_ABSTIME, &spec, NULL) < 0:
            raise OSError(errno, os.strerror(errno))
        self.armed_tick = tick
        return 0

    cdef uint64_t tick(self) noexcept:
        return (monotonic_ns() - self.start_ns) // (TICK_MS * NS_PER_MS)

    @cython.overflowcheck(False)
    cdef uint64_t random(self) noexcept:
        """xorshift64* (Vigna 2016): phases and nonces need to be spread, not secret."""
        self.random_state ^= self.random_state >> 12
        self.random_state ^= self.random_state << 25
        self.random_state ^= self.random_state >> 27
        return (self.random_state * <uint64_t> 0x2545F4914F6CDD1D) >> 1

    cdef int on_events(self, Connection c, uint32_t events) except -1:
        if c._state == STATE_CLOSED:  # by an earlier event of this turn
            return 0
        if events & EPOLLIN:
            self.receive(c)
        elif events & (EPOLLERR | EPOLLHUP):
            self.drop(c, CODE_LOST if c._state == STATE_OPEN else c.close_code)
        if events & EPOLLOUT and c._state != STATE_CLOSED:
            self.flush(c)
        return 0

    # --- deadlines

    cdef int run_timers(self) except -1:
        cdef wheel_entry *entry
        cdef uint64_t now_ns = monotonic_ns(), stop_ns = now_ns + TIMER_SLICE_NS, due_ns
        cdef uint64_t tick = (now_ns - self.start_ns) // (TICK_MS * NS_PER_MS)
        cdef int left = TIMERS_PER_CHECK
        cdef Connection c
        while True:
            entry = wheel_pop(&self.timers, tick)
            if entry == NULL:
                return 0
            due_ns = self.start_ns + entry.deadline * TICK_MS * NS_PER_MS
            # An entry lies at a fixed place in its connection, and is stopped before that can be freed.
            if entry.kind == ENTRY_ALARM:
                c = <Connection> <PyObject *> (<char *> entry - ALARM_OFFSET)
                histogram_observe(&self.deadline_lateness, now_ns - due_ns)
                self.notify(c, NOTICE_ALARM)
            else:
                c = <Connection> <PyObject *> (<char *> entry - BEAT_OFFSET)
                self.fire_beat(c, due_ns, now_ns)
            left -= 1
            if left == 0:
                left = TIMERS_PER_CHECK
                now_ns = monotonic_ns()
                if now_ns > stop_ns:  # what is still due keeps its place: the timer fires again at once
                    return 0

    cdef int fire_beat(self, Connection c, uint64_t due_ns, uint64_t now_ns) except -1:
        if c.beat == BEAT_PING:
            histogram_observe(&self.ping_lateness, now_ns - due_ns)
            try:
                self.send_ping(c)
            except MemoryError:
                self.drop(c, CODE_INTERNAL_ERROR)
            return 0
        histogram_observe(&self.deadline_lateness, now_ns - due_ns)
        if c.beat == BEAT_PONG:
            self.notify(c, NOTICE_PONG_TIMEOUT)
        else:
            self.drop(c, c.close_code)
        return 0

    cdef int send_ping(self, Connection c) except -1:
        """A ping with a nonce: only its own echo counts as the answer (RFC 6455 section 5.5.3)."""
        cdef uint8_t[PING_FRAME_BYTES] frame
        c.nonce = self.random()
        frame_write_header(frame, OPCODE_PING, sizeof(c.nonce))
        memcpy(&frame[2], &c.nonce, sizeof(c.nonce))
        c.ping_sent_ns = monotonic_ns()
        c.beat = BEAT_PONG
        wheel_start(&self.timers, &c.beat_entry, self.tick() + 1 + self.pong_timeout_ticks)
        self.pings_out += 1
        self.write(c, PyBytes_FromStringAndSize(<char *> frame, PING_FRAME_BYTES))
        return 0

    cdef void schedule_ping(self, Connection c) noexcept:
        """The next one a whole interval after the last was due, however late that was; never two to make up for a stall."""
        cdef uint64_t now = self.tick()
        c.beat = BEAT_PING
        c.ping_due_tick += self.ping_interval_ticks
        if c.ping_due_tick <= now:
            c.ping_due_tick += (now - c.ping_due_tick) // self.ping_interval_ticks * self.ping_interval_ticks
            c.ping_due_tick += self.ping_interval_ticks
        wheel_start(&self.timers, &c.beat_entry, c.ping_due_tick)

    # --- what Python is told

    cdef void notify(self, Connection c, uint8_t notice) noexcept:
        """Note it for run_notices. The list holds a reference to each connection in it."""
        if not c.notices & NOTICE_LISTED:
            Py_INCREF(c)
            c.notice_next = NULL
            if self.notice_tail == NULL:
                self.notice_head = <PyObject *> c
            else:
                (<Connection> self.notice_tail).notice_next = <PyObject *> c
            self.notice_tail = <PyObject *> c
        c.notices |= notice | NOTICE_LISTED
        self.wake()

    cdef int run_notices(self) except -1:
        cdef int left = NOTICES_PER_TURN
        cdef Connection c
        while self.notice_head != NULL and left:
            c = <Connection> self.notice_head
            self.notice_head = c.notice_next
            if self.notice_head == NULL:
                self.notice_tail = NULL
            c.notices &= NOTICES_ALL ^ NOTICE_LISTED
            Py_DECREF(c)  # the list's; c has its own
            self.tell(c)
            left -= 1
        return 0

    cdef int tell(self, Connection c) except -1:
        if c.notices & NOTICE_CLOSED:
            return self.tell_closed(c)
        if c.notices & NOTICE_BACKLOG:
            c.notices &= NOTICES_ALL ^ NOTICE_BACKLOG
            self.tell_limit(c, LIMIT_BACKLOG)
        if c.notices & (NOTICE_PONG_TIMEOUT | NOTICE_ALARM) and c._state == STATE_OPEN:
            self.receive(c)  # what was to come in time may have come while this process was held up
        if c.notices & NOTICE_PONG_TIMEOUT:
            c.notices &= NOTICES_ALL ^ NOTICE_PONG_TIMEOUT
            if c.beat == BEAT_PONG:
                self.tell_deadline(c, DEADLINE_PONG)
        if c.notices & NOTICE_ALARM:  # unless a callback has set another one meanwhile
            c.notices &= NOTICES_ALL ^ NOTICE_ALARM
            self.tell_deadline(c, DEADLINE_ALARM)
        return 0

    cdef int tell_closed(self, Connection c) except -1:
        try:
            self.handler.on_closed(c, c.close_code)
        except BaseException as error:
            self.failed(c, error)
        members_remove(&self.everyone, &c.registration)
        Py_DECREF(c)  # the reference taken by adopt
        return 0

    cdef int tell_deadline(self, Connection c, object deadline) except -1:
        if c._state != STATE_OPEN:
            return 0
        try:
            self.handler.on_deadline(c, deadline)
        except BaseException as error:
            self.failed(c, error)
        if deadline is DEADLINE_PONG and c._state == STATE_OPEN and c.beat == BEAT_PONG:
            self.fail(c, CODE_GOING_AWAY)
        return 0

    cdef int tell_limit(self, Connection c, object limit) except -1:
        if c._state != STATE_OPEN:
            return 0
        try:
            self.handler.on_limit(c, limit)
        except BaseException as error:
            self.failed(c, error)
        if c._state == STATE_OPEN:
            self.fail(c, CODE_POLICY_VIOLATION)
        return 0

    cdef void failed(self, Connection c, object error) noexcept:
        """A callback raised: that connection (None: it was about a room) ends, everything else goes on."""
        if not isinstance(error, Exception):
            self.hold(error)
        else:
            try:
                self.handler.on_error(c, error)
            except Exception as second:
                report(second)
            except BaseException as second:
                self.hold(second)
        if c is not None and c._state == STATE_OPEN:
            self.fail(c, CODE_INTERNAL_ERROR)

    cdef void hold(self, object error) noexcept:
        """KeyboardInterrupt and its like go on when all is in order: behind the turn. One is enough."""
        if self.held is None:
            self.held = error

    # --- input

    cdef int receive(self, Connection c) except -1:
        cdef ssize_t received = recv(c.fd, self.read_buffer, READ_BUFFER_BYTES, MSG_DONTWAIT)
        if received > 0:
            if c.deaf:
                return 0
            try:
                return self.decode(c, self.read_buffer, <size_t> received)
            except MemoryError:
                self.drop(c, CODE_INTERNAL_ERROR)
                return 0
        if received < 0 and (errno == EAGAIN or errno == EINTR):
            return 0
        self.drop(c, CODE_LOST if c._state == STATE_OPEN else c.close_code)
        return 0

    cdef int decode(self, Connection c, uint8_t *data, size_t size) except -1:
        cdef size_t at = 0, used = 0
        cdef frame_event event
        cdef decode_status status
        while c._state == STATE_OPEN or c._state == STATE_CLOSING:
            used = 0
            status = decoder_next(&c.decoder, self.max_message_bytes, data + at, size - at, &used, &event)
            at += used
            self.frames_in += event.frames
            if status == DECODE_NEED_MORE:
                return 0
            if status == DECODE_EVENT:
                self.on_frame(c, &event)
            elif status == DECODE_ERROR:
                return self.on_violation(c, event.close_code)
            else:
                return self.on_violation(c, CODE_INTERNAL_ERROR)
        return 0

    cdef int on_frame(self, Connection c, const frame_event *event) except -1:
        cdef object data
        if event.opcode == OPCODE_CLOSE:
            return self.on_peer_close(c, event.close_code)
        if c._state != STATE_OPEN:  # behind our close frame nothing else counts
            return 0
        if event.opcode == OPCODE_PONG:
            return self.on_pong(c, event)
        if not self.take_token(c, event.opcode == OPCODE_PING):
            return self.tell_limit(c, LIMIT_PINGS if event.opcode == OPCODE_PING else LIMIT_MESSAGES)
        if event.opcode == OPCODE_PING:
            return self.send_pong(c, event)
        self.messages_in += 1
        data = PyBytes_FromStringAndSize(<const char *> event.payload, <Py_ssize_t> event.size)
        try:
            self.handler.on_message(c, data, event.opcode)
        except BaseException as error:
            self.failed(c, error)
        return 0

    cdef int send_pong(self, Connection c, const frame_event *event) except -1:
        cdef uint8_t[FRAME_HEADER_MAX_BYTES + FRAME_CONTROL_MAX_BYTES] frame
        cdef size_t header = frame_write_header(frame, OPCODE_PONG, event.size)
        memcpy(&frame[header], event.payload, event.size)
        self.write(c, PyBytes_FromStringAndSize(<char *> frame, <Py_ssize_t> (header + event.size)))
        return 0

    cdef int on_pong(self, Connection c, const frame_event *event) except -1:
        cdef uint64_t round_trip_ns
        if c.beat != BEAT_PONG or event.size != sizeof(c.nonce) or memcmp(event.payload, &c.nonce, sizeof(c.nonce)):
            self.stray_pongs += 1
            return 0 if self.take_token(c, True) else self.tell_limit(c, LIMIT_PINGS)
        round_trip_ns = monotonic_ns() - c.ping_sent_ns
        c._rtt_us = <uint32_t> min(round_trip_ns // 1000 + 1, <uint64_t> 0xFFFFFFFF)
        histogram_observe(&self.round_trip, round_trip_ns)
        self.pongs_in += 1
        self.schedule_ping(c)
        return 0

    @cython.overflowcheck(False)  # the milliseconds wrap after 49 days
    cdef bint take_token(self, Connection c, bint control) noexcept:
        """One token of the bucket for messages, or for pings and unasked pongs; False when it is empty."""
        cdef uint32_t now_ms = <uint32_t> (monotonic_ns() // NS_PER_MS)
        cdef float passed_s = <float> (<uint32_t> (now_ms - c.bucket_ms)) / 1000
        c.bucket_ms = now_ms
        c.message_tokens = min(self.message_burst, c.message_tokens + passed_s * self.messages_per_s)
        c.ping_tokens = min(self.ping_burst, c.ping_tokens + passed_s * self.pings_per_s)
        if control:
            if c.ping_tokens < 1:
                return False
            c.ping_tokens -= 1
        else:
            if c.message_tokens < 1:
                return False
            c.message_tokens -= 1
        return True

    cdef int on_violation(self, Connection c, int code) except -1:
        """_Fail the connection_ (RFC 6455 section 7.1.7): our close frame and the end of our stream; its own is not read on.

        What still comes is taken and forgotten until the peer has closed too: closing at once would reset the connection,
        and the close frame with it.
        """
        if c._state != STATE_OPEN:
            self.drop(c, c.close_code)
            return 0
        c.deaf = True
        self.fail(c, code)
        if c._state == STATE_CLOSING and c.waiting.head == NULL:
            shutdown(c.fd, SHUT_WR)
        try:
            self.handler.on_violation(c, code)
        except BaseException as error:
            self.failed(c, error)
        return 0

    cdef int on_peer_close(self, Connection c, int code) except -1:
        if c._state == STATE_CLOSING:  # the answer to ours: the handshake is complete
            self.drop(c, c.close_code)
            return 0
        c.close_code = code
        self.start_closing(c, STATE_CLOSE_RECEIVED)
        # Nothing more is read: without this the end of the stream would wake the loop again and again.
        if self.watch(c, EPOLLOUT if c.polling_out else 0, EPOLL_CTL_MOD) < 0:
            self.drop(c, code)
            return 0
        try:
            self.handler.on_close(c, code)
        except BaseException as error:
            self.failed(c, error)
            self.finish(c)
        return 0

    # --- output

    cdef int write(self, Connection c, bytes frames) noexcept:
        """Send, or queue behind what waits already. -1: the connection is gone."""
        cdef size_t size = <size_t> PyBytes_GET_SIZE(frames)
        cdef ssize_t sent = 0
        if c.overflowed or size == 0:
            return 0
        if c.waiting.head == NULL:
            sent = send(c.fd, PyBytes_AS_STRING(frames), size, MSG_NOSIGNAL | MSG_DONTWAIT)
            self.sends_out += 1
            if sent < 0:
                if errno != EAGAIN and errno != EINTR:
                    self.drop(c, CODE_LOST if c._state == STATE_OPEN else c.close_code)
                    return -1
                sent = 0
            self.bytes_out += <size_t> sent
            if <size_t> sent == size:
                return 0
        elif c._state == STATE_OPEN and c.waiting.pending_bytes + size > self.max_backlog_bytes:
            # One item may pass the bound when nothing waited before it: a large event to a healthy member.
            self.refuse_backlog(c)
            return 0
        if backlog_push(&c.waiting, <PyObject *> frames, <size_t> sent) < 0 or self.poll_output(c, True) < 0:
            self.drop(c, CODE_INTERNAL_ERROR)
            return -1
        return 0

    cdef void refuse_backlog(self, Connection c) noexcept:
        """Free what waits at once, but for the rest of a frame that is partly sent; the handler closes it soon."""
        self.backlogs_refused += 1
        if backlog_truncate(&c.waiting) < 0:
            self.drop(c, CODE_INTERNAL_ERROR)
            return
        c.overflowed = True
        self.notify(c, NOTICE_BACKLOG)

    cdef int flush(self, Connection c) noexcept:
        cdef iovec[BACKLOG_VECTORS] vectors
        cdef msghdr message
        cdef ssize_t sent
        memset(&message, 0, sizeof(message))
        message.msg_iov = vectors
        while c.waiting.head != NULL:
            message.msg_iovlen = <size_t> backlog_fill(&c.waiting, vectors, BACKLOG_VECTORS)
            sent = sendmsg(c.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
            self.sends_out += 1
            if sent < 0:
                if errno == EAGAIN or errno == EINTR:
                    return 0
                self.drop(c, CODE_LOST if c._state == STATE_OPEN else c.close_code)
                return -1
            self.bytes_out += <size_t> sent
            backlog_consume(&c.waiting, <size_t> sent)
        if c._state == STATE_FINISHING:
            self.drop(c, c.close_code)
            return 0
        if c.deaf:
            shutdown(c.fd, SHUT_WR)
        if self.poll_output(c, False) < 0:
            self.drop(c, CODE_INTERNAL_ERROR)
            return -1
        return 0

    cdef int poll_output(self, Connection c, bint wanted) noexcept:
        if c.polling_out == wanted:
            return 0
        c.polling_out = wanted
        return self.watch(c, self.input_events(c) | (EPOLLOUT if wanted else 0), EPOLL_CTL_MOD)

    cdef uint32_t input_events(self, Connection c) noexcept:
        return EPOLLIN if c._state == STATE_OPEN or c._state == STATE_CLOSING else 0

    cdef int watch(self, Connection c, uint32_t events, int operation) noexcept:
        cdef epoll_event event
        event.events = events
        event.data.ptr = <void *> c
        return epoll_ctl(self.epoll_fd, operation, c.fd, &event)

    # --- fan-out

    cdef void activate(self, Room room) noexcept:
        if room.active:
            return
        room.active = True
        room.ring_next = None
        if self.ring_tail is None:
            self.ring_head = room
        else:
            self.ring_tail.ring_next = room
        self.ring_tail = room
        self.wake()

    cdef Room take_room(self):
        """The first of the ring, out of it."""
        cdef Room room = self.ring_head
        self.ring_head = room.ring_next
        room.ring_next = None
        if self.ring_head is None:
            self.ring_tail = None
        room.active = False
        return room

    cdef int fan_out(self) except -1:
        """Serve rooms in turn until the slice is over: what is left goes on in the next turn of the loop."""
        cdef uint64_t now = monotonic_ns(), stop_ns = now + self.slice_ns
        cdef Room room
        cdef list drained = []
        while self.ring_head is not None and now < stop_ns:
            room = self.take_room()
            if room.batched == 0:
                room.begin_pass()
            self.serve_some(room)
            now = monotonic_ns()
            if not members_in_pass(&room.members):
                room.end_pass(now)
            if room.events.end:
                self.activate(room)
            elif room.overflowed:
                room.overflowed = False
                drained.append(room)
        if drained:
            self.tell_drained(drained)
        return 0

    cdef int serve_some(self, Room room) except -1:
        cdef member *next_member
        cdef Connection c
        cdef int left = MEMBERS_PER_TURN
        cdef uint64_t first_number = room.events.items[room.events.start].number
        while left:
            next_member = members_next(&room.members)
            if next_member == NULL:
                return 0
            c = <Connection> next_member.owner
            if c.named or c.joined_number > first_number:
                try:
                    self.serve_named(room, c)
                except MemoryError:
                    self.drop(c, CODE_INTERNAL_ERROR)
            elif room.common is not None:
                self.write(c, room.common)
            left -= 1
        return 0

    cdef int serve_named(self, Room room, Connection c) except -1:
        """The events of the batch that are for this one: in order, in one send."""
        cdef size_t i
        cdef room_event *event
        cdef list frames = []
        for i in range(room.batched):
            event = &room.events.items[room.events.start + i]
            if event.number < c.joined_number or event.exclude == <PyObject *> c:
                continue
            if event.only == NULL or event.only == <PyObject *> c:
                frames.append(<object> event.frame)
        if frames and c._state == STATE_OPEN:  # a new list may let the collector run, and that a finaliser
            self.write(c, b"".join(frames))
        return 0

    cdef int tell_drained(self, list rooms) except -1:
        for room in rooms:
            try:
                self.handler.on_room_drained(room)
            except BaseException as error:
                self.failed(None, error)
        return 0

    # --- the end of a connection

    cdef int begin_close(self, Connection c, int code, bytes reason, bytes message) except -1:
        """Our close frame, behind an optional last message; then the peer has close_timeout_ms to answer."""
        cdef bytes frame = encode_close(code, reason)
        self.start_closing(c, STATE_CLOSING)
        c.close_code = <uint16_t> code
        c.overflowed = False
        self.write(c, frame if message is None else message + frame)
        return 0

    cdef void fail(self, Connection c, int code) noexcept:
        """Close it for a reason of the hub's own; without the memory for a close frame, at once."""
        try:
            self.begin_close(c, code, b"", None)
        except MemoryError:
            self.drop(c, CODE_INTERNAL_ERROR)

    cdef int finish(self, Connection c) except -1:
        """Answer the peer's close frame with its own code; the descriptor closes when that is with the kernel."""
        cdef int code = c.close_code
        if c._state != STATE_CLOSE_RECEIVED:
            return 0
        c._state = STATE_FINISHING
        c.overflowed = False
        try:
            self.write(c, encode_close(code) if code != CODE_NONE else EMPTY_CLOSE_FRAME)
        except MemoryError:
            self.drop(c, code)
        if c._state == STATE_FINISHING and c.waiting.head == NULL:
            self.drop(c, code)
        return 0

    cdef void start_closing(self, Connection c, uint8_t state) noexcept:
        cdef Room held = c._room  # lives until this is done
        self.open_count -= 1
        c._state = state
        leave_room(c)
        wheel_stop(&self.timers, &c.alarm_entry)
        c.beat = BEAT_CLOSE
        wheel_start(&self.timers, &c.beat_entry, self.tick() + 1 + self.close_timeout_ticks)
        if not self.turning:
            self.wake()  # settle arms the timer

    cdef void drop(self, Connection c, int code) noexcept:
        """The descriptor goes now; on_closed follows with the notices."""
        cdef Room held = c._room  # lives until this is done
        if c._state == STATE_CLOSED:
            return
        if c._state == STATE_OPEN:
            self.open_count -= 1
        c._state = STATE_CLOSED
        c.close_code = <uint16_t> code
        leave_room(c)
        wheel_stop(&self.timers, &c.beat_entry)
        wheel_stop(&self.timers, &c.alarm_entry)
        # Whoever made the descriptor may still hold another for the same socket: closing alone would not end the watch.
        self.watch(c, 0, EPOLL_CTL_DEL)
        close(c.fd)
        c.fd = -1
        decoder_free(&c.decoder)
        backlog_clear(&c.waiting)
        self.notify(c, NOTICE_CLOSED)
