"""A histogram of durations in fixed buckets from 0.5 ms to 5 s, kept in C and read on demand."""

cdef uint64_t[HISTOGRAM_BUCKETS - 1] BOUNDS_US
BOUNDS_US[:] = [500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000]


cdef void histogram_observe(histogram *h, uint64_t value_ns) noexcept nogil:
    cdef uint64_t value_us = value_ns // 1000
    cdef int bucket = 0
    while bucket < HISTOGRAM_BUCKETS - 1 and value_us > BOUNDS_US[bucket]:
        bucket += 1
    h.counts[bucket] += 1
    h.sum_ns += value_ns


cdef tuple histogram_read(const histogram *h):
    """``(upper bounds in seconds, counts with one more for the rest, sum in seconds)``; counts are not cumulative."""
    bounds = [BOUNDS_US[i] / 1e6 for i in range(HISTOGRAM_BUCKETS - 1)]
    return bounds, [h.counts[i] for i in range(HISTOGRAM_BUCKETS)], h.sum_ns / 1e9
