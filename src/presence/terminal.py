"""The commands for a terminal beside a gateway: token, join, publish.

Owns their options and what they find in the data directory. Knows nothing of how the gateway works.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal
from uuid import UUID, uuid4

import nats
import nats.errors
import orjson
import typer

from presence.data_dir import DEFAULT_AUDIENCE, DEFAULT_DATA_DIR, DataDir, State
from presence.errors import ConfigError, StartError
from presence.join import TerminalAgent, printer

__all__ = ["COMMANDS"]

DEFAULT_WS_URL: Final = "ws://127.0.0.1:8080/ws"
DEFAULT_NATS_URL: Final = "nats://127.0.0.1:4222"
DEFAULT_SUBJECT_PREFIX: Final = "classrooms"
CONNECT_TIMEOUT_S: Final = 5
REFRESH_PART: Final = 0.8  # of a token's life

_KIND = re.compile(r"[^\s.*>\x00-\x1f\x7f]{1,200}")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,200}")

DataDirOption = Annotated[
    Path, typer.Option("--data-dir", envvar="PRESENCE_DATA_DIR", help="Folder of the gateway's data and keys.")
]
LabelOption = Annotated[str, typer.Option(help="First part of the agent's identity: what it connects with.")]
TtlOption = Annotated[float, typer.Option(metavar="SECONDS", min=1, help="How long a token is good for.")]


def token(
    *,
    classroom: Annotated[list[str], typer.Option(metavar="UUID", help="May be given several times; '*' for all.")],
    agent: Annotated[str, typer.Option(help="Name of the agent: the token's subject.")],
    label: LabelOption = "web",
    ttl: TtlOption = 3600.0,
    audience: Annotated[str | None, typer.Option(help="The token's audience. Default: the gateway's.")] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
) -> None:
    """Print a token for the key of the embedded gateway."""
    folder = DataDir(data_dir)
    identity_label = _checked("--label", label, _LABEL)
    chosen = audience or _audience(folder.read_state())
    text = folder.mint_token(
        _checked("--agent", agent, _NAME),
        _classrooms(classroom),
        audience=_checked("--audience", chosen, _NAME),
        ttl_s=ttl,
    )
    print(text, flush=True)
    if sys.stdout.isatty():
        until = datetime.fromtimestamp(datetime.now().timestamp() + ttl).strftime("%H:%M:%S")
        print(f"# {identity_label}.{agent}.{chosen}, until {until}", file=sys.stderr)


def join(
    *,
    classroom: Annotated[str | None, typer.Option(metavar="UUID", help="Default: the example classroom.")] = None,
    agent: Annotated[str | None, typer.Option(help="Name of the agent, for a token made here.")] = None,
    label: LabelOption = "web",
    token: Annotated[
        str | None, typer.Option(envvar="PRESENCE_TOKEN", help="Default: one made with the embedded gateway's key.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help=f"Default: the gateway of the data folder, or {DEFAULT_WS_URL}.")
    ] = None,
    ttl: TtlOption = 3600.0,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
) -> int:
    """Join a classroom and print what happens there, until Ctrl-C."""
    folder = DataDir(data_dir)
    state = folder.read_state()
    room = folder.example_classroom() if classroom is None else _uuid("--classroom", classroom)
    _checked("--label", label, _LABEL)
    target = url or (state.ws_url if state else DEFAULT_WS_URL)
    if not target.startswith(("ws://", "wss://")):
        raise ConfigError(f"--url {target!r}: must start with ws:// or wss://")
    if token is not None:
        terminal_agent = TerminalAgent(target, room, label, lambda: token, printer())
    elif agent is None:
        raise ConfigError("give --agent NAME, or a --token")
    else:
        name = _checked("--agent", agent, _NAME)

        def make_token() -> str:
            return folder.mint_token(name, [room], audience=_audience(state), ttl_s=ttl)

        make_token()  # a key that is missing is told now, not in the middle
        terminal_agent = TerminalAgent(target, room, label, make_token, printer(), refresh_every_s=ttl * REFRESH_PART)
    return asyncio.run(_until_interrupted(terminal_agent))


def publish(
    *,
    classroom: Annotated[str, typer.Argument(metavar="CLASSROOM", help="Id of the classroom.")],
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Kind of the event: one word, such as chat.")],
    payload: Annotated[str, typer.Argument(metavar="JSON", help="The event itself.")],
    sender: Annotated[str | None, typer.Option(help="Identity of the agent who sends it: not echoed to it.")] = None,
    receiver: Annotated[str | None, typer.Option(help="Identity of the only agent who gets it.")] = None,
    nats_url: Annotated[
        str | None, typer.Option(envvar="PRESENCE_NATS_URL", help="Default: the gateway's own NATS server.")
    ] = None,
    subject_prefix: Annotated[
        str | None, typer.Option(envvar="PRESENCE_SUBJECT_PREFIX", help="First part of the subject.")
    ] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
) -> None:
    """Publish an event to a classroom over NATS."""
    room, state = _uuid("CLASSROOM", classroom), DataDir(data_dir).read_state()
    try:
        orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"JSON: {error}") from None
    headers = {"Nats-Msg-Id": str(uuid4())}
    if sender is not None:
        headers["Sender-Agent-Id"] = _checked("--sender", sender, _NAME)
    if receiver is not None:
        headers["Receiver-Agent-Id"] = _checked("--receiver", receiver, _NAME)
    prefix = subject_prefix or (state.subject_prefix if state else DEFAULT_SUBJECT_PREFIX)
    subject = f"{prefix}.{room}.{_checked('KIND', kind, _KIND)}"
    server = nats_url or (state and state.nats_url) or DEFAULT_NATS_URL
    asyncio.run(_publish(server, subject, payload.encode(), headers))
    print(f"published {subject} ({len(payload.encode())} bytes)", flush=True)


COMMANDS: Final = (token, join, publish)


async def _until_interrupted(agent: TerminalAgent) -> int:
    life = asyncio.create_task(agent.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, life.cancel)
    await asyncio.wait({life})
    return 0 if life.cancelled() else life.result()


async def _publish(server: str, subject: str, payload: bytes, headers: dict[str, str]) -> None:
    async def ignore(_: Exception) -> None:
        return  # it is raised as well, where it can be told

    place = server.rpartition("@")[2]
    try:
        connection = await nats.connect(
            server, allow_reconnect=False, connect_timeout=CONNECT_TIMEOUT_S, error_cb=ignore, name="presence publish"
        )
    except (OSError, nats.errors.Error, TimeoutError) as error:
        raise StartError(f"cannot connect to NATS at {place}: {error or type(error).__name__}") from None
    try:
        await connection.publish(subject, payload, headers=headers)
        await connection.flush(CONNECT_TIMEOUT_S)
    except (OSError, nats.errors.Error, TimeoutError) as error:
        raise StartError(f"NATS at {place} did not take it: {error or type(error).__name__}") from None
    finally:
        await connection.close()


def _audience(state: State | None) -> str:
    return state.audience if state else DEFAULT_AUDIENCE


def _classrooms(names: list[str]) -> list[UUID] | Literal["*"]:
    return "*" if "*" in names else [_uuid("--classroom", name) for name in names]


def _uuid(option: str, text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r}: is not a UUID") from None


def _checked(option: str, text: str, form: re.Pattern[str]) -> str:
    if form.fullmatch(text) is None:
        raise ConfigError(f"{option} {text!r}: has characters that cannot be used there, or the wrong length")
    return text
