# What a connection sends.

from libc.stdint cimport uint32_t, uint8_t

from presence_core.frames cimport frame_event
from presence_core.hub cimport Connection, Hub

cdef int receive(Hub hub, Connection c) except -1
cdef int decode(Hub hub, Connection c, uint8_t *data, size_t size) except -1
cdef int on_frame(Hub hub, Connection c, const frame_event *event) except -1
cdef int send_pong(Hub hub, Connection c, const frame_event *event) except -1
cdef int on_pong(Hub hub, Connection c, const frame_event *event) except -1
cdef bint pay_fragments(Hub hub, Connection c, uint32_t count) noexcept
cdef bint take_tokens(Hub hub, Connection c, bint control, float count) noexcept
cdef int on_violation(Hub hub, Connection c, int code) except -1
cdef int on_peer_close(Hub hub, Connection c, int code) except -1
