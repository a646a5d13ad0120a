"""A long campaign: python -m tests.guestfs --cases 500 --seed 1 [--bare] [--kinds ext4 xfs]

Prints what is missed and what is wrong as it is met, and a summary. Exit code 1 where there is any.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from tests.guestfs.campaign import NO_FILE_SYSTEM, Case, run
from tests.guestfs.settings import MAKERS, WITH_COPIES, settings


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.guestfs", description=__doc__)
    parser.add_argument("--cases", type=int, default=500, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--kinds", nargs="+", choices=MAKERS, metavar="KIND",
                        help=", ".join(MAKERS))  # fmt: skip
    parser.add_argument("--bare", action="store_true",
                        help="without the first superblock and the first GPT")  # fmt: skip
    arguments = parser.parse_args()
    kinds = tuple(arguments.kinds or (WITH_COPIES if arguments.bare else MAKERS))
    sums, unread_sums = Counter[str](), Counter[str]()
    made_so = {"is_long": True, "is_bare": arguments.bare}
    with settings(arguments.seed, kinds, **made_so) as made, tempfile.TemporaryDirectory() as at:
        for number in range(arguments.cases):
            case = run(made, arguments.seed, number, Path(at))
            _count(case, sums, unread_sums)
            if case.lost or case.wrong or case.unread == NO_FILE_SYSTEM:
                print(number, case.name, "; ".join(case.done))
                unread = [case.unread] if case.unread else []
                for what, lines in (
                    ("missed", case.lost),
                    ("wrong", case.wrong),
                    ("not counted", unread),
                ):
                    for line in lines[:3]:
                        print(f"  {what}: {line}")
    print(", ".join(f"{count} {what}" for what, count in sums.items()))
    for reason, count in unread_sums.most_common():
        print(f"  not counted: {count} {reason}")
    return 1 if sums["missed"] or sums["wrong"] else 0


def _count(case: Case, sums: Counter[str], unread: Counter[str]) -> None:
    sums["cases"] += 1
    sums["not counted"] += bool(case.unread)
    if case.unread:
        unread[case.unread] += 1
        return
    sums["that hit files"] += case.expected > 0
    sums["hit"] += case.expected
    sums["found"] += case.found
    sums["that nobody can know of"] += case.excused
    sums["missed"] += len(case.lost)
    sums["wrong"] += len(case.wrong)


if __name__ == "__main__":
    raise SystemExit(main())
