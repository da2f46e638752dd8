# What the gateway says, read just as far as an agent's conduct and the measurements need. Pure functions of bytes.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, strlen

cdef extern from *:
    """
    #include <string.h>
    """
    const void *memmem(const void *data, size_t size, const void *what, size_t what_size) noexcept nogil

cdef enum message_kind:
    MESSAGE_OTHER = 0
    MESSAGE_EVENT = 1
    MESSAGE_SUCCESS = 2
    MESSAGE_GAP = 3
    MESSAGE_ERROR = 4

cdef enum:
    ERROR_TYPE_BYTES = 24  # names longer than that are cut

cdef struct event_stamp:
    uint64_t sent_ns  # the publisher's CLOCK_MONOTONIC; 0: not an event of ours
    uint64_t number   # in its numbered stream, from 1; 0: not numbered
    uint64_t before_ns  # the stamp of the number before; 0: unknown, or there is none

cdef struct session_error:
    char type[ERROR_TYPE_BYTES]
    bint reconnect
    uint32_t reconnect_after_ms


cdef inline bint begins(const uint8_t *data, size_t size, const char *what) noexcept nogil:
    cdef size_t length = strlen(what)
    return size >= length and memcmp(data, what, length) == 0


cdef inline message_kind kind_of(const uint8_t *data, size_t size) noexcept nogil:
    if begins(data, size, b'{"type":"event"'):
        return MESSAGE_EVENT
    if begins(data, size, b'{"type":"connect_success"'):
        return MESSAGE_SUCCESS
    if begins(data, size, b'{"type":"gap"'):
        return MESSAGE_GAP
    if begins(data, size, b'{"type":"recoverable_s') or begins(data, size, b'{"type":"unrecoverable_s'):
        return MESSAGE_ERROR
    return MESSAGE_OTHER


cdef inline const uint8_t *behind(const uint8_t *data, size_t size, const char *what) noexcept nogil:
    """Where the text behind the first `what` begins, or NULL."""
    cdef size_t length = strlen(what)
    cdef const uint8_t *found = <const uint8_t *> memmem(data, size, what, length)
    return found + length if found != NULL else NULL


cdef inline uint64_t number_at(const uint8_t *at, const uint8_t *end) noexcept nogil:
    cdef uint64_t value = 0
    cdef int digits = 0
    while at != NULL and at < end and digits < 19 and 48 <= at[0] <= 57:
        value = value * 10 + (at[0] - 48)
        at += 1
        digits += 1
    return value


cdef inline uint64_t number_behind(const uint8_t *data, size_t size, const char *what) noexcept nogil:
    """The decimal number behind the first `what`; 0 where there is none."""
    return number_at(behind(data, size, what), data + size)


cdef inline void read_stamp(const uint8_t *data, size_t size, event_stamp *stamp) noexcept nogil:
    """Of an event whose payload begins {"at":NS,"n":NUMBER,"was":NS: the publishers of the load tests write it so."""
    cdef const uint8_t *end = data + size
    cdef const uint8_t *at = behind(data, size, b'"payload":{"at":')
    stamp.sent_ns = 0
    stamp.number = 0
    stamp.before_ns = 0
    if at != NULL:
        stamp.sent_ns = number_at(at, end)
        stamp.number = number_behind(at, <size_t> end - <size_t> at, b'"n":')
        stamp.before_ns = number_behind(at, <size_t> end - <size_t> at, b'"was":')


cdef inline void read_error(const uint8_t *data, size_t size, session_error *error) noexcept nogil:
    cdef const uint8_t *end = data + size
    cdef const uint8_t *at = behind(data, size, b'"payload":{"type":"')
    cdef const uint8_t *flag = behind(data, size, b'"reconnect":')
    cdef int length = 0
    while at != NULL and at < end and at[0] != 34 and length < ERROR_TYPE_BYTES - 1:
        error.type[length] = <char> at[0]
        at += 1
        length += 1
    error.type[length] = 0
    error.reconnect = flag != NULL and flag < end and flag[0] == 116  # t of true
    error.reconnect_after_ms = <uint32_t> number_behind(data, size, b'"reconnect_after_ms":')
