"""Heartbeats over real sockets: when pings are sent, which pongs count, what is measured, and what happens after a stall."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from typing import Any

import pytest

from peers import OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG, OPCODE_TEXT, Handler, Peer, masked, new_hub, turn_until
from presence_core.hub import Connection, Hub

TICK_S = 0.004
LATE_S = 0.5  # a busy machine may be that late; being early is never allowed


@pytest.fixture
def hub(handler: Handler) -> Iterator[Hub]:
    hub = new_hub(handler, ping_interval_ms=60, pong_timeout_ms=40)
    yield hub
    hub.close()


def next_ping(peer: Peer) -> bytes:
    [(opcode, nonce)] = peer.frames(1)
    assert opcode == OPCODE_PING
    return nonce


def counters(hub: Hub) -> dict[str, Any]:
    found: dict[str, Any] = hub.stats()["counters"]
    return found


def stall(seconds: float) -> None:
    """Keep the thread from the hub, as a long callback or a collection would."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_the_first_ping_comes_at_a_random_point_of_the_interval_and_then_every_interval(handler: Handler) -> None:
    interval_s = 0.6  # long beside what a busy machine takes to look at forty sockets
    hub = new_hub(handler, ping_interval_ms=600, pong_timeout_ms=590)
    peers = [Peer(hub) for _ in range(40)]
    begun = time.monotonic()
    for peer in peers:
        peer.connection.start_heartbeat()
    sent: dict[Peer, list[float]] = {peer: [] for peer in peers}

    def answer() -> bool:
        for peer in peers:
            pings = [payload for opcode, payload in peer.take() if opcode == OPCODE_PING]
            if len(pings) > len(sent[peer]):
                sent[peer].append(time.monotonic() - begun)
                peer.send(masked(OPCODE_PONG, pings[-1]))
        return all(len(times) >= 3 for times in sent.values())

    turn_until(hub, answer)
    first = sorted(times[0] for times in sent.values())
    assert first[0] < interval_s / 2  # forty points of an interval do not all miss its first half
    assert first[-1] - first[0] > interval_s / 4
    for times in sent.values():
        for number in range(3):  # no interval makes up for another
            assert number * interval_s <= times[number] < (number + 1) * interval_s + LATE_S
    assert counters(hub)["pings_sent"] >= 120
    hub.close()


def test_the_seed_decides_phases_and_nonces() -> None:
    def pings(seed: int) -> list[bytes]:
        hub = new_hub(ping_interval_ms=8, pong_timeout_ms=4, seed=seed)
        peer = Peer(hub)
        peer.connection.start_heartbeat()
        nonce = next_ping(peer)
        hub.close()
        return [nonce]

    assert pings(1) == pings(1) != pings(3)


def test_nonces_differ_and_are_eight_bytes(hub: Hub) -> None:
    peer = Peer(hub)
    peer.connection.start_heartbeat()
    nonces = []
    for _ in range(3):
        nonces.append(next_ping(peer))
        peer.send(masked(OPCODE_PONG, nonces[-1]))
    assert len(set(nonces)) == 3
    assert {len(nonce) for nonce in nonces} == {8}


