"""What tests of the HTTP port share: requests, and rows to list."""

from __future__ import annotations

import uuid

import httpx
from running import API_TOKEN, Running

from waiting import within

AUTHORIZATION = f"Authorization: Bearer {API_TOKEN}\r\n"
BAD_REQUEST_BYTES = 1_000  # a refusal is shorter than this


def agents_path(gateway: Running, query: str = "") -> str:
    return f"/api/v1/classrooms/{gateway.classroom_id}/agents{query}"


async def post(gateway: Running, body: bytes, authorization: str | None = f"Bearer {API_TOKEN}") -> httpx.Response:
    """These bytes to the counters, as JSON."""
    url = f"http://127.0.0.1:{gateway.app.http_api.port}/api/v1/counters/agent"
    headers = {"Content-Type": "application/json", **({"Authorization": authorization} if authorization else {})}
    async with httpx.AsyncClient(trust_env=False) as client:
        return await within(client.post(url, content=body, headers=headers))


async def status_of(gateway: Running, path: str) -> int:
    return (await gateway.http("GET", path, token=None)).status_code


async def insert_sessions(gateway: Running, count: int, classroom_id: str) -> None:
    await gateway.database.execute(
        "INSERT INTO agent_session (agent_id, classroom_id, replica_id, started_at)"
        " SELECT 'web.agent-' || n || '.presence', $1, $2, now() FROM generate_series(1, $3::int) n",
        uuid.UUID(classroom_id),
        gateway.app.replica_id,
        count,
    )
