# What an agent hears: whole messages and control frames of the gateway.

from libc.stdint cimport uint8_t, uint64_t

from presence_swarm.client_frames cimport server_frame
from presence_swarm.life cimport agent, link, swarm

cdef void on_message(swarm *s, link *line, const uint8_t *data, size_t size, uint64_t at_ns) noexcept nogil
cdef void on_ping(swarm *s, link *line, const uint8_t *payload, size_t size, uint64_t at_ns) noexcept nogil
cdef void on_close_frame(swarm *s, link *line, const server_frame *frame, uint64_t at_ns) noexcept nogil
cdef uint64_t pending_numbers(const agent *a) noexcept nogil
