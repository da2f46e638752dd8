"""One turn of the hub: wait, deadlines, events, rooms, notices; and when the descriptors wake its driver next.

Owns the order within a turn. Knows nothing of what any of it does.
"""

import os

cimport cython
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport itimerspec
from posix.unistd cimport read
from posix.unistd cimport write as write_fd

from presence_core.closing cimport drop
from presence_core.deadlines cimport run_timers
from presence_core.fanout cimport fan_out
from presence_core.hub cimport CODE_LOST, Connection, EVENTS_PER_TURN, Hub, STATE_CLOSED, STATE_OPEN, TICK_MS
from presence_core.input cimport receive
from presence_core.notices cimport run_notices
from presence_core.output cimport flush
from presence_core.system cimport (
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    NS_PER_MS,
    TFD_TIMER_ABSTIME,
    epoll_event,
    epoll_wait,
    monotonic_ns,
    timerfd_settime,
)
from presence_core.wheel cimport WHEEL_NEVER, wheel_next


cdef int turn(Hub hub, int timeout_ms) except -1:
    cdef epoll_event[EVENTS_PER_TURN] events
    cdef int i, count
    cdef void *source
    cdef uint64_t expirations
    if hub.turning or hub.polling or hub.epoll_fd < 0:
        raise RuntimeError("a turn inside a turn, or of a closed hub")
    hub.polling = True
    with nogil:
        count = epoll_wait(hub.epoll_fd, events, EVENTS_PER_TURN, timeout_ms)
    hub.polling = False
    if count < 0:
        if errno != EINTR:
            raise OSError(errno, os.strerror(errno))
        count = 0
    hub.turning = True
    try:
        run_timers(hub)
        for i in range(count):
            source = events[i].data.ptr
            if source == &hub.timer_fd:
                read(hub.timer_fd, &expirations, sizeof(expirations))
                hub.armed_tick = WHEEL_NEVER
            elif source != &hub.event_fd:
                on_events(hub, <Connection> source, events[i].events)
        if hub.ring_head is not None:
            fan_out(hub)
        run_notices(hub)
    finally:
        hub.turning = False
        end_turn(hub)
    return raise_held(hub)


cdef int end_turn(Hub hub) except -1:
    return hub.finish_close() if hub.closing else settle(hub)


cdef int raise_held(Hub hub) except -1:
    cdef object error = hub.held
    if error is not None:
        hub.held = None
        raise error
    return 0


cdef int settle(Hub hub) except -1:
    """Leave the descriptors as the work that is left needs them."""
    cdef uint64_t count
    if hub.ring_head is not None or hub.notice_head != NULL:
        wake(hub)
    elif hub.awake:
        read(hub.event_fd, &count, sizeof(count))
        hub.awake = False
    return set_timer(hub, wheel_next(&hub.timers))


cdef void wake(Hub hub) noexcept:
    cdef uint64_t one = 1
    if not hub.awake and not hub.turning:  # at the end of a turn, settle sees what is left
        hub.awake = write_fd(hub.event_fd, &one, sizeof(one)) == sizeof(one)


cdef int arm(Hub hub) except -1:
    """After a deadline was started outside a turn; inside one, settle does it once for all."""
    cdef uint64_t tick
    if not hub.turning:
        tick = wheel_next(&hub.timers)
        if tick < hub.armed_tick:
            set_timer(hub, tick)
    return 0


cdef int set_timer(Hub hub, uint64_t tick) except -1:
    cdef itimerspec spec
    cdef uint64_t at_ns
    if tick == hub.armed_tick:
        return 0
    memset(&spec, 0, sizeof(spec))
    if tick != WHEEL_NEVER:
        at_ns = hub.start_ns + tick * TICK_MS * NS_PER_MS
        spec.it_value.tv_sec = at_ns // 1_000_000_000
        spec.it_value.tv_nsec = at_ns % 1_000_000_000
    if timerfd_settime(hub.timer_fd, TFD_TIMER_ABSTIME, &spec, NULL) < 0:
        raise OSError(errno, os.strerror(errno))
    hub.armed_tick = tick
    return 0


cdef uint64_t tick(Hub hub) noexcept:
    return (monotonic_ns() - hub.start_ns) // (TICK_MS * NS_PER_MS)


@cython.overflowcheck(False)
cdef uint64_t random(Hub hub) noexcept:
    """xorshift64* (Vigna 2016): phases and nonces need to be spread, not secret."""
    hub.random_state ^= hub.random_state >> 12
    hub.random_state ^= hub.random_state << 25
    hub.random_state ^= hub.random_state >> 27
    return (hub.random_state * <uint64_t> 0x2545F4914F6CDD1D) >> 1


cdef int on_events(Hub hub, Connection c, uint32_t events) except -1:
    if c._state == STATE_CLOSED:  # by an earlier event of this turn
        return 0
    if events & EPOLLIN:
        receive(hub, c)
    elif events & (EPOLLERR | EPOLLHUP):
        drop(hub, c, CODE_LOST if c._state == STATE_OPEN else c.close_code)
    if events & EPOLLOUT and c._state != STATE_CLOSED:
        flush(hub, c)
    return 0
