# The end of a connection.

from libc.stdint cimport uint8_t

from presence_core.hub cimport Connection, Hub

cdef int begin_close(Hub hub, Connection c, int code, bytes reason, bytes message) except -1
cdef void fail(Hub hub, Connection c, int code) noexcept
cdef int finish(Hub hub, Connection c) except -1
cdef void start_closing(Hub hub, Connection c, uint8_t state) noexcept
cdef void drop(Hub hub, Connection c, int code) noexcept
cdef void leave_room(Connection c) noexcept
