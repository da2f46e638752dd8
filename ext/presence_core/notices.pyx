"""What the handler is told, when no loop over timers, members or events is under way; and what its callbacks raise.

Knows nothing of frames or rooms.
"""

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint8_t

from presence_core.closing cimport fail
from presence_core.hub cimport (
    BEAT_PONG,
    CODE_INTERNAL_ERROR,
    Connection,
    Hub,
    NOTICES_ALL,
    NOTICES_PER_TURN,
    NOTICE_ALARM,
    NOTICE_BACKLOG,
    NOTICE_CLOSED,
    NOTICE_LISTED,
    NOTICE_PONG_TIMEOUT,
    STATE_OPEN,
)
from presence_core.input cimport receive
from presence_core.members cimport members_remove
from presence_core.turns cimport wake

from presence_core.names import DEADLINE_ALARM, DEADLINE_PONG, LIMIT_BACKLOG

cdef enum:
    CODE_GOING_AWAY = 1001
    CODE_POLICY_VIOLATION = 1008


cdef void report(object error) noexcept:
    """To sys.unraisablehook, as all that a function raises which must not."""
    raise error


cdef void notify(Hub hub, Connection c, uint8_t notice) noexcept:
    """Note it for run_notices. The list holds a reference to each connection in it."""
    if not c.notices & NOTICE_LISTED:
        Py_INCREF(c)
        c.notice_next = NULL
        if hub.notice_tail == NULL:
            hub.notice_head = <PyObject *> c
        else:
            (<Connection> hub.notice_tail).notice_next = <PyObject *> c
        hub.notice_tail = <PyObject *> c
    c.notices |= notice | NOTICE_LISTED
    wake(hub)


cdef int run_notices(Hub hub) except -1:
    cdef int left = NOTICES_PER_TURN
    cdef Connection c
    while hub.notice_head != NULL and left:
        c = <Connection> hub.notice_head
        hub.notice_head = c.notice_next
        if hub.notice_head == NULL:
            hub.notice_tail = NULL
        c.notices &= NOTICES_ALL ^ NOTICE_LISTED
        Py_DECREF(c)  # the list's; c has its own
        tell(hub, c)
        left -= 1
    return 0


cdef int tell(Hub hub, Connection c) except -1:
    if c.notices & NOTICE_CLOSED:
        return tell_closed(hub, c)
    if c.notices & NOTICE_BACKLOG:
        c.notices &= NOTICES_ALL ^ NOTICE_BACKLOG
        tell_limit(hub, c, LIMIT_BACKLOG)
    if c.notices & (NOTICE_PONG_TIMEOUT | NOTICE_ALARM) and c._state == STATE_OPEN:
        receive(hub, c)  # what was to come in time may have come while this process was held up
    if c.notices & NOTICE_PONG_TIMEOUT:
        c.notices &= NOTICES_ALL ^ NOTICE_PONG_TIMEOUT
        if c.beat == BEAT_PONG:
            tell_deadline(hub, c, DEADLINE_PONG)
    if c.notices & NOTICE_ALARM:  # unless a callback has set another one meanwhile
        c.notices &= NOTICES_ALL ^ NOTICE_ALARM
        tell_deadline(hub, c, DEADLINE_ALARM)
    return 0


cdef int tell_closed(Hub hub, Connection c) except -1:
    try:
        hub.handler.on_closed(c, c.close_code)
    except BaseException as error:
        failed(hub, c, error)
    members_remove(&hub.everyone, &c.registration)
    Py_DECREF(c)  # the reference taken by adopt
    return 0


cdef int tell_deadline(Hub hub, Connection c, object deadline) except -1:
    if c._state != STATE_OPEN:
        return 0
    try:
        hub.handler.on_deadline(c, deadline)
    except BaseException as error:
        failed(hub, c, error)
    if deadline is DEADLINE_PONG and c._state == STATE_OPEN and c.beat == BEAT_PONG:
        fail(hub, c, CODE_GOING_AWAY)
    return 0


cdef int tell_limit(Hub hub, Connection c, object limit) except -1:
    if c._state != STATE_OPEN:
        return 0
    try:
        hub.handler.on_limit(c, limit)
    except BaseException as error:
        failed(hub, c, error)
    if c._state == STATE_OPEN:
        fail(hub, c, CODE_POLICY_VIOLATION)
    return 0


cdef void failed(Hub hub, Connection c, object error) noexcept:
    """A callback raised: that connection (None: it was about a room) ends, everything else goes on."""
    if not isinstance(error, Exception):
        hold(hub, error)
    else:
        try:
            hub.handler.on_error(c, error)
        except Exception as second:
            report(second)
        except BaseException as second:
            hold(hub, second)
    if c is not None and c._state == STATE_OPEN:
        fail(hub, c, CODE_INTERNAL_ERROR)


cdef void hold(Hub hub, object error) noexcept:
    """KeyboardInterrupt and its like go on when all is in order: behind the turn. One is enough."""
    if hub.held is None:
        hub.held = error


cdef int tell_drained(Hub hub, list rooms) except -1:
    for room in rooms:
        try:
            hub.handler.on_room_drained(room)
        except BaseException as error:
            failed(hub, None, error)
    return 0
