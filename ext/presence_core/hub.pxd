# The field map of the hub: one epoll descriptor, one timerfd, one wheel; a Connection is one object with C fields.

from cpython.object cimport PyObject
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from presence_core.backlog cimport backlog
from presence_core.frames cimport frame_decoder, frame_event
from presence_core.histogram cimport histogram
from presence_core.members cimport member, member_list
from presence_core.wheel cimport wheel, wheel_entry

cdef enum:
    TICK_MS = 4              # resolution of every deadline: a deadline never fires early, and at most one tick late
    READ_BUFFER_BYTES = 65536
    EVENTS_PER_TURN = 128
    NOTICES_PER_TURN = 256
    TIMERS_PER_CHECK = 64    # deadlines handled between two looks at the clock
    MEMBERS_PER_TURN = 64    # members of one room served before the next room has its turn
    BATCH_MAX_BYTES = 65536  # events of a room that are joined into one send
    BACKLOG_VECTORS = 64     # buffers handed to one sendmsg

cdef enum connection_state:
    STATE_NEW = 0            # not adopted yet
    STATE_OPEN = 1
    STATE_CLOSING = 2        # our close frame is on its way, the peer's is awaited
    STATE_CLOSE_RECEIVED = 3  # the peer's close frame is here, the handler has to finish()
    STATE_FINISHING = 4      # both close frames exist; the descriptor closes when ours is with the kernel
    STATE_CLOSED = 5

cdef enum beat_kind:         # what the beat entry of a connection waits for
    BEAT_NONE = 0
    BEAT_PING = 1            # the time to send the next ping
    BEAT_PONG = 2            # the answer to the last one
    BEAT_CLOSE = 3           # the end of the close handshake

cdef enum entry_kind:         # which of a connection's wheel entries this is
    ENTRY_BEAT = 0
    ENTRY_ALARM = 1

cdef enum notice_kind:       # bits: what the handler is still to be told of a connection
    NOTICE_ALARM = 1
    NOTICE_PONG_TIMEOUT = 2
    NOTICE_BACKLOG = 4
    NOTICE_CLOSED = 8
    NOTICE_LISTED = 16       # it waits in the hub's list

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

cdef class Room:
    cdef:
        Hub hub
        readonly object tag  # the handler's own
        member_list members
        event_list events    # those of the pass under way, then those that wait for the next one
        size_t batched       # how many are of the pass under way
        bytes common         # these as most members get them; None: nothing for everyone
        bint active          # in the hub's ring
        bint overflowed      # an event was refused since the queue was last empty
        uint64_t next_number
        readonly size_t queued_bytes  # of those that wait for the next pass
        Room ring_next

    cdef int enqueue(self, bytes frame, PyObject *exclude, PyObject *only, uint64_t received_ns) except -1
    cdef void begin_pass(self) noexcept
    cdef bytes join(self, size_t count)
    cdef void end_pass(self, uint64_t now_ns) noexcept
    cdef void forget_events(self) noexcept
    cdef void name(self, int by) noexcept

cdef class Connection:
    cdef:
        Hub hub
        Room _room
        int fd
        uint8_t _state           # connection_state
        uint8_t beat             # beat_kind
        uint8_t notices          # notice_kind bits not yet handed over
        uint8_t overflowed       # past its backlog bound: nothing more is queued
        uint8_t polling_out      # EPOLLOUT is asked for
        uint8_t deaf             # it broke the protocol: what it sends is not decoded any more
        uint16_t close_code      # what on_closed will say
        int32_t named            # events of batches under way that name this connection
        uint32_t _rtt_us         # of the last ping; 0: none measured
        uint32_t bucket_ms       # when the token buckets were last filled
        float message_tokens
        float ping_tokens
        wheel_entry beat_entry
        wheel_entry alarm_entry
        frame_decoder decoder
        backlog waiting
        member membership        # of its room
        member registration      # of everyone in the hub
        uint64_t joined_number   # the room's order at joining: earlier events are not for it
        uint64_t ping_due_tick
        uint64_t ping_sent_ns
        uint64_t nonce           # payload of the ping under way
        PyObject *notice_next

