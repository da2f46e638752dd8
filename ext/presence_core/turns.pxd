# One turn of the hub.

from libc.stdint cimport uint32_t, uint64_t

from presence_core.hub cimport Connection, Hub

cdef int turn(Hub hub, int timeout_ms) except -1
cdef int end_turn(Hub hub) except -1
cdef int raise_held(Hub hub) except -1
cdef int settle(Hub hub) except -1
cdef void wake(Hub hub) noexcept
cdef int arm(Hub hub) except -1
cdef int set_timer(Hub hub, uint64_t tick) except -1
cdef uint64_t tick(Hub hub) noexcept
cdef uint64_t random(Hub hub) noexcept
cdef int on_events(Hub hub, Connection c, uint32_t events) except -1
