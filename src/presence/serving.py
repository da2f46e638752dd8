"""`presence serve`: the embedded servers around the gateway where none were given, and what to do next.

Owns: the order embedded servers → schema → gateway, the state file, and the words printed when it is ready.
Knows nothing of what the gateway does once it serves.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import uvloop

from presence import app
from presence.app import App
from presence.config import Settings
from presence.data_dir import DEFAULT_AUDIENCE, DEFAULT_DATA_DIR, DataDir, State
from presence.embedded import Embedded
from presence.embedded.postgres import find_programs
from presence.errors import ConfigError
from presence.migrate import check_schema, migrate

__all__ = ["raise_descriptor_limit", "serve"]

MAX_USEFUL_DESCRIPTORS: Final = 1_048_576
EXAMPLE_TOKEN_TTL_S: Final = 86_400.0
SIGNALLED: Final = 128  # and the signal's number: what a shell shows of a program that a signal ended


def raise_descriptor_limit() -> None:
    """Takes as many descriptors as this user may have: one is an agent. Call before the settings are loaded."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_USEFUL_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_USEFUL_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def serve(settings: Settings) -> int:
    """Serves until a signal; returns the exit status. Raises ConfigError or StartError with one line."""
    if settings.nats_url and settings.database_url and not settings.auth_keys:
        raise ConfigError("auth_keys: is needed with nats_url and database_url, there is no embedded key then")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_until_signalled(settings))


async def _until_signalled(settings: Settings) -> int:
    """Serves in a task of its own, which a signal ends until the gateway listens to signals itself."""
    life, received = asyncio.create_task(_serve(settings)), list[int]()

    def interrupt(number: int) -> None:
        received.append(number)
        life.cancel()

    _on_signals(interrupt)
    await asyncio.wait({life})
    return SIGNALLED + received[0] if received and life.cancelled() else life.result()


def _on_signals(callback: Callable[[int], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, callback, number)


async def _serve(settings: Settings) -> int:
    if settings.nats_url and settings.database_url:
        await check_schema(settings.database_url)
        return await app.serve(settings)
    async with Embedded(
        settings.data_dir, nats=settings.nats_url is None, postgres=settings.database_url is None
    ) as embedded:
        own = settings.model_copy(
            update={
                "nats_url": settings.nats_url or embedded.nats_url,
                "database_url": settings.database_url or embedded.database_url,
                "auth_keys": settings.auth_keys or str(embedded.auth_keys_path),
                "api_tokens": settings.api_tokens or (embedded.api_token,),
            }
        )
        if embedded.database_url is not None:
            await migrate(embedded.database_url)
        elif settings.database_url is not None:
            await check_schema(settings.database_url)
        try:
            status = await app.serve(own, ready=partial(_on_ready, embedded, own, settings.auth_keys is None))
        finally:
            embedded.data_dir.remove_state()
            _on_signals(lambda _: embedded.hurry())  # the gateway has gone; what is left is to stop its servers
        if status == app.EXIT_KILLED:
            embedded.hurry()
    return app.EXIT_KILLED if embedded.hurried else status


def _on_ready(embedded: Embedded, settings: Settings, own_key: bool, running: App) -> None:
    data_dir = embedded.data_dir
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - read, not bound
    place = f"[{host}]" if ":" in host else host
    state = State(
        pid=os.getpid(),
        ws_url=f"ws://{place}:{running.gateway.port}/ws",
        http_url=f"http://{place}:{running.http_api.port}",
        nats_url=embedded.nats_url,
        database_url=embedded.database_url,
        subject_prefix=settings.subject_prefix,
        audience=settings.auth_audience or DEFAULT_AUDIENCE,
    )
    data_dir.write_state(state)
    with suppress(BrokenPipeError):  # serving does not depend on who reads this
        print(_next_steps(state, data_dir, settings.data_dir, own_key), flush=True)


def _next_steps(state: State, data_dir: DataDir, shown_dir: Path, own_key: bool) -> str:
    """Returns lines that can be pasted into another terminal of the same folder."""
    option = "" if shown_dir == DEFAULT_DATA_DIR else f" --data-dir {shlex.quote(str(shown_dir))}"
    command, room = _program(), data_dir.example_classroom()
    given = data_dir.mint_token("alice", [room], audience=state.audience, ttl_s=EXAMPLE_TOKEN_TTL_S) if own_key else "…"
    lines = [
        f"Presence is ready: {state.ws_url} for agents, {state.http_url} for services. Ctrl-C drains and stops it.",
        "",
        "In a second terminal, join a classroom:",
        f"  {command} join{option} --classroom {room} --token {given}",
    ]
    if own_key:
        lines += ["In a third one, as somebody else:", f"  {command} join{option} --classroom {room} --agent bob"]
    if state.nats_url:
        event = shlex.quote('{"text":"hello"}')
        lines += ["Publish an event to both:", f"  {command} publish{option} {room} chat {event}"]
    if state.database_url:
        tables = "-c 'TABLE agent_session' -c 'TABLE agent_session_history'"
        lines += ["See the rows:", f"  {_psql(data_dir)} {shlex.quote(state.database_url)} {tables}"]
    secret = shlex.quote(os.path.relpath(data_dir.api_token_path))
    url = f"{state.http_url}/api/v1/classrooms/{room}/agents"
    lines += ["Ask who is there:", f'  curl -H "Authorization: Bearer $(cat {secret})" {url}', ""]
    return "\n".join(lines)


def _program() -> str:
    """Returns how this program can be called again."""
    called = Path(sys.argv[0])
    if called.name != "presence":
        return f"{shlex.quote(sys.executable)} -m presence"
    found = shutil.which("presence")
    if found is not None and called.exists() and Path(found).samefile(called):
        return "presence"
    return shlex.quote(os.path.relpath(called))


def _psql(data_dir: DataDir) -> str:
    if shutil.which("psql"):
        return "psql"
    return shlex.quote(os.path.relpath(find_programs(data_dir.path / "postgres") / "psql"))
