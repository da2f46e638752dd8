"""The commands for a terminal beside a gateway: token, join, publish.

Owns their options and what they find in the data directory. Knows nothing of how the gateway works.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import nats
import nats.errors
import orjson
import typer
from pydantic import TypeAdapter, ValidationError

from presence.data_dir import DEFAULT_AUDIENCE, DEFAULT_DATA_DIR, DataDir, State
from presence.errors import ConfigError, StartError
from presence.join import TerminalAgent, printer
from presence.setting_types import NatsUrl, SubjectPrefix

__all__ = ["COMMANDS"]

DEFAULT_WS_URL: Final = "ws://127.0.0.1:8080/ws"
DEFAULT_NATS_URL: Final = "nats://127.0.0.1:4222"
DEFAULT_SUBJECT_PREFIX: Final = "classrooms"
CONNECT_TIMEOUT_S: Final = 5
RECONNECT_WAIT_S: Final = 0.2
REFRESH_PART: Final = 0.8  # of a token's life
MAX_TTL_S: Final = 10 * 365 * 86_400.0

# Surrogates stand for bytes of the command line that are not UTF-8.
_KIND = re.compile(r"[^\s.*>\x00-\x1f\x7f\ud800-\udfff]{1,200}")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[^\s\x00-\x1f\x7f\ud800-\udfff]{1,200}")

DataDirOption = Annotated[
    Path, typer.Option("--data-dir", envvar="PRESENCE_DATA_DIR", help="Folder of the gateway's data and keys.")
]
LabelOption = Annotated[str, typer.Option(help="First part of the agent's identity: what it connects with.")]


def _ttl(value: float) -> float:
    if math.isnan(value):  # no bound refuses it
        raise typer.BadParameter("is not a number")
    return value


TtlOption = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=1, max=MAX_TTL_S, callback=_ttl, help="How long a token is good for."),
]


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
    if url is not None:
        _check_ws_url(url)

    def find_url() -> str:  # asked again each time: a gateway that was started anew may have another port
        now = None if url else folder.read_state()
        return url or (now.ws_url if now else state.ws_url if state else DEFAULT_WS_URL)

    if token is not None:
        terminal_agent = TerminalAgent(find_url, room, label, lambda: token, printer())
    elif agent is None:
        raise ConfigError("give --agent NAME, or a --token")
    else:
        name = _checked("--agent", agent, _NAME)

        def make_token() -> str:
            return folder.mint_token(name, [room], audience=_audience(state), ttl_s=ttl)

        make_token()  # a key that is missing is told now, not in the middle
        terminal_agent = TerminalAgent(find_url, room, label, make_token, printer(), refresh_every_s=ttl * REFRESH_PART)
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
    prefix = state.subject_prefix if state else DEFAULT_SUBJECT_PREFIX
    if subject_prefix:
        prefix = _setting("--subject-prefix", TypeAdapter(SubjectPrefix), subject_prefix)
    subject = f"{prefix}.{room}.{_checked('KIND', kind, _KIND)}"
    server = _setting("--nats-url", TypeAdapter(NatsUrl), nats_url) if nats_url else _nats_url_of(state)
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
    last: list[Exception] = []

    async def keep(error: Exception) -> None:
        last[:] = [error]

    servers = [url.strip() for url in server.split(",")]
    place = ", ".join(urlsplit(url).netloc.rpartition("@")[2] for url in servers)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await nats.connect(
                servers,
                name="presence publish",
                allow_reconnect=False,
                max_reconnect_attempts=1,  # otherwise it tries sixty times to make the first connection
                reconnect_time_wait=RECONNECT_WAIT_S,
                connect_timeout=CONNECT_TIMEOUT_S,
                error_cb=keep,
            )
    except (OSError, nats.errors.Error, TimeoutError) as error:
        # What nats-py raises in the end is only that no server is left.
        why = last[0] if last else error
        words = "it does not answer" if isinstance(why, TimeoutError) else _words_of(why)
        raise StartError(f"cannot connect to NATS at {place}: {words}") from None
    try:
        await connection.publish(subject, payload, headers=headers)
        await connection.flush(CONNECT_TIMEOUT_S)
    except (OSError, nats.errors.Error, TimeoutError) as error:
        raise StartError(f"NATS at {place} did not take it: {_words_of(error)}") from None
    finally:
        await connection.close()


def _words_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _nats_url_of(state: State | None) -> str:
    if state is not None and state.nats_url is None:
        raise ConfigError("give --nats-url: the NATS server of this gateway is not an embedded one")
    return state.nats_url if state and state.nats_url else DEFAULT_NATS_URL


def _setting(option: str, adapter: TypeAdapter[str], text: str) -> str:
    """Returns the text if the setting of this type can hold it; it is not shown, it may have a password."""
    try:
        return adapter.validate_python(text)
    except ValidationError as error:
        raise ConfigError(f"{option}: {error.errors()[0]['msg']}") from None


def _check_ws_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("ws", "wss") and bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url or "#" in url:
        raise ConfigError("--url: must look like ws://host:8080/ws or wss://host/ws")


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
