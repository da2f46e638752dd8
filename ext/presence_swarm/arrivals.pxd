# Bytes that arrive at a link.

from libc.stdint cimport uint32_t

from presence_swarm.life cimport link, swarm

cdef void on_link_ready(swarm *s, link *line, uint32_t events) noexcept nogil
