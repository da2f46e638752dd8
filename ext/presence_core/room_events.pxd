# The events that wait in a room.

from cpython.object cimport PyObject
from libc.stdint cimport uint64_t

cdef struct room_event:
    PyObject *frame          # bytes: one encoded frame
    PyObject *exclude        # Connection that does not get it, or NULL
    PyObject *only           # Connection that alone gets it, or NULL
    uint64_t received_ns     # when it reached the process
    uint64_t number          # position in the room's order

cdef struct event_list:
    room_event *items
    size_t start             # the first one
    size_t end               # behind the last one; 0 when there is none
    size_t capacity

cdef int events_push(event_list *events, room_event *event) except -1
cdef void events_drop_first(event_list *events) noexcept
cdef void events_free(event_list *events) noexcept
