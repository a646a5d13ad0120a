"""One fuzzer: worker.py TARGET [libFuzzer's arguments], as `tests.fuzz` starts it."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile

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


def run_alone(name: str, data: bytes) -> None:
    """Run the target of that *name* in a process that is not instrumented; raises if it fails."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [sys.executable, "-m", "tests.fuzz", "--run", file.name, name]
        subprocess.run(command, check=True)


def main() -> None:
    """Fuzz until libFuzzer's limits, or a crash."""
    name = sys.argv.pop(1)
    target = TARGETS[name]

    def run(data: bytes) -> None:
        try:
            bounds.run(target, data)
        except bounds.TooSlow:
            # Instrumented it takes two to five times as long: without, the bound is the promise.
            run_alone(name, data)

    atheris.Setup(sys.argv, run, custom_mutator=mutate)
    atheris.Fuzz()


main()
