"""Events of rooms on their way to the members: batches, passes, and rooms that take turns.

Owns the order of events in a room. Knows nothing of sockets: `output` writes.
"""

from cpython.bytes cimport PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XINCREF
from libc.stdint cimport uint64_t

from presence_core.closing cimport drop
from presence_core.histogram cimport histogram_observe
from presence_core.hub cimport (
    BATCH_MAX_BYTES,
    BYTES_PER_TURN,
    CODE_INTERNAL_ERROR,
    Connection,
    Hub,
    MEMBERS_PER_TURN,
    Room,
    STATE_OPEN,
)
from presence_core.members cimport member, member_list, members_begin_pass, members_in_pass, members_next
from presence_core.notices cimport tell_drained
from presence_core.output cimport add_to_bulk, can_take, write, write_together
from presence_core.room_events cimport events_drop_first, events_push, room_event
from presence_core.system cimport monotonic_ns
from presence_core.turns cimport wake

cdef extern from *:
    """
    #define prefetch(address) __builtin_prefetch(address)
    """
    void prefetch(const void *address) noexcept nogil

cdef enum:
    PREFETCH_AHEAD = 3       # members: a crowd does not stay in the cache from one event to the next
    CACHE_LINE_BYTES = 64
    TOGETHER_MIN = 8         # sends: fewer are not worth a call of another kind


cdef int enqueue(Room room, bytes frame, PyObject *exclude, PyObject *only, uint64_t received_ns) except -1:
    cdef room_event event
    event.frame = <PyObject *> frame
    event.exclude = exclude
    event.only = only
    event.received_ns = received_ns
    event.number = room.next_number
    events_push(&room.events, &event)
    Py_INCREF(frame)
    Py_XINCREF(exclude)
    Py_XINCREF(only)
    room.next_number += 1
    room.queued_bytes += <size_t> PyBytes_GET_SIZE(frame)
    room.hub.events_queued += 1
    activate(room.hub, room)
    return 0


cdef void begin_pass(Room room) noexcept:
    """Take what waits, up to BATCH_MAX_BYTES, and join it into what most members get in one send."""
    cdef size_t size, taken = 0, count = 0
    cdef size_t waiting = room.events.end - room.events.start
    while count < waiting:
        size = <size_t> PyBytes_GET_SIZE(<object> room.events.items[room.events.start + count].frame)
        if count and taken + size > BATCH_MAX_BYTES:
            break
        taken += size
        count += 1
    try:
        room.common = join_frames(room, count)
    except MemoryError:  # one event alone needs none
        count = 1
        taken = <size_t> PyBytes_GET_SIZE(<object> room.events.items[room.events.start].frame)
        if room.events.items[room.events.start].only == NULL:
            room.common = <bytes> room.events.items[room.events.start].frame
    room.batched = count
    room.queued_bytes -= taken
    mark_named(room, 1)
    members_begin_pass(&room.members)


cdef bytes join_frames(Room room, size_t count):
    """The first events as those get them whom none of them names; None: nothing."""
    cdef list shared = []
    cdef size_t i
    for i in range(room.events.start, room.events.start + count):
        if room.events.items[i].only == NULL:
            shared.append(<object> room.events.items[i].frame)
    if not shared:
        return None
    return shared[0] if len(shared) == 1 else b"".join(shared)


cdef void mark_named(Room room, int by) noexcept:
    """Mark those whom an event of the batch names: only they, and newcomers, are served event by event."""
    cdef size_t i
    cdef room_event *event
    for i in range(room.batched):
        event = &room.events.items[room.events.start + i]
        if event.exclude != NULL:
            (<Connection> event.exclude).named += by
        if event.only != NULL:
            (<Connection> event.only).named += by


cdef void end_pass(Room room, uint64_t now_ns) noexcept:
    cdef uint64_t received
    mark_named(room, -1)
    room.common = None
    while room.batched:
        received = room.events.items[room.events.start].received_ns
        histogram_observe(&room.hub.delivery, now_ns - received if now_ns > received else 0)
        room.batched -= 1
        events_drop_first(&room.events)


