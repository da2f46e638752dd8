"""Fuzzes the decoder and the hub: mutations of a kept corpus, guided by what each input made happen.

    python tests/fuzz/fuzz.py [decode|hub] [--seconds 60] [--seed N] [--keep]
    python tests/fuzz/fuzz.py hub --input FILE

Owns the loop, the corpus and the record of the input under way: after a crash of the process it is in tests/fuzz/last-TARGET,
after a failure in tests/fuzz/failed-TARGET. Knows nothing of what is fuzzed.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import random
import sys
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from mutate import MAX_BYTES, mutated  # noqa: E402
from targets import InputPath, decode  # noqa: E402

CORPUS = FOLDER / "corpus"
TARGETS: dict[str, Callable[[], Callable[[bytes], Hashable]]] = {"decode": lambda: decode, "hub": InputPath}

Target = Callable[[bytes], Hashable]


class Last:
    """The input under way, in a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(MAX_BYTES + 4))
        self.path = path
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def note(self, data: bytes) -> None:
        self._map[: len(data) + 4] = len(data).to_bytes(4) + data

    def close(self) -> None:
        self._map.close()
        self.path.unlink()

    @staticmethod
    def read(path: Path) -> bytes:
        kept = path.read_bytes()
        return kept[4 : 4 + int.from_bytes(kept[:4])] if path.name.startswith("last-") else kept


def corpus_of(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def keep(name: str, data: bytes) -> None:
    (CORPUS / name / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


def fuzz(name: str, seconds: float, seed: int, *, keeping: bool = False, folder: Path = FOLDER) -> int:
    """Run the corpus, then mutations of it and of what was found; how many inputs. An input that fails is kept, and raises."""
    rng, target, corpus = random.Random(seed), TARGETS[name](), corpus_of(name)
    seen, count, until = set(), 0, time.monotonic() + seconds
    last = Last(folder / f"last-{name}")
    waiting = list(reversed(corpus))
    try:
        while time.monotonic() < until or waiting:
            data = waiting.pop() if waiting else mutated(rng, corpus)
            last.note(data)
            signature = _tried(target, name, data, seed, folder)
            count += 1
            if signature not in seen:
                seen.add(signature)
                if count > len(corpus):
                    corpus.append(data)
                    if keeping:
                        keep(name, data)
    finally:
        last.close()
        with suppress(AttributeError):
            target.close()
    return count


def _tried(target: Target, name: str, data: bytes, seed: int, folder: Path) -> Hashable:
    try:
        return target(data)
    except BaseException as error:
        path = folder / f"failed-{name}"
        path.write_bytes(data)
        error.add_note(f"seed {seed}; the input is in {path}")
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS), help="default: each in turn")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % (1 << 32))
    parser.add_argument("--keep", action="store_true", help="add what is new to the corpus")
    parser.add_argument("--input", type=Path, help="run this one only, as the files of a failure hold it")
    arguments = parser.parse_args()
    for name in [arguments.target] if arguments.target else sorted(TARGETS):
        if arguments.input:
            print(name, TARGETS[name]()(Last.read(arguments.input)))
            continue
        count = fuzz(name, arguments.seconds, arguments.seed, keeping=arguments.keep)
        print(f"{name}: {count:,} inputs in {arguments.seconds:g} s, seed {arguments.seed}: nothing found", flush=True)


if __name__ == "__main__":
    main()
