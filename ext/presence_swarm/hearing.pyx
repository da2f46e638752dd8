"""What an agent hears: success, events and their numbers, errors, pings; and what is recorded of each.

Owns the measurements of messages and pings. Knows nothing of bytes that are not a whole frame.
"""

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport strcmp, strcpy

from presence_core.frame_header cimport read_length
from presence_core.frames cimport OPCODE_CLOSE, OPCODE_PONG
from presence_core.system cimport EPOLLRDHUP, NS_PER_MS
from presence_swarm.client_frames cimport CONTROL_FRAME_BYTES, server_frame, write_client_frame
from presence_swarm.durations cimport durations, durations_add
from presence_swarm.life cimport (
    ANSWERS_NOT,
    BEHAVES,
    IS_PLAIN,
    LINK_CONNECTED,
    LINK_LEAVING,
    LINK_WAITING,
    READS_NOTHING,
    agent,
    dial_later,
    end_link,
    enter_connected,
    leave,
    link,
    next_random,
    swarm,
    transmit,
    watch,
)
from presence_swarm.messages cimport (
    MESSAGE_ERROR,
    MESSAGE_EVENT,
    MESSAGE_GAP,
    MESSAGE_SUCCESS,
    event_stamp,
    kind_of,
    number_behind,
    read_error,
    read_stamp,
    session_error,
)

cdef extern from *:
    int count_ones "__builtin_popcountll"(unsigned long long bits) noexcept nogil

cdef enum:
    CODE_NO_STATUS = 1005
    CROSSING_MS = 25  # an event and the end of a connection may cross on their way: as long as an event may take


# --- messages

