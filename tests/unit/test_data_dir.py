"""The data directory: keys that are made once, one gateway at a time, and a state file that tells no lies."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from presence.data_dir import DataDir, Lock, State
from presence.errors import StartError

CLASSROOM = uuid.UUID("0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10")
STATE = State(os.getpid(), "ws://127.0.0.1:1/ws", "http://127.0.0.1:2", None, None, "classrooms", "presence")


@pytest.fixture
def folder(tmp_path: Path) -> DataDir:
    made = DataDir(tmp_path / "data")
    made.create()
    made.create_keys()
    return made


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def claims(folder: DataDir, token: str, audience: str = "presence") -> dict[str, object]:
    """What a gateway that has only the published key reads from a token."""
    keys = jwt.PyJWKSet.from_json(folder.auth_keys_path.read_text())
    key = keys[jwt.get_unverified_header(token)["kid"]]
    read: dict[str, object] = jwt.decode(token, key, algorithms=["ES256"], audience=audience)
    return read


def test_a_token_opens_its_classrooms_for_its_time(folder: DataDir) -> None:
    now = int(time.time())
    token = folder.mint_token("alice", [CLASSROOM], ttl_s=60, clock=lambda: now)
    expected = {"sub": "alice", "aud": "presence", "iat": now, "exp": now + 60, "classrooms": [str(CLASSROOM)]}
    assert claims(folder, token) == expected
    assert claims(folder, folder.mint_token("bob", "*", audience="school"), "school")["classrooms"] == "*"


def test_the_keys_are_made_once(folder: DataDir) -> None:
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    room, token = folder.example_classroom(), folder.mint_token("alice", "*")
    again = DataDir(folder.path)
    again.create()
    again.create_keys()
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before
    assert again.example_classroom() == room
    assert claims(again, token)["sub"] == "alice"


def test_two_directories_have_different_secrets(folder: DataDir, tmp_path: Path) -> None:
    other = DataDir(tmp_path / "other")
    other.create()
    other.create_keys()
    assert other.api_token() != folder.api_token()
    assert other.example_classroom() != folder.example_classroom()
    with pytest.raises(KeyError):
        claims(folder, other.mint_token("alice", "*"))


@pytest.mark.usefixtures("open_umask")
def test_secrets_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    folder = DataDir(tmp_path / "a" / "data")
    folder.create()
    with Lock(folder):
        folder.create_keys()
        folder.write_state(STATE)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()}
    assert modes.pop("jwks.json") == 0o644
    assert modes == dict.fromkeys(["api-token", "lock", "signing-key.pem", "state.json"], 0o600)
    assert stat.S_IMODE(folder.path.stat().st_mode) == (0o711 if os.geteuid() == 0 else 0o700)
    assert "d" not in json.loads(folder.auth_keys_path.read_text())["keys"][0]
    assert folder.api_token() not in folder.state_path.read_text()


def test_one_gateway_at_a_time(folder: DataDir) -> None:
    with Lock(folder):
        line = f"{folder.path} is already served by process {os.getpid()}"
        with pytest.raises(StartError, match=line), Lock(folder):
            pass
    with Lock(folder):  # free again
        pass


def test_a_terminal_that_looks_does_not_stop_a_gateway_that_starts(
    folder: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = os.open(folder.lock_path, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            os.close(looking)

    monkeypatch.setattr(time, "sleep", sleep)
    with Lock(folder):
        assert len(waited) == 2


def test_the_state_is_there_while_the_gateway_is(folder: DataDir) -> None:
    assert folder.read_state() is None
    with Lock(folder):
        assert folder.read_state() is None
        folder.write_state(STATE)
        assert folder.read_state() == STATE
        folder.remove_state()
        assert folder.read_state() is None
        folder.remove_state()


def test_the_state_of_a_gateway_that_was_killed_is_not_believed(folder: DataDir) -> None:
    """Even where its process number belongs to somebody alive: here, to this test."""
    with Lock(folder):
        folder.write_state(STATE)
    assert folder.state_path.exists()
    assert folder.read_state() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"pid": 1}', '{"pid": 1, "more": 2}', "\x00"])
def test_a_state_that_cannot_be_read_is_none(folder: DataDir, text: str) -> None:
    with Lock(folder):
        folder.state_path.write_text(text)
        assert folder.read_state() is None


def test_without_a_gateway_ever_a_line_says_what_to_do(tmp_path: Path) -> None:
    folder = DataDir(tmp_path / "none")
    assert folder.read_state() is None
    for use in (folder.api_token, folder.example_classroom, lambda: folder.mint_token("alice", "*")):
        with pytest.raises(StartError, match=r"run `presence serve` there first, or give --data-dir"):
            use()


def rsa_pem() -> bytes:
    return pem(rsa.generate_private_key(public_exponent=65_537, key_size=2_048))


def pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (b"", "is not a PEM private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "is not a PEM private key"),
        (b"\xff\xfe", "cannot read .*: not text"),
        (rsa_pem(), "is not a P-256 key"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "is not a P-256 key"),
    ],
    ids=["empty", "damaged", "no text", "rsa", "another curve"],
)
def test_a_key_that_cannot_be_used_is_one_line_and_stays(folder: DataDir, key: bytes, words: str) -> None:
    folder.signing_key_path.write_bytes(key)
    with pytest.raises(StartError, match=words) as caught:
        folder.create_keys()
    assert "\n" not in str(caught.value)
    assert folder.signing_key_path.read_bytes() == key


def test_a_directory_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(StartError, match=rf"cannot use the data directory {path}: \w"):
            DataDir(path).create()
    with pytest.raises(StartError, match=r"cannot open .*lock: No such file"), Lock(DataDir(tmp_path / "none")):
        pass
