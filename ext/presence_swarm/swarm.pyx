"""The swarm: many agents in one process, one epoll and one loop, which runs without the interpreter's lock.

Owns the agents, their memory and the loop. Knows nothing of what an agent does (that is life.pyx), of tokens or of scenarios.
"""

import os

from libc.errno cimport EAGAIN, EINTR, ENOMEM, errno
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from posix.time cimport nanosleep, timespec
from posix.types cimport time_t
from posix.unistd cimport close

from presence_core.frames cimport OPCODE_TEXT
from presence_core.system cimport (
    EPOLL_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    NS_PER_MS,
    epoll_create1,
    epoll_event,
    epoll_wait,
    monotonic_ns,
    send,
)
from presence_core.wheel cimport WHEEL_NEVER, wheel_entry, wheel_entry_init, wheel_init, wheel_next, wheel_pop, wheel_start
from presence_swarm.arrivals cimport on_link_ready
from presence_swarm.client_frames cimport CLIENT_FRAME_HEADER_BYTES, write_client_frame
from presence_swarm.durations cimport DURATION_BUCKETS, durations, durations_add, duration_floor
from presence_swarm.hearing cimport pending_numbers
from presence_swarm.life cimport IS_PLAIN as LAST_BEHAVIOUR
from presence_swarm.life cimport (
    BEHAVES,
    FRAME_MAX_BYTES,
    GROUPS,
    LINK_CLOSED,
    LINK_CONNECTED,
    LINK_DIALLING,
    LINK_LEAVING,
    LINK_UPGRADING,
    LINK_WAITING,
    READ_BYTES,
    REQUEST_MAX_BYTES,
    TARGETS,
    agent,
    connect_more,
    dial,
    drop_link,
    figures_clear,
    leave,
    link,
    next_random,
    swarm,
)
from presence_swarm.sockets cimport clock_offset_ns

cdef enum:
    EVENTS_PER_TURN = 512
    DIALS_PER_TURN = 64  # connects are not free: sockets get their turn in between
    SAY_MAX_BYTES = 16777216

GOOD, MUTE, SILENT, DEAF, STAYING, ONCE, PLAIN = range(7)


cdef agent *add_agent(swarm *s, const uint8_t *request, size_t size) noexcept nogil:
    """NULL: no memory for the request's frame."""
    cdef agent *a = &s.agents[s.agent_count]
    cdef int i
    a.request = <uint8_t *> malloc(size + CLIENT_FRAME_HEADER_BYTES)
    if a.request == NULL:
        return NULL
    a.request_bytes = <uint16_t> write_client_frame(a.request, OPCODE_TEXT, request, size, <unsigned int> next_random(s))
    wheel_entry_init(&a.entry)
    for i in range(2):
        a.links[i].owner = a
        a.links[i].fd = -1
    s.in_state[LINK_CLOSED] += 2
    s.agent_count += 1
    return a


cdef size_t write_frames(swarm *s, uint8_t *out, const uint8_t *message, size_t size, unsigned int times) noexcept nogil:
    """The message as text frames, so many times; returns their bytes."""
    cdef size_t at = 0
    cdef unsigned int _
    for _ in range(times):
        at += write_client_frame(out + at, OPCODE_TEXT, message, size, <unsigned int> next_random(s))
    return at


