"""A hierarchical timing wheel: deadlines in ticks, O(1) start, stop and restart, no allocation.

It owns the lists that link entries to slots. It knows no clock (`now` is passed in), no unit (a tick is what its
caller says), and nothing of what an entry stands for: entries are embedded in their owners' structs and never move
while started.

A deadline is filed by the highest bit in which it differs from `now` (G. Varghese and A. Lauck, 1987, scheme 6; the
same arithmetic as tokio's wheel). Hence every entry of a level expires before every entry of the level above, slots
within a level never wrap below the last one, and the next occupied slot is one count-trailing-zeros away.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from *:
    int count_trailing_zeros "__builtin_ctzll"(unsigned long long bits) noexcept nogil
    int count_leading_zeros "__builtin_clzll"(unsigned long long bits) noexcept nogil

cdef enum:  # literals: Cython's overflow checks cannot compile arithmetic here
    SLOT_BITS = 6
    LAST_LEVEL = 4      # WHEEL_LEVELS - 1
    DUE_SLOT = 320      # WHEEL_LEVELS * WHEEL_SLOTS: an entry in the due list has no occupancy bit
    UNFILED_SLOT = 321  # never filed yet


# Slot arithmetic: pure, each tested exhaustively around the level boundaries.

cdef inline unsigned int level_of(uint64_t now, uint64_t deadline) noexcept nogil:
    """The level for a deadline > now, by the highest differing bit; all that is beyond shares the last level."""
    cdef unsigned int level = <unsigned int>(63 - count_leading_zeros(now ^ deadline)) // SLOT_BITS
    return level if level < LAST_LEVEL else LAST_LEVEL


cdef inline unsigned int index_of(uint64_t now, uint64_t deadline, unsigned int level) noexcept nogil:
    """The slot of that level; in the last one, at most a whole turn ahead of `now`."""
    cdef uint64_t block = deadline >> (SLOT_BITS * level)
    cdef uint64_t current = now >> (SLOT_BITS * level)
    if level == LAST_LEVEL and block - current > WHEEL_SLOTS:
        block = current  # too far to be told apart: looked at again after one turn
    return <unsigned int>(block & (WHEEL_SLOTS - 1))


cdef inline unsigned int first_index(uint64_t occupied, uint64_t now, unsigned int level) noexcept nogil:
    """The first occupied slot after the current one; the last level wraps, and ends with the current one."""
    cdef unsigned int current = <unsigned int>((now >> (SLOT_BITS * level)) & (WHEEL_SLOTS - 1))
    cdef uint64_t ahead = (occupied >> current) >> 1
    if ahead:
        return current + 1 + <unsigned int>count_trailing_zeros(ahead)
    return <unsigned int>count_trailing_zeros(occupied)


cdef inline uint64_t slot_begins(uint64_t now, unsigned int level, unsigned int index) noexcept nogil:
    """The tick at which an occupied slot begins, always > now."""
    cdef unsigned int shift = SLOT_BITS * level
    cdef uint64_t current = now >> shift
    cdef uint64_t block = current - (current & (WHEEL_SLOTS - 1)) + index
    if block <= current:
        block += WHEEL_SLOTS  # only in the last level: a slot of the next turn
    return block << shift


# Lists: circular, with a head, so that linking and unlinking have no special cases.

cdef inline void append(wheel_entry *head, wheel_entry *entry) noexcept nogil:
    entry.next = head
    entry.prev = head.prev
    head.prev.next = entry
    head.prev = entry


cdef inline void unlink(wheel *w, wheel_entry *entry) noexcept nogil:
    cdef wheel_entry *next_entry = entry.next
    cdef wheel_entry *prev_entry = entry.prev
    prev_entry.next = next_entry
    next_entry.prev = prev_entry
    if next_entry == prev_entry and entry.slot < DUE_SLOT and next_entry == &w.slots[entry.slot]:
        w.occupied[entry.slot // WHEEL_SLOTS] &= ~(<uint64_t>1 << (entry.slot % WHEEL_SLOTS))
    entry.next = NULL
    entry.prev = NULL


cdef inline void file_entry(wheel *w, wheel_entry *entry) noexcept nogil:
    """Link an unlinked entry where its deadline belongs, seen from w.now."""
    cdef unsigned int level
    cdef unsigned int index
    if entry.deadline <= w.now:
        entry.slot = DUE_SLOT
        append(&w.due, entry)
        return
    level = level_of(w.now, entry.deadline)
    index = index_of(w.now, entry.deadline, level)
    entry.slot = <uint16_t>(level * WHEEL_SLOTS + index)
    append(&w.slots[entry.slot], entry)
    w.occupied[level] |= <uint64_t>1 << index


cdef inline void empty_slot(wheel *w, unsigned int level, unsigned int index) noexcept nogil:
    """File all entries of a slot again, w.now being where the slot begins: one level down, or due."""
    cdef wheel_entry *head = &w.slots[level * WHEEL_SLOTS + index]
    cdef wheel_entry *entry = head.next
    cdef wheel_entry *next_entry
    # Take the whole slot first: an entry beyond the last level is filed into this very slot again.
    head.next = head
    head.prev = head
    w.occupied[level] &= ~(<uint64_t>1 << index)
    while entry != head:
        next_entry = entry.next
        file_entry(w, entry)
        entry = next_entry


cdef inline int first_level(const wheel *w) noexcept nogil:
    """The lowest level with an entry, which holds the earliest; -1 when there is none."""
    cdef int level
    for level in range(WHEEL_LEVELS):
        if w.occupied[level]:
            return level
    return -1


cdef void wheel_init(wheel *w, uint64_t now) noexcept nogil:
    """Make an empty wheel at `now`; it must not be moved afterwards, its lists point into it."""
    cdef int i
    w.now = now
    w.count = 0
    for i in range(WHEEL_LEVELS):
        w.occupied[i] = 0
    for i in range(WHEEL_LEVELS * WHEEL_SLOTS):
        w.slots[i].next = &w.slots[i]
        w.slots[i].prev = &w.slots[i]
        w.slots[i].deadline = 0
        w.slots[i].slot = <uint16_t>i
    w.due.next = &w.due
    w.due.prev = &w.due
    w.due.deadline = 0
    w.due.slot = DUE_SLOT


cdef void wheel_entry_init(wheel_entry *entry) noexcept nogil:
    """Make a stopped entry."""
    entry.next = NULL
    entry.prev = NULL
    entry.deadline = 0
    entry.slot = UNFILED_SLOT


cdef bint wheel_is_started(const wheel_entry *entry) noexcept nogil:
    """Whether the entry waits in a slot or in the due list."""
    return entry.next != NULL


cdef void wheel_start(wheel *w, wheel_entry *entry, uint64_t deadline) noexcept nogil:
    """Start or restart an entry, O(1). A deadline that has passed is due at once."""
    if entry.next != NULL:
        unlink(w, entry)
    else:
        w.count += 1
    entry.deadline = deadline
    file_entry(w, entry)


cdef void wheel_stop(wheel *w, wheel_entry *entry) noexcept nogil:
    """Stop an entry, O(1), also one that is due; nothing to do for a stopped one."""
    if entry.next != NULL:
        unlink(w, entry)
        w.count -= 1


cdef wheel_entry *wheel_pop(wheel *w, uint64_t now) noexcept nogil:
    """Advance up to `now` and return one expired entry, stopped; NULL when there is none left.

    Slots come in order of their tick and w.now stands at the one being emptied, so that whatever is started between
    two pops still expires in order. A `now` before w.now changes nothing. Cost: O(1) for each entry and level it
    passes, O(levels) for any empty stretch; a deadline beyond 64**WHEEL_LEVELS ticks is looked at once a turn.
    """
    cdef wheel_entry *entry
    cdef int level
    cdef unsigned int index
    cdef uint64_t begins
    while True:
        entry = w.due.next
        if entry != &w.due:
            unlink(w, entry)
            w.count -= 1
            return entry
        level = first_level(w)
        if level >= 0:
            index = first_index(w.occupied[level], w.now, <unsigned int>level)
            begins = slot_begins(w.now, <unsigned int>level, index)
            if begins <= now:
                w.now = begins
                empty_slot(w, <unsigned int>level, index)
                continue
        if now > w.now:
            w.now = now
        return NULL


cdef uint64_t wheel_next(const wheel *w) noexcept nogil:
    """The tick to call wheel_pop() at: never after the earliest deadline, at most one call early for each level."""
    cdef int level
    if w.due.next != &w.due:
        return w.now
    level = first_level(w)
    if level < 0:
        return WHEEL_NEVER
    return slot_begins(w.now, <unsigned int>level, first_index(w.occupied[level], w.now, <unsigned int>level))


# The Python seam, for tests and benchmarks: the hub uses the functions above.

cdef class _KeyedEntry


cdef struct owned_entry:
    wheel_entry entry  # first, so that its address is the struct's
    void *owner        # borrowed: the _KeyedEntry that embeds this


cdef class _KeyedEntry:
    cdef owned_entry link
    cdef object key

    def __cinit__(self, key):
        wheel_entry_init(&self.link.entry)
        self.link.owner = <void *>self
        self.key = key


cdef class TimerWheel:
    cdef wheel wheel
    cdef dict entries  # key -> _KeyedEntry; it keeps alive whatever the wheel links to

    def __cinit__(self, uint64_t now=0):
        wheel_init(&self.wheel, now)
        self.entries = {}

    def start(self, key, uint64_t deadline):
        cdef _KeyedEntry entry = self.entries.get(key)
        if entry is None:
            entry = _KeyedEntry(key)
            self.entries[key] = entry
        wheel_start(&self.wheel, &entry.link.entry, deadline)

    def stop(self, key):
        cdef _KeyedEntry entry = self.entries.pop(key, None)
        if entry is None:
            return False
        wheel_stop(&self.wheel, &entry.link.entry)
        return True

    def pop(self, uint64_t now):
        cdef wheel_entry *popped = wheel_pop(&self.wheel, now)
        cdef _KeyedEntry entry
        if popped == NULL:
            raise LookupError("nothing has expired")
        entry = <_KeyedEntry>(<owned_entry *>popped).owner
        del self.entries[entry.key]
        return entry.key

    def advance(self, uint64_t now):
        cdef list expired = []
        cdef wheel_entry *popped = wheel_pop(&self.wheel, now)
        cdef _KeyedEntry entry
        while popped != NULL:
            entry = <_KeyedEntry>(<owned_entry *>popped).owner
            del self.entries[entry.key]
            expired.append(entry.key)
            popped = wheel_pop(&self.wheel, now)
        return expired

    def next_expiry(self):
        cdef uint64_t tick = wheel_next(&self.wheel)
        return tick if self.wheel.count else None

    def __len__(self):
        return <Py_ssize_t>self.wheel.count

    @property
    def now(self):
        return self.wheel.now


def slot_of(uint64_t now, uint64_t deadline):
    if deadline <= now:
        raise ValueError("such a deadline is due, it has no slot")
    cdef unsigned int level = level_of(now, deadline)
    cdef unsigned int index = index_of(now, deadline, level)
    return level, index, slot_begins(now, level, index)


def first_slot(uint64_t occupied, uint64_t now, unsigned int level):
    if level >= WHEEL_LEVELS or not occupied:
        raise ValueError("no such level, or nothing occupied")
    return first_index(occupied, now, level)


# Benchmarks: a C loop each, since a Python call costs more than what is measured.

cdef enum:
    BENCH_SPREAD_TICKS = 30_000  # deadlines fall within the heartbeat interval, in milliseconds
    BENCH_BATCH = 256            # operations between two looks at the clock


cdef inline uint64_t clock_ns() noexcept nogil:
    cdef timespec at
    clock_gettime(CLOCK_MONOTONIC, &at)
    return <uint64_t>at.tv_sec * 1_000_000_000 + <uint64_t>at.tv_nsec


cdef inline uint64_t next_random(uint64_t *state) noexcept nogil:
    # xorshift32 in 64 bits: what is shifted out is cut off, not taken for an overflow by the debug build
    cdef uint64_t x = state[0]
    x ^= <uint32_t>(x << 13)
    x ^= x >> 17
    x ^= <uint32_t>(x << 5)
    state[0] = x
    return x


cdef inline uint64_t random_deadline(const wheel *w, uint64_t *state) noexcept nogil:
    return w.now + 1 + next_random(state) % BENCH_SPREAD_TICKS


cdef class _Population:
    """A wheel with that many entries started, and BENCH_BATCH stopped ones behind them."""
    cdef wheel wheel
    cdef wheel_entry *entries
    cdef size_t size
    cdef uint64_t random

    def __cinit__(self, size_t size):
        cdef size_t i
        if size < 1 or size > 100_000_000:
            raise ValueError("a population has 1 to 100,000,000 entries")
        self.size = size
        self.random = 2463534242
        self.entries = <wheel_entry *>malloc((size + BENCH_BATCH) * sizeof(wheel_entry))
        if self.entries == NULL:
            raise MemoryError
        wheel_init(&self.wheel, 1_000_000)
        for i in range(size + BENCH_BATCH):
            wheel_entry_init(&self.entries[i])
        self.refill()

    def __dealloc__(self):
        free(self.entries)

    cdef void refill(self) noexcept nogil:
        cdef size_t i
        for i in range(self.size):
            wheel_start(&self.wheel, &self.entries[i], random_deadline(&self.wheel, &self.random))


cdef tuple start_and_stop_ns(size_t population, size_t rounds):
    cdef _Population p = _Population(population)
    cdef wheel_entry *extra = p.entries + population
    cdef uint64_t started_ns = 0, stopped_ns = 0, at_ns
    cdef uint64_t[BENCH_BATCH] deadlines
    cdef size_t _
    cdef int j
    for _ in range(rounds):
        for j in range(BENCH_BATCH):
            deadlines[j] = random_deadline(&p.wheel, &p.random)
        at_ns = clock_ns()
        for j in range(BENCH_BATCH):
            wheel_start(&p.wheel, &extra[j], deadlines[j])
        started_ns += clock_ns() - at_ns
        at_ns = clock_ns()
        for j in range(BENCH_BATCH):
            wheel_stop(&p.wheel, &extra[j])
        stopped_ns += clock_ns() - at_ns
    return started_ns / <double>(rounds * BENCH_BATCH), stopped_ns / <double>(rounds * BENCH_BATCH)


def bench_start(size_t population, size_t rounds):
    return start_and_stop_ns(population, rounds)[0]


def bench_stop(size_t population, size_t rounds):
    return start_and_stop_ns(population, rounds)[1]


def bench_restart(size_t population, size_t rounds):
    cdef _Population p = _Population(population)
    cdef uint64_t total_ns = 0, at_ns
    cdef uint64_t[BENCH_BATCH] deadlines
    cdef size_t[BENCH_BATCH] chosen
    cdef size_t _
    cdef int j
    for _ in range(rounds):
        for j in range(BENCH_BATCH):
            deadlines[j] = random_deadline(&p.wheel, &p.random)
            chosen[j] = next_random(&p.random) % population
        at_ns = clock_ns()
        for j in range(BENCH_BATCH):
            wheel_start(&p.wheel, &p.entries[chosen[j]], deadlines[j])
        total_ns += clock_ns() - at_ns
    return total_ns / <double>(rounds * BENCH_BATCH)


def bench_expire(size_t population, size_t rounds):
    cdef _Population p = _Population(population)
    cdef uint64_t total_ns = 0, at_ns, tick
    cdef size_t _
    for _ in range(rounds):
        at_ns = clock_ns()
        tick = wheel_next(&p.wheel)
        while tick != WHEEL_NEVER:
            while wheel_pop(&p.wheel, tick) != NULL:
                pass
            tick = wheel_next(&p.wheel)
        total_ns += clock_ns() - at_ns
        p.refill()
    return total_ns / <double>(rounds * population)