cdef void forget_events(Room room) noexcept:
    """Those of a pass under way too: the room is at its end, or its hub is."""
    mark_named(room, -1)
    room.common = None
    room.batched = 0
    room.queued_bytes = 0
    while room.events.end:
        events_drop_first(&room.events)


cdef void activate(Hub hub, Room room) noexcept:
    if room.active:
        return
    room.active = True
    room.ring_next = None
    if hub.ring_tail is None:
        hub.ring_head = room
    else:
        hub.ring_tail.ring_next = room
    hub.ring_tail = room
    wake(hub)


cdef Room take_room(Hub hub):
    """The first of the ring, out of it."""
    cdef Room room = hub.ring_head
    hub.ring_head = room.ring_next
    room.ring_next = None
    if hub.ring_head is None:
        hub.ring_tail = None
    room.active = False
    return room


cdef int fan_out(Hub hub) except -1:
    """Serve rooms in turn until the slice is over: what is left goes on in the next turn of the loop."""
    cdef uint64_t now = monotonic_ns(), stop_ns = now + hub.slice_ns
    cdef Room room
    cdef list drained = []
    while hub.ring_head is not None and now < stop_ns:
        room = take_room(hub)
        if room.batched == 0:
            begin_pass(room)
        serve_some(hub, room)
        now = monotonic_ns()
        if not members_in_pass(&room.members):
            end_pass(room, now)
        if room.events.end:
            activate(hub, room)
        elif room.overflowed:
            room.overflowed = False
            drained.append(room)
    if drained:
        tell_drained(hub, drained)
    return 0


cdef inline void prefetch_ahead(const member_list *members) noexcept:
    """The lines of a connection that serving it reads: its membership's and those before it."""
    cdef const char *membership
    if members.cursor + PREFETCH_AHEAD < members.end:
        membership = <const char *> members.items[members.cursor + PREFETCH_AHEAD]
        prefetch(membership)
        prefetch(membership - CACHE_LINE_BYTES)
        prefetch(membership - 2 * CACHE_LINE_BYTES)


cdef int members_per_turn(Room room) noexcept:
    if room.common is None:
        return MEMBERS_PER_TURN
    return <int> max(1, min(MEMBERS_PER_TURN, BYTES_PER_TURN // (PyBytes_GET_SIZE(room.common) + 1)))


cdef int serve_some(Hub hub, Room room) except -1:
    cdef member *next_member
    cdef Connection c
    cdef int left = members_per_turn(room)
    cdef bint together = hub.ring.fd >= 0 and left >= TOGETHER_MIN and room.members.end - room.members.cursor >= TOGETHER_MIN
    cdef uint64_t first_number = room.events.items[room.events.start].number
    while left:
        prefetch_ahead(&room.members)
        next_member = members_next(&room.members)
        if next_member == NULL:
            break
        c = <Connection> next_member.owner
        if c.named or c.joined_number > first_number:
            write_together(hub, room.common)  # before any Python code may run
            try:
                serve_named(hub, room, c)
            except MemoryError:
                drop(hub, c, CODE_INTERNAL_ERROR)
        elif room.common is not None:
            if together and hub.ring.fd >= 0 and can_take(c):  # a call before may have been the last of the ring
                add_to_bulk(hub, c, room.common)
            else:
                write(hub, c, room.common)
        left -= 1
    write_together(hub, room.common)
    return 0


cdef int serve_named(Hub hub, Room room, Connection c) except -1:
    """The events of the batch that are for this one: in order, in one send."""
    cdef size_t i
    cdef room_event *event
    cdef list frames = []
    for i in range(room.batched):
        event = &room.events.items[room.events.start + i]
        if event.number < c.joined_number or event.exclude == <PyObject *> c:
            continue
        if event.only == NULL or event.only == <PyObject *> c:
            frames.append(<object> event.frame)
    if frames and c._state == STATE_OPEN:  # a new list may let the collector run, and that a finaliser
        write(hub, c, b"".join(frames))
    return 0
