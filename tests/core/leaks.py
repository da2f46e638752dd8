"""A run for LeakSanitizer: whole lives of connections, rooms and decoders, ended in every way, then a clean exit.

Not a test itself: tests/core/asan.sh runs it on the build that is instrumented for it.
"""

from __future__ import annotations

import gc

from client_frames import client_frame
from test_memory import Quiet, lives

from peers import new_hub
from presence_core.backlog import Backlog
from presence_core.frames import Decoder, encode_frame
from presence_core.members import MemberList
from presence_core.wheel import TimerWheel


def main() -> None:
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
