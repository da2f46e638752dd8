"""The events that wait in a room, in order. Owns a reference to each frame and to whom it names. Knows nothing of rooms."""

from cpython.mem cimport PyMem_RawFree, PyMem_RawRealloc
from cpython.ref cimport Py_DECREF, Py_XDECREF
from libc.string cimport memmove, memset

cdef enum:
    EVENTS_KEPT = 16  # an empty room keeps no more memory for events than this


cdef int events_push(event_list *events, room_event *event) except -1:
    """Append; the references of ``event`` are the list's from then on. Raises MemoryError, and changes nothing."""
    cdef size_t capacity
    cdef room_event *items
    if events.start and events.end == events.capacity:  # reclaim what has been taken from the front
        memmove(events.items, events.items + events.start, (events.end - events.start) * sizeof(room_event))
        events.end -= events.start
        events.start = 0
    if events.end == events.capacity:
        capacity = events.capacity * 2 if events.capacity else 4
        items = <room_event *> PyMem_RawRealloc(events.items, capacity * sizeof(room_event))
        if items == NULL:
            raise MemoryError
        events.items = items
        events.capacity = capacity
    events.items[events.end] = event[0]
    events.end += 1
    return 0


cdef void events_drop_first(event_list *events) noexcept:
    """Its objects go last: a finaliser may push to this list."""
    cdef room_event event = events.items[events.start]
    events.start += 1
    if events.start == events.end:
        events.start = events.end = 0
        if events.capacity > EVENTS_KEPT:
            events_free(events)
    Py_DECREF(<object> event.frame)
    Py_XDECREF(event.exclude)
    Py_XDECREF(event.only)


cdef void events_free(event_list *events) noexcept:
    PyMem_RawFree(events.items)
    memset(events, 0, sizeof(event_list))