cdef void on_success(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil:
    cdef agent *a = line.owner
    cdef link *other = &a.links[1] if line == &a.links[0] else &a.links[0]
    line.interval_ns = number_behind(data, size, b'"ping_interval_ms":') * NS_PER_MS
    enter_connected(s, line, at_ns)
    if a.lost_ns:
        come_back(s, line, at_ns)
    elif a.hears_from_ns == 0:
        a.hears_from_ns = at_ns
    a.current = 0 if line == &a.links[0] else 1
    if other.state == LINK_CONNECTED:
        s.now.handovers += 1
        leave(s, other)
    else:
        s.connected_agents += 1
    if a.behaviour == READS_NOTHING:
        watch(s, line, EPOLLRDHUP)


cdef void come_back(swarm *s, link *line, uint64_t at_ns) noexcept nogil:
    """Connected again. Where nothing was under way when the old connection ended, what was published in between may be missed."""
    cdef agent *a = line.owner
    cdef uint64_t due_ns = a.return_ns if a.return_ns > a.lost_ns else a.lost_ns
    durations_add(&s.now.outage, at_ns - a.lost_ns if at_ns > a.lost_ns else 0)
    durations_add(&s.now.overdue, at_ns - due_ns if at_ns > due_ns else 0)
    if a.lost_ns < line.began_ns:
        s.now.missing[a.group] += pending_numbers(a)
        if a.highest:
            a.heard_highest = a.highest
            a.heard_until_ns = a.lost_ns - CROSSING_MS * NS_PER_MS
        a.hears_from_ns = at_ns
        a.highest = 0
    a.lost_ns = 0


cdef uint64_t missed_before(const agent *a, const event_stamp *stamp) noexcept nogil:
    """How many numbers before the first one of a stretch must have come, and have not. Of the last one before it the time is
    known; those before that one are older.
    """
    if stamp.number <= a.heard_highest + 1 or stamp.before_ns == 0:
        return 0
    if stamp.before_ns >= a.hears_from_ns:
        return 1
    if a.heard_highest and stamp.before_ns < a.heard_until_ns:
        return stamp.number - 1 - a.heard_highest
    return 0


cdef inline uint64_t fallen_out(uint64_t window, uint64_t ahead) noexcept nogil:
    """How many numbers that never came leave a window that moves on."""
    if ahead >= 64:
        return ahead - 64 + <uint64_t> (64 - count_ones(window))
    return ahead - <uint64_t> count_ones(window >> (64 - ahead))


cdef uint64_t pending_numbers(const agent *a) noexcept nogil:
    """Numbers that have not come but still may, since later ones came on another connection: the window's holes."""
    return <uint64_t> (64 - count_ones(a.window)) if a.highest else 0


@cython.overflowcheck(False)
cdef void on_number(swarm *s, agent *a, const event_stamp *stamp) noexcept nogil:
    """Keep the last 64 numbers of the stream: two connections may deliver it side by side."""
    cdef uint64_t back, number = stamp.number
    if a.highest == 0:
        s.now.missing[a.group] += missed_before(a, stamp)
        a.highest = number
        a.window = ~<uint64_t> 0
    elif number > a.highest:
        s.now.missing[a.group] += fallen_out(a.window, number - a.highest)
        a.window = a.window << (number - a.highest) if number - a.highest < 64 else 0
        a.highest = number
        a.window |= 1
    else:
        back = a.highest - number
        if back >= 64 or a.window >> back & 1:
            s.now.repeats += 1
        else:
            a.window |= <uint64_t> 1 << back


cdef void on_event(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil:
    cdef agent *a = line.owner
    cdef event_stamp stamp
    read_stamp(data, size, &stamp)
    if stamp.sent_ns == 0:
        s.now.other_events += 1
        return
    s.now.events += 1
    a.events += 1
    durations_add(&s.now.delivery[a.group], at_ns - stamp.sent_ns if at_ns > stamp.sent_ns else 0)
    if stamp.number:
        on_number(s, a, &stamp)


cdef void on_error(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil:
    cdef agent *a = line.owner
    cdef session_error error
    read_error(data, size, &error)
    line.is_told = True
    line.may_return = error.reconnect
    strcpy(line.error, error.type)
    if strcmp(error.type, b"terminated") == 0:
        s.now.terminated += 1
        if s.now.terminated_first_ns == 0:
            s.now.terminated_first_ns = at_ns
        if at_ns > s.now.terminated_last_ns:
            s.now.terminated_last_ns = at_ns
    if error.reconnect and a.behaviour == BEHAVES and line == &a.links[a.current]:
        a.return_ns = at_ns + error.reconnect_after_ms * NS_PER_MS
        dial_later(s, a, error.reconnect_after_ms)


cdef void on_message(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil:
    cdef int kind = kind_of(data, size)
    if kind == MESSAGE_EVENT:
        on_event(s, line, data, size, at_ns)
    elif kind == MESSAGE_SUCCESS and line.state == LINK_WAITING:
        on_success(s, line, data, size, at_ns)
    elif kind == MESSAGE_GAP:
        s.now.gaps += 1
    elif kind == MESSAGE_ERROR:
        on_error(s, line, data, size, at_ns)
    else:
        s.now.violations += 1


# --- pings

cdef void count_cadence(swarm *s, link *line, uint64_t at_ns) noexcept nogil:
    """The first one may come anywhere in the first interval, then one comes every interval."""
    cdef durations *cadence = &s.now.cadence[line.owner.group]
    cdef uint64_t due_ns = line.ping_due_ns
    if due_ns == 0:
        due_ns = line.connected_ns + line.interval_ns
        durations_add(cadence, at_ns - due_ns if at_ns > due_ns else 0)
        line.ping_due_ns = at_ns + line.interval_ns
    elif at_ns >= due_ns:
        durations_add(cadence, at_ns - due_ns)
        line.ping_due_ns = due_ns + line.interval_ns
    else:
        durations_add(cadence, due_ns - at_ns)
        line.ping_due_ns = at_ns + line.interval_ns  # the ones before were late: this one shows where the beat is


cdef void on_ping(swarm *s, link *line, const uint8_t *payload, size_t size, uint64_t at_ns) noexcept nogil:
    cdef agent *a = line.owner
    cdef uint8_t[CONTROL_FRAME_BYTES] pong
    s.now.pings += 1
    if a.behaviour != IS_PLAIN:
        count_cadence(s, line, at_ns)
    if a.behaviour == ANSWERS_NOT:
        if line.unanswered_ns == 0:
            line.unanswered_ns = at_ns
        return
    transmit(s, line, pong, write_client_frame(pong, OPCODE_PONG, payload, size, <uint32_t> next_random(s)))


# --- the close frame

cdef void on_close_frame(swarm *s, link *line, const server_frame *frame, uint64_t at_ns) noexcept nogil:
    cdef uint8_t[CONTROL_FRAME_BYTES] answer
    cdef size_t size = 2 if frame.size >= 2 else 0
    cdef uint16_t code = <uint16_t> read_length(frame.payload, 2) if size else CODE_NO_STATUS
    if line.state != LINK_LEAVING:
        transmit(s, line, answer, write_client_frame(answer, OPCODE_CLOSE, frame.payload, size, <uint32_t> next_random(s)))
    end_link(s, line, code, at_ns)
