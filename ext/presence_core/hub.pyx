"""The hub: sockets, frames, deadlines and rooms on one epoll descriptor, with one handler object to call back.

Owns the descriptors handed to it, every deadline of theirs, what waits to be written and the order of events in a room.
Knows nothing of classrooms, NATS or SQL, nor of asyncio: whoever drives it watches ``fileno()`` and calls ``on_readable``.
Python is called for each message, limit, deadline and closed connection; never for a delivery, a ping or a pong.

Three rules keep memory safe. A connection is an object: the hub holds one reference from ``adopt`` until ``on_closed`` has
returned, and gives it back only when the events of the turn have been worked off; a ``close`` of the hub inside a turn ends
with it. Loops over timers, members or queues never call Python: they note what is to be told, and ``run_notices`` tells it
when the loop is over. And whatever may run a finaliser is let go last, when all else is in order.

This file has what Python sees; what is done with it lies in the modules of its stages: `turns` has the order, `deadlines`,
`input`, `output` and `fanout` the work, `notices` the callbacks, `closing` the end. They change the fields of hub.pxd.

No callback ends a turn: what it raises ends its connection, and what is no Exception is raised again behind the turn. A
connection that memory does not suffice for is dropped, nobody else notices.
"""

import os

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.errno cimport errno
from libc.math cimport ceil, isnan
from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC
from posix.unistd cimport close

from presence_core.backlog cimport backlog_clear, backlog_init
from presence_core.bulk cimport bulk_close, bulk_init, bulk_open
from presence_core.closing cimport begin_close, drop, finish, leave_room
from presence_core.deadlines cimport measure_offsets
from presence_core.fanout cimport enqueue, forget_events, take_room
from presence_core.frames cimport decoder_free, decoder_init
from presence_core.histogram cimport histogram_read
from presence_core.input cimport decode
from presence_core.members cimport members_add, members_free, members_init, members_remove
from presence_core.notices cimport failed, run_notices
from presence_core.output cimport watch, write
from presence_core.room_events cimport event_list, events_free
from presence_core.system cimport (
    EFD_CLOEXEC,
    EFD_NONBLOCK,
    EPOLLIN,
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    NS_PER_MS,
    TFD_CLOEXEC,
    TFD_NONBLOCK,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    eventfd,
    monotonic_ns,
    timerfd_create,
)
from presence_core.turns cimport arm, end_turn, raise_held, random, tick, turn
from presence_core.wheel cimport WHEEL_NEVER, wheel_entry_init, wheel_init, wheel_start, wheel_stop

from presence_core.names import DEADLINE_ALARM, DEADLINE_PONG, LIMIT_BACKLOG, LIMIT_MESSAGES, LIMIT_PINGS  # no-cython-lint

STATE_NAMES = ("new", "open", "closing", "close_received", "finishing", "closed")
cdef double ALARM_MAX_MS = 2.0**48  # further away there is nothing to tell apart


