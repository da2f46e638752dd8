"""`presence serve` with nothing given: what a user sees in the first minutes, and what no signal leaves behind."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import httpx
import psutil
import pytest

from presence.embedded.nats import Nats
from presence.embedded.postgres import Postgres
from processes import PROGRAM, Shell, servers_of, shell_in
from servers import free_port, process_is_alive, temporary_folder
from waiting import eventually, within

# Told at once to come back soon: tests need not wait for the spread of a crowd.
SOON = {"PRESENCE_RECONNECT_SPREAD_S": "0.1"}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One folder for the tests that need no fresh one: its cluster is made once."""
    made = temporary_folder("embedded")
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
async def shell(folder: Path) -> AsyncIterator[Shell]:
    async with shell_in(folder) as it:
        yield it


async def rows(url: str, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        found: list[asyncpg.Record] = await connection.fetch(query)
        return found
    finally:
        await connection.close()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_signal_during_the_start_leaves_nothing(number: signal.Signals, status: int, shell: Shell) -> None:
    """The first of these tests to run: the folder is still empty, and it is the making of the cluster that ends."""
    gateway = await shell.start("serve", "--port", "0", "--http-port", "0")
    await eventually(lambda: len(servers_of(shell.folder)) >= 2, 10)
    gateway.signal(number)
    assert await gateway.status() == status
    assert servers_of(shell.folder) == []
    assert gateway.out == []
    assert [line for line in gateway.err if not line.startswith("{")] == []


async def test_a_first_evening(shell: Shell) -> None:
    """Serve, and paste what it prints into other terminals: two agents meet, hear an event, and one leaves."""
    gateway = await shell.serve(env={"PRESENCE_DRAIN_TIMEOUT_S": "0.2"})
    await gateway.says("curl")
    pasted = [line for line in gateway.out if line.startswith("  ")]
    alice_line, bob_line, publish_line, psql_line, curl_line = pasted
    state = shell.state()

    alice = await shell.paste(alice_line)
    await alice.says("connected as web.alice.presence")
    bob = await shell.paste(bob_line)
    await bob.says("connected as web.bob.presence")
    await alice.says("agent.enter web.bob.presence")
    publishing = await shell.paste(publish_line)
    assert await publishing.status() == 0
    assert publishing.out[0].endswith(".chat (16 bytes)")
    await asyncio.gather(*(agent.says('chat {"text":"hello"}') for agent in (alice, bob)))

    (publishing_words,) = publishing.out
    here = f"WHERE classroom_id = '{publishing_words.split('.')[1]}'"
    live = await rows(state["database_url"], f"SELECT agent_id FROM agent_session {here} ORDER BY id")
    assert [row["agent_id"] for row in live] == ["web.alice.presence", "web.bob.presence"]
    psql = await shell.paste(psql_line)
    assert await psql.status() == 0, psql.err
    assert any("web.alice.presence" in line for line in psql.out)
    if shutil.which("curl"):
        curl = await shell.paste(curl_line)
        assert await curl.status() == 0
        assert [row["agent_id"] for row in json.loads("".join(curl.out))] == ["web.alice.presence", "web.bob.presence"]

    bob.signal(signal.SIGINT)
    assert await bob.status() == 0
    await alice.says("agent.leave web.bob.presence")
    (gone,) = await eventually(
        lambda: rows(
            state["database_url"], f"SELECT agent_id, upper(lifetime) AS ended FROM agent_session_history {here}"
        )
    )
    assert gone["agent_id"] == "web.bob.presence"
    assert gone["ended"] is not None

    assert len(servers_of(shell.folder)) == 2
    gateway.signal(signal.SIGTERM)
    await alice.says("terminated: ")
    assert await gateway.status() == 0
    assert servers_of(shell.folder) == []
    assert not (shell.folder / ".presence" / "state.json").exists()
    events = [line["event"] for line in gateway.logged()]
    assert (events[0], "drain_finished" in events) == ("serving", True)
    await alice.says("reconnecting in ")
    alice.signal(signal.SIGINT)
    assert await alice.status() == 0
    assert alice.err == bob.err == []


async def test_after_a_kill_nothing_is_left_and_the_same_is_served_again(shell: Shell) -> None:
    gateway = await shell.serve(env=SOON)
    status, (token,), _ = await shell.run("token", "--classroom", "*", "--agent", "carol")
    assert status == 0
    room = str(uuid.uuid4())
    carol = await shell.start("join", "--classroom", room, "--token", token)
    await carol.says("connected as web.carol.presence")
    before = shell.state()

    gateway.process.kill()
    assert await gateway.status() == -signal.SIGKILL
    await eventually(lambda: not servers_of(shell.folder), 10)
    assert (shell.folder / ".presence" / "state.json").exists()
    # The agent finds the new gateway by itself, on its new port, with the token that it had.
    await shell.serve(env=SOON)
    assert shell.state()["ws_url"] != before["ws_url"]
    await eventually(lambda: sum("connected as web.carol" in line for line in carol.out) == 2, 20)
    url = shell.state()["database_url"]
    seen = await rows(url, f"SELECT id FROM agent_session WHERE classroom_id = '{room}'")
    assert len(seen) == 1
    assert (await shell.run("publish", room, "chat", "[1, 2]"))[0] == 0
    await carol.says("chat [1,2]")


async def test_a_second_gateway_is_told_who_serves_and_a_second_signal_ends_the_first_at_once(shell: Shell) -> None:
    gateway = await shell.serve(env={"PRESENCE_DRAIN_TIMEOUT_S": "600", "PRESENCE_RECONNECT_SPREAD_S": "600"})
    status, out, err = await shell.run("serve", "--port", "0", "--http-port", "0")
    assert (status, out) == (1, [])
    assert err == [f"presence: {shell.folder / '.presence'} is already served by process {gateway.process.pid}"]
    agent = await shell.start("join", "--agent", "alice")
    await agent.says("connected")  # the first one goes on
    gateway.signal(signal.SIGTERM)
    await agent.says("terminated: ")
    assert gateway.process.returncode is None
    gateway.signal(signal.SIGTERM)
    assert await gateway.status(5.0) == 130
    await eventually(lambda: not servers_of(shell.folder))


async def test_a_second_signal_does_not_wait_for_a_server_that_is_stuck(shell: Shell) -> None:
    gateway = await shell.serve()
    (postgres,) = [server for server in servers_of(shell.folder) if server.name() == "postgres"]
    postgres.suspend()
    gateway.signal(signal.SIGTERM)
    await eventually(lambda: any('"drain_finished"' in line for line in gateway.err), 15)
    await eventually(lambda: len(servers_of(shell.folder)) == 1)  # NATS has ended; the other one never would
    assert gateway.process.returncode is None
    gateway.signal(signal.SIGTERM)
    assert await gateway.status(8.0) == 130
    assert servers_of(shell.folder) == []


async def test_a_port_that_is_taken_is_one_line_and_leaves_no_server(shell: Shell) -> None:
    taken = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    async with taken:
        port = str(taken.sockets[0].getsockname()[1])
        status, out, err = await shell.run("serve", "--port", "0", "--http-port", port)
    assert (status, out) == (1, [])
    assert err[-1] == f"presence: cannot listen for HTTP on 127.0.0.1 port {port}: Address already in use"
    assert [line for line in err[:-1] if not line.startswith("{")] == []
    assert servers_of(shell.folder) == []
    assert not (shell.folder / ".presence" / "state.json").exists()


async def test_a_nats_that_does_not_answer_is_one_line_and_leaves_no_server(shell: Shell) -> None:
    url = f"nats://user:hunter2@127.0.0.1:{free_port()}"
    status, out, err = await shell.run("serve", "--port", "0", "--http-port", "0", "--nats-url", url)
    assert (status, out) == (1, [])
    assert err[-1].startswith("presence: NATS cannot be reached")
    assert [line for line in err[:-1] if not line.startswith("{")] == []
    assert "hunter2" not in " ".join(err)
    assert servers_of(shell.folder) == []


async def test_who_does_not_read_what_it_prints_does_not_stop_it(shell: Shell) -> None:
    line = f"{PROGRAM} serve --port 0 --http-port 0 | true; echo gone"
    command = await shell.paste(f"/bin/sh -c {line!r}")
    state = shell.folder / ".presence" / "state.json"
    await eventually(state.exists, 20)
    gateway = psutil.Process(json.loads(state.read_text())["pid"])
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(shell.state()["http_url"] + "/healthz")).status_code == 200
    gateway.terminate()
    await command.says("gone", 20)
    await eventually(lambda: not servers_of(shell.folder))
    assert [line for line in command.err if not line.startswith("{")] == []


