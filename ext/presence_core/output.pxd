# What a connection is sent.

from libc.stdint cimport uint32_t

from presence_core.hub cimport Connection, Hub

cdef int write(Hub hub, Connection c, bytes frames) noexcept
cdef int after_send(Hub hub, Connection c, bytes frames, ssize_t sent) noexcept
cdef int keep_rest(Hub hub, Connection c, bytes frames, size_t sent) noexcept
cdef bint can_take(Connection c) noexcept
cdef void add_to_bulk(Hub hub, Connection c, bytes frames) noexcept
cdef void write_together(Hub hub, bytes frames) noexcept
cdef void refuse_backlog(Hub hub, Connection c) noexcept
cdef int flush(Hub hub, Connection c) noexcept
cdef int poll_output(Hub hub, Connection c, bint wanted) noexcept
cdef uint32_t input_events(Hub hub, Connection c) noexcept
cdef int watch(Hub hub, Connection c, uint32_t events, int operation) noexcept