def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds: what ``Room.broadcast`` takes as ``received_ns``."""
    return monotonic_ns()


# --- rooms ----------------------------------------------------------------------------------------------------------

@cython.final
cdef class Room:
    """Connections that hear the same events, each in the same order. Made by ``Hub.new_room``."""

    def __cinit__(self):
        members_init(&self.members)
        memset(&self.events, 0, sizeof(event_list))

    def __dealloc__(self):
        members_free(&self.members)
        forget_events(self)
        events_free(&self.events)

    def __len__(self):
        return <Py_ssize_t> self.members.count

    @property
    def events_taken(self) -> int:
        return self.next_number

    @property
    def events_served(self) -> int:
        return self.events.items[self.events.start].number if self.events.end else self.next_number

    def broadcast(self, bytes frame not None, *, Connection exclude=None, Connection only=None, received_ns=None) -> bool:
        cdef uint64_t received = monotonic_ns() if received_ns is None else received_ns
        if self.members.count == 0:
            return True
        if self.queued_bytes and self.queued_bytes + <size_t> PyBytes_GET_SIZE(frame) > self.hub.max_room_queue_bytes:
            self.overflowed = True
            self.hub.events_refused += 1
            return False
        enqueue(
            self,
            frame,
            NULL if exclude is None else <PyObject *> exclude,
            NULL if only is None else <PyObject *> only,
            received,
        )
        return True


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
        write(self.hub, self, frames)
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
        self.ping_due_tick = tick(self.hub) + 1 + random(self.hub) % self.hub.ping_interval_ticks
        wheel_start(&self.hub.timers, &self.beat_entry, self.ping_due_tick)
        arm(self.hub)

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
        wheel_start(&self.hub.timers, &self.alarm_entry, tick(self.hub) + ticks + 1)
        arm(self.hub)

    def close(self, int code=1000, bytes reason not None=b"", bytes message=None) -> bool:
        if self._state == STATE_CLOSE_RECEIVED:
            finish(self.hub, self)
            return False
        if self._state != STATE_OPEN:
            return False
        begin_close(self.hub, self, code, reason, message)
        return True

    def finish(self) -> None:
        if self._state == STATE_CLOSE_RECEIVED:
            finish(self.hub, self)

    def abort(self) -> None:
        if STATE_NEW < self._state < STATE_CLOSED:
            drop(self.hub, self, CODE_LOST)


# --- the hub --------------------------------------------------------------------------------------------------------

cdef class Hub:
    """See the .pyi for what the arguments mean."""

    def __cinit__(self):
        self.epoll_fd = self.timer_fd = self.event_fd = -1
        self.armed_tick = WHEEL_NEVER
        bulk_init(&self.ring)
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
        bint bulk_sends=True,
        messages_per_s=10.0,
        message_burst=50,
        pings_per_s=2.0,
        ping_burst=20,
        seed=None,
    ):
        if self.read_buffer != NULL:
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
        if bulk_sends:
            bulk_open(&self.ring)

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
        bulk_close(&self.ring)

    def __dealloc__(self):
        self.close_descriptors()
        members_free(&self.everyone)
        PyMem_RawFree(self.read_buffer)

    def __len__(self):
        return <Py_ssize_t> self.everyone.count

    def fileno(self) -> int:
        return self.epoll_fd

    @property
    def sends_in_bulk(self) -> bool:
        return self.ring.fd >= 0

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
        if watch(self, c, EPOLLIN, EPOLL_CTL_ADD) < 0:
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
                end_turn(self)
        if not inside:
            raise_held(self)

    cdef int open(self, Connection c, bytes head) except -1:
        """Tell the handler, then decode what came in the same packets as the upgrade request."""
        cdef size_t size = <size_t> PyBytes_GET_SIZE(head)
        cdef uint8_t *copy
        try:
            self.handler.on_open(c)
        except BaseException as error:
            failed(self, c, error)
        if size == 0:
            return 0
        copy = <uint8_t *> PyMem_RawMalloc(size)  # frames are unmasked in place
        if copy == NULL:
            drop(self, c, CODE_INTERNAL_ERROR)
            return 0
        memcpy(copy, PyBytes_AS_STRING(head), size)
        try:
            decode(self, c, copy, size)
        except MemoryError:
            drop(self, c, CODE_INTERNAL_ERROR)
        finally:
            PyMem_RawFree(copy)
        return 0

    def on_readable(self) -> None:
        turn(self, 0)

    def run_once(self, int timeout_ms=-1) -> None:
        turn(self, timeout_ms)

    def close(self) -> None:
        cdef bint inside = self.turning
        cdef size_t i
        if self.polling:
            raise RuntimeError("another thread waits in this hub")
        if self.epoll_fd < 0 or self.closing:
            return
        self.closing = True
        self.turning = True  # a room's finaliser may not turn the hub meanwhile
        for i in range(self.everyone.count):  # nobody is added any more, and nobody removed before on_closed
            drop(self, <Connection> self.everyone.items[i].owner, CODE_LOST)
        self.turning = inside
        if not inside:
            end_turn(self)
            raise_held(self)

    cdef int finish_close(self) except -1:
        cdef Room room
        self.turning = True
        try:
            while self.notice_head != NULL:
                run_notices(self)
        finally:
            self.turning = False
            while self.ring_head is not None:
                room = take_room(self)
                forget_events(room)
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


measure_offsets(Connection())
