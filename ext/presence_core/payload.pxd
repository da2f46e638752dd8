# Payloads: masks and UTF-8 (RFC 6455 sections 5.3 and 8.1), in pieces of any size, in place and without allocation.

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #define HIGH_BITS UINT64_C(0x8080808080808080)
    """
    const uint64_t HIGH_BITS  # set in a byte that is not ASCII

cdef struct utf8_state:
    uint8_t missing  # continuation bytes of the character under way
    uint8_t lower    # bounds of the next one
    uint8_t upper


cdef inline void unmask(uint8_t *data, size_t size, const uint8_t *mask, uint64_t offset) noexcept nogil:
    """XOR in place; `offset` is how much of the frame's payload went before."""
    cdef uint8_t[8] key
    cdef uint64_t key_word, word
    cdef size_t i
    cdef size_t words = size >> 3
    for i in range(<size_t>8):
        key[i] = mask[(offset + i) & 3]
    memcpy(&key_word, key, 8)
    for i in range(words):  # one pointer only, so that the compiler may use vectors
        memcpy(&word, data + 8 * i, 8)
        word ^= key_word
        memcpy(data + 8 * i, &word, 8)
    for i in range(8 * words, size):
        data[i] ^= key[i & 7]


cdef inline size_t skip_ascii(const uint8_t *data, size_t at, size_t size) noexcept nogil:
    """Where the ASCII from `at` on may end; everything before is ASCII."""
    cdef uint64_t word
    while size - at >= 8:
        memcpy(&word, data + at, 8)
        if word & HIGH_BITS:
            break
        at += 8
    return at


cdef inline bint utf8_lead(utf8_state *state, uint8_t byte) noexcept nogil:
    """Begin a character: how many bytes follow, and the bounds of the next (the Encoding Standard's table)."""
    state.lower = 0x80
    state.upper = 0xBF
    if 0xC2 <= byte <= 0xDF:
        state.missing = 1
    elif 0xE0 <= byte <= 0xEF:
        state.missing = 2
        if byte == 0xE0:
            state.lower = 0xA0  # shorter encodings exist
        elif byte == 0xED:
            state.upper = 0x9F  # surrogates
    elif 0xF0 <= byte <= 0xF4:
        state.missing = 3
        if byte == 0xF0:
            state.lower = 0x90
        elif byte == 0xF4:
            state.upper = 0x8F  # beyond U+10FFFF
    else:
        return False
    return True


cdef inline bint utf8_feed(utf8_state *kept, const uint8_t *data, size_t size) noexcept nogil:
    """Whether the text is still a prefix of valid UTF-8; false at the first byte that settles it."""
    cdef utf8_state state = kept[0]
    cdef uint8_t byte
    cdef size_t at = 0
    while at < size:
        if state.missing:
            byte = data[at]
            if byte < state.lower or byte > state.upper:
                return False
            state.lower = 0x80
            state.upper = 0xBF
            state.missing -= 1
        else:
            at = skip_ascii(data, at, size)
            if at == size:
                break
            byte = data[at]
            if byte >= 0x80 and not utf8_lead(&state, byte):
                return False
        at += 1
    kept[0] = state
    return True


cdef inline bint is_utf8(const uint8_t *data, size_t size) noexcept nogil:
    cdef utf8_state state
    state.missing = 0
    state.lower = 0
    state.upper = 0
    return utf8_feed(&state, data, size) and state.missing == 0
