"""The settings: one typed class. Flags win over `PRESENCE_*` variables, those over a TOML file, that over defaults.

Owns: the name, type, default and explanation of every setting, and the one line that says what is wrong with a value.
Knows nothing of what the settings are used for, and reads no file but the TOML file that it is given.
"""

from __future__ import annotations

import os
import resource
import socket
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from presence.errors import ConfigError
from presence.log import redact_text
from presence.setting_types import (
    Algorithms,
    ApiTokens,
    AuthKeys,
    Bytes,
    Count,
    DatabaseUrl,
    Folder,
    Host,
    HttpUrl,
    Label,
    NatsUrl,
    Origins,
    Port,
    Rate,
    Seconds,
    SubjectPrefix,
    refusal,
)

__all__ = ["ENV_PREFIX", "Settings", "descriptor_limit", "env_name", "load"]

ENV_PREFIX = "PRESENCE_"

# Never shown in a message or a repr: they hold credentials, or may.
SECRETS = frozenset({"api_tokens", "auth_keys", "authorization_url", "database_url", "nats_url"})

# What the process opens beside the agents' sockets: listeners, database pool, NATS, HTTP clients, handshakes in flight.
MIN_SPARE_DESCRIPTORS = 64
MAX_SPARE_DESCRIPTORS = 1_280
MAX_DEFAULT_CONNECTIONS = 250_000

MAX_SHOWN_CHARACTERS = 80


def descriptor_limit() -> int:
    """Returns how many descriptors this process may have open now (the soft limit)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 2**31 - 1


def _default_max_connections() -> int:
    limit = descriptor_limit()
    spare = max(MIN_SPARE_DESCRIPTORS, min(MAX_SPARE_DESCRIPTORS, limit // 8))
    return max(1, min(limit - spare, MAX_DEFAULT_CONNECTIONS))


class Settings(BaseSettings):
    """Every setting of the gateway. Durations are in seconds and accept fractions; lists are comma separated."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_ignore_empty=True, validate_default=False
    )

    # Where it listens
    host: Host = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: Port = Field(8080, description="Port for agents: GET /ws. 0 picks a free one.")
    http_port: Port = Field(
        8081, description="Port for services and operators: health, metrics, API. 0 picks a free one."
    )

    # What it stands on
    nats_url: NatsUrl | None = Field(
        None,
        repr=False,
        description="NATS servers, as nats://host:4222. Unset: an embedded nats-server is started.",
    )
    database_url: DatabaseUrl | None = Field(
        None,
        repr=False,
        description="PostgreSQL, as postgresql://user@host:5432/database. Unset: an embedded one is started.",
    )
    data_dir: Folder = Field(Path(".presence"), description="Folder of the embedded servers' data and keys.")
    replica_label: Label = Field(
        default_factory=socket.gethostname, description="Name of this replica for humans. Default: the host's name."
    )
    subject_prefix: SubjectPrefix = Field("classrooms", description="First part of the NATS subjects of classrooms.")

    # Deadlines
    auth_timeout_s: Seconds = Field(10.0, description="Time for a new connection to send its connect_request.")
    ping_interval_s: Seconds = Field(30.0, description="Time between two pings to an agent.")
    pong_timeout_s: Seconds = Field(5.0, description="Time to answer a ping; less than the ping interval.")
    close_timeout_s: Seconds = Field(2.0, description="Time for the other side to answer a close frame.")
    connect_timeout_s: Seconds = Field(
        10.0, description="Time to serve a connect_request, waiting for its turn included; past it: unavailable."
    )
    drain_timeout_s: Seconds = Field(10.0, description="Time that agents have to move away after SIGTERM.")
    reconnect_spread_s: Seconds = Field(5.0, description="Agents are told to reconnect at random within this time.")
    lease_ttl_s: Seconds = Field(15.0, description="A replica without a heartbeat for this long is swept by others.")

    # Who may come in
    auth_keys: AuthKeys | None = Field(
        None,
        repr=False,
        description="Path or URL of a JWK Set, or path of a PEM public key. Default: the embedded servers' own key.",
    )
    auth_algorithms: Algorithms = Field(
        ("ES256", "RS256", "EdDSA"), description="Signature algorithms that tokens may use; asymmetric ones only."
    )
    auth_audience: Label | None = Field(None, description="Audience that tokens must name. Unset: any single one.")
    authorization: Literal["claim", "webhook", "open"] = Field(
        "claim", description="Who may enter a classroom: by the token's classrooms claim, by a webhook, or everyone."
    )
    authorization_url: HttpUrl | None = Field(
        None, repr=False, description="Where the webhook is; needed with --authorization webhook."
    )
    allowed_origins: Origins = Field(
        (), description="Origins that browsers may connect from, or *. Default: this host's own pages only."
    )
    api_tokens: ApiTokens = Field(
        (), repr=False, description="Secrets of which the API wants one as a Bearer token. Default: the embedded one."
    )

    # Bounds
    max_connections: Count = Field(
        default_factory=_default_max_connections,
        description="Sockets at once. Default: the descriptor limit less what else needs one.",
    )
    max_handshakes: Count = Field(1_024, description="HTTP upgrades in flight at once.")
    max_connects_in_flight: Count = Field(512, description="connect_requests being served at once.")
    max_message_bytes: Bytes = Field(65_536, description="Largest message of an agent.")
    max_backlog_bytes: Bytes = Field(262_144, description="Unsent bytes of one agent before it is a slow consumer.")
    max_room_queue_bytes: Bytes = Field(8_388_608, description="Events of one classroom that wait to be sent.")
    messages_per_s: Rate = Field(10.0, description="Messages a second that one agent may send, in the long run.")
    message_burst: Count = Field(50, description="Messages that one agent may send at once.")
    pings_per_s: Rate = Field(2.0, description="Pings a second that one agent may send, in the long run.")
    ping_burst: Count = Field(20, description="Pings that one agent may send at once.")

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="Form of the log lines on stderr; auto: console on a terminal, else json."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.pong_timeout_s >= self.ping_interval_s:
            why = f"must be less than ping_interval_s ({self.ping_interval_s:g})"
            raise refusal(why, setting="pong_timeout_s")
        if self.authorization == "webhook" and self.authorization_url is None:
            raise refusal("is needed with authorization=webhook", setting="authorization_url")
        limit = descriptor_limit()
        most = limit - MIN_SPARE_DESCRIPTORS
        if "max_connections" in self.model_fields_set and self.max_connections > most:
            why = f"must be {most} at most: this process may open {limit} descriptors (ulimit -n)"
            raise refusal(why, setting="max_connections")
        return self


