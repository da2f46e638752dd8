"""The gateway over its embedded servers, for the benchmarks: prints where it listens and its process is the gateway alone.

python bench/gateway_server.py --data-dir DIR --auth-keys FILE [--ping-interval-s 30] [--pong-timeout-s 5]
"""

import argparse
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from presence.app import App, serve
from presence.config import load
from presence.embedded import Embedded
from presence.log import configure
from presence.migrate import migrate


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--auth-keys", required=True)
    parser.add_argument("--ping-interval-s", type=float, default=30.0)
    parser.add_argument("--pong-timeout-s", type=float, default=5.0)
    arguments = parser.parse_args()
    configure("warning", "json")
    async with Embedded(arguments.data_dir) as embedded:
        await migrate(embedded.database_url)
        settings = load(
            {
                "port": 0,
                "http_port": 0,
                "nats_url": embedded.nats_url,
                "database_url": embedded.database_url,
                "auth_keys": arguments.auth_keys,
                "drain_timeout_s": 1,
                "ping_interval_s": arguments.ping_interval_s,
                "pong_timeout_s": arguments.pong_timeout_s,
            },
            None,
        )
        nats_port = urlsplit(embedded.nats_url).port

        def ready(app: App) -> None:
            print(f"listening on {app.gateway.port}, http on {app.http_api.port}, nats on {nats_port}", flush=True)

        return await serve(settings, ready=ready)


if __name__ == "__main__":
    raise SystemExit(uvloop.run(main()))
