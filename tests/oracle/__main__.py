"""Long campaigns: python -m tests.oracle [--repair] --cases 5000 --seed 1

Prints every disagreement as it is met, and a summary. Exit code 1 where there was one.
With --choices, images whose damage only a person can decide are repaired as each tier does it.
With --again, repairs follow each other: none frees unasked what the one before has kept.
With --truth, what the report calls safe or missing is held against the disk before the damage.
With --repair, every image is repaired under both tiers, by us and by qemu-img; and counted is how
many of the repairs that QEMU makes without losing guest data we make, with plan ids quoted. Those
that we do not make are listed, by what we leave and by damage.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.images.random_damage import KINDS
from tests.oracle.again import SequenceCase, run_sequence_group
from tests.oracle.campaign import GROUP_CASES, Case, groups, run_group
from tests.oracle.choices import ChoiceCase, run_choice_group
from tests.oracle.repair_campaign import RepairCase, run_repair_group
from tests.oracle.truth import TruthCase, run_truth_group


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("--repair", action="store_true", help="judge repairs rather than checks")
    parser.add_argument("--choices", action="store_true", help="judge what a person may choose")
    parser.add_argument("--again", action="store_true", help="judge repairs after repairs")
    parser.add_argument("--truth", action="store_true", help="judge what is called safe")
    parser.add_argument("--cases", type=int, default=5000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--only", type=int, metavar="CASE", help="run this case alone")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="with --only: keep its image here")
    arguments = parser.parse_args()
    if arguments.choices:
        return _choices_all(arguments)
    if arguments.again:
        return _again_all(arguments)
    if arguments.only is not None:
        run_one = _repair_one if arguments.repair else _run_one
        return run_one(arguments.seed, arguments.only, arguments.keep)
    run_all = _repair_all if arguments.repair else _truth_all if arguments.truth else _run_all
    return run_all(arguments.seed, arguments.cases, arguments.jobs)


def _run_one(seed: int, number: int, keep: Path | None) -> int:
    for case in run_group(seed, number // GROUP_CASES, number + 1, only=number, keep=keep):
        print(case)
        return 0 if case.judgement.agreed else 1
    return 1


def _chosen_group(group: int, seed: int) -> list[ChoiceCase]:
    return list(run_choice_group(seed, group))


def _choices_all(arguments: argparse.Namespace) -> int:
    seed, only = arguments.seed, arguments.only
    if only is not None:
        cases = list(run_choice_group(seed, only // GROUP_CASES, only, arguments.keep))
        print(*cases, sep="\n")
        return 0 if all(case.passed for case in cases) else 1
    outcomes: Counter[str] = Counter()
    wrong = number = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        judged = partial(_chosen_group, seed=seed)
        for done in pool.map(judged, groups(arguments.cases)):
            for case in done:
                number += 1
                told = (f"{each.outcome} {each.refusal}".strip() for each in case.judgements)
                tiers = (each.tier for each in case.judgements)
                outcomes.update(": ".join(pair) for pair in zip(tiers, told, strict=True))
                if not case.passed:
                    wrong += 1
                    print(case, flush=True)
    print(f"{number} cases of seed {seed}: {wrong} wrong")
    print(*(f"  {what}: {count}" for what, count in sorted(outcomes.items())), sep="\n")
    return 1 if wrong else 0


def _sequence_group(group: int, seed: int) -> list[SequenceCase]:
    return list(run_sequence_group(seed, group))


def _again_all(arguments: argparse.Namespace) -> int:
    seed, only = arguments.seed, arguments.only
    if only is not None:
        (case,) = run_sequence_group(seed, only // GROUP_CASES, only, arguments.keep)
        print(case)
        return 1 if case.faults else 0
    asked: Counter[str] = Counter()
    wrong = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        judged = partial(_sequence_group, seed=seed)
        for case in itertools.chain.from_iterable(pool.map(judged, groups(arguments.cases))):
            asked[" and ".join(case.asked) or "none"] += 1
            if case.faults:
                wrong += 1
                print(case, flush=True)
    print(f"{asked.total()} cases of seed {seed}: {wrong} wrong")
    print(*(f"  {which} asked for an id: {count}" for which, count in asked.items()), sep="\n")
    return 1 if wrong else 0


def _true_group(group: int, seed: int, cases: int) -> list[TruthCase]:
    return list(run_truth_group(seed, group, cases))


def _truth_all(seed: int, cases: int, jobs: int) -> int:
    started = time.monotonic()
    vouched = harmed = wrong = 0
    with ProcessPoolExecutor(jobs) as pool:
        for done in pool.map(partial(_true_group, seed=seed, cases=cases), groups(cases)):
            for case in done:
                vouched += case.verdict.vouched
                harmed += case.verdict.changed > 0
                if case.verdict.faults:
                    wrong += 1
                    print(case, flush=True)
    seconds = time.monotonic() - started
    print(f"{cases} cases of seed {seed} in {seconds:.0f} s: {wrong} untrue")
    print(f"{vouched} disks were vouched for; of those {harmed} read otherwise somewhere")
    return 1 if wrong else 0


def _whole_group(group: int, seed: int, cases: int) -> list[Case]:
    return list(run_group(seed, group, cases))


def _run_all(seed: int, cases: int, jobs: int) -> int:
    started = time.monotonic()
    codes: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    exceptions: Counter[str] = Counter()
    wrong = 0
    with ProcessPoolExecutor(jobs) as pool:
        work = partial(_whole_group, seed=seed, cases=cases)
        for done in pool.map(work, groups(cases)):
            for case in done:
                codes[case.judgement.qemu.exit_code] += 1
                kinds.update(damage.partition(":")[0] for damage in case.damages)
                exceptions.update(filter(None, [case.judgement.exception]))
                if not case.judgement.agreed:
                    wrong += 1
                    print(case, flush=True)
    seconds = time.monotonic() - started
    print(f"{cases} cases of seed {seed} in {seconds:.0f} s: {wrong} disagreements")
    print(f"exit codes of qemu-img: {dict(sorted(codes.items()))}")
    print(f"{len(kinds)} of {len(KINDS)} kinds of damage, {kinds.total()} in all")
    for name, count in exceptions.most_common():
        print(f"exception {name}: {count}")
    return 1 if wrong else 0


def _repair_one(seed: int, number: int, keep: Path | None) -> int:
    for case in run_repair_group(seed, number // GROUP_CASES, (number,), keep, measure=True):
        print(case)
        return 0 if case.passed else 1
    return 1


def _repaired_group(group: int, seed: int, cases: int) -> list[RepairCase]:
    return list(run_repair_group(seed, group, range(cases), measure=True))


def _repair_all(seed: int, cases: int, jobs: int) -> int:
    started = time.monotonic()
    seen: dict[str, Counter[str]] = {
        name: Counter() for name in ("damage", "outcome", "refusal", "purpose")
    }
    behind: dict[str, list[str]] = defaultdict(list)
    wrong = unread = mended = 0
    with ProcessPoolExecutor(jobs) as pool:
        work = partial(_repaired_group, seed=seed, cases=cases)
        for case in itertools.chain.from_iterable(pool.map(work, groups(cases))):
            seen["damage"].update(damage.partition(":")[0] for damage in case.damages)
            for judged in case.judgements:
                seen["outcome"][f"{judged.tier}: {judged.outcome}"] += 1
                seen["refusal"].update(filter(None, [judged.refusal]))
                seen["purpose"].update(judged.purposes)
                unread += judged.unread
            for reached in case.reaches:
                mended += not reached.ours
                if reached.ours:
                    damages = "; ".join(damage.partition(":")[0] for damage in case.damages)
                    what = f"{reached.tier}: {reached.ours}"
                    what += f"; by choice: {reached.chosen or 'mended'}"
                    behind[what].append(f"case {case.number} ({damages})")
            if not case.passed:
                wrong += 1
                print(case, flush=True)
    seconds = time.monotonic() - started
    print(f"{cases} cases of seed {seed}, two tiers each, in {seconds:.0f} s: {wrong} with faults")
    print(f"{len(seen['damage'])} of {len(KINDS)} kinds of damage, {seen['damage'].total()} in all")
    print(f"disks that could not be read before, and so were not compared: {unread}")
    for what in ("outcome", "purpose", "refusal"):
        for name, count in seen[what].most_common():
            print(f"{what} {name}: {count}")
    _print_reach(mended, behind)
    return 1 if wrong else 0


def _print_reach(mended: int, behind: dict[str, list[str]]) -> None:
    """Of QEMU's repairs without loss: how many are ours, and by what we leave, the others."""
    count = mended + sum(map(len, behind.values()))
    print(f"QEMU mends {count} without losing guest data; of those we mend {mended}")
    for what, cases in sorted(behind.items(), key=lambda item: -len(item[1])):
        print(f"not mended, {what}: {len(cases)}")
        for case in cases:
            print(f"  {case}")


if __name__ == "__main__":
    sys.exit(main())
