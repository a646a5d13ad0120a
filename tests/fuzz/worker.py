"""One fuzzer: worker.py TARGET [libFuzzer's arguments], as `tests.fuzz` starts it."""

from __future__ import annotations

import random
import sys

import atheris

with atheris.instrument_imports(include=["planner", "instarfs"]):
    from tests.fuzz import bounds
    from tests.fuzz.targets import TARGETS

from tests.fuzz.mutations import SHORTEST, mutate_words


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's own mutations, or ours."""
    rng = random.Random(seed)
    if rng.random() < 0.4 or len(data) < SHORTEST:
        return bytes(atheris.Mutate(data, max_size))
    return mutate_words(data, rng)[:max_size]


def main() -> None:
    """Fuzz until libFuzzer's limits, or a crash."""
    target = TARGETS[sys.argv.pop(1)]

    def run(data: bytes) -> None:
        bounds.run(target, data)

    atheris.Setup(sys.argv, run, custom_mutator=mutate)
    atheris.Fuzz()


main()
