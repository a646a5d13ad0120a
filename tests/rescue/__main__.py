"""A long campaign: python -m tests.rescue --cases 200 --seed 1

Aged disks are made (which only root can, with QEMU's storage daemon), and each loses something in
every way. Prints what is not placed and what is wrong as it is met, and figures by kind of loss, by
file system, by partition table and by size of cluster: of the L2 tables that any metadata lies in,
and of those of file data alone, how many are placed, and beside it how many the order of the file
would put right. Wrong is a table in another place than its own, a cluster that `qemu-img` reads
otherwise than before and that is not told to be unreadable, a rebuilt image that `qemu-img check`
does not find clean, a snapshot that did not come back, and a source that changed. Exit code 1 where
anything is.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from tests.rescue.campaign import Case, look_at, made, run_case
from tests.rescue.disks import make_disk
from tests.rescue.losses import LOSSES, OF_SNAPSHOTS


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.rescue", description=__doc__)
    parser.add_argument("--cases", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="make the disks there, and keep them"
    )
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with that disk")
    parser.add_argument(
        "--loss",
        action="append",
        choices=LOSSES,
        help="of the losses that one, and others so named",
    )
    arguments = parser.parse_args()
    losses = arguments.loss or list(LOSSES)
    cases: list[tuple[tuple[str, ...], Case]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        number = arguments.first
        while len(cases) < arguments.cases:
            mine = losses[: arguments.cases - len(cases)]
            cases += _run_disk(folder, arguments.seed, number, mine)
            print(f"{number}: {len(cases)} cases done", flush=True)
            if arguments.keep is None:
                (folder / f"{arguments.seed}-{number}.qcow2").unlink()
            number += 1
    _print_sums(cases)
    return 1 if any(case.wrong for _, case in cases) else 0


def _run_disk(
    folder: Path, seed: int, number: int, losses: list[str]
) -> list[tuple[tuple[str, ...], Case]]:
    image, how = folder / f"{seed}-{number}.qcow2", made(seed, number)
    if not image.exists():
        make_disk(image, how, seed)
    was = look_at(image, folder)
    cases: list[tuple[tuple[str, ...], Case]] = []
    for loss in losses:
        if loss in OF_SNAPSHOTS and not how.snapshot:
            continue
        case = run_case(image, was, how, loss, f"{seed} {number} {loss}")
        size = f"{1 << how.cluster_bits >> 10}K"
        with_one = "snapshot" if how.snapshot else "no snapshot"
        cases.append(((loss, how.filesystem, f"table: {how.table}", size, with_one), case))
        for what, lines in (("missed", case.missed), ("WRONG", case.wrong)):
            for line in lines:
                print(f"{number} {case.name}: {what}: {line}", flush=True)
    was.delete()
    return cases


def _print_sums(cases: list[tuple[tuple[str, ...], Case]]) -> None:
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for names, case in cases:
        for name in (*names, "all"):
            sums[name]["cases"] += 1
            sums[name]["by order"] += case.by_order
            sums[name]["wrong"] += len(case.wrong)
            sums[name]["whole"] += case.is_whole
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
                f" disks whole {found['whole']}, wrong {found['wrong']};"
                f" by order {found['by order']}/{found['metadata'] + found['data']}"
            )


if __name__ == "__main__":
    raise SystemExit(main())
