"""A scene for the worst that callbacks can do: a hub in which every callback is due in the same turn."""

from __future__ import annotations

from peers import OPCODE_CLOSE, OPCODE_PING, OPCODE_TEXT, Handler, Peer, masked, new_hub
from presence_core.frames import encode_frame

__all__ = ["CLOSE_1000", "Scene"]

CLOSE_1000 = masked(OPCODE_CLOSE, (1000).to_bytes(2))


class Scene:
    """A hub with thirty members in a room, of whom each is told of something different in the same turn."""

    TRIGGERS = (
        "on_open",
        "on_message",
        "on_close",
        "on_violation",
        "on_deadline",
        "on_limit",
        "on_closed",
        "on_room_drained",
    )

    def __init__(self) -> None:
        self.handler = Handler()
        self.hub = new_hub(
            self.handler,
            close_timeout_ms=50,
            message_burst=4,
            messages_per_s=0.001,
            max_room_queue_bytes=1000,
            slice_us=1,
        )
        self.room = self.hub.new_room("room")
        self.other_room = self.hub.new_room("other room")
        self.extra: list[Peer] = []
        self.adoptions = self.collections = 0
        self.peers = [Peer(self.hub) for _ in range(30)]
        for peer in self.peers:
            peer.connection.join(self.room)
            peer.connection.start_heartbeat()
        self.handler.calls.clear()

    def provoke(self) -> None:
        """Everything at once; what then comes first is up to the hub."""
        for index, peer in enumerate(self.peers):
            match index % 5:
                case 0:
                    peer.send(
                        masked(OPCODE_TEXT, b"m") * 3 + masked(OPCODE_PING) + masked(OPCODE_TEXT, b"n", fin=False)
                    )
                case 1:
                    peer.send(masked(OPCODE_TEXT, b"m") + CLOSE_1000)
                case 2:
                    peer.send(masked(OPCODE_TEXT, b"m") + b"\xff\xff")
                case 3:
                    peer.connection.set_alarm(0)
                    peer.send(masked(OPCODE_TEXT) * 9)
                case 4:
                    peer.connection.set_alarm(0)
                    if index % 10 == 4:
                        peer.reset()
        while self.room.broadcast(encode_frame(OPCODE_TEXT, b"x" * 100), exclude=self.peers[0].connection):
            pass

    def play(self) -> None:
        self.provoke()
        self.adopt(masked(OPCODE_TEXT, b"head") * 2)
        for _ in range(12):
            try:
                self.hub.run_once(2)
            except RuntimeError:  # the hub was closed
                break

    def adopt(self, head: bytes = b"") -> None:
        try:
            self.extra.append(Peer(self.hub, head))
        except ValueError:  # the hub is closed
            self.extra = self.extra[:]

    def end(self) -> None:
        self.hub.close()
        closed = [connection for connection, _ in self.handler.of("on_closed")]
        # A member told before the scene began is in nobody's list: all that were adopted are told, each once.
        assert len(closed) == len(set(map(id, closed)))
        assert {id(peer.connection) for peer in self.peers + self.extra} == set(map(id, closed))
        assert len(self.hub) == 0
        assert len(self.room) == len(self.other_room) == 0
        assert self.hub.stats()["gauges"] == {"connections_open": 0, "connections_closing": 0, "timers": 0}
