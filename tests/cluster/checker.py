"""What must be true of a record once every fault is healed and things have settled; every flaw in one line.

Owns the rules, as they stand in the documentation. Knows nothing of the implementation, and waits for nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from record import Key, Life, Record, Row, Told

# docs/protocol.md
CODES = {
    "auth_timed_out": 4500,
    "serialization_failed": 4501,
    "unsupported_request": 4502,
    "unauthenticated": 4503,
    "access_denied": 4504,
    "replaced": 4505,
    "rate_limited": 4506,
    "removed": 4507,
    "pong_timed_out": 4001,
    "slow_consumer": 4002,
    "unavailable": 4003,
    "token_expired": 4004,
    "terminated": 1012,
}
IN_FLIGHT_S = 3.0  # how long a connect may be under way in the gateway after its agent has given it up
REASONS = {*CODES, "closed", "lost", "protocol_error", "replica_lost"}


def flaws(record: Record, killed: set[str], overlap_s: float) -> list[str]:
    """`killed`: processes that were killed; `overlap_s`: how long a dead session may go unnoticed beside a new one."""
    found: list[str] = []
    for key in sorted(record.keys()):
        who = f"{key[1]} in {key[0][:8]}"
        lives, rows = record.lives_of(key), [row for row in record.rows if row.key == key]
        sequence = record.ear.sequence(key)
        for flaw in itertools.chain(
            row_flaws(lives, rows),
            session_flaws(lives, rows),
            history_flaws(rows, overlap_s),
            sequence_flaws(sequence, is_live=any(life.is_live for life in lives)),
            replacement_flaws(lives),
            *(end_flaws(life, killed) for life in lives),
        ):
            found.append(f"{who}: {flaw}")
    return found + list(snapshot_flaws(record))


def row_flaws(lives: list[Life], rows: list[Row]) -> Iterator[str]:
    """Each live socket has exactly one row, and no row is without a live socket."""
    live = [life for life in lives if life.is_live]
    present = [row for row in rows if row.place == "live"]
    if len(live) > 1:
        yield f"{len(live)} live sockets: {[(life.replica, life.session_id) for life in live]}"
    if live and not present:
        yield f"a live socket on {live[0].replica}, session {live[0].session_id}, has no row"
    if present and not live:
        yield f"ghost: row {present[0].session_id} has no live socket"
    if len(present) > 1:
        yield f"{len(present)} rows"


def session_flaws(lives: list[Life], rows: list[Row]) -> Iterator[str]:
    """Every session that was ever acknowledged is live or in the history, once."""
    places = Counter(row.session_id for row in rows)
    for session_id in {life.session_id for life in lives if life.success_at is not None}:
        if places[session_id] == 0:
            yield f"session {session_id} is lost"
    for session_id, count in places.items():
        if count > 1:
            yield f"session {session_id} is there {count} times"


def history_flaws(rows: list[Row], overlap_s: float) -> Iterator[str]:
    past = sorted((row for row in rows if row.place == "past"), key=lambda row: row.session_id)
    for row in past:
        if row.reason not in REASONS:
            yield f"session {row.session_id} ended with {row.reason}"
    for one, other in itertools.combinations(past, 2):
        assert one.began is not None
        assert one.ended is not None
        assert other.began is not None
        assert other.ended is not None
        overlap = min(one.ended, other.ended) - max(one.began, other.began)
        if overlap > overlap_s:
            yield f"sessions {one.session_id} and {other.session_id} overlap by {overlap:.2f} s"


def sequence_flaws(sequence: list[Told], *, is_live: bool) -> Iterator[str]:
    """enter, leave, enter, … and in the end the truth; after a gap nobody knows what the last one was."""
    words = " ".join(f"{told.kind}({told.session_id})" if told.kind else "…" for told in sequence)
    inside: bool | None = False
    for told in sequence:
        if not told.kind:
            inside = None
            continue
        entered = told.kind == "enter"
        if inside is entered:
            yield f"{told.kind} of session {told.session_id} came twice in a row: {words}"
        inside = entered
    if inside is not None and inside is not is_live:
        yield f"the last that was told is {'enter' if inside else 'leave'}, live is {is_live}: {words}"


def replacement_flaws(lives: list[Life]) -> Iterator[str]:
    """Only a later connect, or one at the same time, replaces."""
    for life in lives:
        replaced_at = next((at for at, why in life.errors if why == "replaced"), None)
        if replaced_at is None:
            continue
        if not any(
            other.requested_at <= replaced_at
            and (other.success_at or other.ended_at or replaced_at) >= life.requested_at
            for other in lives
            if other is not life and other.requested_at
        ):
            yield f"session {life.session_id} on {life.replica} was replaced by nobody that came later"


def until(life: Life, now: float) -> float:
    """When its connect was over at the latest."""
    return life.success_at or (life.ended_at + IN_FLIGHT_S if life.ended_at else now)


def end_flaws(life: Life, killed: set[str]) -> Iterator[str]:
    """The close code is that of the reason; without a reason the gateway ends nothing."""
    if life.ended_at is None or life.left_at is not None:
        return
    whys = [why for _, why in life.errors]
    where = f"socket on {life.replica}, session {life.session_id}"
    if life.code in (None, 1006):
        if life.replica not in killed:
            yield f"{where}: ended without a close frame after {whys}"
    elif not whys:
        yield f"{where}: closed with {life.code} and no reason"
    elif "terminated" in whys:
        if life.code != 1012 and life.code != CODES[whys[-1]]:
            yield f"{where}: closed with {life.code} after {whys}"
    elif whys[1:] or life.code != CODES.get(whys[0]):
        yield f"{where}: closed with {life.code} after {whys}"


def snapshot_flaws(record: Record) -> Iterator[str]:
    """At no time is a session in two places, or of two agents; what is history stays as it is."""
    past: dict[int, Row] = {}
    keys: dict[int, Key] = {}
    for _, rows in record.snapshots:
        for session_id, count in Counter(row.session_id for row in rows).items():
            if count > 1:
                yield f"session {session_id} was in two places"
        for row in rows:
            if keys.setdefault(row.session_id, row.key) != row.key:
                yield f"session {row.session_id} changed its agent"
            if past.get(row.session_id, row) != row:
                yield f"the history of session {row.session_id} changed"
            if row.place == "past":
                past[row.session_id] = row
