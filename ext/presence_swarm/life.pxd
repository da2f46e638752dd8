# One agent's life at the client's end, as plain structs: no Python object is touched after an agent has been added.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from presence_core.wheel cimport wheel, wheel_entry
from presence_swarm.durations cimport durations
from presence_swarm.messages cimport ERROR_TYPE_BYTES

cdef enum:
    GROUPS = 4           # of agents whose figures are kept apart: by the size of their room, say
    TARGETS = 16         # replicas at once
    SOURCES = 16         # 127.0.1.1, 127.0.1.2, …: one address has only 28,000 ports
    CLOSE_ROWS = 64      # different ways to end that are told apart
    READ_BYTES = 262144
    MESSAGE_MAX_BYTES = 1048576
    FRAME_MAX_BYTES = 1048592
    REQUEST_MAX_BYTES = 65535
    CODE_LOST = 1006     # no close frame came

cdef enum:  # behaviours of an agent
    BEHAVES = 0       # as a good client
    ANSWERS_NOT = 1   # reads, but answers no ping
    SAYS_NOTHING = 2  # never sends its connect_request
    READS_NOTHING = 3  # once it is connected
    STAYS = 4         # as a good client, but moves only when its connection is over
    ONCE = 5          # as a good client until its connection is over, and then no more
    IS_PLAIN = 6      # knows WebSocket alone: connected once it is upgraded; what it hears is counted, not read

cdef enum:  # states of a link
    LINK_CLOSED = 0
    LINK_DIALLING = 1   # connect(2) is under way
    LINK_UPGRADING = 2  # the request is sent
    LINK_WAITING = 3    # upgraded; the connect_request is sent, or never will be
    LINK_CONNECTED = 4
    LINK_LEAVING = 5    # our close frame is sent, its answer has not come

cdef struct link:  # one socket of an agent
    agent *owner
    int fd
    uint8_t state            # LINK_…
    uint8_t target           # index of the replica
    bint is_told             # an error message came: the fields below
    bint may_return          # `reconnect` of it
    uint8_t source
    char error[ERROR_TYPE_BYTES]
    uint8_t *partial         # bytes of a frame that has not come whole; NULL at a frame's boundary
    size_t partial_bytes
    uint64_t began_ns        # connect(2)
    uint64_t upgraded_ns
    uint64_t connected_ns
    uint64_t interval_ns     # of pings, as connect_success says
    uint64_t ping_due_ns     # 0: none has come yet
    uint64_t unanswered_ns   # when the ping came that was left without an answer; 0: none
    uint64_t left_ns         # when our close frame went

cdef struct agent:
    wheel_entry entry        # first, so that its address is the agent's: when to dial
    link links[2]            # after `terminated` the old one still delivers while the new one connects
    uint8_t current          # index of the link that counts
    uint8_t behaviour
    uint8_t group
    uint8_t failures         # in a row
    bint is_done             # will not dial again
    uint16_t request_bytes
    uint8_t *request         # the connect_request as a masked frame; owned
    uint64_t lost_ns         # since when without a connection; 0: has one, or never had
    uint64_t return_ns       # when it was to dial again, as it was told or as it chose
    uint64_t events
    uint64_t highest         # number seen in the room's stream; 0: none yet in this stretch
    uint64_t hears_from_ns   # what was published after this, and
    uint64_t heard_until_ns  # before that, must have come; 0: there was no stretch before
    uint64_t heard_highest   # number seen in the stretch before
    uint64_t window          # bit i: number highest - i was seen

cdef struct close_row:
    uint16_t code            # 1006: no close frame came
    char error[ERROR_TYPE_BYTES]
    uint64_t count

cdef struct figures:  # since they were last taken
    durations connect[GROUPS]     # connect(2) to connect_success
    durations delivery[GROUPS]    # a publisher's stamp to the arrival of the event
    durations cadence[GROUPS]     # how far from its time a ping came, either way
    durations unanswered          # a ping without an answer to the end of the connection
    durations silent              # upgrade to the end, of agents that say nothing
    durations outage              # end of a connection to the next success
    durations overdue             # of that: after its own reconnect delay had passed
    durations farewell            # our close frame to its answer
    durations lag                 # arrival in the socket to being read: the swarm's own lateness
    durations stall               # one turn of the loop
    uint64_t attempts
    uint64_t refusals             # answers other than 101, and connects that the kernel refused
    uint64_t connects
    uint64_t handovers            # of them: while the old connection still delivered
    uint64_t frames
    uint64_t bytes                # with everything around them
    uint64_t payload_bytes        # of frames
    uint64_t events               # with a publisher's stamp
    uint64_t other_events         # agent.enter, agent.leave
    uint64_t missing[GROUPS]      # numbers that never came although the agent had a connection
    uint64_t repeats
    uint64_t gaps                 # gap messages
    uint64_t pings
    uint64_t violations           # of the protocol, by the gateway
    uint64_t terminated           # messages
    uint64_t terminated_first_ns  # CLOCK_MONOTONIC; 0: none
    uint64_t terminated_last_ns
    uint64_t connected_last_ns
    uint64_t heard_last_ns        # a frame of any kind
    int close_rows
    close_row closes[CLOSE_ROWS]

cdef struct swarm:
    int epoll_fd
    int errno_seen           # of the last socket that could not be made
    uint64_t start_ns        # tick 0 of the wheel; a tick is a millisecond
    uint64_t clock_offset_ns  # CLOCK_REALTIME less CLOCK_MONOTONIC, looked at every turn
    uint64_t random
    uint16_t ports[TARGETS]
    int targets
    uint32_t next_target
    uint32_t next_source
    uint8_t *buffer          # READ_BYTES behind room for what was kept
    agent *agents
    uint32_t agent_count
    uint32_t capacity
    uint32_t in_state[6]     # links by state
    uint32_t connected_agents
    uint32_t connect_next    # agents that are to connect: from this one
    uint32_t connect_stop    # to before that one,
    uint32_t connect_window  # so many connects under way at once
    wheel timers
    figures now

cdef void figures_clear(figures *f) noexcept nogil
cdef uint64_t next_random(swarm *s) noexcept nogil
cdef void dial_later(swarm *s, agent *a, uint64_t delay_ms) noexcept nogil
cdef void dial(swarm *s, agent *a) noexcept nogil
cdef void connect_more(swarm *s) noexcept nogil
cdef void leave(swarm *s, link *line) noexcept nogil
cdef void drop_link(swarm *s, link *line) noexcept nogil
cdef void enter(swarm *s, link *line, uint8_t state) noexcept nogil
cdef void enter_connected(swarm *s, link *line, uint64_t at_ns) noexcept nogil
cdef void watch(swarm *s, link *line, uint32_t events) noexcept nogil
cdef bint transmit(swarm *s, link *line, const uint8_t *data, size_t size) noexcept nogil
cdef void on_dialled(swarm *s, link *line) noexcept nogil
cdef size_t on_answer(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil
cdef void refuse(swarm *s, link *line) noexcept nogil
cdef void end_link(swarm *s, link *line, uint16_t code, uint64_t at_ns) noexcept nogil
