# Many sends in one system call: a small io_uring, where the kernel lets us have one.

from libc.stdint cimport uint32_t

cdef enum:
    BULK_MAX = 64  # sends in one call

cdef extern from "<linux/io_uring.h>" nogil:
    struct io_uring_sqe:
        pass
    struct io_uring_cqe:
        pass

cdef struct bulk:
    int fd                   # -1: there is none
    uint32_t count           # sends that wait for the call
    uint32_t sq_mask, cq_mask
    uint32_t *sq_head        # the kernel's
    uint32_t *sq_tail
    uint32_t *sq_array
    uint32_t *cq_head
    uint32_t *cq_tail        # the kernel's
    io_uring_sqe *sqes
    io_uring_cqe *cqes
    void *rings              # both, in one mapping
    size_t rings_bytes, sqes_bytes

cdef void bulk_init(bulk *b) noexcept nogil
cdef void bulk_open(bulk *b) noexcept nogil
cdef void bulk_close(bulk *b) noexcept nogil
cdef void bulk_add(bulk *b, int fd, const void *data, size_t size) noexcept nogil
cdef void bulk_send(bulk *b, ssize_t *results) noexcept nogil
