"""The catalogue of reasons: complete, consistent, and the same in the documentation."""

import re
from pathlib import Path

import pytest

from presence import reasons
from presence.reasons import BY_TYPE, Reason

PROTOCOL_MD = Path(__file__).parents[2] / "docs" / "protocol.md"
TABLE_ROW = re.compile(r"\| `(\w+)` \| (yes|no) \| (\d+) \| (\d+) \| [^|]+ \|")

ALL = list(BY_TYPE.values())
ANNOUNCED = [reason for reason in ALL if reason.announced]


def constants() -> dict[str, Reason]:
    return {name: value for name, value in vars(reasons).items() if isinstance(value, Reason)}


def test_every_constant_is_in_the_catalogue_under_its_own_name() -> None:
    assert {name.lower(): reason for name, reason in constants().items()} == dict(BY_TYPE)
    assert set(constants()) < set(reasons.__all__)


def test_the_catalogue_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        BY_TYPE["new"] = reasons.CLOSED  # type: ignore[index]
    with pytest.raises(AttributeError):
        reasons.CLOSED.close_code = 1  # type: ignore[misc]


@pytest.mark.parametrize("reason", ANNOUNCED, ids=lambda reason: reason.type)
def test_close_codes_say_whether_to_reconnect(reason: Reason) -> None:
    if reason is reasons.TERMINATED:
        assert reason.close_code == 1012
        assert reason.reconnect
    else:
        assert reason.close_code in (range(4000, 4500) if reason.reconnect else range(4500, 5000))


def test_announced_close_codes_differ() -> None:
    assert len({reason.close_code for reason in ANNOUNCED}) == len(ANNOUNCED) == 13


def test_only_a_replaced_session_lives_on() -> None:
    assert [reason for reason in ALL if not reason.leaves] == [reasons.REPLACED]


def test_what_sends_no_message_uses_the_codes_of_the_rfc() -> None:
    silent = {reason.type: reason.close_code for reason in ALL if not reason.announced}
    assert silent == {
        "closed": 1000,
        "lost": 1006,
        "protocol_error": 1002,
        "replica_lost": 1006,
        "internal_error": 1011,
    }


@pytest.mark.parametrize("reason", ALL, ids=lambda reason: reason.type)
def test_titles_are_short_sentences(reason: Reason) -> None:
    assert reason.title[0].isupper()
    assert len(reason.title) < 60
    assert 100 <= reason.status < 600


def test_the_tables_in_the_documentation_are_the_catalogue() -> None:
    documented = TABLE_ROW.findall(PROTOCOL_MD.read_text(encoding="utf-8"))
    expected = [
        (reason.type, "yes" if reason.reconnect else "no", str(reason.close_code), str(reason.status)) for reason in ALL
    ]
    assert documented == expected
