"""How long agents are told to stay away in an outage."""

from __future__ import annotations

import pytest

from presence.outage import MAX_SPREAD_S, Outage


def test_it_grows_with_the_outage_up_to_a_bound() -> None:
    outage = Outage(5.0)
    spreads = [outage.spread_s(1000.0 + second) for second in range(0, 121, 10)]
    assert spreads[:4] == [5.0, 10.0, 15.0, 20.0]
    assert spreads == sorted(spreads)
    assert spreads[-1] == MAX_SPREAD_S


def test_it_is_over_with_the_first_that_is_served() -> None:
    outage = Outage(5.0)
    assert outage.spread_s(1000.0) < outage.spread_s(1030.0)
    outage.end()
    assert outage.spread_s(1031.0) == 5.0
    assert outage.spread_s(1033.0) == 6.0


def test_who_is_refused_long_after_the_last_one_is_the_first_of_another_outage() -> None:
    outage = Outage(5.0)
    outage.spread_s(1000.0)
    assert outage.spread_s(1000.0 + 2 * MAX_SPREAD_S) == MAX_SPREAD_S
    assert outage.spread_s(1000.0 + 4 * MAX_SPREAD_S + 1) == 5.0


@pytest.mark.parametrize("spread_s", [0.0, 120.0])
def test_the_usual_spread_is_the_least(spread_s: float) -> None:
    outage = Outage(spread_s)
    assert outage.spread_s(1000.0) == spread_s
    assert outage.spread_s(1050.0) == max(spread_s, 25.0)
