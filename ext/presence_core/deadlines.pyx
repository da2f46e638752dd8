"""What is due: pings, missing pongs, alarms, the end of close handshakes.

Knows nothing of Python callbacks: it notes what is to be told.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from libc.stdint cimport uint64_t, uint8_t
from libc.string cimport memcpy

from presence_core.closing cimport drop
from presence_core.frames cimport OPCODE_PING, frame_write_header
from presence_core.histogram cimport histogram_observe
from presence_core.hub cimport (
    BEAT_PING,
    BEAT_PONG,
    CODE_INTERNAL_ERROR,
    Connection,
    ENTRY_ALARM,
    Hub,
    NOTICE_ALARM,
    NOTICE_PONG_TIMEOUT,
    TICK_MS,
    TIMERS_PER_CHECK,
)
from presence_core.notices cimport notify
from presence_core.output cimport write
from presence_core.system cimport NS_PER_MS, monotonic_ns
from presence_core.turns cimport random, tick
from presence_core.wheel cimport wheel_entry, wheel_pop, wheel_start

cdef enum:
    PING_FRAME_BYTES = 10       # two of header, eight of nonce
    TIMER_SLICE_NS = 4_000_000  # after a long stall everything is due at once: sockets get their turn in between


cdef size_t BEAT_OFFSET, ALARM_OFFSET


cdef void measure_offsets(Connection probe) noexcept:
    """Where the wheel entries lie in a Connection: the way back from an expired entry to its object.

    Called by the hub's module: either of the two may be imported first, so neither can rely on the other being complete.
    """
    global BEAT_OFFSET, ALARM_OFFSET
    BEAT_OFFSET = <size_t> &probe.beat_entry - <size_t> <PyObject *> probe
    ALARM_OFFSET = <size_t> &probe.alarm_entry - <size_t> <PyObject *> probe


cdef int run_timers(Hub hub) except -1:
    cdef wheel_entry *entry
    cdef uint64_t now_ns = monotonic_ns(), stop_ns = now_ns + TIMER_SLICE_NS, due_ns
    cdef uint64_t now_tick = (now_ns - hub.start_ns) // (TICK_MS * NS_PER_MS)
    cdef int left = TIMERS_PER_CHECK
    cdef Connection c
    while True:
        entry = wheel_pop(&hub.timers, now_tick)
        if entry == NULL:
            return 0
        due_ns = hub.start_ns + entry.deadline * TICK_MS * NS_PER_MS
        # An entry lies at a fixed place in its connection, and is stopped before that can be freed.
        if entry.kind == ENTRY_ALARM:
            c = <Connection> <PyObject *> (<char *> entry - ALARM_OFFSET)
            histogram_observe(&hub.deadline_lateness, now_ns - due_ns)
            notify(hub, c, NOTICE_ALARM)
        else:
            c = <Connection> <PyObject *> (<char *> entry - BEAT_OFFSET)
            fire_beat(hub, c, due_ns, now_ns)
        left -= 1
        if left == 0:
            left = TIMERS_PER_CHECK
            now_ns = monotonic_ns()
            if now_ns > stop_ns:  # what is still due keeps its place: the timer fires again at once
                return 0


cdef int fire_beat(Hub hub, Connection c, uint64_t due_ns, uint64_t now_ns) except -1:
    if c.beat == BEAT_PING:
        histogram_observe(&hub.ping_lateness, now_ns - due_ns)
        try:
            send_ping(hub, c)
        except MemoryError:
            drop(hub, c, CODE_INTERNAL_ERROR)
        return 0
    histogram_observe(&hub.deadline_lateness, now_ns - due_ns)
    if c.beat == BEAT_PONG:
        notify(hub, c, NOTICE_PONG_TIMEOUT)
    else:
        drop(hub, c, c.close_code)
    return 0


cdef int send_ping(Hub hub, Connection c) except -1:
    """A ping with a nonce: only its own echo counts as the answer (RFC 6455 section 5.5.3)."""
    cdef uint8_t[PING_FRAME_BYTES] frame
    c.nonce = random(hub)
    frame_write_header(frame, OPCODE_PING, sizeof(c.nonce))
    memcpy(&frame[2], &c.nonce, sizeof(c.nonce))
    c.ping_sent_ns = monotonic_ns()
    c.beat = BEAT_PONG
    wheel_start(&hub.timers, &c.beat_entry, tick(hub) + 1 + hub.pong_timeout_ticks)
    hub.pings_out += 1
    write(hub, c, PyBytes_FromStringAndSize(<char *> frame, PING_FRAME_BYTES))
    return 0


cdef void schedule_ping(Hub hub, Connection c) noexcept:
    """The next one a whole interval after the last was due, however late that was; never two to make up for a stall."""
    cdef uint64_t now = tick(hub)
    c.beat = BEAT_PING
    c.ping_due_tick += hub.ping_interval_ticks
    if c.ping_due_tick <= now:
        c.ping_due_tick += (now - c.ping_due_tick) // hub.ping_interval_ticks * hub.ping_interval_ticks
        c.ping_due_tick += hub.ping_interval_ticks
    wheel_start(&hub.timers, &c.beat_entry, c.ping_due_tick)
