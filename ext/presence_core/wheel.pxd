# A hierarchical timing wheel with intrusive entries (Varghese and Lauck, 1987): no clock, no allocation, no Python.

from libc.stdint cimport uint16_t, uint64_t

cdef enum:
    WHEEL_LEVELS = 5  # 64**5 ticks; a deadline further away waits in the last level and cascades again
    WHEEL_SLOTS = 64  # one bit each in a level's occupancy word

cdef struct wheel_entry:
    wheel_entry *next  # circular list of its slot; NULL while stopped
    wheel_entry *prev
    uint64_t deadline  # tick
    uint16_t slot      # level * WHEEL_SLOTS + index, so that stopping can clear the occupancy bit
    uint16_t kind      # the owner's own, never read by the wheel

cdef struct wheel:
    uint64_t now                                  # tick up to which the wheel has been advanced
    uint64_t count                                # entries started
    uint64_t occupied[WHEEL_LEVELS]               # bit i: slot i of that level is not empty
    wheel_entry slots[WHEEL_LEVELS * WHEEL_SLOTS]  # list heads
    wheel_entry due                               # list head: expired and not yet popped

cdef extern from *:
    """
    #define WHEEL_NEVER UINT64_MAX
    """
    const uint64_t WHEEL_NEVER  # wheel_next() of an empty wheel

cdef void wheel_init(wheel *w, uint64_t now) noexcept nogil
cdef void wheel_entry_init(wheel_entry *entry) noexcept nogil
cdef bint wheel_is_started(const wheel_entry *entry) noexcept nogil
cdef void wheel_start(wheel *w, wheel_entry *entry, uint64_t deadline) noexcept nogil
cdef void wheel_stop(wheel *w, wheel_entry *entry) noexcept nogil
cdef wheel_entry *wheel_pop(wheel *w, uint64_t now) noexcept nogil
cdef uint64_t wheel_next(const wheel *w) noexcept nogil
