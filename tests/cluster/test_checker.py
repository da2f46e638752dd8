"""The checker sees every kind of flaw: each rule is shown a record that breaks it, beside one that does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from checker import (
    end_flaws,
    history_flaws,
    replacement_flaws,
    row_flaws,
    sequence_flaws,
    session_flaws,
    snapshot_flaws,
)
from record import Ear, Life, Reader, Record, Row, Told

KEY = ("0b0e5a3c-5a1f-4f0e-8b60-6f2d2e1f0a01", "web.alice.presence")


def life(session_id: int = 1, **fields: Any) -> Life:
    made = Life(KEY, "a.1", requested_at=1.0, success_at=2.0, session_id=session_id)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def row(session_id: int = 1, place: str = "live", began: float = 0.0, ended: float = 10.0, why: str = "closed") -> Row:
    past = (began, ended, why) if place == "past" else (None, None, None)
    return Row(session_id, KEY[1], KEY[0], *past, place)


def told(words: str) -> list[Told]:
    kinds = {"e": "enter", "l": "leave", ".": ""}
    return [Told(float(number), kinds[word], number, f"{number}") for number, word in enumerate(words)]


GONE = {"left_at": 3.0, "ended_at": 3.0, "code": 1000}
REPLACED = {"errors": [(3.0, "replaced")], "ended_at": 3.0, "code": 4505}


@pytest.mark.parametrize(
    ("lives", "rows", "word"),
    [
        ([life()], [row()], None),
        ([life(**GONE)], [row(place="past")], None),
        ([life()], [row(place="past")], "no row"),
        ([life(**GONE)], [row()], "ghost"),
        ([life(), life(2)], [row()], "2 live sockets"),
        ([life()], [row(), row(2)], "2 rows"),
    ],
)
def test_rows(lives: list[Life], rows: list[Row], word: str | None) -> None:
    found = list(row_flaws(lives, rows))
    assert bool(found) is bool(word)
    assert word is None or word in found[0]


def test_sessions_are_neither_lost_nor_doubled() -> None:
    assert list(session_flaws([life(1)], [row(1)])) == []
    assert "lost" in next(session_flaws([life(1)], [row(2)]))
    assert "2 times" in next(session_flaws([life(1)], [row(1), row(1, "past")]))


def test_lifetimes_do_not_overlap() -> None:
    one, other = row(1, "past", 0.0, 10.0), row(2, "past", 9.0, 20.0)
    assert list(history_flaws([one, other], 1.5)) == []
    assert "overlap by 1.00 s" in next(history_flaws([one, other], 0.5))
    assert "ended with nonsense" in next(history_flaws([row(1, "past", why="nonsense")], 0.5))


@pytest.mark.parametrize(
    ("words", "is_live", "is_true"),
    [
        ("", False, True),
        ("", True, False),
        ("e", True, True),
        ("e", False, False),
        ("el", False, True),
        ("el", True, False),
        ("ele", True, True),
        ("ee", True, False),
        ("ell", False, False),
        ("l", False, False),
        ("e.", False, True),
        ("e.e", True, True),
        ("e.ee", True, False),
        (".l", True, False),
    ],
)
def test_sequences(words: str, is_live: bool, is_true: bool) -> None:
    assert (list(sequence_flaws(told(words), is_live=is_live)) == []) is is_true


def test_only_a_later_one_replaces() -> None:
    replaced = life(**REPLACED)
    assert list(replacement_flaws([replaced, life(2, requested_at=2.5, success_at=2.9)])) == []
    assert list(replacement_flaws([replaced, life(2, requested_at=0.5, success_at=1.5)])) == []  # at the same time
    assert list(replacement_flaws([replaced, life(2, requested_at=0.1, success_at=0.5)])) != []
    assert list(replacement_flaws([replaced])) != []


@pytest.mark.parametrize(
    ("fields", "is_true"),
    [
        (REPLACED, True),
        ({**REPLACED, "code": 4003}, False),
        ({**REPLACED, "code": 1006}, False),
        ({"ended_at": 3.0, "code": 1006, "replica": "b.1"}, True),  # its process was killed
        ({"ended_at": 3.0, "code": 1006}, False),
        ({"ended_at": 3.0, "code": 1011}, False),
        ({"errors": [(2.5, "terminated")], "ended_at": 3.0, "code": 1012}, True),
        ({"errors": [(2.5, "terminated")], "ended_at": 3.0, "code": 4505}, False),
        (GONE, True),
    ],
)
def test_ends(fields: dict[str, Any], is_true: bool) -> None:
    assert (list(end_flaws(life(**fields), {"b.1"})) == []) is is_true


def test_rows_over_time() -> None:
    record = Record(Ear(""), Reader(""), [KEY[0]])
    record.snapshots = [(1.0, [row(1)]), (2.0, [row(1, "past")])]
    assert list(snapshot_flaws(record)) == []
    record.snapshots.append((3.0, [row(1, "past", ended=11.0)]))
    assert "history of session 1 changed" in next(snapshot_flaws(record))
    record.snapshots = [(1.0, [row(1), row(1, "past")])]
    assert "two places" in next(snapshot_flaws(record))
    record.snapshots = [(1.0, [row(1)]), (2.0, [replace(row(1), agent_id="web.bob.presence")])]
    assert "changed its agent" in next(snapshot_flaws(record))
