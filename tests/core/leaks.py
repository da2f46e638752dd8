"""A run for LeakSanitizer: whole lives of connections, rooms, decoders and agents, ended in every way, then a clean exit.

Not a test itself: tests/core/asan.sh runs it on the build that is instrumented for it.
"""

from __future__ import annotations

import gc
import socket

from client_frames import client_frame
from test_memory import Quiet, lives

from peers import new_hub
from presence_core.backlog import Backlog
from presence_core.frames import Decoder, encode_frame
from presence_core.members import MemberList
from presence_core.wheel import TimerWheel
from presence_swarm.swarm import Swarm

UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
SUCCESS = encode_frame(1, b'{"type":"connect_success","payload":{"session_id":1,"ping_interval_ms":30000}}')


def agents(answers: list[bytes]) -> None:
    """Agents that are told so much and then lose their server, or end with the swarm."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        swarm = Swarm(len(answers))
        swarm.set_targets([listening.getsockname()[1]])
        for _ in answers:
            swarm.add(b"request")
        swarm.run(5)
        for number, answer in enumerate(answers):
            accepted, _ = listening.accept()
            accepted.sendall(answer)
            if number % 2:
                accepted.close()
            swarm.run(1)
        swarm.take()


def main() -> None:
    agents([(UPGRADED + SUCCESS * 2)[:cut] for cut in range(0, len(UPGRADED + SUCCESS) + 20, 7)])
    hub = new_hub(Quiet(), max_room_queue_bytes=1 << 20)
    lives(hub, hub.new_room(), 100)
    hub.close()
    for cut in range(1, 40):
        decoder = Decoder()
        decoder.feed(
            (client_frame(1, b"a" * 20, final=False) + client_frame(9, b"p") + client_frame(0, b"b" * 99))[:cut]
        )
        backlog = Backlog()
        backlog.push(encode_frame(1, bytes(cut)), 1)
        backlog.push(encode_frame(1, bytes(cut)))
        members, wheel = MemberList(), TimerWheel()
        for number in range(cut):
            members.add(number)
            wheel.start(number, number)
    del hub, decoder, backlog, members, wheel
    gc.collect()


if __name__ == "__main__":
    main()
