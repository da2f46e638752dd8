# The members of one room, and how far a pass over them has come.

cdef struct member:
    size_t index  # of this member in its list
    void *owner   # the connection

cdef struct member_list:
    member **items
    size_t count
    size_t capacity
    size_t cursor  # [0, cursor) have been served in the pass under way
    size_t end     # [cursor, end) are still to be served; [end, count) joined since the pass began

cdef void members_init(member_list *members) noexcept nogil
cdef void members_free(member_list *members) noexcept nogil
cdef int members_add(member_list *members, member *newcomer) noexcept nogil
cdef void members_remove(member_list *members, member *leaver) noexcept nogil
cdef void members_begin_pass(member_list *members) noexcept nogil
cdef member *members_next(member_list *members) noexcept nogil
cdef bint members_in_pass(const member_list *members) noexcept nogil
