"""The write backlog of one connection: what its full socket could not take yet.

Owns one reference to each bytes object it holds and one small allocation for each entry; the bytes themselves are shared
by every connection that waits for them. Knows nothing of sockets. Every bytes object holds whole frames; if a caller
breaks that rule, the peer gets what the caller sent, never anything else.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint8_t, uint64_t
from posix.uio cimport iovec

cdef enum:
    MAX_VECTORS = 16  # of the test seam


cdef void backlog_init(backlog *b) noexcept:
    b.head = NULL
    b.tail = NULL
    b.pending_bytes = 0


cdef void backlog_clear(backlog *b) noexcept:
    while b.head != NULL:
        _drop_head(b)
    b.pending_bytes = 0


cdef void _drop_head(backlog *b) noexcept:
    cdef backlog_entry *entry = b.head
    b.head = entry.next
    if b.head == NULL:
        b.tail = NULL
    Py_DECREF(<object> entry.frames)
    PyMem_RawFree(entry)


cdef int backlog_push(backlog *b, PyObject *frames, size_t offset) noexcept:
    """Queue what lies behind ``offset``. Returns -1, and changes nothing, when there is no memory."""
    cdef backlog_entry *entry = <backlog_entry *> PyMem_RawMalloc(sizeof(backlog_entry))
    if entry == NULL:
        return -1
    Py_INCREF(<object> frames)
    entry.frames = frames
    entry.offset = offset
    entry.next = NULL
    if b.tail == NULL:
        b.head = entry
    else:
        b.tail.next = entry
    b.tail = entry
    b.pending_bytes += <size_t> PyBytes_GET_SIZE(<object> frames) - offset
    return 0


cdef int backlog_fill(const backlog *b, iovec *vectors, int capacity) noexcept:
    """Point ``vectors`` at the waiting bytes, in order, for one sendmsg(2). Returns how many were filled."""
    cdef const backlog_entry *entry = b.head
    cdef int count = 0
    while entry != NULL and count < capacity:
        vectors[count].iov_base = PyBytes_AS_STRING(<object> entry.frames) + entry.offset
        vectors[count].iov_len = <size_t> PyBytes_GET_SIZE(<object> entry.frames) - entry.offset
        count += 1
        entry = entry.next
    return count


cdef void backlog_consume(backlog *b, size_t sent_bytes) noexcept:
    """Forget the first ``sent_bytes``: they are with the kernel now."""
    cdef size_t left
    b.pending_bytes -= sent_bytes
    while sent_bytes > 0:
        left = <size_t> PyBytes_GET_SIZE(<object> b.head.frames) - b.head.offset
        if sent_bytes < left:
            b.head.offset += sent_bytes
            return
        sent_bytes -= left
        _drop_head(b)


cdef int backlog_truncate(backlog *b) noexcept:
    """Forget all but the rest of a frame that is partly sent, so that a close frame may follow. -1: no memory."""
    cdef uint8_t *data
    cdef size_t start = 0, end = 0, offset, size
    cdef bytes rest
    if b.head == NULL:
        return 0
    offset = b.head.offset
    size = <size_t> PyBytes_GET_SIZE(<object> b.head.frames)
    data = <uint8_t *> PyBytes_AS_STRING(<object> b.head.frames)
    while end < offset:
        start = end
        end = start + _frame_bytes(data + start, size - start)
    if end == offset:
        backlog_clear(b)
        return 0
    try:
        rest = PyBytes_FromStringAndSize(<char *> data + offset, <Py_ssize_t> (end - offset))
    except MemoryError:
        return -1
    backlog_clear(b)
    return backlog_push(b, <PyObject *> rest, 0)


cdef size_t _frame_bytes(const uint8_t *frame, size_t available) noexcept:
    """Length of a server's (unmasked) frame, header included; what is no whole frame counts as one."""
    cdef unsigned int count, i
    cdef uint64_t size
    if available < 2:
        return available
    size = frame[1] & 0x7F
    count = 0 if size < 126 else 2 if size == 126 else 8
    if available - 2 < count:
        return available
    if count:
        size = 0
        for i in range(count):
            size = size << 8 | frame[2 + i]
    if size > available - 2 - count:
        return available
    return <size_t> size + 2 + count


cdef class Backlog:
    """The queue over Python bytes, for the tests: what a full socket would take is what `consume` is told."""

    cdef backlog waiting

    def __cinit__(self):
        backlog_init(&self.waiting)

    def __dealloc__(self):
        backlog_clear(&self.waiting)

    def push(self, bytes frames not None, size_t offset=0):
        if offset > <size_t> PyBytes_GET_SIZE(frames):
            raise ValueError("the offset lies behind the end")
        if backlog_push(&self.waiting, <PyObject *> frames, offset) < 0:
            raise MemoryError

    def consume(self, size_t sent_bytes):
        if sent_bytes > self.waiting.pending_bytes:
            raise ValueError("so much does not wait")
        backlog_consume(&self.waiting, sent_bytes)

    def truncate(self):
        if backlog_truncate(&self.waiting) < 0:
            raise MemoryError

    def clear(self):
        backlog_clear(&self.waiting)

    def vectors(self, int capacity):
        cdef iovec[MAX_VECTORS] vectors
        cdef int count = backlog_fill(&self.waiting, vectors, max(0, min(capacity, MAX_VECTORS)))
        return [(<char *> vectors[i].iov_base)[:vectors[i].iov_len] for i in range(count)]

    @property
    def pending_bytes(self):
        return self.waiting.pending_bytes
