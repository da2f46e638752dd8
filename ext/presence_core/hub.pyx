"""The hub: sockets, frames, deadlines and rooms on one epoll descriptor, with one handler object to call back.

Owns the descriptors handed to it, every deadline of theirs, what waits to be written and the order of events in a room.
Knows nothing of classrooms, NATS or SQL, nor of asyncio: whoever drives it watches ``fileno()`` and calls ``turn``.
Python is called for each message, limit, deadline and closed connection; never for a delivery, a ping or a pong.

Two rules keep memory safe. A connection is an object: the hub holds one reference from ``adopt`` until ``on_closed`` has
returned, and gives it back only when the events of the turn have been worked off. And loops over timers, members or queues
never call Python: they note what is to be told, and ``run_notices`` tells it when the loop is over.
"""

import os

cimport cython
from cpython.exc cimport PyErr_WriteUnraisable
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_CLEAR, Py_DECREF, Py_INCREF, Py_XDECREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, malloc, realloc
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
    OPCODE_BINARY,
    OPCODE_CLOSE,
    OPCODE_PING,
    OPCODE_PONG,
    OPCODE_TEXT,
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
    enum: MSG_NOSIGNAL, MSG_DONTWAIT
    ssize_t send(int fd, const void *buf, size_t n, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t recv(int fd, void *buf, size_t n, int flags)

cdef enum:
    NS_PER_MS = 1_000_000
    PING_FRAME_BYTES = 10        # two of header, eight of nonce
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
EMPTY_CLOSE_FRAME = b"\x88\x00"
STATE_NAMES = ("new", "open", "closing", "close_received", "finishing", "closed")


cdef inline uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1_000_000_000 + <uint64_t> now.tv_nsec


def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds: what ``Room.broadcast`` takes as ``received_ns``."""
    return monotonic_ns()


# --- rooms ----------------------------------------------------------------------------------------------------------

cdef int events_push(event_list *events, room_event *event) except -1:
    cdef size_t capacity
    cdef room_event *items
    if events.start and events.count == events.capacity: # reclaim what has been taken from the front
        memmove(events.items, events.items + events.start, (events.count - events.start) * sizeof(room_event))
        events.count -= events.start
        events.start = 0
    if events.count == events.capacity:
        capacity = events.capacity * 2 if events.capacity else 4
        items = <room_event *> realloc(events.items, capacity * sizeof(room_event))
        if items == NULL:
            raise MemoryError
        events.items = items
        events.capacity = capacity
    events.items[events.count] = event[0]
    events.count += 1
    return 0


cdef void events_clear(event_list *events) noexcept:
    cdef size_t i
    cdef room_event *event
    for i in range(events.start, events.count):
        event = &events.items[i]
        Py_DECREF(<object> event.frame)
        Py_XDECREF(event.exclude)
        Py_XDECREF(event.only)
    free(events.items)
    memset(events, 0, sizeof(event_list))


@cython.final
cdef class Room:
    """Connections that hear the same events, each in the same order. Made by ``Hub.new_room``."""

    def __cinit__(self):
        members_init(&self.members)
        memset(&self.queue, 0, sizeof(event_list))
        memset(&self.batch, 0, sizeof(event_list))

    def __dealloc__(self):
        members_free(&self.members)
        events_clear(&self.queue)
        events_clear(&self.batch)
        Py_CLEAR(self.common)

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
        events_push(&self.queue, &event)
        Py_INCREF(frame)
        if exclude != NULL:
            Py_INCREF(<object> exclude)
        if only != NULL:
            Py_INCREF(<object> only)
        self.next_number += 1
        self.queued_bytes += <size_t> PyBytes_GET_SIZE(frame)
        self.hub.events_queued += 1
        self.hub.activate(self)
        return 0

    cdef int begin_pass(self) except -1:
        """Take what waits, up to BATCH_MAX_BYTES, and join it into what most members get in one send."""
        cdef size_t taken = 0, size = 0
        cdef room_event *event
        cdef list shared = []
        while self.queue.start < self.queue.count:
            event = &self.queue.items[self.queue.start]
            size = <size_t> PyBytes_GET_SIZE(<object> event.frame)
            if taken and taken + size > BATCH_MAX_BYTES:
                break
            events_push(&self.batch, event) # the references move along
            self.queue.start += 1
            self.queued_bytes -= size
            taken += size
            if event.only == NULL:
                shared.append(<object> event.frame)
        if self.queue.start == self.queue.count:
            self.queue.start = self.queue.count = 0
        if shared:
            joined = shared[0] if len(shared) == 1 else b"".join(shared)
            Py_INCREF(joined)
            self.common = <PyObject *> joined
        self.name(1)
        members_begin_pass(&self.members)
        return 0

    cdef void name(self, int by) noexcept:
        """Mark those whom an event of the batch names: only they, and newcomers, are served event by event."""
        cdef size_t i
        for i in range(self.batch.start, self.batch.count):
            if self.batch.items[i].exclude != NULL:
                (<Connection> self.batch.items[i].exclude).named += by
            if self.batch.items[i].only != NULL:
                (<Connection> self.batch.items[i].only).named += by

    cdef void end_pass(self, uint64_t now_ns) noexcept:
        cdef size_t i
        cdef uint64_t received
        for i in range(self.batch.start, self.batch.count):
            received = self.batch.items[i].received_ns
            histogram_observe(&self.hub.delivery, now_ns - received if now_ns > received else 0)
        self.name(-1)
        events_clear(&self.batch)
        Py_CLEAR(self.common)


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
        if self._room is not None:
            self.hub.leave_room(self)

    def start_heartbeat(self) -> None:
        if self._state != STATE_OPEN:
            return
        self.beat = BEAT_PING
        self.ping_due_tick = self.hub.tick() + 1 + self.hub.random() % self.hub.ping_interval_ticks
        wheel_start(&self.hub.timers, &self.beat_entry, self.ping_due_tick)
        self.hub.arm()

    def set_alarm(self, delay_ms) -> None:
        cdef uint64_t delay
        if self._state != STATE_OPEN:
            return
        if delay_ms is None:
            wheel_stop(&self.hub.timers, &self.alarm_entry)
            return
        delay = 0 if delay_ms < 0 else <uint64_t> min(delay_ms, 1 << 48)
        # One tick more: the tick under way has partly passed, and a deadline never fires early.
        wheel_start(&self.hub.timers, &self.alarm_entry, self.hub.tick() + (delay + TICK_MS - 1) // TICK_MS + 1)
        self.hub.arm()

    def close(self, int code=1000, bytes reason not None=b"", bytes message=None) -> bool:
        if self._state == STATE_CLOSE_RECEIVED:
            self.finish()
            return False
        if self._state != STATE_OPEN:
            return False
        self.hub.begin_close(self, code, reason, message)
        return True

    def finish(self) -> None:
        cdef int code = self.close_code
        if self._state != STATE_CLOSE_RECEIVED:
            return
        self._state = STATE_FINISHING
        self.hub.write(self, encode_close(code) if code != CODE_NONE else EMPTY_CLOSE_FRAME)
        if self._state == STATE_FINISHING:
            if self.waiting.head == NULL:
                self.hub.drop(self, code)
            else:
                self.hub.poll_output(self, True)

    def abort(self) -> None:
        if STATE_NEW < self._state < STATE_CLOSED:
            self.hub.drop(self, CODE_LOST)


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
        self.read_buffer = <uint8_t *> malloc(READ_BUFFER_BYTES)
        if self.read_buffer == NULL:
            raise MemoryError
        self.open_descriptors()

    def open_descriptors(self):
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

    def __dealloc__(self):
        for fd in (self.epoll_fd, self.timer_fd, self.event_fd):
            if fd >= 0:
                close(fd)
        members_free(&self.everyone)
        free(self.read_buffer)

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
        if c._state != STATE_NEW or self.epoll_fd < 0:
            close(fd)
            raise ValueError("a connection is adopted once, by an open hub")
        if members_add(&self.everyone, &c.registration) < 0:
            close(fd)
            raise MemoryError
        c.hub = self
        c.fd = fd
        if self.watch(c, EPOLLIN, EPOLL_CTL_ADD) < 0:
            members_remove(&self.everyone, &c.registration)
            c.fd = -1
            close(fd)
            raise OSError(errno, os.strerror(errno))
        Py_INCREF(c) # until on_closed has returned
        c._state = STATE_OPEN
        self.open_count += 1
        c.message_tokens = self.message_burst
        c.ping_tokens = self.ping_burst
        c.bucket_ms = <uint32_t> (monotonic_ns() // NS_PER_MS)
        try:
            self.handler.on_open(c)
        except Exception as error:
            self.failed(c, error)
        if head:
            self.adopt_head(c, head)

    def adopt_head(self, Connection c, bytes head):
        """Decode what came in the same packets as the upgrade request, in a copy: frames are unmasked in place."""
        cdef size_t size = <size_t> PyBytes_GET_SIZE(head)
        cdef uint8_t *copy = <uint8_t *> malloc(size)
        if copy == NULL:
            self.drop(c, CODE_INTERNAL_ERROR)
            raise MemoryError
        memcpy(copy, PyBytes_AS_STRING(head), size)
        try:
            self.decode(c, copy, size)
        finally:
            free(copy)

    def on_readable(self) -> None:
        self.turn(0)

    def run_once(self, int timeout_ms=-1) -> None:
        self.turn(timeout_ms)

    def close(self) -> None:
        cdef size_t i
        if self.epoll_fd < 0:
            return
        for c in self.members():
            (<Connection> c).abort()
        while self.notice_head != NULL:
            self.run_notices()
        while self.ring_head is not None:
            room = self.ring_head
            self.ring_head = (<Room> room).ring_next
            (<Room> room).ring_next = None
            (<Room> room).active = False
        self.ring_tail = None
        for fd in (self.epoll_fd, self.timer_fd, self.event_fd):
            close(fd)
        self.epoll_fd = self.timer_fd = self.event_fd = -1

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
        if self.turning or self.epoll_fd < 0:
            raise RuntimeError("a turn inside a turn, or of a closed hub")
        with nogil:
            count = epoll_wait(self.epoll_fd, events, EVENTS_PER_TURN, timeout_ms)
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
            self.settle()
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
        if not self.awake and not self.turning: # at the end of a turn, settle sees what is left
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
        if c._state == STATE_CLOSED: # by an earlier event of this turn
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
                if now_ns > stop_ns: # what is still due keeps its place: the timer fires again at once
                    return 0

    cdef int fire_beat(self, Connection c, uint64_t due_ns, uint64_t now_ns) except -1:
        if c.beat == BEAT_PING:
            histogram_observe(&self.ping_lateness, now_ns - due_ns)
            self.send_ping(c)
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
        if c.notices == 0:
            Py_INCREF(c)
            c.notice_next = NULL
            if self.notice_tail == NULL:
                self.notice_head = <PyObject *> c
            else:
                (<Connection> self.notice_tail).notice_next = <PyObject *> c
            self.notice_tail = <PyObject *> c
        c.notices |= notice
        self.wake()

    cdef int run_notices(self) except -1:
        cdef int left = NOTICES_PER_TURN
        cdef Connection c
        cdef uint8_t notices
        while self.notice_head != NULL and left:
            c = <Connection> self.notice_head
            self.notice_head = c.notice_next
            if self.notice_head == NULL:
                self.notice_tail = NULL
            notices = c.notices
            c.notices = 0
            Py_DECREF(c) # the list's; c has its own
            self.tell(c, notices)
            left -= 1
        return 0

    cdef int tell(self, Connection c, uint8_t notices) except -1:
        if notices & NOTICE_CLOSED:
            try:
                self.handler.on_closed(c, c.close_code)
            except Exception as error:
                self.failed(c, error)
            members_remove(&self.everyone, &c.registration)
            Py_DECREF(c) # the reference taken by adopt
            return 0
        if notices & NOTICE_BACKLOG:
            self.tell_limit(c, LIMIT_BACKLOG)
        if notices & NOTICE_PONG_TIMEOUT:
            if c._state == STATE_OPEN and c.beat == BEAT_PONG:
                self.receive(c) # the answer may have come while this process was held up
            if c._state == STATE_OPEN and c.beat == BEAT_PONG:
                self.tell_deadline(c, DEADLINE_PONG)
        if notices & NOTICE_ALARM:
            self.tell_deadline(c, DEADLINE_ALARM)
        return 0

    cdef int tell_deadline(self, Connection c, object deadline) except -1:
        if c._state != STATE_OPEN:
            return 0
        try:
            self.handler.on_deadline(c, deadline)
        except Exception as error:
            self.failed(c, error)
        if deadline is DEADLINE_PONG and c._state == STATE_OPEN and c.beat == BEAT_PONG:
            self.begin_close(c, CODE_GOING_AWAY, b"", None)
        return 0

    cdef int tell_limit(self, Connection c, object limit) except -1:
        if c._state != STATE_OPEN:
            return 0
        try:
            self.handler.on_limit(c, limit)
        except Exception as error:
            self.failed(c, error)
        if c._state == STATE_OPEN:
            self.begin_close(c, CODE_POLICY_VIOLATION, b"", None)
        return 0

    cdef int failed(self, Connection c, object error) except -1:
        """A callback raised: that connection ends, everything else goes on."""
        try:
            self.handler.on_error(c, error)
        except Exception as second:
            PyErr_WriteUnraisable(second)
        if c._state == STATE_OPEN:
            self.begin_close(c, CODE_INTERNAL_ERROR, b"", None)
        return 0

    # --- input

    cdef int receive(self, Connection c) except -1:
        cdef ssize_t received = recv(c.fd, self.read_buffer, READ_BUFFER_BYTES, MSG_DONTWAIT)
        if received > 0:
            return self.decode(c, self.read_buffer, <size_t> received)
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
        if c._state != STATE_OPEN: # behind our close frame nothing else counts
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
        except Exception as error:
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

    @cython.overflowcheck(False) # the milliseconds wrap after 49 days
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
        if c._state != STATE_OPEN:
            self.drop(c, c.close_code)
            return 0
        self.begin_close(c, code, b"", None)
        try:
            self.handler.on_violation(c, code)
        except Exception as error:
            self.failed(c, error)
        return 0

    cdef int on_peer_close(self, Connection c, int code) except -1:
        if c._state == STATE_CLOSING: # the answer to ours: the handshake is complete
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
        except Exception as error:
            self.failed(c, error)
            c.finish()
        return 0

    # --- output

    cdef int write(self, Connection c, bytes frames) noexcept:
        """Send, or queue behind what waits already. -1: the connection is gone."""
        cdef size_t size = <size_t> PyBytes_GET_SIZE(frames)
        cdef ssize_t sent = 0
        if c.overflowed:
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
        return self.poll_output(c, False)

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

    cdef int fan_out(self) except -1:
        """Serve rooms in turn until the slice is over: what is left goes on in the next turn of the loop."""
        cdef uint64_t now = monotonic_ns(), stop_ns = now + self.slice_ns
        cdef Room room
        cdef list drained = None
        while self.ring_head is not None and now < stop_ns:
            room = self.ring_head
            self.ring_head = room.ring_next
            room.ring_next = None
            if self.ring_head is None:
                self.ring_tail = None
            room.active = False
            if room.batch.count == 0:
                room.begin_pass()
            self.serve_some(room)
            now = monotonic_ns()
            if not members_in_pass(&room.members):
                room.end_pass(now)
            if room.batch.count or room.queue.count:
                self.activate(room)
            elif room.overflowed:
                room.overflowed = False
                drained = [room] if drained is None else drained + [room]
        if drained is not None:
            self.tell_drained(drained)
        return 0

    cdef int serve_some(self, Room room) except -1:
        cdef member *next_member
        cdef Connection c
        cdef int left = MEMBERS_PER_TURN
        cdef uint64_t first_number = room.batch.items[0].number if room.batch.count else 0
        while left:
            next_member = members_next(&room.members)
            if next_member == NULL:
                return 0
            c = <Connection> next_member.owner
            if c.named or c.joined_number > first_number:
                self.serve_named(room, c)
            elif room.common != NULL:
                self.write(c, <bytes> room.common)
            left -= 1
        return 0

    cdef int serve_named(self, Room room, Connection c) except -1:
        """The events of the batch that are for this one: in order, in one send."""
        cdef size_t i
        cdef room_event *event
        cdef list frames = []
        for i in range(room.batch.count):
            event = &room.batch.items[i]
            if event.number < c.joined_number or event.exclude == <PyObject *> c:
                continue
            if event.only == NULL or event.only == <PyObject *> c:
                frames.append(<object> event.frame)
        if frames:
            self.write(c, b"".join(frames))
        return 0

    cdef int tell_drained(self, list rooms) except -1:
        for room in rooms:
            try:
                self.handler.on_room_drained(room)
            except Exception as error:
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

    cdef void start_closing(self, Connection c, uint8_t state) noexcept:
        self.open_count -= 1
        c._state = state
        self.leave_room(c)
        wheel_stop(&self.timers, &c.alarm_entry)
        c.beat = BEAT_CLOSE
        wheel_start(&self.timers, &c.beat_entry, self.tick() + 1 + self.close_timeout_ticks)
        if not self.turning:
            self.wake() # settle arms the timer

    cdef void leave_room(self, Connection c) noexcept:
        if c._room is not None:
            members_remove(&c._room.members, &c.membership)
            c._room = None

    cdef void drop(self, Connection c, int code) noexcept:
        """The descriptor goes now; on_closed follows with the notices."""
        if c._state == STATE_CLOSED:
            return
        if c._state == STATE_OPEN:
            self.open_count -= 1
        c._state = STATE_CLOSED
        c.close_code = <uint16_t> code
        self.leave_room(c)
        wheel_stop(&self.timers, &c.beat_entry)
        wheel_stop(&self.timers, &c.alarm_entry)
        # Whoever made the descriptor may still hold another for the same socket: closing alone would not end the watch.
        self.watch(c, 0, EPOLL_CTL_DEL)
        close(c.fd)
        c.fd = -1
        decoder_free(&c.decoder)
        backlog_clear(&c.waiting)
        self.notify(c, NOTICE_CLOSED)
