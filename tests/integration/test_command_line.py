"""The commands as real processes over servers that are given: what cannot be done is one line, and what is done ends well."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from running import Signer

from processes import PROGRAM, Shell, environment, servers_of, shell_in
from servers import PostgresDatabase, free_port
from waiting import eventually, within

ROOM = "0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10"


@pytest.fixture
async def shell(tmp_path: Path) -> AsyncIterator[Shell]:
    async with shell_in(tmp_path) as it:
        yield it


@pytest.fixture
def empty_database_url(postgres: PostgresDatabase) -> Iterator[str]:
    url = postgres.create()
    yield url
    postgres.drop(url)


def settings(shell: Shell, nats_url: str, database_url: str) -> dict[str, str]:
    return {
        "PRESENCE_PORT": "0",
        "PRESENCE_HTTP_PORT": "0",
        "PRESENCE_NATS_URL": nats_url,
        "PRESENCE_DATABASE_URL": database_url,
        "PRESENCE_AUTH_KEYS": str(Signer(shell.folder).path),
        "PRESENCE_DRAIN_TIMEOUT_S": "0.2",
    }


async def failed(shell: Shell, *arguments: str, env: dict[str, str], status: int = 1) -> str:
    """The one line of a command that must not succeed; log lines before it are JSON."""
    found, out, err = await shell.run(*arguments, env=env)
    assert (found, out) == (status, [])
    assert [line for line in err[:-1] if not line.startswith("{")] == []
    assert "hunter2" not in " ".join(err)
    return err[-1]


async def test_a_database_that_does_not_answer_leaves_no_server(shell: Shell) -> None:
    """NATS is an embedded one here: it has been started by then."""
    port = free_port()
    env = settings(shell, "", f"postgresql://user:hunter2@127.0.0.1:{port}/database")
    line = f"presence: the database at 127.0.0.1:{port} cannot be used: Connection refused"
    assert await failed(shell, "serve", env=env) == line
    assert (shell.folder / ".presence" / "nats.log").exists()
    assert servers_of(shell.folder) == []


async def test_a_database_that_is_not_there(shell: Shell, nats_url: str, postgres_url: str) -> None:
    url = postgres_url.rpartition("/")[0] + "/nothing"
    line = await failed(shell, "serve", env=settings(shell, nats_url, url))
    assert line.endswith('cannot be used: database "nothing" does not exist')


async def test_publishing_where_no_nats_answers(shell: Shell) -> None:
    place = f"127.0.0.1:{free_port()}"
    env = {"PRESENCE_NATS_URL": f"nats://user:hunter2@{place},nats://user:hunter2@{place}"}
    line = f"presence: cannot connect to NATS at {place}, {place}: Connection refused"
    assert await failed(shell, "publish", ROOM, "chat", "1", env=env) == line


async def test_a_port_that_is_taken(shell: Shell, nats_url: str, database_url: str) -> None:
    taken = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    async with taken:
        port = str(taken.sockets[0].getsockname()[1])
        env = settings(shell, nats_url, database_url)
        line = await failed(shell, "serve", "--port", port, env=env)
    assert line == f"presence: cannot listen for agents on 127.0.0.1 port {port}: Address already in use"


async def test_keys_are_needed_where_nothing_is_embedded(shell: Shell, nats_url: str, database_url: str) -> None:
    env = settings(shell, nats_url, database_url) | {"PRESENCE_AUTH_KEYS": ""}
    line = await failed(shell, "serve", env=env, status=2)
    assert line.startswith("presence: auth_keys: is needed with nats_url and database_url")
    assert list(shell.folder.iterdir()) == [shell.folder / "jwks.json"]


async def test_the_schema_is_asked_for_then_made_then_served(
    shell: Shell, nats_url: str, empty_database_url: str
) -> None:
    env = settings(shell, nats_url, empty_database_url)
    line = "presence: the database schema is not there: run `presence migrate` first"
    assert await failed(shell, "serve", env=env) == line
    first = await asyncio.gather(*(shell.run("migrate", env=env) for _ in range(2)))  # several at once
    assert [status for status, _, _ in first] == [0, 0]
    assert sorted(out for _, out, _ in first) == [["applied 0001"], ["nothing to do"]]

    port = free_port()
    (shell.folder / "presence.toml").write_text(f"http_port = 1\nport = {port}\nlog_level = 'debug'\n")
    gateway = await shell.start("serve", "--config", "presence.toml", env={**env, "PRESENCE_PORT": ""})
    await eventually(lambda: any('"serving"' in line for line in gateway.err), 15)
    (serving,) = [line for line in gateway.logged() if line["event"] == "serving"]
    assert serving["port"] == port  # from the file
    assert serving["http_port"] not in (1, 8081)  # 0 from the environment: a free one
    gateway.signal(signal.SIGTERM)
    assert await gateway.status() == 0
    assert gateway.logged()[-1]["level"] in ("debug", "info")
    assert not (shell.folder / ".presence").exists()


async def test_closed_streams_do_not_stop_it(shell: Shell, nats_url: str, database_url: str) -> None:
    """As some supervisors start their programs; the next descriptors must not be taken for stdout and stderr."""
    port = free_port()
    env = settings(shell, nats_url, database_url) | {"PRESENCE_HTTP_PORT": str(port)}
    words = ["/bin/sh", "-c", f"exec {PROGRAM} serve <&- >&- 2>&-"]
    process = await asyncio.create_subprocess_exec(*words, cwd=shell.folder, env=environment() | env)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

            async def is_ready() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return (await client.get("/readyz")).status_code == 200
                return False

            await eventually(is_ready, 15)
        for number in range(3):
            assert Path(f"/proc/{process.pid}/fd/{number}").readlink() == Path(os.devnull)
        process.terminate()
        assert await within(process.wait(), 15) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_nobody_reads_the_output(shell: Shell) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = await asyncio.create_subprocess_exec(
        str(PROGRAM), "serve", "--help", cwd=shell.folder, stdout=writer, stderr=asyncio.subprocess.PIPE
    )
    os.close(writer)
    _, err = await within(process.communicate(), 15)
    assert (process.returncode, err) == (1, b"")


async def test_a_command_that_needs_a_key_says_where_to_get_one(shell: Shell) -> None:
    folder = shell.folder / ".presence"
    line = f"presence: there is no signing-key.pem in {folder}: run `presence serve` there first, or give --data-dir"
    assert await failed(shell, "token", "--classroom", ROOM, "--agent", "alice", env={}) == line
