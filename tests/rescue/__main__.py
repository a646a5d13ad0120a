"""A long campaign: python -m tests.rescue --cases 200 --seed 1

Aged disks are made (which only root can, with QEMU's storage daemon), and each loses something in
every way. Prints what is not placed and what is wrong as it is met, and figures by kind of loss and
by file system: of the L2 tables that any metadata lies in, and of those of file data alone, how
many are placed, and beside it how many the order of the file would put right. Exit code 1 where
anything is wrong.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from tests.rescue.campaign import Case, made, run_case
from tests.rescue.disks import make_disk
from tests.rescue.losses import LOSSES, truth_of


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.rescue", description=__doc__)
    parser.add_argument("--cases", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="make the disks there, and keep them"
    )
    arguments = parser.parse_args()
    cases: list[tuple[tuple[str, ...], Case]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        number = 0
        while len(cases) < arguments.cases:
            cases += _run_disk(folder, arguments.seed, number, arguments.cases - len(cases))
            if arguments.keep is None:
                (folder / f"{arguments.seed}-{number}.qcow2").unlink()
            number += 1
    _print_sums(cases)
    return 1 if any(case.wrong for _, case in cases) else 0


def _run_disk(
    folder: Path, seed: int, number: int, most: int
) -> list[tuple[tuple[str, ...], Case]]:
    image, how = folder / f"{seed}-{number}.qcow2", made(seed, number)
    if not image.exists():
        make_disk(image, how, seed)
    truth = truth_of(image)
    cases: list[tuple[tuple[str, ...], Case]] = []
    for loss in list(LOSSES)[:most]:
        case = run_case(image, how, truth, loss, f"{seed} {number} {loss}")
        cases.append(((loss, how.filesystem), case))
        for what, lines in (("missed", case.missed), ("WRONG", case.wrong)):
            for line in lines:
                print(f"{number} {case.name}: {what}: {line}", flush=True)
    return cases


def _print_sums(cases: list[tuple[tuple[str, ...], Case]]) -> None:
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for names, case in cases:
        for name in (*names, "all"):
            sums[name]["cases"] += 1
            sums[name]["by order"] += case.by_order
            sums[name]["wrong"] += len(case.wrong)
            for sort in ("metadata", "data"):
                sums[name][sort] += case.tables[sort]
                sums[name][f"{sort} placed"] += case.placed[sort]
    for name in (*LOSSES, *sorted(set(sums) - {*LOSSES, "all"}), "all"):
        if name in sums:
            found = sums[name]
            print(
                f"{name:20} {found['cases']:4} cases:"
                f" metadata {found['metadata placed']}/{found['metadata']},"
                f" data {found['data placed']}/{found['data']},"
                f" wrong {found['wrong']}; by order {found['by order']}"
            )


if __name__ == "__main__":
    raise SystemExit(main())
