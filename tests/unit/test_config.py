"""The settings: their names, their order of precedence, and one line for every value that cannot be used."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from presence.__main__ import run
from presence.config import SECRETS, Settings, descriptor_limit, env_name, load
from presence.errors import ConfigError

PASSWORD = "hunter2hunter2"

DOCUMENTED = [
    "PORT",
    "HTTP_PORT",
    "HOST",
    "NATS_URL",
    "DATABASE_URL",
    "DATA_DIR",
    "REPLICA_LABEL",
    "AUTH_TIMEOUT_S",
    "PING_INTERVAL_S",
    "PONG_TIMEOUT_S",
    "DRAIN_TIMEOUT_S",
    "LEASE_TTL_S",
    "AUTH_KEYS",
    "AUTH_ALGORITHMS",
    "AUTH_AUDIENCE",
    "AUTHORIZATION",
    "AUTHORIZATION_URL",
    "ALLOWED_ORIGINS",
    "MAX_CONNECTIONS",
    "MAX_MESSAGE_BYTES",
    "MAX_BACKLOG_BYTES",
    "SUBJECT_PREFIX",
]

DEFAULTS = {
    "port": 8080,
    "http_port": 8081,
    "data_dir": Path(".presence"),
    "auth_timeout_s": 10,
    "ping_interval_s": 30,
    "pong_timeout_s": 5,
    "drain_timeout_s": 10,
    "lease_ttl_s": 15,
    "authorization": "claim",
    "subject_prefix": "classrooms",
    "nats_url": None,
    "database_url": None,
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PRESENCE_")]:
        monkeypatch.delenv(name)


def toml(folder: Path, text: str | bytes) -> Path:
    path = folder / "presence.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(flags: dict[str, object], config_file: Path | None = None) -> str:
    """The line about settings that must not load."""
    with pytest.raises(ConfigError) as caught:
        load(flags, config_file)
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


# --- names and explanations


def test_the_documented_settings_exist_under_their_names_in_all_three_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in DOCUMENTED:
        assert f"--{name.lower().replace('_', '-')} " in shown
        assert f"[PRESENCE_{name}" in shown
        assert load({}, toml(tmp_path, "")).__class__.model_fields[name.lower()].description


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert run(["serve", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert field.description
        assert f"--{name.replace('_', '-')} " in shown
        assert f"{field.description} [{env_name(name)}" in shown
    assert "--config FILE" in shown


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    names = re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert set(names) == {"serve", "migrate", "token", "join", "publish"}
    for name in names:
        assert run([name, "--help"]) == 0
        assert f"Usage: presence {name}" in capsys.readouterr().out


def test_the_defaults() -> None:
    settings = load({}, None)
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert 0 < settings.max_connections < descriptor_limit()


# --- precedence


@pytest.mark.parametrize(
    ("flag", "variable", "in_file", "wins"),
    [
        ("1", "2", "3", 1),
        (None, "2", "3", 2),
        (None, None, "3", 3),
        (None, None, None, 8080),
        ("1", None, "3", 1),
        ("1", "2", None, 1),
        (None, "", "3", 3),
    ],
)
def test_flags_win_over_the_environment_over_the_file_over_the_default(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str | None,
    variable: str | None,
    in_file: str | None,
    wins: int,
) -> None:
    if variable is not None:
        monkeypatch.setenv("PRESENCE_PORT", variable)
    path = toml(tmp_path, f"port = {in_file}" if in_file else "")
    assert load({"port": flag}, path).port == wins


def test_a_variable_in_small_letters_wins_over_the_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("presence_port", "2")
    assert load({}, toml(tmp_path, "port = 3")).port == 2


def test_a_bad_value_that_is_not_used_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESENCE_PORT", "2")
    assert load({}, toml(tmp_path, 'port = "no"')).port == 2


def test_lists_are_separated_by_commas_or_are_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESENCE_AUTH_ALGORITHMS", "ES256, RS256,")
    settings = load(
        {"allowed_origins": "https://School.example"},
        toml(tmp_path, 'api_tokens = ["0123456789abcdef", "fedcba9876543210"]'),
    )
    assert settings.auth_algorithms == ("ES256", "RS256")
    assert settings.allowed_origins == ("https://school.example",)
    assert len(settings.api_tokens) == 2


# --- values


@pytest.mark.parametrize("name", sorted(n for n in Settings.model_fields if n.endswith("_s")))
def test_durations_and_rates_take_fractions(name: str) -> None:
    assert (
        getattr(
            load({"pong_timeout_s": "0.125", name: "0.25"} if name == "ping_interval_s" else {name: "0.25"}, None), name
        )
        == 0.25
    )


BAD = [
    ("port", "-1"),
    ("port", "65536"),
    ("port", "eighty"),
    ("port", "80.5"),
    ("http_port", "99999"),
    ("host", ""),
    ("host", "a..b"),
    ("host", "one two"),
    ("host", "a\nb"),
    ("data_dir", ""),
    ("replica_label", "a\x1b[2J"),
    ("auth_timeout_s", "0"),
    ("ping_interval_s", "-1"),
    ("ping_interval_s", "nan"),
    ("lease_ttl_s", "inf"),
    ("drain_timeout_s", "soon"),
    ("auth_algorithms", "none"),
    ("auth_algorithms", "HS256"),
    ("auth_algorithms", "ES256,HS256"),
    ("auth_algorithms", ""),
    ("authorization", "maybe"),
    ("allowed_origins", "https://school.example/path"),
    ("allowed_origins", "school.example"),
    ("max_connections", "0"),
    ("max_connections", "9999999"),
    ("max_message_bytes", "1"),
    ("max_backlog_bytes", "x"),
    ("messages_per_s", "0"),
    ("subject_prefix", ""),
    ("subject_prefix", "a.*"),
    ("subject_prefix", "a b"),
    ("subject_prefix", "presence.x"),
    ("log_level", "loud"),
    ("log_format", "xml"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_one_line_that_names_it(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = refused({name: value})
    assert line.startswith(f"--{name.replace('_', '-')} = {value!r}: ")
    if value:
        monkeypatch.setenv(env_name(name), value)
        assert refused({}) == line.replace(f"--{name.replace('_', '-')}", env_name(name), 1)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("port = true", "port in {file} = 'True': should be a number"),
        ("port = 'x'", "port in {file} = 'x': should be a valid integer, unable to parse string as an integer"),
        ("port = [1]", "port in {file} = '[1]': should be a valid integer"),
        ("host = 3", "host in {file} = '3': should be a valid string"),
        ("data_dir = 3", "data_dir in {file} = '3': must be a path"),
        ('data_dir = "a\\u0000"', "data_dir in {file} = 'a\\x00': must be a path"),
        ("prot = 1", "{file} has an unknown setting 'prot'; did you mean port?"),
        ("AUTH-KEYS = 1", "{file} has an unknown setting 'AUTH-KEYS'; did you mean auth_keys?"),
        ("[presence]\nport = 1", "{file} has an unknown setting 'presence'"),
        ("port =", "{file} is not TOML: Invalid value (at end of document)"),
        (b"\xff\xfe", "{file} is not TOML: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str | bytes, line: str) -> None:
    path = toml(tmp_path, text)
    assert refused({}, path) == line.format(file=path)


def test_a_file_that_nests_without_end_is_one_line(tmp_path: Path) -> None:
    assert "is not TOML" in refused({}, toml(tmp_path, "port = " + "[" * 100_000))


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert refused({}, tmp_path / "none.toml") == f"cannot read {tmp_path / 'none.toml'}: No such file or directory"
    assert refused({}, tmp_path) == f"cannot read {tmp_path}: Is a directory"


def test_values_that_do_not_fit_together() -> None:
    assert refused({"pong_timeout_s": "30"}) == "--pong-timeout-s = '30': must be less than ping_interval_s (30)"
    assert refused({"ping_interval_s": "5"}) == "pong_timeout_s: must be less than ping_interval_s (5)"
    assert refused({"authorization": "webhook"}) == "authorization_url: is needed with authorization=webhook"
    too_many = descriptor_limit()
    assert "this process may open" in refused({"max_connections": str(too_many)})


def test_a_port_that_kubernetes_set_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESENCE_PORT", "tcp://10.0.0.1:8080")
    assert "enableServiceLinks: false" in refused({})


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@host/database",
        "postgres://user:p%40ss@host:5432/database?sslmode=require",
        "postgresql://user@one:5432,two:5433/database",
        "postgresql://postgres@/presence?host=/tmp/a%20folder&port=5432",
        "postgresql://user@[::1]:5432/database",
        "postgresql://pooler/database?statement_cache_size=0",
    ],
)
def test_database_urls_that_are_good(url: str) -> None:
    assert load({"database_url": url}, None).database_url == url


@pytest.mark.parametrize(
    "url",
    ["nats://host", "nats://user:password@host:4222", "tls://a:4222, tls://b:4222", "ws://host", "nats://[::1]:4222"],
)
def test_nats_urls_that_are_good(url: str) -> None:
    assert load({"nats_url": url}, None).nats_url == url


# --- secrets

BAD_SECRETS = [
    ("nats_url", f"http://user:{PASSWORD}@host"),
    ("nats_url", f"nats://user:{PASSWORD}@"),
    ("nats_url", f"nats://user@host:{PASSWORD}"),
    ("nats_url", f"nats://user:{PASSWORD}@[host"),
    ("nats_url", f"nats://good:1,nats://user:{PASSWORD}@a..b"),
    ("database_url", f"mysql://user:{PASSWORD}@host/database"),
    ("database_url", f"postgresql://user:{PASSWORD}@host:port/database"),
    ("database_url", f"postgresql://user:{PASSWORD}@one:1,two:x/database"),
    ("database_url", f"postgresql://user:{PASSWORD}/x@host/database"),
    ("database_url", f"postgresql://user:{PASSWORD}@a..b/database"),
    ("database_url", f"postgresql://host/database?password={PASSWORD}&statement_cache_size=x"),
    ("authorization_url", f"ftp://user:{PASSWORD}@host"),
    ("auth_keys", f"ftp://user:{PASSWORD}@host/jwks.json"),
    ("api_tokens", f"{PASSWORD}"),
    ("api_tokens", f"0123456789abcdef,{PASSWORD} x"),
]


@pytest.mark.parametrize(("name", "value"), BAD_SECRETS)
def test_a_secret_is_in_no_error_line(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--{name.replace('_', '-')}"
    path = toml(tmp_path, f"{name} = {value!r}")
    lines = [refused({name: value}), refused({}, path)]
    monkeypatch.setenv(env_name(name), value)
    lines.append(refused({}))
    assert [line.partition(":")[0] for line in lines] == [flag, f"{name} in {path}", env_name(name)]
    assert PASSWORD not in "".join(lines)
    assert run(["serve", flag, value]) == 2
    assert PASSWORD not in capsys.readouterr().err


def test_a_secret_in_the_wrong_place_is_in_no_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"postgresql://user:{PASSWORD}@host/database"
    token = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
    for arguments in (["serve", url], ["serve", "--host", url], ["serve", f"--token={token}"], [token]):
        assert run(arguments) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert PASSWORD not in line
        assert "eyJ" not in line
    assert PASSWORD not in refused({"allowed_origins": f"https://user:{PASSWORD}@host"})


def test_secrets_are_not_in_the_settings_own_text() -> None:
    values = {
        "nats_url": f"nats://user:{PASSWORD}@host",
        "database_url": f"postgresql://user:{PASSWORD}@host/database",
        "authorization_url": f"https://user:{PASSWORD}@host",
        "auth_keys": f"https://user:{PASSWORD}@host",
        "api_tokens": f"{PASSWORD}{PASSWORD}",
    }
    assert set(values) == SECRETS
    settings = load(values, None)
    assert settings.nats_url == values["nats_url"]
    assert PASSWORD not in f"{settings!r} {settings}"


# --- what reaches the terminal


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serve", "--port", "x"], "--port = 'x': should be a valid integer, unable to parse string as an integer"),
        (["serve", "--config", "/nowhere"], "cannot read /nowhere: No such file or directory"),
        (["serve", "--port"], "Option '--port' requires an argument."),
        (["serve", "--nonsense"], "No such option: --nonsense"),
        (["nonsense"], "No such command 'nonsense'."),
        (["migrate"], "give --database-url: an embedded database is brought up to date by `presence serve`"),
        (["token", "--agent", "a"], "Missing option '--classroom'."),
        (["token", "--classroom", "x", "--agent", "a"], "--classroom 'x': is not a UUID"),
        (["token", "--classroom", "*", "--agent", "a b"], "--agent 'a b': has characters that cannot be used there"),
        (["join", "--url", "http://h"], "--url: must look like ws://host:8080/ws or wss://host/ws"),
        (["join", "--url", "ws://u:pw@h:x"], "--url: must look like ws://host:8080/ws or wss://host/ws"),
        (["publish", "x", "chat", "1"], "CLASSROOM 'x': is not a UUID"),
        (["publish", "0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10", "a.b", "1"], "KIND 'a.b': has characters"),
        (["publish", "0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10", "chat", "{"], "JSON: "),
        (
            ["publish", "0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10", "chat", "1", "--nats-url", "http://u:pw@h"],
            "--nats-url: ",
        ),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_status_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    classroom = ["--classroom", "0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10"] if arguments[0] == "join" else []
    assert run([*arguments, *classroom]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"presence: {line}")
    assert shown.err.count("\n") == 1
    assert "pw" not in shown.err


@pytest.mark.parametrize("ttl", ["nan", "inf", "0", "-1", "1e300", "x"])
def test_a_bad_ttl_is_one_line(ttl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", "--classroom", "*", "--agent", "a", "--ttl", ttl, "--data-dir", str(tmp_path)]) == 2
    assert "--ttl" in capsys.readouterr().err


def test_an_error_line_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--config", "/no\x1b[2J\nwhere"]) == 2
    assert capsys.readouterr().err == "presence: cannot read /no\\x1b[2J where: No such file or directory\n"
