"""The members of one room in one array, with a cursor: served | still to be served | joined since the pass began.

Joining, leaving and stepping are O(1); a member that leaves in the middle of a pass lets nobody be skipped or served
twice. Owns the array, not the members. Knows nothing of sockets or frames.
"""

from cpython.mem cimport PyMem_RawFree, PyMem_RawRealloc

cdef enum:
    FIRST_CAPACITY = 4


cdef void members_init(member_list *members) noexcept nogil:
    members.items = NULL
    members.count = members.capacity = 0
    members.cursor = members.end = 0


cdef void members_free(member_list *members) noexcept nogil:
    PyMem_RawFree(members.items)
    members_init(members)


cdef int members_add(member_list *members, member *newcomer) noexcept nogil:
    """Append, behind the end of a pass under way. Returns -1, and changes nothing, when there is no memory."""
    cdef size_t capacity
    cdef member **items
    if members.count == members.capacity:
        capacity = members.capacity * 2 if members.capacity else FIRST_CAPACITY
        items = <member **> PyMem_RawRealloc(members.items, capacity * sizeof(member *))
        if items == NULL:
            return -1
        members.items = items
        members.capacity = capacity
    _put(members, members.count, newcomer)
    members.count += 1
    return 0


cdef inline void _put(member_list *members, size_t index, member *item) noexcept nogil:
    members.items[index] = item
    item.index = index


cdef void members_remove(member_list *members, member *leaver) noexcept nogil:
    """Take one out: the last of each region fills the hole that the region before it has left."""
    cdef size_t hole = leaver.index
    if hole < members.cursor:
        members.cursor -= 1
        hole = _fill(members, hole, members.cursor)
    if hole < members.end:
        members.end -= 1
        hole = _fill(members, hole, members.end)
    members.count -= 1
    _fill(members, hole, members.count)
    _shrink(members)


cdef inline size_t _fill(member_list *members, size_t hole, size_t last) noexcept nogil:
    """Move the last of a region into the hole; returns where the hole is then."""
    if hole != last:  # what stands in the hole itself has left, or has moved already
        _put(members, hole, members.items[last])
    return last


cdef void _shrink(member_list *members) noexcept nogil:
    cdef size_t capacity = members.capacity // 2
    cdef member **items
    if members.count == 0:
        PyMem_RawFree(members.items)
        members.items = NULL
        members.capacity = 0
    elif members.count * 4 <= members.capacity and capacity >= FIRST_CAPACITY:
        items = <member **> PyMem_RawRealloc(members.items, capacity * sizeof(member *))
        if items != NULL:  # a failed shrink leaves the larger array: it is only larger
            members.items = items
            members.capacity = capacity


cdef void members_begin_pass(member_list *members) noexcept nogil:
    members.cursor = 0
    members.end = members.count


cdef member *members_next(member_list *members) noexcept nogil:
    """The next member of the pass, or NULL when everyone has been served."""
    if members.cursor >= members.end:
        return NULL
    members.cursor += 1
    return members.items[members.cursor - 1]


cdef bint members_in_pass(const member_list *members) noexcept nogil:
    return members.cursor < members.end


cdef class MemberList:
    """The array over Python keys, for the tests: ``add``, ``remove``, ``begin_pass``, ``next``."""

    cdef member_list members
    cdef dict entries  # key -> _Entry

    def __cinit__(self):
        members_init(&self.members)
        self.entries = {}

    def __dealloc__(self):
        members_free(&self.members)

    def add(self, key):
        cdef _Entry entry = _Entry(key)
        entry.node.owner = <void *> entry
        if members_add(&self.members, &entry.node) < 0:
            raise MemoryError
        self.entries[key] = entry

    def remove(self, key):
        cdef _Entry entry = self.entries.pop(key)
        members_remove(&self.members, &entry.node)

    def begin_pass(self):
        members_begin_pass(&self.members)

    def next(self):
        cdef member *node = members_next(&self.members)
        return None if node == NULL else (<_Entry> node.owner).key

    def in_pass(self) -> bool:
        return members_in_pass(&self.members)

    def keys(self) -> list:
        return [(<_Entry> self.members.items[i].owner).key for i in range(self.members.count)]

    def capacity(self) -> int:
        return self.members.capacity


cdef class _Entry:
    cdef member node
    cdef object key

    def __init__(self, key):
        self.key = key
