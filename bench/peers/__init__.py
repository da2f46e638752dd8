"""Who is measured beside the hub, and what each is started with. A peer that is not installed is skipped, with a word."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from figures import Figures

PRESENCE = "Presence"  # the hub alone, or the gateway
PICOWS = "picows, stock"
WEBSOCKETS = "websockets"
UWEBSOCKETS = "uWebSockets (socketify)"
NATS_SERVER = "nats-server ws"
NCHAN = "nchan"
BARE_C = "bare C, send(2)"
PRESENCE_ONE_BY_ONE = "Presence without io_uring"
PRESENCE_NAGLE = "Presence without TCP_NODELAY"

NEEDS_MODULE = {PICOWS: "picows", WEBSOCKETS: "websockets", UWEBSOCKETS: "socketify"}
NEEDS_FILES = {
    NCHAN: ("/usr/sbin/nginx", "/usr/lib/nginx/modules/ngx_nchan_module.so")
}  # of Debian's libnginx-mod-nchan

SOCKET_SERVERS: dict[str, tuple[str, ...]] = {
    PRESENCE: ("bench/echo_server.py", "--port", "0"),
    PICOWS: ("bench/peers/picows_server.py",),
    WEBSOCKETS: ("bench/peers/websockets_server.py",),
    UWEBSOCKETS: ("bench/peers/socketify_server.py",),
    NCHAN: ("bench/peers/nchan.py",),
}

PING_INTERVAL_S = 5
PING_SERVERS: dict[str, tuple[str, ...]] = {
    PRESENCE: ("bench/echo_server.py", "--port", "0", "--heartbeat", "--ping-interval-s", str(PING_INTERVAL_S)),
    PICOWS: ("bench/peers/picows_server.py", "--ping-interval-s", str(PING_INTERVAL_S)),
    WEBSOCKETS: ("bench/peers/websockets_server.py", "--ping-interval-s", str(PING_INTERVAL_S)),
    UWEBSOCKETS: ("bench/peers/socketify_server.py", "--pings"),
    NCHAN: ("bench/peers/nchan.py", "--ping-interval-s", str(PING_INTERVAL_S)),
}

FANOUT_SERVERS: dict[str, tuple[str, ...]] = {
    PRESENCE: ("bench/fanout_server.py",),
    PRESENCE_ONE_BY_ONE: ("bench/fanout_server.py", "--one-by-one"),
    PRESENCE_NAGLE: ("bench/fanout_server.py", "--nagle"),
    PICOWS: ("bench/peers/picows_fanout.py",),
    WEBSOCKETS: ("bench/peers/websockets_fanout.py",),
    UWEBSOCKETS: ("bench/peers/socketify_fanout.py",),
    NATS_SERVER: ("bench/peers/nats_ws.py",),
    NCHAN: ("bench/peers/nchan.py",),
    BARE_C: ("bench/peers/bare.c",),
}


def is_installed(who: str, figures: Figures) -> bool:
    missing = why_missing(who)
    if missing is None:
        return True
    if who not in figures.skipped:
        figures.skipped[who] = missing
        print(f"skipped: {who}: {missing}", flush=True)
    return False


def why_missing(who: str) -> str | None:
    module = NEEDS_MODULE.get(who)
    if module is not None and find_spec(module) is None:
        return f"{module} is not installed"
    absent = [path for path in NEEDS_FILES.get(who, ()) if not Path(path).exists()]
    return f"there is no {absent[0]}" if absent else None
