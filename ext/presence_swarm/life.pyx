"""One agent's life at the client's end, in its order: dial, upgrade, connect, events and pings, the end, and back again.

Owns what an agent does and what is recorded of it. Knows nothing of Python, of when it is called, or of who reads the figures.

An arrival is the kernel's time stamp of the bytes (SO_TIMESTAMPNS), so that a swarm that reads late measures right all the
same; how late it reads is a figure of its own. Of bytes read together the stamp is the last one's: never too early.
"""

cimport cython
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strcmp, strcpy
from posix.unistd cimport close

from presence_core.frame_header cimport read_length
from presence_core.frames cimport OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG, OPCODE_TEXT
from presence_core.system cimport (
    EPOLL_CTL_ADD,
    EPOLL_CTL_MOD,
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLRDHUP,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    NS_PER_MS,
    epoll_ctl,
    epoll_event,
    monotonic_ns,
    send,
)
from presence_core.wheel cimport wheel_start
from presence_swarm.client_frames cimport (
    SERVER_FRAME_BAD,
    SERVER_FRAME_MORE,
    read_server_frame,
    server_frame,
    write_client_frame,
)
from presence_swarm.durations cimport durations_add, durations_clear
from presence_swarm.messages cimport (
    MESSAGE_ERROR,
    MESSAGE_EVENT,
    MESSAGE_GAP,
    MESSAGE_SUCCESS,
    begins,
    behind,
    event_stamp,
    kind_of,
    number_behind,
    read_error,
    read_stamp,
    session_error,
)
from presence_swarm.sockets cimport receive_stamped, socket_error, start_connect, upgrade_request

cdef extern from *:
    int count_ones "__builtin_popcountll"(unsigned long long bits) noexcept nogil

cdef enum:
    CODE_NORMAL = 1000
    CODE_GOING_AWAY = 1001
    CODE_NO_STATUS = 1005
    CODE_LOST = 1006
    CODE_INTERNAL = 1011
    CODE_RESTART = 1012
    FIRST_BACKOFF_MS = 200
    MOST_BACKOFF_MS = 5000
    NO_TARGET_RETRY_MS = 100
    CONTROL_BYTES = 140


cdef void figures_clear(figures *f) noexcept nogil:
    cdef int i
    memset(f, 0, sizeof(figures))
    for i in range(GROUPS):
        durations_clear(&f.connect[i])
        durations_clear(&f.delivery[i])
        durations_clear(&f.cadence[i])
    durations_clear(&f.unanswered)
    durations_clear(&f.silent)
    durations_clear(&f.outage)
    durations_clear(&f.farewell)
    durations_clear(&f.lag)
    durations_clear(&f.stall)


cdef uint64_t next_random(swarm *s) noexcept nogil:
    # xorshift32 in 64 bits: what is shifted out is cut off, not taken for an overflow by the debug build
    cdef uint64_t x = s.random
    x ^= <uint32_t> (x << 13)
    x ^= x >> 17
    x ^= <uint32_t> (x << 5)
    s.random = x
    return x


cdef inline void enter(swarm *s, link *line, uint8_t state) noexcept nogil:
    s.in_state[line.state] -= 1
    s.in_state[state] += 1
    line.state = state


# --- dial

