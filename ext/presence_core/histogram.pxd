# Counts in fixed buckets, always on: one comparison chain and two additions an observation.

from libc.stdint cimport uint64_t

cdef enum:
    HISTOGRAM_BUCKETS = 14  # the last one has no upper bound

cdef struct histogram:
    uint64_t counts[HISTOGRAM_BUCKETS]
    uint64_t sum_ns

cdef void histogram_observe(histogram *h, uint64_t value_ns) noexcept nogil
cdef tuple histogram_read(const histogram *h)
