"""What the store makes of a DSN, and of the errors it meets."""

import asyncpg
import pytest

from presence.store.database import (
    MAX_BACKOFF_S,
    Away,
    BadRow,
    TryAgain,
    backoff_delays_s,
    connect_options,
    one_line,
    translated,
)

DSN = "postgresql://user:pass%40word@db.example:5432/presence"


def test_sessions_get_limits_and_a_name() -> None:
    options = connect_options(DSN, "presence one")
    assert options["dsn"] == DSN
    assert options["server_settings"] == {
        "application_name": "presence one",
        "statement_timeout": "3000",
        "lock_timeout": "2500",
        "idle_in_transaction_session_timeout": "2000",
    }
    assert options["target_session_attrs"] == "read-write"
    assert options["command_timeout"] > 3
    assert "statement_cache_size" not in options


def test_behind_a_pooler_nothing_is_set_for_the_session() -> None:
    options = connect_options(DSN + "?statement_cache_size=0&sslmode=require", "presence one")
    assert options["dsn"] == DSN + "?sslmode=require"
    assert options["statement_cache_size"] == 0
    assert options["server_settings"] == {"application_name": "presence one"}


def test_the_dsn_has_the_last_word() -> None:
    dsn = DSN + "?application_name=mine&target_session_attrs=any&lock_timeout=1"
    options = connect_options(dsn, "presence one")
    assert options["dsn"] == dsn
    assert "target_session_attrs" not in options
    assert {"application_name", "lock_timeout"}.isdisjoint(options["server_settings"])


@pytest.mark.parametrize("value", ["many", "-1", ""])
def test_a_bad_cache_size_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="statement_cache_size"):
        connect_options(f"{DSN}?statement_cache_size={value}", "presence one")


@pytest.mark.parametrize(
    ("error", "may_have_run"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (asyncpg.ConnectionDoesNotExistError("said the server"), True),
        (asyncpg.InterfaceError("connection is closed"), True),
        (asyncpg.TargetServerAttributeNotMatched("read-only"), True),
        (asyncpg.AdminShutdownError("said the server"), True),
        (asyncpg.QueryCanceledError("said the server"), False),
        (asyncpg.ReadOnlySQLTransactionError("said the server"), False),
        (asyncpg.TooManyConnectionsError("said the server"), False),
        (asyncpg.DiskFullError("said the server"), False),
        (asyncpg.IdleInTransactionSessionTimeoutError("said the server"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_a_database_that_is_away(error: Exception, may_have_run: bool) -> None:
    away = translated(error)
    assert isinstance(away, Away)
    assert away.may_have_run is may_have_run
    assert away.was_slow is isinstance(error, TimeoutError | asyncpg.QueryCanceledError)


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.SerializationError("said the server"),
        asyncpg.DeadlockDetectedError("said the server"),
        asyncpg.LockNotAvailableError("said the server"),
        asyncpg.InvalidCachedStatementError("said the server"),
    ],
)
def test_errors_worth_another_attempt(error: Exception) -> None:
    assert isinstance(translated(error), TryAgain)


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.DataError("out of range"),
        asyncpg.CharacterNotInRepertoireError("said the server"),
        asyncpg.CheckViolationError("no"),
    ],
)
def test_errors_of_one_row(error: Exception) -> None:
    assert isinstance(translated(error), BadRow)


@pytest.mark.parametrize("error", [asyncpg.UndefinedTableError("said the server"), KeyError("a mistake")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert translated(error) is error


def test_an_error_is_one_line() -> None:
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(TimeoutError()) == "TimeoutError"


def test_backoff_doubles_and_is_bounded() -> None:
    delays = backoff_delays_s()
    first = [next(delays) for _ in range(20)]
    assert all(0 < delay <= MAX_BACKOFF_S for delay in first)
    assert first[0] < 0.06
    assert min(first[10:]) >= MAX_BACKOFF_S / 2


def test_a_url_without_a_host_keeps_its_form() -> None:
    dsn = "postgresql:///presence?host=/run/postgresql&statement_cache_size=0"
    assert connect_options(dsn, "test")["dsn"] == "postgresql:///presence?host=%2Frun%2Fpostgresql"
