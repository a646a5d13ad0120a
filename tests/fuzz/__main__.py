"""Runs the fuzzers one after the other: `make fuzz SECONDS=60 ARGS="check plan"`.

Each begins with its seeds and with what earlier runs found worth keeping, in `.fuzz/`. A crasher
is written beside that; `--run FILE` runs one again, without instrumentation.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
from pathlib import Path

from tests.fuzz import bounds
from tests.fuzz.targets import FILE_BYTES, TARGETS, Target

KEPT = Path(".fuzz")

BOMBS = "bombs"
"""Not a target: whole commands, and mounts, on files with holes; see `tests.fuzz.costs`."""

A_PROCESS = 20
"""Seconds that one process fuzzes: libFuzzer and atheris leak, up to 3 MiB an input."""

# Of the whole process, and by libFuzzer's coarse clock: the bounds proper are kept by `bounds`.
_FLAGS = ["-timeout=20", "-rss_limit_mb=8192", "-print_final_stats=1", f"-max_len={FILE_BYTES}"]


def main() -> int:
    """The exit code: 0 if no fuzzer crashed."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="of each fuzzer")
    parser.add_argument("--run", type=Path, metavar="FILE", help="only run the target on this file")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join([*TARGETS, BOMBS]))
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - TARGETS.keys() - {BOMBS}
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    chosen = arguments.targets or [*TARGETS, BOMBS]
    if arguments.run:
        for name in TARGETS.keys() & set(chosen):
            seconds = bounds.run(TARGETS[name], arguments.run.read_bytes())
            print(f"{name}: {seconds:.3f} s")
        return 0
    failed = [name for name in chosen if not run(name, arguments.seconds)]
    print(f"crashed: {', '.join(failed)}" if failed else "no crash")
    return bool(failed)


def run(name: str, seconds: int) -> bool:
    """Fuzz one target, or make up bombs, for so long: whether nothing was found."""
    if name != BOMBS:
        return fuzz(name, seconds)
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"---- {name}: {seconds} s, from seed {seed} on", flush=True)
    command = [sys.executable, "-m", "tests.fuzz.costs", f"--seconds={seconds}", f"--seed={seed}"]
    return not subprocess.run(command, check=False).returncode


def fuzz(name: str, seconds: int) -> bool:
    """Fuzz one target for so long: whether nothing crashed."""
    corpus = KEPT / name
    corpus.mkdir(parents=True, exist_ok=True)
    write_seeds(TARGETS[name], corpus)
    print(
        f"---- {name}: {seconds} s, {len(list(corpus.iterdir()))} inputs to begin with", flush=True
    )
    command = [sys.executable, "-m", "tests.fuzz.worker", name, str(corpus), *_FLAGS]
    command += [f"-artifact_prefix={KEPT}/{name}."]
    for start in range(0, seconds, A_PROCESS):
        part = min(A_PROCESS, seconds - start)
        if subprocess.run([*command, f"-max_total_time={part}"], check=False).returncode:
            return False
    return True


def write_seeds(target: Target, corpus: Path) -> None:
    """Add the seeds of *target* to its corpus, named after their content as libFuzzer does."""
    for seed in target.seeds():
        name = hashlib.sha1(seed, usedforsecurity=False).hexdigest()
        (corpus / name).write_bytes(seed)


sys.exit(main())
