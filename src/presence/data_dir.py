"""The data directory of an embedded gateway: its keys, its lock, and the state file that other terminals read.

Owns: the names and modes of these files, the signing key, and the tokens made with it.
Knows nothing of the servers whose data lies beside them, nor of who connects.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from presence.errors import StartError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["DEFAULT_AUDIENCE", "DEFAULT_DATA_DIR", "DataDir", "Lock", "State"]

DEFAULT_DATA_DIR = Path(".presence")
DEFAULT_AUDIENCE = "presence"

LOCK_ATTEMPTS = 5
LOCK_RETRY_S = 0.02


@dataclass(frozen=True, slots=True)
class State:
    """What a running gateway tells the terminals beside it. Holds no secret."""

    pid: int
    ws_url: str
    http_url: str
    nats_url: str | None  # None: not ours to tell
    database_url: str | None
    subject_prefix: str
    audience: str


class DataDir:
    """Paths and small files under one directory. Every method raises StartError where the directory cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.signing_key_path = self.path / "signing-key.pem"
        self.auth_keys_path = self.path / "jwks.json"
        self.api_token_path = self.path / "api-token"
        self.state_path = self.path / "state.json"
        self.lock_path = self.path / "lock"

    def create(self) -> None:
        """Makes the directory where it is missing."""
        # As root, PostgreSQL runs as another user and must pass through; the files inside have modes of their own.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        try:
            self.path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"cannot use the data directory {self.path}: {error.strerror}") from None

    def create_keys(self) -> None:
        """Makes the keys that are missing; leaves those that are there. The lock must be held."""
        try:
            if not self.signing_key_path.exists():
                _write(self.signing_key_path, _new_signing_key(), 0o600)
            _write(self.auth_keys_path, json.dumps({"keys": [self._public_jwk()]}, indent=2).encode(), 0o644)
            if not self.api_token_path.exists():
                _write(self.api_token_path, secrets.token_urlsafe(32).encode(), 0o600)
        except OSError as error:
            raise StartError(f"cannot use the data directory {self.path}: {error.strerror}") from None

    def api_token(self) -> str:
        """Returns the secret that the API takes as a Bearer token."""
        return self._read(self.api_token_path).strip()

    def mint_token(
        self,
        agent: str,
        classrooms: Sequence[uuid.UUID] | Literal["*"],
        *,
        audience: str = DEFAULT_AUDIENCE,
        ttl_s: float = 3_600.0,
        clock: Callable[[], float] = time.time,
    ) -> str:
        """Returns a signed token for an agent; it opens these classrooms, or all of them."""
        now = clock()
        claims = {
            "sub": agent,
            "aud": audience,
            "iat": int(now),
            "exp": int(now + ttl_s),
            "classrooms": classrooms if classrooms == "*" else [str(classroom) for classroom in classrooms],
        }
        return jwt.encode(claims, self._signing_key(), algorithm="ES256", headers={"kid": self._public_jwk()["kid"]})

    def example_classroom(self) -> uuid.UUID:
        """Returns a classroom id for examples: always the same one for one data directory."""
        return uuid.uuid5(uuid.NAMESPACE_OID, self._public_jwk()["kid"])

    def write_state(self, state: State) -> None:
        """Tells other terminals where the gateway is."""
        _write(self.state_path, json.dumps(asdict(state), indent=2).encode(), 0o600)

    def remove_state(self) -> None:
        """Takes the state file away at the end."""
        self.state_path.unlink(missing_ok=True)

    def read_state(self) -> State | None:
        """Returns where the gateway of this directory is, or None when none runs."""
        try:
            if not _is_locked(self.lock_path):  # the file of a gateway that was killed
                return None
            return State(**json.loads(self.state_path.read_bytes()))
        except PermissionError:
            raise StartError(f"the gateway of {self.path} belongs to another user") from None
        except (OSError, ValueError, TypeError):  # no file, or another version's
            return None

    def _signing_key(self) -> ec.EllipticCurvePrivateKey:
        try:
            key = serialization.load_pem_private_key(self._read(self.signing_key_path).encode(), password=None)
        except ValueError:
            raise StartError(f"{self.signing_key_path} is not a PEM private key") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
            raise StartError(f"{self.signing_key_path} is not a P-256 key")
        return key

    def _public_jwk(self) -> dict[str, str]:
        jwk = ECAlgorithm.to_jwk(self._signing_key().public_key(), as_dict=True)
        # RFC 7638: these members in this order, without blanks.
        thumbprint = json.dumps({name: jwk[name] for name in ("crv", "kty", "x", "y")}, separators=(",", ":"))
        kid = urlsafe_b64encode(hashlib.sha256(thumbprint.encode()).digest()).rstrip(b"=").decode()
        return {**jwk, "kid": kid, "alg": "ES256", "use": "sig"}

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise StartError(
                f"there is no {path.name} in {self.path}: run `presence serve` there first, or give --data-dir"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not text'}") from None


class Lock:
    """One gateway for one data directory. The kernel lets go of it when the process ends, however it ends."""

    def __init__(self, data_dir: DataDir) -> None:
        self._data_dir = data_dir
        self._fd = -1

    def __enter__(self) -> Self:
        path = self._data_dir.lock_path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"cannot open {path}: {error.strerror}") from None
        if not self._take():
            holder = os.read(self._fd, 32).decode().strip() or "unknown"
            os.close(self._fd)
            raise StartError(f"{self._data_dir.path} is already served by process {holder}")
        os.truncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        return self

    def _take(self) -> bool:
        for _ in range(LOCK_ATTEMPTS):
            with suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(LOCK_RETRY_S)  # a terminal may be looking, in this very moment, whether it is held
        return False

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)


def _is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _new_signing_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Writes a whole file or none of it; nobody ever sees it with a wider mode."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        os.fchmod(fd, mode)  # whatever the umask
        file.write(data)
    temporary.replace(path)
