"""The gateway over its embedded servers, for the benchmarks: prints `listening on PORT` and its process is the gateway alone.

python bench/gateway_server.py --data-dir DIR --auth-keys FILE
"""

import argparse
from pathlib import Path

import uvloop

from presence.app import serve
from presence.config import load
from presence.embedded import Embedded
from presence.log import configure
from presence.migrate import migrate


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--auth-keys", required=True)
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
            },
            None,
        )
        return await serve(settings, ready=lambda app: print(f"listening on {app.gateway.port}", flush=True))


if __name__ == "__main__":
    raise SystemExit(uvloop.run(main()))
