"""Adoption: takes the socket of a finished HTTP upgrade out of picows and hands it to the hub.

picows bounds, parses and answers the upgrade request. Once the 101 is with the kernel, ``Upgrade`` takes the descriptor and
the bytes that came behind the request, and aborts the picows transport, which frees all that picows held for the
connection. Knows nothing of what the connection is for: ``accepted`` makes the ``Connection``.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from picows.picows cimport WSListener, WSTransport

import os

from libc.errno cimport errno

from presence_core.hub cimport Connection, Hub

cdef extern from "<fcntl.h>":
    enum: F_DUPFD_CLOEXEC
    int fcntl(int fd, int operation, int lowest)

cdef enum:
    PICOWS_SPARE_BYTES = 256          # picows keeps this much of its read buffer back
    PICOWS_HEAD_MAX_BYTES = 16_384    # its bound on a request head

# What to give picows as ``read_buffer_init_size``. The room left in its buffer tells how many bytes lie behind the request
# head, but picows doubles a buffer that is more than 90 % full. This size makes the two cases tell apart: a head that may
# still be upgraded fills less than 90 % of it, so at most one doubling has happened, and more room is left after one
# than there is in an empty buffer before.
READ_BUFFER_INIT_BYTES = 20 * 1024
cdef Py_ssize_t BUFFER_BYTES = READ_BUFFER_INIT_BYTES - PICOWS_SPARE_BYTES
assert BUFFER_BYTES * 9 // 10 > PICOWS_HEAD_MAX_BYTES


cdef class Upgrade(WSListener):
    """One listener for all upgrades: it keeps nothing of any of them.

    ``accepted(request)`` returns the Connection for an upgraded request; ``failed(error)`` is told of an upgrade that could
    not be adopted (descriptors ran out, the client is gone).
    """
    cdef Hub hub
    cdef object accepted
    cdef object failed

    def __init__(self, Hub hub not None, accepted, failed):
        self.hub = hub
        self.accepted = accepted
        self.failed = failed

    cpdef on_ws_connected(self, WSTransport transport):
        cdef object underlying = transport.underlying_transport
        try:
            if underlying.get_write_buffer_size():
                raise BlockingIOError("the upgrade response could not be written at once")
            head = take_head(underlying.get_protocol())
            connection = <Connection?> self.accepted(transport.request)
            self.hub.adopt(connection, take_descriptor(underlying, transport._socket), head)
        except Exception as error:
            self.failed(error)
        finally:
            underlying.abort()


cdef int take_descriptor(object underlying, int fd) except -1:
    """Our own door gives its descriptor away; the transport of another server is aborted, which leaves a duplicate alive."""
    cdef int duplicate
    detach = getattr(underlying, "detach", None)
    if detach is not None:
        return detach()
    duplicate = fcntl(fd, F_DUPFD_CLOEXEC, 3)
    if duplicate < 0:
        raise OSError(errno, os.strerror(errno))
    return duplicate


cdef bytes take_head(object protocol):
    """The bytes behind the request head. picows is left without them: what it has not got, it cannot answer."""
    cdef Py_buffer space
    cdef Py_ssize_t size, taken
    cdef bytes head
    PyObject_GetBuffer(protocol.get_buffer(-1), &space, PyBUF_WRITABLE)
    size = BUFFER_BYTES if space.len <= BUFFER_BYTES else 2 * BUFFER_BYTES
    taken = size - space.len
    try:
        head = PyBytes_FromStringAndSize(<char *> space.buf - taken, taken)
    finally:
        PyBuffer_Release(&space)
    if taken:
        protocol.buffer_updated(-taken)
    return head
