"""The end of a connection: the close handshake from either side, and letting go.

Knows nothing of why.
"""

from libc.stdint cimport uint16_t, uint8_t
from posix.unistd cimport close

from presence_core.backlog cimport backlog_clear
from presence_core.frames cimport decoder_free, encode_close
from presence_core.hub cimport (
    BEAT_CLOSE,
    CODE_INTERNAL_ERROR,
    CODE_NONE,
    Connection,
    Hub,
    NOTICE_CLOSED,
    Room,
    STATE_CLOSED,
    STATE_CLOSE_RECEIVED,
    STATE_CLOSING,
    STATE_FINISHING,
    STATE_OPEN,
)
from presence_core.members cimport members_remove
from presence_core.notices cimport notify
from presence_core.output cimport watch, write
from presence_core.system cimport EPOLL_CTL_DEL
from presence_core.turns cimport tick, wake
from presence_core.wheel cimport wheel_start, wheel_stop

cdef bytes EMPTY_CLOSE_FRAME = b"\x88\x00"


cdef void leave_room(Connection c) noexcept:
    """The room may go with its last member, and run a finaliser: callers that are in the middle of something hold it."""
    cdef Room room = c._room
    if room is not None:
        members_remove(&room.members, &c.membership)
        c._room = None


cdef int begin_close(Hub hub, Connection c, int code, bytes reason, bytes message) except -1:
    """Our close frame, behind an optional last message; then the peer has close_timeout_ms to answer."""
    cdef bytes frame = encode_close(code, reason)
    start_closing(hub, c, STATE_CLOSING)
    c.close_code = <uint16_t> code
    c.overflowed = False
    write(hub, c, frame if message is None else message + frame)
    return 0


cdef void fail(Hub hub, Connection c, int code) noexcept:
    """Close it for a reason of the hub's own; without the memory for a close frame, at once."""
    try:
        begin_close(hub, c, code, b"", None)
    except MemoryError:
        drop(hub, c, CODE_INTERNAL_ERROR)


cdef int finish(Hub hub, Connection c) except -1:
    """Answer the peer's close frame with its own code; the descriptor closes when that is with the kernel."""
    cdef int code = c.close_code
    if c._state != STATE_CLOSE_RECEIVED:
        return 0
    c._state = STATE_FINISHING
    c.overflowed = False
    try:
        write(hub, c, encode_close(code) if code != CODE_NONE else EMPTY_CLOSE_FRAME)
    except MemoryError:
        drop(hub, c, code)
    if c._state == STATE_FINISHING and c.waiting.head == NULL:
        drop(hub, c, code)
    return 0


cdef void start_closing(Hub hub, Connection c, uint8_t state) noexcept:
    cdef Room _held = c._room  # lives until this is done
    hub.open_count -= 1
    c._state = state
    leave_room(c)
    wheel_stop(&hub.timers, &c.alarm_entry)
    c.beat = BEAT_CLOSE
    wheel_start(&hub.timers, &c.beat_entry, tick(hub) + 1 + hub.close_timeout_ticks)
    if not hub.turning:
        wake(hub)  # settle arms the timer


cdef void drop(Hub hub, Connection c, int code) noexcept:
    """The descriptor goes now; on_closed follows with the notices."""
    cdef Room _held = c._room  # lives until this is done
    if c._state == STATE_CLOSED:
        return
    if c._state == STATE_OPEN:
        hub.open_count -= 1
    c._state = STATE_CLOSED
    c.close_code = <uint16_t> code
    leave_room(c)
    wheel_stop(&hub.timers, &c.beat_entry)
    wheel_stop(&hub.timers, &c.alarm_entry)
    # Whoever made the descriptor may still hold another for the same socket: closing alone would not end the watch.
    watch(hub, c, 0, EPOLL_CTL_DEL)
    close(c.fd)
    c.fd = -1
    decoder_free(&c.decoder)
    backlog_clear(&c.waiting)
    notify(hub, c, NOTICE_CLOSED)