cdef void dial_later(swarm *s, agent *a, uint64_t delay_ms) noexcept nogil:
    wheel_start(&s.timers, &a.entry, (monotonic_ns() - s.start_ns) // NS_PER_MS + 1 + delay_ms)


cdef void back_off(swarm *s, agent *a) noexcept nogil:
    """Again after a random time that doubles with every failure."""
    cdef uint64_t most_ms = FIRST_BACKOFF_MS << a.failures if a.failures < 8 else MOST_BACKOFF_MS
    if most_ms > MOST_BACKOFF_MS:
        most_ms = MOST_BACKOFF_MS
    if a.failures < 255:
        a.failures += 1
    dial_later(s, a, most_ms // 2 + next_random(s) % (most_ms // 2 + 1))


cdef void dial(swarm *s, agent *a) noexcept nogil:
    """Open a socket to the next replica, as a load balancer would choose it; the old link, if any, goes on."""
    cdef link *line
    cdef epoll_event event
    if a.is_done:
        return
    if s.targets == 0:
        dial_later(s, a, NO_TARGET_RETRY_MS)
        return
    line = &a.links[1 - a.current] if a.links[a.current].state != LINK_CLOSED else &a.links[a.current]
    if line.state == LINK_LEAVING:
        dial_later(s, a, NO_TARGET_RETRY_MS)  # two at the most: the one before has not quite gone
        return
    if line.state != LINK_CLOSED:
        return  # it is on its way already
    s.now.attempts += 1
    line.target = <uint8_t> (s.next_target % <uint32_t> s.targets)
    s.next_target += 1
    line.source = <uint8_t> (s.next_source % SOURCES)
    s.next_source += 1
    line.is_told = False
    line.error[0] = 0
    line.upgraded_ns = line.connected_ns = line.ping_due_ns = line.unanswered_ns = line.left_ns = 0
    line.began_ns = monotonic_ns()
    line.fd = start_connect(line.source, s.ports[line.target], a.behaviour == READS_NOTHING)
    if line.fd < 0:
        s.errno_seen = -line.fd
        s.now.refusals += 1
        back_off(s, a)
        return
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP
    event.data.ptr = line
    if epoll_ctl(s.epoll_fd, EPOLL_CTL_ADD, line.fd, &event) < 0:
        s.errno_seen = errno
        close(line.fd)
        back_off(s, a)
        return
    enter(s, line, LINK_DIALLING)


cdef void watch(swarm *s, link *line, uint32_t events) noexcept nogil:
    cdef epoll_event event
    event.events = events
    event.data.ptr = line
    if epoll_ctl(s.epoll_fd, EPOLL_CTL_MOD, line.fd, &event) < 0:
        s.errno_seen = errno


cdef bint transmit(swarm *s, link *line, const uint8_t *data, size_t size) noexcept nogil:
    """What an agent says is small: a socket that does not take it whole at once is not well."""
    if send(line.fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT) == <ssize_t> size:
        return True
    s.errno_seen = errno
    return False


# --- upgrade

cdef void on_dialled(swarm *s, link *line) noexcept nogil:
    cdef uint8_t[512] request
    cdef size_t size
    cdef int error = socket_error(line.fd)
    if error:
        s.errno_seen = error
        refuse(s, line)
        return
    size = upgrade_request(request, sizeof(request), s.ports[line.target])
    watch(s, line, EPOLLIN | EPOLLRDHUP)
    enter(s, line, LINK_UPGRADING)
    if not transmit(s, line, request, size):
        refuse(s, line)


cdef void refuse(swarm *s, link *line) noexcept nogil:
    """It was not upgraded: the next replica may do it."""
    s.now.refusals += 1
    drop_link(s, line)
    back_off(s, line.owner)


cdef size_t on_answer(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil:
    """The answer to the upgrade request, once it is whole; returns the bytes taken."""
    cdef agent *a = line.owner
    cdef const uint8_t *rest = behind(data, size, b"\r\n\r\n")
    if rest == NULL:
        return 0
    if not begins(data, size, b"HTTP/1.1 101"):
        refuse(s, line)
        return size
    line.upgraded_ns = at_ns
    enter(s, line, LINK_WAITING)
    if a.behaviour != SAYS_NOTHING and not transmit(s, line, a.request, a.request_bytes):
        end_link(s, line, CODE_LOST, at_ns)
    return <size_t> (rest - data)


# --- messages

cdef void on_success(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil:
    cdef agent *a = line.owner
    cdef link *other = &a.links[1] if line == &a.links[0] else &a.links[0]
    line.connected_ns = at_ns
    line.interval_ns = number_behind(data, size, b'"ping_interval_ms":') * NS_PER_MS
    a.failures = 0
    enter(s, line, LINK_CONNECTED)
    s.now.connects += 1
    durations_add(&s.now.connect[a.group], at_ns - line.began_ns)
    if a.lost_ns:
        if a.lost_ns < line.began_ns:
            a.highest = 0  # a new start: what went by in between is not missing. A move must not miss anything.
        durations_add(&s.now.outage, at_ns - a.lost_ns if at_ns > a.lost_ns else 0)
        a.lost_ns = 0
    a.current = 0 if line == &a.links[0] else 1
    if other.state == LINK_CONNECTED:
        s.now.handovers += 1
        leave(s, other)
    else:
        s.connected_agents += 1
    if a.behaviour == READS_NOTHING:
        watch(s, line, EPOLLRDHUP)


cdef inline uint64_t fallen_out(uint64_t window, uint64_t ahead) noexcept nogil:
    """How many numbers that never came leave a window that moves on."""
    if ahead >= 64:
        return ahead - 64 + <uint64_t> (64 - count_ones(window))
    return ahead - <uint64_t> count_ones(window >> (64 - ahead))


cdef uint64_t pending_numbers(const agent *a) noexcept nogil:
    """Numbers that have not come but still may, since later ones came on another connection: the window's holes."""
    return <uint64_t> (64 - count_ones(a.window)) if a.highest else 0


@cython.overflowcheck(False)
cdef void on_number(swarm *s, agent *a, uint64_t number) noexcept nogil:
    """Keep the last 64 numbers of the stream: two connections may deliver it side by side."""
    cdef uint64_t back
    if a.highest == 0:
        a.highest = number
        a.window = ~<uint64_t> 0
    elif number > a.highest:
        s.now.missing += fallen_out(a.window, number - a.highest)
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
        on_number(s, a, stamp.number)


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

cdef void on_ping(swarm *s, link *line, const uint8_t *payload, size_t size, uint64_t at_ns) noexcept nogil:
    """The first one may come anywhere in the first interval, then one comes every interval."""
    cdef agent *a = line.owner
    cdef uint8_t[CONTROL_BYTES] pong
    cdef uint64_t due_ns = line.ping_due_ns
    s.now.pings += 1
    if due_ns == 0:
        due_ns = line.connected_ns + line.interval_ns
        durations_add(&s.now.cadence[a.group], at_ns - due_ns if at_ns > due_ns else 0)
        line.ping_due_ns = at_ns + line.interval_ns
    elif at_ns >= due_ns:
        durations_add(&s.now.cadence[a.group], at_ns - due_ns)
        line.ping_due_ns = due_ns + line.interval_ns
    else:
        durations_add(&s.now.cadence[a.group], due_ns - at_ns)
        line.ping_due_ns = at_ns + line.interval_ns  # the ones before were late: this one shows where the beat is
    if a.behaviour == ANSWERS_NOT:
        if line.unanswered_ns == 0:
            line.unanswered_ns = at_ns
        return
    transmit(s, line, pong, write_client_frame(pong, OPCODE_PONG, payload, size, <uint32_t> next_random(s)))


# --- the end

cdef void leave(swarm *s, link *line) noexcept nogil:
    """Say goodbye; the end of it is the gateway's answer."""
    cdef uint8_t[CONTROL_BYTES] frame
    cdef uint8_t[2] code
    code[0] = CODE_NORMAL >> 8
    code[1] = CODE_NORMAL & 0xFF
    if line.state != LINK_CONNECTED:
        return
    if not is_other_connected(line):
        s.connected_agents -= 1
    line.left_ns = monotonic_ns()
    enter(s, line, LINK_LEAVING)
    watch(s, line, EPOLLIN | EPOLLRDHUP)
    transmit(s, line, frame, write_client_frame(frame, OPCODE_CLOSE, code, 2, <uint32_t> next_random(s)))


cdef inline bint is_other_connected(link *line) noexcept nogil:
    cdef agent *a = line.owner
    return a.links[1 if line == &a.links[0] else 0].state == LINK_CONNECTED


cdef void drop_link(swarm *s, link *line) noexcept nogil:
    """Close the socket and give back what it held."""
    if line.state == LINK_CLOSED:
        return
    if line.state == LINK_CONNECTED and not is_other_connected(line):
        s.connected_agents -= 1
    close(line.fd)
    line.fd = -1
    free(line.partial)
    line.partial = NULL
    line.partial_bytes = 0
    enter(s, line, LINK_CLOSED)


cdef void count_close(swarm *s, uint16_t code, const char *error) noexcept nogil:
    cdef int i
    for i in range(s.now.close_rows):
        if s.now.closes[i].code == code and strcmp(s.now.closes[i].error, error) == 0:
            s.now.closes[i].count += 1
            return
    if s.now.close_rows < CLOSE_ROWS:
        i = s.now.close_rows
        s.now.close_rows += 1
        s.now.closes[i].code = code
        strcpy(s.now.closes[i].error, error)
        s.now.closes[i].count = 1


cdef inline bint asks_back(uint16_t code) noexcept nogil:
    """Whether a close without a message means to reconnect."""
    return 4000 <= code < 4500 or code in (CODE_GOING_AWAY, CODE_LOST, CODE_INTERNAL, CODE_RESTART)


cdef void end_link(swarm *s, link *line, uint16_t code, uint64_t at_ns) noexcept nogil:
    """A connection is over: by the gateway's close frame, or without one (1006)."""
    cdef agent *a = line.owner
    cdef bint left = line.state == LINK_LEAVING
    cdef bint was_current = line == &a.links[a.current]
    cdef bint may_return = line.may_return if line.is_told else asks_back(code)
    if left:
        count_close(s, code, b"left")
        durations_add(&s.now.farewell, at_ns - line.left_ns if at_ns > line.left_ns else 0)
    else:
        count_close(s, code, line.error)
    if line.unanswered_ns and at_ns > line.unanswered_ns:
        durations_add(&s.now.unanswered, at_ns - line.unanswered_ns)
    if a.behaviour == SAYS_NOTHING and line.upgraded_ns:
        durations_add(&s.now.silent, at_ns - line.upgraded_ns)
    drop_link(s, line)
    if left:
        a.is_done = a.is_done or was_current
    else:
        go_on(s, line, was_current, may_return, at_ns)


cdef void go_on(swarm *s, link *line, bint was_current, bint may_return, uint64_t at_ns) noexcept nogil:
    """What the agent does when one of its connections is over that it did not leave itself."""
    cdef agent *a = line.owner
    cdef link *other = &a.links[1 if line == &a.links[0] else 0]
    cdef bint has_other = LINK_CLOSED < other.state < LINK_LEAVING
    if was_current and line.connected_ns and other.state != LINK_CONNECTED:
        a.lost_ns = at_ns
    if has_other and was_current:
        return  # the next one is on its way already
    if a.behaviour not in (BEHAVES, STAYS) or not may_return:
        a.is_done = not has_other
    elif not was_current or not line.is_told or a.behaviour == STAYS:
        back_off(s, a)  # with a message, its time runs already


cdef void on_close_frame(swarm *s, link *line, const server_frame *frame, uint64_t at_ns) noexcept nogil:
    cdef uint8_t[CONTROL_BYTES] answer
    cdef size_t size = 2 if frame.size >= 2 else 0
    cdef uint16_t code = <uint16_t> read_length(frame.payload, 2) if size else CODE_NO_STATUS
    if line.state != LINK_LEAVING:
        transmit(s, line, answer, write_client_frame(answer, OPCODE_CLOSE, frame.payload, size, <uint32_t> next_random(s)))
    end_link(s, line, code, at_ns)


# --- bytes

cdef size_t take_frames(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil:
    """Everything that is whole; returns the bytes taken. The link may be closed behind it."""
    cdef server_frame frame
    cdef size_t taken = 0
    cdef int status
    while line.state >= LINK_WAITING:
        status = read_server_frame(data + taken, size - taken, MESSAGE_MAX_BYTES, &frame)
        if status == SERVER_FRAME_MORE:
            break
        if status == SERVER_FRAME_BAD:
            s.now.violations += 1
            end_link(s, line, CODE_LOST, at_ns)
            break
        taken += frame.taken
        s.now.frames += 1
        if frame.opcode == OPCODE_TEXT:
            on_message(s, line, frame.payload, frame.size, at_ns)
        elif frame.opcode == OPCODE_PING:
            on_ping(s, line, frame.payload, frame.size, at_ns)
        elif frame.opcode == OPCODE_CLOSE:
            on_close_frame(s, line, &frame, at_ns)
    return taken


cdef bint keep(link *line, const uint8_t *data, size_t size) noexcept nogil:
    """What is not whole waits for the rest, in memory of its own."""
    free(line.partial)
    line.partial = NULL
    line.partial_bytes = 0
    if size == 0:
        return True
    line.partial = <uint8_t *> malloc(size)
    if line.partial == NULL:
        return False
    memcpy(line.partial, data, size)
    line.partial_bytes = size
    return True


cdef void receive(swarm *s, link *line) noexcept nogil:
    cdef uint64_t stamp_ns = 0, now_ns
    cdef size_t kept = line.partial_bytes, size, taken = 0
    cdef ssize_t got
    if kept:
        memcpy(s.buffer, line.partial, kept)
    got = receive_stamped(line.fd, s.buffer + kept, READ_BYTES, &stamp_ns)
    now_ns = monotonic_ns()
    if got < 0 and (errno == EAGAIN or errno == EINTR):
        return
    if got <= 0:
        if line.state == LINK_UPGRADING:
            refuse(s, line)
        else:
            end_link(s, line, CODE_LOST, now_ns)
        return
    stamp_ns = stamp_ns - s.clock_offset_ns if stamp_ns > s.clock_offset_ns else now_ns
    if stamp_ns > now_ns:
        stamp_ns = now_ns  # the offset was taken a moment before
    durations_add(&s.now.lag, now_ns - stamp_ns)
    s.now.bytes += <uint64_t> got
    size = kept + <size_t> got
    if line.state == LINK_UPGRADING:
        taken = on_answer(s, line, s.buffer, size, stamp_ns)
    if line.state >= LINK_WAITING:
        taken += take_frames(s, line, s.buffer + taken, size - taken, stamp_ns)
    if line.state != LINK_CLOSED and not keep(line, s.buffer + taken, size - taken):
        s.errno_seen = errno
        end_link(s, line, CODE_LOST, now_ns)


cdef void on_link_ready(swarm *s, link *line, uint32_t events) noexcept nogil:
    if line.state == LINK_CLOSED:
        return  # by an earlier event of this turn
    if line.state == LINK_DIALLING:
        if events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
            on_dialled(s, line)
        return
    receive(s, line)