cdef int wait_ms(const swarm *s, uint64_t stop_ns) noexcept nogil:
    """Until the next dial or the end, in whole milliseconds."""
    cdef uint64_t now_ns = monotonic_ns(), until_ns = stop_ns
    cdef uint64_t tick = wheel_next(&s.timers)
    if tick != WHEEL_NEVER and s.start_ns + tick * NS_PER_MS < until_ns:
        until_ns = s.start_ns + tick * NS_PER_MS
    return <int> ((until_ns - now_ns) // NS_PER_MS + 1) if until_ns > now_ns else 0


cdef int turn(swarm *s, uint64_t stop_ns, int looks) noexcept nogil:
    """Wait for something to do, and do it, in up to so many looks at the sockets; an errno, or 0."""
    cdef epoll_event[EVENTS_PER_TURN] events
    cdef wheel_entry *entry
    cdef uint64_t began_ns = 0
    cdef int _, i, count
    connect_more(s)
    for _ in range(looks):
        count = epoll_wait(s.epoll_fd, events, EVENTS_PER_TURN, 0 if began_ns else wait_ms(s, stop_ns))
        if count < 0:
            return 0 if errno == EINTR else errno
        if began_ns == 0:
            began_ns = monotonic_ns()
            s.clock_offset_ns = clock_offset_ns()
        for i in range(count):
            on_link_ready(s, <link *> events[i].data.ptr, events[i].events)
        if count < EVENTS_PER_TURN:
            break
    for _ in range(DIALS_PER_TURN):
        entry = wheel_pop(&s.timers, (began_ns - s.start_ns) // NS_PER_MS)
        if entry == NULL:
            break
        dial(s, <agent *> entry)
    durations_add(&s.now.stall, monotonic_ns() - began_ns)
    return 0


cdef void pause(uint64_t pace_ns, uint64_t stop_ns) noexcept nogil:
    cdef timespec length
    cdef uint64_t now_ns = monotonic_ns()
    if now_ns < stop_ns:
        pace_ns = min(pace_ns, stop_ns - now_ns)
        length.tv_sec = <time_t> (pace_ns // 1_000_000_000)
        length.tv_nsec = <long> (pace_ns % 1_000_000_000)
        nanosleep(&length, NULL)


cdef int run_until(swarm *s, uint64_t stop_ns, uint64_t pace_ns) noexcept nogil:
    cdef int error = 0
    cdef int looks = <int> s.agent_count // EVENTS_PER_TURN + 1 if pace_ns else 1  # enough for all that is there
    while error == 0 and monotonic_ns() < stop_ns:
        error = turn(s, stop_ns, looks)
        if pace_ns:
            pause(pace_ns, stop_ns)
    return error


cdef dict read_durations(const durations *d):
    return {
        "count": d.count,
        "sum_ns": d.sum_ns,
        "least_ns": d.least_ns if d.count else 0,
        "most_ns": d.most_ns,
        "buckets": [[i, d.counts[i]] for i in range(DURATION_BUCKETS) if d.counts[i]],
    }


def bucket_floors():
    return [duration_floor(i) for i in range(DURATION_BUCKETS)]


def now_ns():
    return monotonic_ns()


cdef class Swarm:
    cdef swarm s
    cdef bint running

    def __cinit__(self, unsigned int capacity, uint64_t seed=1):
        memset(&self.s, 0, sizeof(swarm))
        self.s.epoll_fd = -1  # first of all: what is raised from here on ends in __dealloc__
        if not 1 <= capacity <= 1_000_000:
            raise ValueError("a swarm has 1 to 1,000,000 agents")
        self.s.capacity = capacity
        self.s.random = seed * 2 + 1
        self.s.start_ns = monotonic_ns()
        self.s.clock_offset_ns = clock_offset_ns()
        wheel_init(&self.s.timers, 0)
        figures_clear(&self.s.now)
        self.s.agents = <agent *> calloc(capacity, sizeof(agent))
        self.s.buffer = <uint8_t *> malloc(READ_BYTES + FRAME_MAX_BYTES)
        if self.s.agents == NULL or self.s.buffer == NULL:
            raise MemoryError
        self.s.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.s.epoll_fd < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        cdef unsigned int i
        if self.s.agents != NULL:
            for i in range(self.s.agent_count):
                drop_link(&self.s, &self.s.agents[i].links[0])
                drop_link(&self.s, &self.s.agents[i].links[1])
                free(self.s.agents[i].request)
        free(self.s.agents)
        free(self.s.buffer)
        if self.s.epoll_fd >= 0:
            close(self.s.epoll_fd)

    cdef int check_idle(self) except -1:
        """`run` has the agents, without the interpreter's lock."""
        if self.running:
            raise RuntimeError("the swarm runs")
        return 0

    def __len__(self):
        return self.s.agent_count

    def set_targets(self, ports):
        self.check_idle()
        if len(ports) > TARGETS or not all(0 < port < 65536 for port in ports):
            raise ValueError(f"{TARGETS} ports at the most")
        for i, port in enumerate(ports):
            self.s.ports[i] = port
        self.s.targets = len(ports)

    def add(self, bytes request, at_ms=0.0, int group=0, int behaviour=BEHAVES):
        cdef agent *a
        cdef double delay_ms = 0.0 if at_ms is None else at_ms
        cdef uint64_t tick
        self.check_idle()
        if self.s.agent_count == self.s.capacity:
            raise ValueError("the swarm is full")
        if len(request) > REQUEST_MAX_BYTES - CLIENT_FRAME_HEADER_BYTES or not 0 <= group < GROUPS:
            raise ValueError("too large a request, or no such group")
        if not BEHAVES <= behaviour <= LAST_BEHAVIOUR or not 0 <= delay_ms < 1e9:
            raise ValueError("no such behaviour, or no such time")
        a = add_agent(&self.s, <const uint8_t *> <const char *> request, len(request))
        if a == NULL:
            raise MemoryError
        a.group = <uint8_t> group
        a.behaviour = <uint8_t> behaviour
        if at_ms is not None:
            tick = (monotonic_ns() - self.s.start_ns) // NS_PER_MS + 1 + <uint64_t> delay_ms
            wheel_start(&self.s.timers, &a.entry, tick)
        return self.s.agent_count - 1

    def run(self, double duration_ms, double pace_ms=0.0):
        cdef uint64_t stop_ns
        cdef uint64_t pace_ns
        cdef int error
        self.check_idle()
        if not 0 <= duration_ms < 1e9 or not 0 <= pace_ms < 1e6:
            raise ValueError("no such duration, or no such pace")
        stop_ns = monotonic_ns() + <uint64_t> (duration_ms * NS_PER_MS)
        pace_ns = <uint64_t> (pace_ms * NS_PER_MS)
        self.running = True
        with nogil:
            error = run_until(&self.s, stop_ns, pace_ns)
        self.running = False
        if error:
            raise MemoryError if error == ENOMEM else OSError(error, os.strerror(error))

    def leave(self, unsigned int first=0, unsigned int count=0xFFFFFFFF):
        cdef unsigned int i, left = 0
        cdef agent *a
        self.check_idle()
        cdef unsigned int stop = min(<uint64_t> first + count, <uint64_t> self.s.agent_count)
        for i in range(first, stop):
            a = &self.s.agents[i]
            left += a.links[a.current].state == LINK_CONNECTED
            a.is_done = True
            leave(&self.s, &a.links[0])
            leave(&self.s, &a.links[1])
        return left

    def connect(self, unsigned int window, unsigned int first=0, unsigned int count=0xFFFFFFFF):
        self.check_idle()
        if window == 0:
            raise ValueError("a window of connects under way")
        self.s.connect_next = min(first, self.s.agent_count)
        self.s.connect_stop = min(<uint64_t> first + count, <uint64_t> self.s.agent_count)
        self.s.connect_window = window

    def say(self, bytes message, unsigned int times=1, unsigned int first=0, unsigned int count=0xFFFFFFFF):
        cdef size_t size = len(message)
        cdef unsigned int i, said = 0
        cdef unsigned int stop = min(<uint64_t> first + count, <uint64_t> self.s.agent_count)
        cdef uint8_t *frames
        cdef size_t frames_bytes
        cdef ssize_t sent
        cdef link *line
        self.check_idle()
        if size > 65535 or not 0 < times <= SAY_MAX_BYTES // (size + CLIENT_FRAME_HEADER_BYTES):
            raise ValueError("too large a message, or too many")
        frames = <uint8_t *> malloc(times * (size + CLIENT_FRAME_HEADER_BYTES))
        if frames == NULL:
            raise MemoryError
        try:
            for i in range(first, stop):
                line = &self.s.agents[i].links[self.s.agents[i].current]
                if line.state != LINK_CONNECTED:
                    continue
                frames_bytes = write_frames(&self.s, frames, <const uint8_t *> <const char *> message, size, times)
                sent = send(line.fd, frames, frames_bytes, MSG_NOSIGNAL | MSG_DONTWAIT)
                if sent < 0 and errno != EAGAIN:
                    raise OSError(errno, os.strerror(errno))
                if sent < <ssize_t> frames_bytes:
                    raise BlockingIOError(EAGAIN, f"the socket of agent {i} has not taken it whole")
                said += 1
        finally:
            free(frames)
        return said

    def events_of(self, unsigned int index):
        self.check_idle()
        if index >= self.s.agent_count:
            raise IndexError(index)
        return self.s.agents[index].events

    def gauges(self):
        cdef unsigned int i, done = 0
        cdef int group
        cdef uint64_t[GROUPS] pending
        self.check_idle()
        memset(pending, 0, sizeof(pending))
        for i in range(self.s.agent_count):
            done += self.s.agents[i].is_done
            pending[self.s.agents[i].group] += pending_numbers(&self.s.agents[i])
        return {
            **{f"pending_{group}": pending[group] for group in range(GROUPS)},
            "agents": self.s.agent_count,
            "connected": self.s.connected_agents,
            "dialling": self.s.in_state[LINK_DIALLING],
            "upgrading": self.s.in_state[LINK_UPGRADING],
            "waiting": self.s.in_state[LINK_WAITING],
            "leaving": self.s.in_state[LINK_LEAVING],
            "links": self.s.agent_count * 2 - self.s.in_state[LINK_CLOSED],
            "done": done,
            "pending": sum([pending[group] for group in range(GROUPS)]),
            "errno": self.s.errno_seen,
        }

    def take(self):
        cdef int i
        self.check_idle()
        taken = {
            "connect": [read_durations(&self.s.now.connect[i]) for i in range(GROUPS)],
            "delivery": [read_durations(&self.s.now.delivery[i]) for i in range(GROUPS)],
            "cadence": [read_durations(&self.s.now.cadence[i]) for i in range(GROUPS)],
            "unanswered": read_durations(&self.s.now.unanswered),
            "silent": read_durations(&self.s.now.silent),
            "outage": read_durations(&self.s.now.outage),
            "overdue": read_durations(&self.s.now.overdue),
            "farewell": read_durations(&self.s.now.farewell),
            "lag": read_durations(&self.s.now.lag),
            "stall": read_durations(&self.s.now.stall),
            "missing_by_group": [self.s.now.missing[i] for i in range(GROUPS)],
            "counters": self.counters(),
            "terminated_first_ns": self.s.now.terminated_first_ns,
            "terminated_last_ns": self.s.now.terminated_last_ns,
            "connected_last_ns": self.s.now.connected_last_ns,
            "heard_last_ns": self.s.now.heard_last_ns,
            "closes": [
                [self.s.now.closes[i].code, self.s.now.closes[i].error.decode("ascii", "replace"), self.s.now.closes[i].count]
                for i in range(self.s.now.close_rows)
            ],
        }
        figures_clear(&self.s.now)
        return taken

    def counters(self):
        cdef int group, i
        self.check_idle()
        return {
            "attempts": self.s.now.attempts,
            "refusals": self.s.now.refusals,
            "ends": sum([self.s.now.closes[i].count for i in range(self.s.now.close_rows)]),
            "connects": self.s.now.connects,
            "handovers": self.s.now.handovers,
            "frames": self.s.now.frames,
            "bytes": self.s.now.bytes,
            "payload_bytes": self.s.now.payload_bytes,
            "events": self.s.now.events,
            "other_events": self.s.now.other_events,
            "missing": sum([self.s.now.missing[group] for group in range(GROUPS)]),
            "repeats": self.s.now.repeats,
            "gaps": self.s.now.gaps,
            "pings": self.s.now.pings,
            "violations": self.s.now.violations,
            "terminated": self.s.now.terminated,
        }