# --- servers that outlive their gateway, as they do where nothing ends them with it


async def test_a_nats_server_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    first, second = Nats(tmp_path), Nats(tmp_path)
    try:
        await within(first.start())
        (left,) = servers_of(tmp_path)
        await within(second.start())
        assert not process_is_alive(left.pid)
        assert len(servers_of(tmp_path)) == 1
    finally:
        await first.stop()
        await second.stop()
    assert servers_of(tmp_path) == []


async def test_a_postgres_that_was_left_behind_is_replaced_and_keeps_its_data(folder: Path) -> None:
    data_dir = folder / ".presence"
    first, second = Postgres(data_dir), Postgres(data_dir)
    try:
        await within(first.start(), 60)
        await rows(first.url, "CREATE TABLE kept AS SELECT 3 AS number")
        (left,) = servers_of(folder)
        await within(second.start(), 60)
        assert not process_is_alive(left.pid)
        assert [row["number"] for row in await rows(second.url, "SELECT number FROM kept")] == [3]
        await rows(second.url, "DROP TABLE kept")
    finally:
        await first.stop()
        await second.stop()
    assert servers_of(folder) == []


async def test_any_name_will_do_for_the_folder(folder: Path) -> None:
    """A comma separates hosts in a URL, and a socket's path has its bounds: the data moves, the server serves them."""
    for name in ('a folder, for Zoë\'s "own"', "x" * 120):
        moved = folder / name
        (folder / ".presence").rename(moved)
        server = Postgres(moved)
        try:
            await within(server.start(), 60)
            assert [row["one"] for row in await rows(server.url, "SELECT 1 AS one")] == [1]
        finally:
            await server.stop()
            moved.rename(folder / ".presence")


async def test_a_process_that_only_has_the_number_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    bystander = await asyncio.create_subprocess_exec("sleep", "60")
    server = Nats(tmp_path)
    try:
        (tmp_path / "nats" / "nats.pid").write_text(f"{bystander.pid}\n")
        await within(server.start())
        assert process_is_alive(bystander.pid)
    finally:
        await server.stop()
        bystander.kill()
        await bystander.wait()
