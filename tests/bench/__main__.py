"""Measure each row beside its peer: python -m tests.bench [--only check-1t] [--runs 5] [--json F]

Prints a line as soon as its race is over. The sample images are made in a temporary folder
(TMPDIR), the big ones sparse. No time is too long to pass: a benchmark reports.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import (
    beside_writer,
    checks,
    damaged,
    exports,
    files,
    fleets,
    growth,
    idle,
    listings,
    race,
    reads,
    repairs,
    rescues,
)
from tests.bench.samples import Samples
from tests.mount.mounts import PROJECT

RACES = (
    *checks.RACES,
    *beside_writer.RACES,
    *repairs.RACES,
    *rescues.RACES,
    *damaged.RACES,
    *listings.RACES,
    *idle.RACES,
    *reads.RACES,
    *exports.RACES,
    *files.RACES,
    *fleets.RACES,
)


FAILURES = (race.Unavailable, subprocess.CalledProcessError, OSError)
"""What keeps one race from being held; the others are."""


def main() -> None:
    """Measure what the command line asks for: without words, everything."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    names = [*(each.name for each in RACES), growth.NAME, idle.NAME]
    parser.add_argument("--only", nargs="+", choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--runs", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    arguments = parser.parse_args()
    chosen = arguments.only or names
    results: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "runs": arguments.runs,
    }
    for package in ("instarfs", "planner"):  # as an installed one is, whatever the environment says
        compileall.compile_dir(PROJECT / package, quiet=1)
    with tempfile.TemporaryDirectory(prefix="instarfs-bench-") as folder:
        samples = Samples(Path(folder))
        results["rows"] = _run_races(chosen, samples, arguments.runs)
        results["growth"] = _run_growth(samples) if growth.NAME in chosen else []
        results["idle"] = _measure_idle(samples) if idle.NAME in chosen else None
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=4) + "\n")


def _run_races(chosen: list[str], samples: Samples, runs: int) -> list[dict[str, Any]]:
    rows = []
    print(race.HEADLINE, flush=True)
    for each in RACES:
        if each.name not in chosen:
            continue
        try:
            for result in race.run_race(each, samples, runs):
                print(race.table_line(result), flush=True)
                rows.append(result.as_json())
        except FAILURES as error:
            print(f"{each.name}: not measured: {error}", flush=True)
    return rows


def _run_growth(samples: Samples) -> list[dict[str, Any]]:
    sizes = []
    print("\n" + growth.HEADLINE, flush=True)
    try:
        for size in growth.measure(samples):
            print(growth.line(size), flush=True)
            sizes.append(size.as_json())
    except FAILURES as error:
        print(f"{growth.NAME}: not measured further: {error}", flush=True)
    return sizes


def _measure_idle(samples: Samples) -> int | None:
    """KiB."""
    try:
        kib = idle.memory(samples)
    except FAILURES as error:
        print(f"{idle.NAME}: not measured: {error}", flush=True)
        return None
    print("\n" + idle.line(kib), flush=True)
    return kib


if __name__ == "__main__":
    main()
