# The field map of the hub: one epoll descriptor, one timerfd, one wheel; a Connection is one object with C fields.

from cpython.object cimport PyObject
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from presence_core.backlog cimport backlog
from presence_core.bulk cimport BULK_MAX, bulk
from presence_core.frames cimport frame_decoder
from presence_core.histogram cimport histogram
from presence_core.members cimport member, member_list
from presence_core.room_events cimport event_list
from presence_core.wheel cimport wheel, wheel_entry

cdef enum:
    TICK_MS = 4              # resolution of every deadline: a deadline never fires early, and at most one tick late
    READ_BUFFER_BYTES = 65536
    EVENTS_PER_TURN = 128
    NOTICES_PER_TURN = 256
    TIMERS_PER_CHECK = 64    # deadlines handled between two looks at the clock
    MEMBERS_PER_TURN = BULK_MAX  # members of one room served before the next room has its turn; one bulk takes them all
    BYTES_PER_TURN = 262_144  # or fewer members, when they get much: a send takes as long as its copy
    BATCH_MAX_BYTES = 65536  # events of a room that are joined into one send
    BACKLOG_VECTORS = 64     # buffers handed to one sendmsg
    FRAGMENTS_PER_TOKEN = 256  # so many fragments of a message, beyond those that are free, count as one more message

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

cdef enum entry_kind:        # which of a connection's wheel entries this is
    ENTRY_BEAT = 0
    ENTRY_ALARM = 1

cdef enum notice_kind:       # bits: what the handler is still to be told of a connection
    NOTICE_ALARM = 1
    NOTICE_PONG_TIMEOUT = 2
    NOTICE_BACKLOG = 4
    NOTICE_CLOSED = 8
    NOTICE_LISTED = 16       # it waits in the hub's list
    NOTICES_ALL = 31

cdef enum:                   # RFC 6455 section 7.4.1
    CODE_NONE = 1005         # the close frame had no code
    CODE_LOST = 1006         # there was no close frame
    CODE_INTERNAL_ERROR = 1011

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
        bulk ring                # for fan-out; of no descriptor where the kernel allows none
        PyObject *in_bulk[BULK_MAX]  # connections, in the order of what was added to it; borrowed
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
