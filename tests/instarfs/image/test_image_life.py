"""An image's life, in any order: damaged, checked, planned, repaired, crashed, taken back, trimmed.

A hypothesis state machine on a real file, without a mount. `--cases 6000`: 600 lives.
"""

import random
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from instarfs.errors import PlanStale, RepairInterrupted
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.repair.interrupted import pending
from instarfs.repair.outcome import RepairOutcome, Status
from instarfs.repair.run import Repairer
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import RepairError
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, propose, total
from planner.source import Bytes
from tests.cached import cached_check, cached_propose, check_bytes, propose_bytes
from tests.crash.guest import disks
from tests.devices import EIO, WatchedDevice, from_then_on
from tests.fuzz.mutations import mutate_words
from tests.images.damage import DAMAGES
from tests.lives import LARGEST, SHAPES, damaged, lives, made

CASES_A_LIFE = 10

tiers = st.sampled_from(RepairTier)
seeds = st.integers(0, 1 << 16)


class ImageLife(RuleBasedStateMachine):
    """``undoes_to``: what undo must give, where nobody else wrote since the repair.

    ``taken_back_to``: what the next repair or undo must begin from, where one was interrupted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "disk.qcow2"
        self.undoes_to: bytes | None = None
        self.taken_back_to: bytes | None = None

    def teardown(self) -> None:
        self.directory.cleanup()

    # ---- the file ----

    def read(self) -> bytes:
        return self.path.read_bytes()

    def write(self, content: bytes) -> None:
        """As somebody else would, who knows nothing of undo files."""
        self.path.write_bytes(content)
        self.undoes_to = None

    def repairer(self, image: Image, fails_at: int | None = None) -> Repairer:
        fail = from_then_on(fails_at if fails_at is not None else 1 << 30, EIO)
        device = lambda fd, name: WatchedDevice(fd, name, fail)  # noqa: E731
        return Repairer(image, check=cached_check, propose=cached_propose, device=device)

    def run(self, tier: RepairTier | None, quote: str, fails_at: int | None) -> RepairOutcome:
        """Repair with that tier, or undo; from the operation *fails_at* on the disk is gone."""
        with Image.open(str(self.path)) as image:
            repairer = self.repairer(image, fails_at)
            return repairer.undo() if tier is None else repairer.repair(tier, quote)

    @initialize(shape=st.sampled_from(SHAPES))
    def begin(self, shape: Mapping[str, int]) -> None:
        self.write(made(shape))

    # ---- what happens to it ----

    @precondition(lambda self: self.taken_back_to is None)
    @rule(name=st.sampled_from(sorted(DAMAGES)), seed=seeds)
    def damage(self, name: str, seed: int) -> None:
        before = self.read()
        content = damaged(before, name, seed)
        if content != before:
            self.write(content)

    @precondition(lambda self: self.taken_back_to is None)
    @rule(seed=seeds)
    def change_words(self, seed: int) -> None:
        self.write(mutate_words(self.read(), random.Random(seed)))

    @precondition(lambda self: self.taken_back_to is None)
    @rule(cluster=st.integers(0, 40))
    def let_qemu_write(self, cluster: int) -> None:
        before = self.read()
        command = f"write -P 7 {cluster * 512} 512"
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", command, self.path],
            check=False,
            capture_output=True,
            timeout=60,
        )
        if self.path.stat().st_size > LARGEST:
            self.path.write_bytes(before)  # where a changed word led it
        if self.read() != before:
            self.undoes_to = None

    # ---- looking ----

    @rule()
    def check(self) -> None:
        content = self.read()
        first, again = check_image(Bytes(content)), check_image(Bytes(content))
        assert same(first, again)
        assert self.read() == content

    @rule(tier=tiers)
    def plan(self, tier: RepairTier) -> None:
        content = self.read()
        assert told(lambda: propose_bytes(content, tier)) == told(
            lambda: propose(Bytes(content), check_image(Bytes(content)), tier)
        )

    # ---- repairing ----

    @rule(
        tier=tiers,
        is_quoted=st.booleans(),
        fails_at=st.none() | st.integers(1, 12),
        name=st.sampled_from(sorted(DAMAGES)),
        seed=seeds,
    )
    def repair(
        self, tier: RepairTier, is_quoted: bool, fails_at: int | None, name: str, seed: int
    ) -> None:
        if self.taken_back_to is None:
            self.damage(name, seed)  # or there would seldom be anything to repair
        start = self.read() if self.taken_back_to is None else self.taken_back_to
        self.repair_from(start, tier, plan_id(start, tier) if is_quoted else "", fails_at)

    @rule(tier=tiers)
    def repair_again(self, tier: RepairTier) -> None:
        start = self.read() if self.taken_back_to is None else self.taken_back_to
        self.repair_from(start, tier, plan_id(start, tier), None)

    def repair_from(
        self, start: bytes, tier: RepairTier, quote: str, fails_at: int | None
    ) -> RepairOutcome:
        was_interrupted = self.taken_back_to is not None
        outcome = self.run(tier, quote, fails_at)
        if outcome.status is Status.INTERRUPTED:
            self.taken_back_to = start
            self.assert_pending()
            return outcome
        assert outcome.recovered == was_interrupted or outcome.error is not None
        self.taken_back_to = None
        now = self.read()
        if outcome.stands and now != start:
            assert outcome.found == outcome.repaired + outcome.left_count
            self.assert_better(start, now, outcome)
            self.undoes_to = start
        else:
            assert now == start, outcome.reason
        return outcome

    @precondition(lambda self: self.taken_back_to is None)
    @rule(tier=tiers, name=st.sampled_from(sorted(DAMAGES)), seed=seeds)
    def quote_a_plan_of_before(self, tier: RepairTier, name: str, seed: int) -> None:
        quote = plan_id(self.read(), tier)
        self.damage(name, seed)
        content = self.read()
        now = plan_id(content, tier)
        if quote and now and quote != now:
            outcome = self.repair_from(content, tier, quote, None)
            assert isinstance(outcome.error, PlanStale)
            assert self.read() == content

    @rule(fails_at=st.none() | st.integers(0, 12))
    def undo(self, fails_at: int | None) -> None:
        before, expected = self.read(), self.taken_back_to or self.undoes_to
        was_interrupted = self.taken_back_to is not None
        outcome = self.run(None, "", fails_at)
        if outcome.status is Status.INTERRUPTED:
            if not was_interrupted:
                self.taken_back_to, self.undoes_to = self.undoes_to, None
            if self.taken_back_to is None:  # somebody had written to it
                self.write(before)
                self.path.with_name(self.path.name + SUFFIX).unlink()
            else:
                self.assert_pending()
        elif outcome.status is Status.UNDONE:
            assert expected is None or self.read() == expected
            self.undoes_to = self.undoes_to if was_interrupted else None
            self.taken_back_to = None
        else:
            assert self.read() == before, outcome.reason
            assert fails_at is not None or self.undoes_to is None, outcome.reason

    @rule()
    def trim(self) -> None:
        before = self.read()
        with Image.open(str(self.path)) as image:
            outcome = self.repairer(image).trim()
        if self.taken_back_to is not None:
            assert isinstance(outcome.error, RepairInterrupted)
        if outcome.status is not Status.TRIMMED:
            assert self.read() == before
            return
        assert check_bytes(before).verdict == "clean"
        assert same(check_bytes(before), check_bytes(self.read()))
        assert disks(self.read()) == disks(before)
        self.undoes_to = None  # its metadata only

    # ---- what must hold ----

    def assert_pending(self) -> None:
        with Image.open(str(self.path)) as image:
            assert pending(image) is not None

    def assert_better(self, start: bytes, now: bytes, outcome: RepairOutcome) -> None:
        """No counter is worse, what the outcome says is true, and the guest has lost nothing."""
        before, after = check_bytes(start), check_bytes(now)
        # What may be lost is counted again where refcounts were lost: those are leaks then.
        kept = outcome.found - total(before)
        assert kept >= 0
        assert after.counters.corruptions <= before.counters.corruptions
        assert after.counters.leaks <= before.counters.leaks + kept
        assert after.counters.check_errors <= before.counters.check_errors
        assert outcome.after is not None
        assert same(outcome.after, after)
        assert total(after) <= total(before) + kept
        remaining = disks(now)
        for name, disk in disks(start).items():
            assert disk.items() <= remaining[name].items()


def plan_id(content: bytes, tier: RepairTier) -> str:
    """The id of that tier's plan, or nothing where it refuses."""
    try:
        return propose_bytes(content, tier).plan.id
    except RepairError:
        return ""


def told(proposed: Callable[[], Proposal]) -> str:
    """The id of a plan whose numbers add up, or why there is none."""
    try:
        proposal = proposed()
    except RepairError as error:
        return str(error)
    assert proposal.found == proposal.planned + proposal.left_count
    return proposal.plan.id


def same(one: Report, other: Report) -> bool:
    """Whether two checks say the same."""
    rows = [(r.counters, r.counts(), r.verdict, str(r.error), list(r.rows())) for r in (one, other)]
    return rows[0] == rows[1]


def test_an_images_life_in_any_order(cases: int) -> None:
    run_state_machine_as_test(ImageLife, settings=lives(cases // CASES_A_LIFE))
