"""Many sends in one system call: a small io_uring, where the kernel lets us have one.

Entering the kernel is a good part of sending a short frame: sixty at once take four to eighteen percent less of the processor,
from run to run (`bench/run.py --only fanout`). Owns the ring. Knows nothing of connections: data and descriptors are the
caller's until `bulk_send` has returned, and nothing is under way behind it, for every send is one that must not wait.

A kernel before 6.0 has no such ring, and a container may forbid it, as Docker's default profile does: `fd` is -1, and the
caller sends one by one.
"""

cimport cython
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_FAILED, MAP_POPULATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

from presence_core.system cimport MSG_DONTWAIT, MSG_NOSIGNAL, send

cdef extern from "<linux/io_uring.h>" nogil:
    """
    #include <sys/syscall.h>
    #include <unistd.h>
    #define load_acquire(address) __atomic_load_n(address, __ATOMIC_ACQUIRE)
    #define store_release(address, value) __atomic_store_n(address, value, __ATOMIC_RELEASE)
    #ifndef IORING_SETUP_SINGLE_ISSUER
    #define IORING_SETUP_SINGLE_ISSUER (1U << 12)
    #endif
    #ifndef IORING_SETUP_COOP_TASKRUN
    #define IORING_SETUP_COOP_TASKRUN (1U << 8)
    #endif
    """
    struct io_sqring_offsets:
        uint32_t head, tail, ring_mask, array
    struct io_cqring_offsets:
        uint32_t head, tail, ring_mask, cqes
    struct io_uring_params:
        uint32_t sq_entries, cq_entries, flags, features
        io_sqring_offsets sq_off
        io_cqring_offsets cq_off
    ctypedef struct submission "struct io_uring_sqe":
        unsigned char opcode
        int fd
        uint64_t addr
        uint32_t len
        uint32_t msg_flags
        uint64_t user_data
    ctypedef struct completion "struct io_uring_cqe":
        uint64_t user_data
        int res
    enum: IORING_OP_SEND, IORING_ENTER_GETEVENTS, IORING_FEAT_SINGLE_MMAP, IORING_OFF_SQ_RING, IORING_OFF_SQES
    enum: IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_COOP_TASKRUN
    enum: SYS_io_uring_setup, SYS_io_uring_enter
    long syscall(long number, ...)
    uint32_t load_acquire(const uint32_t *address)
    void store_release(uint32_t *address, uint32_t value)

cdef enum:
    NOT_SENT = -4096  # no errno: the kernel has not taken it


cdef void bulk_init(bulk *b) noexcept nogil:
    memset(b, 0, sizeof(bulk))
    b.fd = -1


cdef void bulk_open(bulk *b) noexcept nogil:
    """`fd` stays -1 where there can be no ring."""
    cdef io_uring_params params
    memset(&params, 0, sizeof(params))
    params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN
    b.fd = <int> syscall(SYS_io_uring_setup, <long> BULK_MAX, &params)
    if b.fd < 0:
        return
    if not params.features & IORING_FEAT_SINGLE_MMAP or not map_rings(b, &params):
        bulk_close(b)


cdef bint map_rings(bulk *b, const io_uring_params *params) noexcept nogil:
    cdef char *rings
    cdef void *sqes
    cdef int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE
    b.rings_bytes = max(
        <size_t> params.sq_off.array + params.sq_entries * sizeof(uint32_t),
        <size_t> params.cq_off.cqes + params.cq_entries * sizeof(completion),
    )
    rings = <char *> mmap(NULL, b.rings_bytes, protection, flags, b.fd, IORING_OFF_SQ_RING)
    if rings == MAP_FAILED:
        return False
    b.rings = rings
    b.sqes_bytes = params.sq_entries * sizeof(submission)
    sqes = mmap(NULL, b.sqes_bytes, protection, flags, b.fd, IORING_OFF_SQES)
    if sqes == MAP_FAILED:
        return False
    b.sqes = <io_uring_sqe *> sqes
    b.sq_head = <uint32_t *> (rings + params.sq_off.head)
    b.sq_tail = <uint32_t *> (rings + params.sq_off.tail)
    b.sq_mask = (<uint32_t *> (rings + params.sq_off.ring_mask))[0]
    b.sq_array = <uint32_t *> (rings + params.sq_off.array)
    b.cq_head = <uint32_t *> (rings + params.cq_off.head)
    b.cq_tail = <uint32_t *> (rings + params.cq_off.tail)
    b.cq_mask = (<uint32_t *> (rings + params.cq_off.ring_mask))[0]
    b.cqes = <io_uring_cqe *> (rings + params.cq_off.cqes)
    return True


