# Events of rooms on their way to the members.

from cpython.object cimport PyObject
from libc.stdint cimport uint64_t

from presence_core.hub cimport Connection, Hub, Room

cdef int enqueue(Room room, bytes frame, PyObject *exclude, PyObject *only, uint64_t received_ns) except -1
cdef void begin_pass(Room room) noexcept
cdef bytes join_frames(Room room, size_t count)
cdef void mark_named(Room room, int by) noexcept
cdef void end_pass(Room room, uint64_t now_ns) noexcept
cdef void forget_events(Room room) noexcept
cdef void activate(Hub hub, Room room) noexcept
cdef Room take_room(Hub hub)
cdef int fan_out(Hub hub) except -1
cdef int serve_some(Hub hub, Room room) except -1
cdef int serve_named(Hub hub, Room room, Connection c) except -1
