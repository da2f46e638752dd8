# Log-linear histograms of durations (as in HdrHistogram): 64 buckets for every power of two, 1.6 % wide at the most.

from libc.stdint cimport uint64_t
from libc.string cimport memset

cdef extern from *:
    """
    #define DURATIONS_LOWEST UINT64_MAX
    """
    const uint64_t DURATIONS_LOWEST
    int leading_zeros "__builtin_clzll"(unsigned long long bits) noexcept nogil

cdef enum:
    SUB_BITS = 6
    SUB_BUCKETS = 64
    DURATION_BUCKETS = 2304  # up to 2**41 ns, 37 minutes; the last one takes all that is longer

cdef struct durations:
    uint64_t counts[DURATION_BUCKETS]
    uint64_t count
    uint64_t sum_ns
    uint64_t least_ns  # exact
    uint64_t most_ns   # exact


cdef inline unsigned int duration_bucket(uint64_t value_ns) noexcept nogil:
    cdef unsigned int exponent
    cdef unsigned int bucket
    if value_ns < SUB_BUCKETS:
        return <unsigned int> value_ns
    exponent = <unsigned int> (63 - leading_zeros(value_ns))
    bucket = (exponent - SUB_BITS + 1) * SUB_BUCKETS
    bucket += <unsigned int> ((value_ns >> (exponent - SUB_BITS)) & (SUB_BUCKETS - 1))
    return bucket if bucket < DURATION_BUCKETS else DURATION_BUCKETS - 1


cdef inline uint64_t duration_floor(unsigned int bucket) noexcept nogil:
    """The least duration, in ns, that falls into the bucket."""
    cdef unsigned int exponent = bucket // SUB_BUCKETS
    if exponent == 0:
        return bucket
    return (<uint64_t> SUB_BUCKETS + bucket % SUB_BUCKETS) << (exponent - 1)


cdef inline void durations_clear(durations *d) noexcept nogil:
    memset(d, 0, sizeof(durations))
    d.least_ns = DURATIONS_LOWEST


cdef inline void durations_add(durations *d, uint64_t value_ns) noexcept nogil:
    d.counts[duration_bucket(value_ns)] += 1
    d.count += 1
    d.sum_ns += value_ns
    if value_ns < d.least_ns:
        d.least_ns = value_ns
    if value_ns > d.most_ns:
        d.most_ns = value_ns
