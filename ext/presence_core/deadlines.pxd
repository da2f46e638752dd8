# What is due.

from libc.stdint cimport uint64_t

from presence_core.hub cimport Connection, Hub

cdef void measure_offsets(Connection probe) noexcept
cdef int run_timers(Hub hub) except -1
cdef int fire_beat(Hub hub, Connection c, uint64_t due_ns, uint64_t now_ns) except -1
cdef int send_ping(Hub hub, Connection c) except -1
cdef void schedule_ping(Hub hub, Connection c) noexcept
