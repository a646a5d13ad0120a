"""A long campaign: python -m tests.guestfs --cases 500 --seed 1

Prints what is missed and what is wrong as it is met, and a summary. Exit code 1 where there is any.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from tests.guestfs.campaign import run, settings


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.guestfs", description=__doc__)
    parser.add_argument("--cases", type=int, default=500, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    arguments = parser.parse_args()
    sums: Counter[str] = Counter()
    with settings(arguments.seed) as made, tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.cases):
            case = run(made, arguments.seed, number, Path(folder))
            sums["cases"] += 1
            sums["unreadable"] += case.unreadable
            sums["hit"] += 0 if case.unreadable else case.expected
            sums["found"] += case.found
            sums["missed"] += len(case.lost)
            sums["wrong"] += len(case.wrong)
            if case.lost or case.wrong:
                print(number, case.name, "; ".join(case.done))
                for what, lines in (("missed", case.lost), ("wrong", case.wrong)):
                    for line in lines[:3]:
                        print(f"  {what}: {line}")
    print(", ".join(f"{count} {what}" for what, count in sums.items()))
    return 1 if sums["missed"] or sums["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
