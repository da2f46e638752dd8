"""Who is measured beside the hub, and what each is started with. A peer that is not installed is skipped, with a word."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from figures import Figures

PRESENCE = "Presence"  # the hub alone, or the gateway
PICOWS = "picows, stock"
WEBSOCKETS = "websockets"
UWEBSOCKETS = "uWebSockets (socketify)"
NATS_SERVER = "nats-server ws"
BARE_C = "bare C, send(2)"

NEEDS = {PICOWS: "picows", WEBSOCKETS: "websockets", UWEBSOCKETS: "socketify"}

SOCKET_SERVERS: dict[str, tuple[str, ...]] = {
    PRESENCE: ("bench/echo_server.py", "--port", "0"),
    PICOWS: ("bench/peers/picows_server.py",),
    WEBSOCKETS: ("bench/peers/websockets_server.py",),
    UWEBSOCKETS: ("bench/peers/socketify_server.py",),
}

FANOUT_SERVERS: dict[str, tuple[str, ...]] = {
    PRESENCE: ("bench/fanout_server.py",),
    PICOWS: ("bench/peers/picows_fanout.py",),
    WEBSOCKETS: ("bench/peers/websockets_fanout.py",),
    UWEBSOCKETS: ("bench/peers/socketify_fanout.py",),
    NATS_SERVER: ("bench/peers/nats_ws.py",),
    BARE_C: ("bench/peers/bare.c",),
}


def is_installed(who: str, figures: Figures) -> bool:
    module = NEEDS.get(who)
    if module is None or find_spec(module) is not None:
        return True
    if who not in figures.skipped:
        figures.skipped[who] = f"{module} is not installed"
        print(f"skipped: {who}: {figures.skipped[who]}", flush=True)
    return False
