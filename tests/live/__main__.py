"""Checks of images that are written meanwhile: python -m tests.live --checks 100 --seed 1

Beside a real program (`qemu-storage-daemon`), with so many checks of each shape of image, `qemu-img
check -U` and ours in turn: a table, and every wrong answer. With --damage, images that were damaged
before in a part that is not written, in each known way; with --damage-written, anywhere. With
--cost, what a check costs the program. With --model N, N checks beside a simulated one. With
--exhaustive, all interleavings with what a simulated one does, one operation or two of them at a
time, until --seconds have gone. Exit code 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.live.campaign import (
    DID_NOT_GO,
    NOT_OPENED,
    SHAPES,
    Session,
    damaged_sessions,
    faults,
    missed,
    sessions,
    starts,
    starts_beside_a_mount,
    throughput,
)
from tests.live.exhaustive import Explored, Script, explore, scripts
from tests.live.interleave import Case, run_case

GROUP = 50
"""Simulated checks that one process does at a time."""


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.live", description=__doc__)
    parser.add_argument("--checks", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="of these alone")
    parser.add_argument("--damage", action="store_true", help="damaged where it is not written")
    parser.add_argument("--damage-written", action="store_true", help="damaged anywhere")
    parser.add_argument("--cost", action="store_true", help="what a check costs the program")
    parser.add_argument("--model", type=int, metavar="N", help="beside a simulated program")
    parser.add_argument("--exhaustive", action="store_true", help="all interleavings with that")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N")
    parser.add_argument("--only", type=int, metavar="CASE", help="with --model: this one alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin nothing after so many")
    arguments = parser.parse_args()
    shapes = arguments.shape or list(SHAPES)
    if arguments.only is not None:
        return _print_case(run_case(arguments.seed, arguments.only))
    if arguments.model is not None:
        until = time.monotonic() + (arguments.seconds or 1e9)
        numbers = range(arguments.first, arguments.first + arguments.model)
        return _run_model(arguments.seed, numbers, arguments.jobs, until)
    if arguments.exhaustive:
        return _run_exhaustive(arguments.seed, arguments.jobs, arguments.seconds or 600)
    if arguments.cost:
        return _run_cost(shapes, arguments.seed)
    if arguments.damage or arguments.damage_written:
        return _run_damaged(shapes, arguments.seed, arguments.checks, quiet=arguments.damage)
    return _run_healthy(shapes, arguments.seed, arguments.checks)


# ---- beside a simulated program ------------------------------------------------------------------


def _print_case(case: Case) -> int:
    print(case)
    return 1 if case.wrong else 0


def _cases(first: int, seed: int, end: int, until: float) -> list[Case]:
    if time.monotonic() > until:
        return []
    return [run_case(seed, number) for number in range(first, min(end, first + GROUP))]


def _run_model(seed: int, numbers: range, jobs: int, until: float) -> int:
    began, wrong, looks, turns = time.monotonic(), 0, 0, 0
    said: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs) as pool:
        work = partial(_cases, seed=seed, end=numbers.stop, until=until)
        groups = range(numbers.start, numbers.stop, GROUP)
        for case in itertools.chain.from_iterable(pool.map(work, groups)):
            looks += case.looks
            turns += case.switches
            said[f"{'damaged' if case.damage else 'healthy'}: {case.verdict}"] += 1
            if case.wrong:
                wrong += 1
                print(case, flush=True)
    seconds = time.monotonic() - began
    print(f"{said.total()} checks of seed {seed}, each with a schedule of its own, {seconds:.0f} s")
    print(
        f"{looks} times a check read the image while the program wrote, which went on {turns} times"
    )
    for what, count in sorted(said.items()):
        print(f"  {what}: {count}")
    print(f"{wrong} wrong")
    return 1 if wrong else 0


def _explored(script: Script, until: float) -> Explored | None:
    return explore(script) if time.monotonic() < until else None


def _run_exhaustive(seed: int, jobs: int, seconds: float) -> int:
    began, done, wrong = time.monotonic(), list[Explored](), 0
    by_operation: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs) as pool:
        work = partial(_explored, until=began + seconds)
        for each in pool.map(work, scripts(seed)):
            if each is None or not each.windows:
                continue
            done.append(each)
            for name in each.script.names:
                by_operation[name] += each.interleavings
            for fault in each.wrong:
                wrong += 1
                print(f"{each.script}: {fault}", flush=True)
    seconds = time.monotonic() - began
    print(f"{len(done)} scripts of seed {seed}, {seconds:.0f} s; interleavings by operation:")
    for name, number in sorted(by_operation.items()):
        scripted = [each.script for each in done if name in each.script.names]
        alone = sum(len(script.names) == 1 for script in scripted)
        print(f"  {name}: {number} ({alone} times alone, {len(scripted) - alone} with another)")
    words, windows, runs, checks, interleavings = (
        sum(getattr(each, what) for each in done)
        for what in ("words", "windows", "runs", "checks", "interleavings")
    )
    print(f"{words} parts of writes in {windows} windows; {runs} runs to a look or to the end,")
    print(f"of {checks} different readings that an image was checked for")
    print(f"{interleavings} interleavings covered")
    for verdict, number in sorted(sum((each.verdicts for each in done), Counter[str]()).items()):
        print(f"  {verdict}: {number} different endings")
    print(f"{wrong} wrong")
    return 1 if wrong else 0


# ---- beside a real one ---------------------------------------------------------------------------

HEAD = (
    "| image | checks | writes/s | qemu-img -U: false corruptions in (most) | ours: false | clean |"
    " leaks | unsettled | settled | median s | qemu-img s | offline s |"
)


def _row(name: str, found: list[Session]) -> str:
    qemu = [answer for each in found for answer in each.qemu]
    ours = [answer for each in found for answer in each.ours]
    offline = [answer.seconds for each in found for answer in each.offline]
    wrong = [answer.corruptions or 1 for answer in qemu if answer.code in (1, 2)]
    said = Counter(answer.verdict for answer in ours)
    settled = sum(answer.as_of is not None for answer in ours)
    cells = (
        f"{name} ({SHAPES[name]})",
        len(ours),
        round(statistics.mean(each.rate for each in found)),
        f"{len(wrong)} ({max(wrong, default=0)})",
        sum(answer.code == 2 for answer in ours),
        said["clean"] + said["dirty"],
        said["leaks"],
        said["unsettled"],
        f"{100 * settled / len(ours):.1f} %",
        f"{statistics.median(answer.seconds for answer in ours):.2f}",
        f"{statistics.median(answer.seconds for answer in qemu):.2f}",
        f"{statistics.median(offline):.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _run_healthy(shapes: list[str], seed: int, checks: int) -> int:
    wrong = 0
    print(HEAD, f"|{' --- |' * 12}", sep="\n", flush=True)
    for name in shapes:
        found = []
        for each in sessions(name, seed, checks):
            found.append(each)
            for fault in faults(each):
                wrong += 1
                print(fault, file=sys.stderr, flush=True)
        print(_row(name, found), flush=True)
        refused = Counter(what.partition(":")[0] for each in found for what in each.refused)
        if refused:
            print(f"{name}: the program would not: {dict(refused)}", file=sys.stderr)
    return 1 if wrong else 0


def _run_damaged(shapes: list[str], seed: int, checks: int, *, quiet: bool) -> int:
    wrong = 0
    for name in shapes:
        said: Counter[str] = Counter()
        skipped: Counter[str] = Counter()
        kinds = 0
        for each in damaged_sessions(name, seed, checks, quiet=quiet):
            skipped.update(why for why in (NOT_OPENED, DID_NOT_GO) if why in each.skipped)
            lines = faults(each) + (missed(each) if quiet else [])
            wrong += len(lines)
            for line in lines:
                print(line, file=sys.stderr, flush=True)
            if each.stayed and each.ours:
                kinds += 1
                said.update(answer.verdict for answer in each.ours)
            elif each.damage and not each.skipped:
                skipped["gone when the program had ended"] += 1
        print(f"{name}: {kinds} kinds of damage, {said.total()} checks: {dict(said)}", flush=True)
        print(f"  not asked: {dict(skipped)}", flush=True)
    return 1 if wrong else 0


def _run_cost(shapes: list[str], seed: int) -> int:
    wrong = 0
    for name in shapes:
        found = throughput(name, seed, seconds=3, rounds=5)
        print(f"{name}: allocating writes a second, by who checks all the time: ", end="")
        print(", ".join(f"{who} {rate:.0f}" for who, rate in found.items()), flush=True)
        started, failed = starts(name, 20)
        wrong += len(failed)
        print(f"{name}: {started} machines started during 20 checks, {len(failed)} could not")
        beside = starts_beside_a_mount(name, 20)
        wrong += len(beside.failed)
        print(
            f"{name}: 20 more while a mount checked: {beside.waited} tries during a check were"
            f" refused, {len(beside.failed)} after it; its verdicts: {Counter(beside.verdicts)}"
        )
        for line in failed + beside.failed:
            print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