def load(flags: Mapping[str, object], config_file: Path | None) -> Settings:
    """Returns the settings; raises ConfigError with one line about the first thing that is wrong.

    `flags` holds what the command line gave, by field name; None means not given.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    from_file = _read_file(config_file) if config_file is not None else {}
    # Arguments beat the environment inside pydantic-settings, so what the environment names is left out of them here.
    arguments = {name: value for name, value in from_file.items() if not _from_environment(name)} | given
    try:
        return Settings(**arguments)
    except ValidationError as error:
        raise ConfigError(_describe(error.errors()[0], given, from_file, config_file)) from None


def env_name(setting: str) -> str:
    """Returns the environment variable of a setting: `port` is `PRESENCE_PORT`."""
    return ENV_PREFIX + setting.upper()


def _from_environment(setting: str) -> str | None:
    """Returns what the environment says, as pydantic-settings reads it: in any case of letters, blank for unset."""
    return next((value for name, value in os.environ.items() if name.upper() == env_name(setting)), None)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML's own errors, and bytes that are not UTF-8
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for name in values:
        if name not in Settings.model_fields:
            close = get_close_matches(name.lower().replace("-", "_"), Settings.model_fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{path} has an unknown setting {name!r}{hint}")
    return values


def _describe(
    details: ErrorDetails, flags: Mapping[str, object], from_file: Mapping[str, object], config_file: Path | None
) -> str:
    """Returns one line: where the value came from, the value unless it is a secret, and why it cannot be used."""
    name = str(details["loc"][0]) if details["loc"] else str(details["ctx"]["setting"])
    why = details["msg"].removeprefix("Input ")
    value: object
    if name in flags:
        source, value = f"--{name.replace('_', '-')}", flags[name]
    elif value := _from_environment(name):
        source = env_name(name)
        if name == "port" and value.startswith("tcp://"):
            why += "; Kubernetes sets it for a Service of this name, unless the pod has enableServiceLinks: false"
    elif name in from_file:
        source, value = f"{name} in {config_file}", from_file[name]
    else:
        return f"{name}: {why}"
    shown = "" if name in SECRETS else f" = {redact_text(str(value))[:MAX_SHOWN_CHARACTERS]!r}"
    return f"{source}{shown}: {redact_text(why)}"