def test_the_answer_is_measured(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    assert peer.connection.round_trip_s is None
    peer.connection.start_heartbeat()
    nonce = next_ping(peer)
    stall(0.01)
    peer.send(masked(OPCODE_PONG, nonce))
    turn_until(hub, lambda: peer.connection.round_trip_s)
    measured = peer.connection.round_trip_s
    assert measured is not None
    assert 0.01 <= measured < 0.04 + LATE_S
    _, counts, total_s = hub.stats()["histograms"]["round_trip_seconds"]
    assert sum(counts) == 1
    assert total_s == pytest.approx(measured, abs=2e-6)
    assert counters(hub)["pongs_received"] == 1
    assert handler.names() == ["on_open"]  # Python is not called for any of it


@pytest.mark.parametrize("wrong", [b"", b"12345678", b"x" * 125])
def test_another_payload_is_no_answer(hub: Hub, handler: Handler, wrong: bytes) -> None:
    peer = Peer(hub)
    peer.connection.start_heartbeat()
    nonce = next_ping(peer)
    for payload in (wrong, nonce[:-1], nonce + b"x", nonce[::-1]):
        peer.send(masked(OPCODE_PONG, payload))
    turn_until(hub, lambda: handler.of("on_deadline"))
    assert handler.of("on_deadline") == [(peer.connection, "pong")]
    assert counters(hub)["pongs_unexpected"] == 4
    assert counters(hub)["pongs_received"] == 0
    assert peer.frames(1) == [(OPCODE_CLOSE, (1001).to_bytes(2))]  # the handler left it to the hub
    assert peer.connection.round_trip_s is None


def test_an_answer_counts_once_and_an_earlier_one_never(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.connection.start_heartbeat()
    first = next_ping(peer)
    peer.send(masked(OPCODE_PONG, first) * 2)
    second = next_ping(peer)
    peer.send(masked(OPCODE_PONG, first))
    turn_until(hub, lambda: handler.of("on_deadline"))
    assert counters(hub)["pongs_unexpected"] == 2
    assert counters(hub)["pongs_received"] == 1
    assert first != second


def test_messages_do_not_stand_in_for_a_pong(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.connection.start_heartbeat()
    next_ping(peer)
    turn_until(hub, lambda: peer.send(masked(OPCODE_TEXT)) or handler.of("on_deadline"))
    assert handler.of("on_message")


def test_a_missing_pong_is_told_at_its_deadline_and_not_before(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.connection.start_heartbeat()
    told: list[float] = []
    handler.react["on_deadline"] = lambda connection, deadline: told.append(time.monotonic())
    begun = time.monotonic()
    turn_until(hub, lambda: counters(hub)["pings_sent"])
    turn_until(hub, lambda: told)
    assert told[0] - begun >= 0.04 - TICK_S
    bounds, counts, _ = hub.stats()["histograms"]["deadline_lateness_seconds"]
    assert sum(counts) == 1
    assert sum(counts[: bounds.index(0.5) + 1]) == 1


def test_a_pong_that_waits_unread_after_a_stall_counts(handler: Handler) -> None:
    hub = new_hub(handler, ping_interval_ms=30, pong_timeout_ms=10)
    peers = [Peer(hub) for _ in range(200)]  # more than one turn takes events for
    for peer in peers:
        peer.connection.start_heartbeat()

    def pings(peer: Peer) -> list[bytes]:
        return [payload for opcode, payload in peer.take() if opcode == OPCODE_PING]

    first = next(peer for peer in iter_until(hub, peers, pings))
    answered = [peer for peer in peers if pings(peer)]
    assert first in answered
    for peer in answered:
        peer.send(masked(OPCODE_PONG, pings(peer)[-1]))
    for peer in peers:
        peer.send(masked(OPCODE_TEXT))
    stall(0.05)
    hub.run_once(0)
    hub.run_once(0)
    lost = {connection for connection, _ in handler.of("on_deadline")}
    assert not lost & {peer.connection for peer in answered}
    hub.close()


def iter_until(hub: Hub, peers: list[Peer], has: Any) -> Iterator[Peer]:
    turn_until(hub, lambda: any(has(peer) for peer in peers))
    yield from (peer for peer in peers if has(peer))


def test_a_stall_makes_up_for_no_ping(hub: Hub) -> None:
    peer = Peer(hub)
    peer.connection.start_heartbeat()
    peer.send(masked(OPCODE_PONG, next_ping(peer)))
    turn_until(hub, lambda: counters(hub)["pongs_received"] == 1)
    stall(0.2)  # three intervals
    before = counters(hub)["pings_sent"]
    for _ in range(3):
        hub.run_once(0)
    assert counters(hub)["pings_sent"] == before + 1
    peer.send(masked(OPCODE_PONG, next_ping(peer)))
    turn_until(hub, lambda: counters(hub)["pongs_received"] == 2)


def test_a_stall_shows_in_the_lateness_of_pings_and_of_every_other_deadline(hub: Hub) -> None:
    for _ in range(5):
        peer = Peer(hub)
        peer.connection.start_heartbeat()  # due within 64 ms
        peer.connection.set_alarm(5)
    assert sum(late_by(hub, "ping_lateness_seconds")) == sum(late_by(hub, "deadline_lateness_seconds")) == 0
    stall(0.3)
    hub.run_once(0)
    for name, least_s in (("ping_lateness_seconds", 0.23), ("deadline_lateness_seconds", 0.28)):
        bounds, counts, total_s = hub.stats()["histograms"][name]
        assert sum(counts) == 5
        assert sum(counts[: bounds.index(0.1) + 1]) == 0, name
        assert 5 * least_s < total_s < 5 * (0.3 + LATE_S), name


def late_by(hub: Hub, name: str) -> list[int]:
    _, counts, _ = hub.stats()["histograms"][name]
    return list(counts)


def test_a_request_that_waits_unread_comes_before_its_deadline(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.connection.set_alarm(5)
    peer.send(masked(OPCODE_TEXT, b"just in time"))
    stall(0.03)
    handler.react["on_message"] = lambda connection, data, opcode: connection.set_alarm(60_000)
    hub.run_once(0)
    hub.run_once(0)
    assert handler.names() == ["on_open", "on_message"]  # the alarm that had fired is the past's


def test_an_alarm_that_was_stopped_after_it_fired_is_not_told(hub: Hub, handler: Handler) -> None:
    first, second = Peer(hub), Peer(hub)
    handler.react["on_deadline"] = lambda connection, deadline: (
        second.connection if connection is first.connection else first.connection
    ).set_alarm(None)
    first.connection.set_alarm(0)
    second.connection.set_alarm(0)
    turn_until(hub, lambda: handler.of("on_deadline"))
    hub.run_once(20)
    assert len(handler.of("on_deadline")) == 1
    assert hub.stats()["gauges"]["timers"] == 0


@pytest.mark.parametrize("delay_ms", [0, 0.5, 3, 4, 4.9, 20.0, 21.5])
def test_an_alarm_never_comes_early(hub: Hub, handler: Handler, delay_ms: float) -> None:
    told: list[float] = []
    handler.react["on_deadline"] = lambda connection, deadline: told.append(time.monotonic_ns() / 1e6)
    peer = Peer(hub)
    for _ in range(30 if delay_ms < 5 else 5):  # at any point of a tick
        told.clear()
        begun = time.monotonic_ns() / 1e6
        peer.connection.set_alarm(delay_ms)
        turn_until(hub, lambda: told)
        assert delay_ms <= told[0] - begun < delay_ms + LATE_S * 1000


def test_an_alarm_may_be_set_again_stopped_and_be_far_away(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.connection.set_alarm(5)
    peer.connection.set_alarm(None)
    peer.connection.set_alarm(None)
    peer.connection.set_alarm(1e300)
    peer.connection.set_alarm(float("inf"))
    hub.run_once(20)
    assert select.select([hub.fileno()], [], [], 0)[0] == []
    peer.connection.set_alarm(-5)
    turn_until(hub, lambda: handler.of("on_deadline"))
    with pytest.raises(ValueError, match="number"):
        peer.connection.set_alarm(float("nan"))
    with pytest.raises(TypeError):
        peer.connection.set_alarm("soon")  # type: ignore[arg-type]
    assert handler.of("on_deadline") == [(peer.connection, "alarm")]


def test_nothing_beats_for_a_connection_that_is_closing_or_closed(hub: Hub, handler: Handler) -> None:
    closing, closed = Peer(hub), Peer(hub)
    for peer in (closing, closed):
        peer.connection.start_heartbeat()
        peer.connection.set_alarm(0)
    closing.connection.close(4000)
    closed.connection.abort()
    for connection in (closing.connection, closed.connection):
        connection.start_heartbeat()
        connection.set_alarm(0)
    assert hub.stats()["gauges"]["timers"] == 1  # the close handshake's
    Connection().start_heartbeat()
    Connection().set_alarm(0)
    hub.run_once(80)
    assert handler.of("on_deadline") == []
    assert counters(hub)["pings_sent"] == 0
    assert closing.frames(1) == [(OPCODE_CLOSE, (4000).to_bytes(2))]


def test_the_peers_pings_are_answered_with_their_payload(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    for payload in (b"", b"x", b"y" * 125):
        peer.send(masked(OPCODE_PING, payload))
        assert peer.frames(1) == [(OPCODE_PONG, payload)]
    assert handler.names() == ["on_open"]
