"""The command line: `presence serve`, `migrate`, and the commands for a terminal beside a gateway.

Owns: the commands, the flags of `serve` (one for each setting), and how an error reaches the terminal: one line on
stderr, status 2 for what was asked wrongly, 1 for what could not be done. Knows nothing of what the commands do.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from pydantic_core import PydanticUndefined

from presence import log
from presence.config import Settings, env_name, load
from presence.errors import ConfigError, PresenceError
from presence.terminal import COMMANDS

__all__ = ["main"]

STDOUT_FD: Final = 1
STDERR_FD: Final = 2
STATUS_FAILED: Final = 1
STATUS_USAGE: Final = 2
STATUS_INTERRUPTED: Final = 130

# The class of every usage error; typer has it from click, or, lately, from a click of its own.
UsageError: Final[type[Exception]] = typer.BadParameter.__bases__[0]

cli = typer.Typer(
    help="A WebSocket presence gateway for online classrooms.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they print local variables: tokens among them
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def serve(config: Path | None = None, **flags: str | None) -> int:
    """Serve agents, over the NATS and PostgreSQL that are given, or over embedded ones.

    Every setting is a flag, an environment variable and a key of the TOML file (such as auth_timeout_s); they win in
    this order. Times are in seconds and may have fractions; lists are separated by commas.
    """
    from presence import serving  # noqa: PLC0415 - the other commands need not wait for the whole gateway

    serving.raise_descriptor_limit()
    settings = load(flags, config)
    log.configure(settings.log_level, settings.log_format)
    return serving.serve(settings)


def migrate(
    database_url: Annotated[
        str | None,
        typer.Option(help=f"postgresql://user@host:5432/database [{env_name('database_url')}]"),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file with settings.")] = None,
) -> None:
    """Bring the schema of a database up to date; several may do so at once."""
    from presence import migrate as schema  # noqa: PLC0415

    settings = load({"database_url": database_url}, config)
    if settings.database_url is None:
        raise ConfigError("give --database-url: an embedded database is brought up to date by `presence serve`")
    applied = asyncio.run(schema.migrate(settings.database_url))
    print("\n".join(f"applied {revision}" for revision in applied) or "nothing to do", flush=True)


def _with_flag_of_each_setting(command: Any) -> Any:
    """Gives the command the parameters that typer makes its options from."""
    file_help = "TOML file with settings."
    annotations: dict[str, Any] = {"config": Annotated[Path | None, typer.Option(metavar="FILE", help=file_help)]}
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "" if default is PydanticUndefined or default in (None, ()) else f"; default {_shown(default)}"
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            metavar=_metavar(name, field.annotation),
            help=f"{field.description} [{env_name(name)}{shown}]",
            show_default=False,
        )
        annotations[name] = Annotated[str | None, option]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind, default=None, annotation=a) for name, a in annotations.items()]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = annotations
    return command


def _shown(default: object) -> str:
    return (
        ",".join(default)
        if isinstance(default, tuple)
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )


def _metavar(name: str, annotation: Any) -> str:
    if name.endswith("_s"):
        return "SECONDS" if "_per_" not in name else "NUMBER"
    if name.endswith("_bytes"):
        return "BYTES"
    return {int: "NUMBER", Path: "FOLDER"}.get(annotation, "TEXT")


cli.command()(_with_flag_of_each_setting(serve))
cli.command()(migrate)
for terminal_command in COMMANDS:
    cli.command()(terminal_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status; every error that can be foreseen is one line on stderr."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        return cli(args=given or ["--help"], prog_name="presence", standalone_mode=False) or 0
    except PresenceError as error:
        status = STATUS_USAGE if isinstance(error, ConfigError) else STATUS_FAILED
        return _fail(str(error), status)
    except UsageError as error:
        return _fail(getattr(error, "format_message", error.__str__)(), STATUS_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return STATUS_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        return STATUS_FAILED


def _fail(text: str, status: int) -> int:
    line = log.escape_controls(log.redact_text(" ".join(text.split())))
    with suppress(OSError):  # nobody is left to tell
        print(f"presence: {line}", file=sys.stderr, flush=True)
    return status


def _fill_standard_streams() -> None:
    """Where one was closed, the next file or socket would take its number, and be written to as if it were that one."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= STDERR_FD:
        continue
    os.close(fd)
    sys.stdout = sys.stdout or open(STDOUT_FD, "w", closefd=False)  # noqa: SIM115 - open to the end
    sys.stderr = sys.stderr or open(STDERR_FD, "w", closefd=False)  # noqa: SIM115


def main() -> NoReturn:
    """The console script."""
    _fill_standard_streams()
    status = run()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody is left to read it
            stream.flush()
    # All has been closed and written. The interpreter would take its objects apart one by one, while others wait for this end.
    os._exit(status)


if __name__ == "__main__":
    main()