cdef class Hub:
    cdef:
        readonly object handler
        int epoll_fd, timer_fd, event_fd
        bint polling             # waits for events, without the interpreter's lock
        bint turning             # inside a turn: wake-ups are not needed
        bint closing             # close() was called: it is complete when the turn is
        bint awake               # event_fd is readable
        wheel timers
        uint64_t start_ns        # CLOCK_MONOTONIC at tick 0
        uint64_t armed_tick      # when timer_fd fires next
        uint64_t random_state
        uint8_t *read_buffer
        size_t max_message_bytes, max_backlog_bytes, max_room_queue_bytes
        uint64_t ping_interval_ticks, pong_timeout_ticks, close_timeout_ticks
        uint64_t slice_ns
        float messages_per_s, message_burst, pings_per_s, ping_burst
        PyObject *notice_head    # FIFO of connections with notices, linked by notice_next
        PyObject *notice_tail
        Room ring_head, ring_tail  # rooms with something to send
        Py_ssize_t open_count
        object held              # a KeyboardInterrupt or its like, until the turn is over
        member_list everyone     # adopted connections whose on_closed is not yet over, one reference each
        uint64_t frames_in, messages_in, sends_out, bytes_out, pings_out, pongs_in, stray_pongs
        uint64_t events_queued, events_refused, backlogs_refused
        histogram ping_lateness, deadline_lateness, delivery, round_trip

    cdef int open_descriptors(self) except -1
    cdef void close_descriptors(self) noexcept
    cdef int open(self, Connection c, bytes head) except -1
    cdef int finish_close(self) except -1
    # the turn
    cdef int end_turn(self) except -1
    cdef int raise_held(self) except -1
    cdef int turn(self, int timeout_ms) except -1
    cdef int settle(self) except -1
    cdef void wake(self) noexcept
    cdef int arm(self) except -1
    cdef int set_timer(self, uint64_t tick) except -1
    cdef int on_events(self, Connection c, uint32_t events) except -1
    cdef uint64_t tick(self) noexcept
    cdef uint64_t random(self) noexcept
    # deadlines
    cdef int run_timers(self) except -1
    cdef int fire_beat(self, Connection c, uint64_t due_ns, uint64_t now_ns) except -1
    cdef int send_ping(self, Connection c) except -1
    cdef void schedule_ping(self, Connection c) noexcept
    # what Python is told
    cdef void notify(self, Connection c, uint8_t notice) noexcept
    cdef int run_notices(self) except -1
    cdef int tell(self, Connection c) except -1
    cdef int tell_closed(self, Connection c) except -1
    cdef int tell_deadline(self, Connection c, object deadline) except -1
    cdef int tell_limit(self, Connection c, object limit) except -1
    cdef int tell_drained(self, list rooms) except -1
    cdef void failed(self, Connection c, object error) noexcept
    cdef void hold(self, object error) noexcept
    # input
    cdef int receive(self, Connection c) except -1
    cdef int decode(self, Connection c, uint8_t *data, size_t size) except -1
    cdef int on_frame(self, Connection c, const frame_event *event) except -1
    cdef int send_pong(self, Connection c, const frame_event *event) except -1
    cdef int on_pong(self, Connection c, const frame_event *event) except -1
    cdef int on_peer_close(self, Connection c, int code) except -1
    cdef int on_violation(self, Connection c, int code) except -1
    cdef bint take_token(self, Connection c, bint control) noexcept
    # output
    cdef int write(self, Connection c, bytes frames) noexcept
    cdef void refuse_backlog(self, Connection c) noexcept
    cdef int flush(self, Connection c) noexcept
    cdef int poll_output(self, Connection c, bint wanted) noexcept
    cdef uint32_t input_events(self, Connection c) noexcept
    cdef int watch(self, Connection c, uint32_t events, int operation) noexcept
    # fan-out
    cdef void activate(self, Room room) noexcept
    cdef Room take_room(self)
    cdef int fan_out(self) except -1
    cdef int serve_some(self, Room room) except -1
    cdef int serve_named(self, Room room, Connection c) except -1
    # the end of a connection
    cdef int begin_close(self, Connection c, int code, bytes reason, bytes message) except -1
    cdef void start_closing(self, Connection c, uint8_t state) noexcept
    cdef void fail(self, Connection c, int code) noexcept
    cdef int finish(self, Connection c) except -1
    cdef void drop(self, Connection c, int code) noexcept
