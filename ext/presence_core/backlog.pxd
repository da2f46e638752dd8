# Frames that a full socket could not take: a queue of references to shared bytes objects, nothing is copied.

from cpython.object cimport PyObject
from posix.uio cimport iovec

cdef struct backlog_entry:
    PyObject *frames     # bytes: whole frames, possibly shared with many other connections
    size_t offset        # bytes of it that are already sent
    backlog_entry *next

cdef struct backlog:
    backlog_entry *head
    backlog_entry *tail
    size_t pending_bytes

cdef void backlog_init(backlog *b) noexcept
cdef void backlog_clear(backlog *b) noexcept
cdef int backlog_push(backlog *b, PyObject *frames, size_t offset) noexcept
cdef int backlog_fill(const backlog *b, iovec *vectors, int capacity) noexcept
cdef void backlog_consume(backlog *b, size_t sent_bytes) noexcept
cdef int backlog_truncate(backlog *b) noexcept
