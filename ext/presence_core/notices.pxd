# What the handler is told.

from libc.stdint cimport uint8_t

from presence_core.hub cimport Connection, Hub

cdef void notify(Hub hub, Connection c, uint8_t notice) noexcept
cdef int run_notices(Hub hub) except -1
cdef int tell(Hub hub, Connection c) except -1
cdef int tell_closed(Hub hub, Connection c) except -1
cdef int tell_deadline(Hub hub, Connection c, object deadline) except -1
cdef int tell_limit(Hub hub, Connection c, object limit) except -1
cdef void failed(Hub hub, Connection c, object error) noexcept
cdef void hold(Hub hub, object error) noexcept
cdef int tell_drained(Hub hub, list rooms) except -1
