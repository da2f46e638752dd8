"""One shard of the swarm as a process: orders on stdin, a report on stdout every half second.

Owns a Swarm, its agents' tokens, and the measure of its own CPU. Knows nothing of locust, scenarios or servers.

    python -m loadtest.swarm_process CAPACITY SEED DATA_DIR
"""

from __future__ import annotations

import json
import select
import sys
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization

from loadtest.lines import answer_with, say
from presence.data_dir import DEFAULT_AUDIENCE, DataDir
from presence_swarm import swarm

REPORT_EVERY_S = 0.5
SLICE_MS = 50.0  # of running, between two looks at the orders
TOKEN_TTL_S = 4 * 3600


class Shard:
    def __init__(self, capacity: int, seed: int, data_dir: Path) -> None:
        self.swarm = swarm.Swarm(capacity, seed)
        self.seed = seed
        pem = DataDir(data_dir).signing_key_path.read_bytes()
        self.key = serialization.load_pem_private_key(pem, password=None)
        self._reported = (time.monotonic(), time.process_time())

    def request(self, name: str, classroom_id: str) -> bytes:
        claims = {
            "sub": name,
            "aud": DEFAULT_AUDIENCE,
            "exp": int(time.time()) + TOKEN_TTL_S,
            "classrooms": [classroom_id],
        }
        token = jwt.encode(claims, self.key, "ES256")  # type: ignore[arg-type]
        payload = {"token": token, "classroom_id": classroom_id, "agent_label": "swarm"}
        return json.dumps({"type": "connect_request", "payload": payload}, separators=(",", ":")).encode()

    def add(self, order: dict[str, Any]) -> int:
        """Agents into rooms, one after the other, spread evenly over their time to arrive. They arrive with `go`."""
        rooms = [str(uuid.UUID(room)) for room in order["rooms"]]
        count = order["count"]
        requests = [self.request(f"{order['name']}-{self.seed}-{i}", rooms[i % len(rooms)]) for i in range(count)]
        step_ms = order["over_s"] * 1000 / max(1, count)
        for i, request in enumerate(requests):
            self.swarm.add(request, i * step_ms, order["group"], order["behaviour"])
        return len(self.swarm)

    def obey(self, order: dict[str, Any]) -> Any:
        if order["do"] == "add":
            return self.add(order)
        if order["do"] == "targets":
            return self.swarm.set_targets(order["ports"])
        if order["do"] == "connect":
            return self.swarm.connect(order["window"])
        if order["do"] == "leave":
            return self.swarm.leave()
        if order["do"] == "gauges":
            return self.swarm.gauges()
        raise ValueError(order["do"])

    def report(self) -> None:
        now, cpu_s = time.monotonic(), time.process_time()
        before, cpu_before_s = self._reported
        self._reported = (now, cpu_s)
        say(
            {
                "at_ns": swarm.now_ns(),
                "took_s": now - before,
                "cpu_s": cpu_s - cpu_before_s,
                "gauges": self.swarm.gauges(),
                **self.swarm.take(),
            }
        )

    def serve(self) -> None:
        """Run and obey, until stdin is closed."""
        next_report = time.monotonic() + REPORT_EVERY_S
        orders = open(sys.stdin.fileno(), "rb", buffering=0)  # noqa: SIM115 - unbuffered, so that select knows
        while True:
            self.swarm.run(SLICE_MS)
            while select.select([sys.stdin], [], [], 0)[0]:
                line = orders.readline()
                if not line:
                    return
                answer_with(partial(self.obey, json.loads(line)))
            if time.monotonic() >= next_report:
                next_report += REPORT_EVERY_S
                self.report()


if __name__ == "__main__":
    capacity, seed, data_dir = sys.argv[1:]
    Shard(int(capacity), int(seed), Path(data_dir)).serve()
