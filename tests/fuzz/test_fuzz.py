"""The fuzzer for a few seconds, over its corpus first; and that it finds what is wrong, and tells how to see it again."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path

import pytest
import targets

import fuzz

SECONDS = 10.0
SEED = int(os.environ.get("PRESENCE_FUZZ_SEED", "0")) or int.from_bytes(os.urandom(4))


@pytest.mark.parametrize("name", sorted(fuzz.TARGETS))
def test_nothing_is_found_in_a_few_seconds(name: str, tmp_path: Path) -> None:
    count = fuzz.fuzz(name, SECONDS, SEED, folder=tmp_path)
    assert count > len(fuzz.corpus_of(name))
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_found_kept_and_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A decoder that takes a surrogate for a character, behind something that no input of the corpus has."""

    def wrong(data: bytes) -> Hashable:
        assert not (b"\xed\xa0\x80" in data and b"\x89\xfd" in data)
        return targets.decode(data)

    monkeypatch.setitem(fuzz.TARGETS, "decode", lambda: wrong)
    assert all(wrong(data) is not None for data in fuzz.corpus_of("decode"))
    with pytest.raises(AssertionError) as failure:
        fuzz.fuzz("decode", 60, 1, folder=tmp_path)
    [kept] = tmp_path.iterdir()
    assert failure.value.__notes__ == [f"seed 1; the input is in {kept}"]
    with pytest.raises(AssertionError):
        wrong(fuzz.Last.read(kept))


def test_the_input_under_way_outlives_the_process(tmp_path: Path) -> None:
    last = fuzz.Last(tmp_path / "last-decode")
    last.note(b"the one before, which was longer")
    last.note(b"this one")
    assert fuzz.Last.read(last.path) == b"this one"
    last.close()
    assert not last.path.exists()
