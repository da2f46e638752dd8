"""One agent's life at the client's end, in its order: dial, upgrade, and (what it hears being elsewhere) the end, and back.

Owns the states of links and agents, and what an agent does next. Knows nothing of messages, of Python, or of who calls it.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset, strcmp, strcpy
from posix.unistd cimport close

from presence_core.frames cimport OPCODE_CLOSE
from presence_core.system cimport (
    EPOLL_CTL_ADD,
    EPOLL_CTL_MOD,
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
from presence_core.wheel cimport wheel_is_started, wheel_start, wheel_stop
from presence_swarm.client_frames cimport CONTROL_FRAME_BYTES, write_client_frame
from presence_swarm.durations cimport durations_add, durations_clear
from presence_swarm.messages cimport begins, behind
from presence_swarm.sockets cimport SOCKET_STAMPED, SOCKET_UNREAD, socket_error, start_connect, upgrade_request

cdef enum:
    CODE_NORMAL = 1000
    CODE_GOING_AWAY = 1001
    CODE_INTERNAL = 1011
    CODE_RESTART = 1012
    FIRST_BACKOFF_MS = 200
    MOST_BACKOFF_MS = 5000
    NO_TARGET_RETRY_MS = 100
    ANSWER_MAX_BYTES = 16384  # head of the answer to an upgrade


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
    durations_clear(&f.overdue)
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


cdef void enter(swarm *s, link *line, uint8_t state) noexcept nogil:
    s.in_state[line.state] -= 1
    s.in_state[state] += 1
    line.state = state


cdef void enter_connected(swarm *s, link *line, uint64_t at_ns) noexcept nogil:
    """What every agent counts when it is connected, whichever link it was."""
    cdef agent *a = line.owner
    line.connected_ns = at_ns
    a.failures = 0
    enter(s, line, LINK_CONNECTED)
    s.now.connects += 1
    durations_add(&s.now.connect[a.group], at_ns - line.began_ns if at_ns > line.began_ns else 0)
    s.now.connected_last_ns = max(s.now.connected_last_ns, at_ns)


# --- dial

cdef void dial_later(swarm *s, agent *a, uint64_t delay_ms) noexcept nogil:
    wheel_start(&s.timers, &a.entry, (monotonic_ns() - s.start_ns) // NS_PER_MS + 1 + delay_ms)


cdef uint64_t back_off(swarm *s, agent *a) noexcept nogil:
    """Again after a random time that doubles with every failure; returns it."""
    cdef uint64_t delay_ms
    cdef uint64_t most_ms = FIRST_BACKOFF_MS << a.failures if a.failures < 8 else MOST_BACKOFF_MS
    if most_ms > MOST_BACKOFF_MS:
        most_ms = MOST_BACKOFF_MS
    if a.failures < 255:
        a.failures += 1
    delay_ms = most_ms // 2 + next_random(s) % (most_ms // 2 + 1)
    dial_later(s, a, delay_ms)
    return delay_ms


cdef inline int socket_flags(const agent *a) noexcept nogil:
    if a.behaviour == READS_NOTHING:
        return SOCKET_STAMPED | SOCKET_UNREAD
    return 0 if a.behaviour == IS_PLAIN else SOCKET_STAMPED  # a stamp for each packet is work of the sender's core, too


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
    line.fd = start_connect(line.source, s.ports[line.target], socket_flags(a))
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


cdef inline bint may_connect(const agent *a) noexcept nogil:
    """Not one who is on the way, or will be by itself."""
    cdef int current = a.links[a.current].state, other = a.links[1 - a.current].state
    return current == LINK_CONNECTED or current == LINK_CLOSED and other == LINK_CLOSED and not wheel_is_started(&a.entry)


cdef void connect_more(swarm *s) noexcept nogil:
    """Dial for the next of those that are to connect, as many as may be under way."""
    cdef agent *a
    while (
        s.connect_next < s.connect_stop
        and s.in_state[LINK_DIALLING] + s.in_state[LINK_UPGRADING] + s.in_state[LINK_WAITING] < s.connect_window
    ):
        a = &s.agents[s.connect_next]
        s.connect_next += 1
        if may_connect(a):
            a.return_ns = 0
            wheel_stop(&s.timers, &a.entry)  # told to come back later, it comes now
            dial(s, a)


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
    if rest == NULL and size <= ANSWER_MAX_BYTES:
        return 0
    if rest == NULL or not begins(data, size, b"HTTP/1.1 101"):
        refuse(s, line)
        return size
    line.upgraded_ns = at_ns
    enter(s, line, LINK_WAITING)
    if a.behaviour == IS_PLAIN:
        a.current = 0 if line == &a.links[0] else 1
        enter_connected(s, line, at_ns)
        s.connected_agents += not is_other_connected(line)
    elif a.behaviour != SAYS_NOTHING and not transmit(s, line, a.request, a.request_bytes):
        end_link(s, line, CODE_LOST, at_ns)
    return <size_t> rest - <size_t> data


# --- the end

cdef void leave(swarm *s, link *line) noexcept nogil:
    """Say goodbye; the end of it is the gateway's answer."""
    cdef uint8_t[CONTROL_FRAME_BYTES] frame
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
        a.return_ns = at_ns + back_off(s, a) * NS_PER_MS  # with a message, its time runs already