cdef void bulk_close(bulk *b) noexcept nogil:
    if b.sqes != NULL:
        munmap(b.sqes, b.sqes_bytes)
    if b.rings != NULL:
        munmap(b.rings, b.rings_bytes)
    if b.fd >= 0:
        close(b.fd)
    bulk_init(b)


@cython.overflowcheck(False)  # the ring's positions wrap
cdef void bulk_add(bulk *b, int fd, const void *data, size_t size) noexcept nogil:
    """BULK_MAX at the most, then comes `bulk_send`."""
    cdef uint32_t at = (b.sq_tail[0] + b.count) & b.sq_mask
    cdef submission *entry = <submission *> b.sqes + at
    memset(entry, 0, sizeof(submission))
    entry.opcode = IORING_OP_SEND
    entry.fd = fd
    entry.addr = <uint64_t> data
    entry.len = <uint32_t> size
    entry.msg_flags = MSG_NOSIGNAL | MSG_DONTWAIT
    entry.user_data = b.count
    b.sq_array[at] = at
    b.count += 1


@cython.overflowcheck(False)  # the ring's positions wrap
cdef void bulk_send(bulk *b, ssize_t *results) noexcept nogil:
    """For each that was added, in order: how many bytes the kernel took, or the negative errno."""
    cdef uint32_t i, count = b.count, first = b.sq_tail[0], taken
    for i in range(count):
        results[i] = NOT_SENT
    store_release(b.sq_tail, first + count)
    enter(b, count)
    taken = load_acquire(b.sq_head) - first
    b.count = 0
    if taken < count:  # no memory in the kernel, or another thread than the first: it is over with the ring
        store_release(b.sq_tail, first + taken)
    reap(b, taken, results)
    for i in range(count):
        if results[i] < 0 and results[i] != -EAGAIN:  # not taken, or the ring's own trouble: the socket says which
            results[i] = send_one(<submission *> b.sqes + ((first + i) & b.sq_mask))
    if taken < count:
        bulk_close(b)


cdef void enter(bulk *b, uint32_t count) noexcept nogil:
    while syscall(SYS_io_uring_enter, <long> b.fd, <long> count, 0L, <long> IORING_ENTER_GETEVENTS, NULL, 0L) < 0:
        if errno != EINTR:
            return


@cython.overflowcheck(False)  # the ring's positions wrap
cdef void reap(bulk *b, uint32_t count, ssize_t *results) noexcept nogil:
    """All of them are there, for none may wait; if not, the kernel's own thread has one, and not for long."""
    cdef uint32_t head = b.cq_head[0], left = count
    cdef completion *done
    while left:
        while head == load_acquire(b.cq_tail):
            syscall(SYS_io_uring_enter, <long> b.fd, 0L, 1L, <long> IORING_ENTER_GETEVENTS, NULL, 0L)
        done = <completion *> b.cqes + (head & b.cq_mask)
        results[done.user_data] = done.res
        head += 1
        left -= 1
        store_release(b.cq_head, head)


cdef ssize_t send_one(const submission *entry) noexcept nogil:
    cdef ssize_t sent = send(entry.fd, <const void *> entry.addr, entry.len, MSG_NOSIGNAL | MSG_DONTWAIT)
    return sent if sent >= 0 else -errno
