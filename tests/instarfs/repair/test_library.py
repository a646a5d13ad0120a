"""instarfs.repair.library: what other programs call does what the commands do."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import instarfs
from instarfs.errors import ImageInUse, ImageMissing, InstarfsError, RepairCancelled, TrimCancelled
from instarfs.image import locks
from instarfs.image.directory import SUFFIX
from instarfs.repair.outcome import Status
from planner import RepairTier
from planner.errors import AmbiguousCorruption, Cancelled, NotQcow2
from tests.instarfs.cli.test_repair import LEAKY, LOST, content


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    path.write_bytes(content(*LEAKY))
    return path


def test_a_plan_is_what_a_repair_does_and_undo_takes_it_back(path: Path) -> None:
    report, proposal = instarfs.check(path), instarfs.plan(path, "all")
    assert report.verdict == "corrupt"
    assert path.read_bytes() == content(*LEAKY)
    outcome = instarfs.repair(path, RepairTier.ALL, proposal.plan.id)
    assert (outcome.status, outcome.error, outcome.undoable) == (Status.REPAIRED, None, 1)
    assert outcome.plan_id == proposal.plan.id
    assert path.with_name(path.name + SUFFIX).exists()
    assert instarfs.check(str(path)).verdict == "clean"
    assert instarfs.undo(path).status is Status.UNDONE
    assert path.read_bytes() == content(*LEAKY)


def test_trim_gives_space_back(path: Path) -> None:
    assert instarfs.trim(path).status is Status.REFUSED
    instarfs.repair(path, "all")
    assert instarfs.trim(path).trimmed > 0


def test_what_a_tier_refuses(path: Path) -> None:
    path.write_bytes(content(*LOST))
    outcome = instarfs.repair(path, "leaks")
    assert outcome.status is Status.REFUSED
    assert isinstance(outcome.error, AmbiguousCorruption)
    assert instarfs.plan(path, "leaks").needs_quote
    assert path.read_bytes() == content(*LOST)


def test_another_tier_is_an_error_before_anything_is_opened(tmp_path: Path) -> None:
    for work in (instarfs.plan, instarfs.repair):
        with pytest.raises(ValueError, match="some"):
            work(tmp_path / "missing", "some")


def test_what_cannot_be_opened_is_raised(path: Path) -> None:
    missing = path.with_name("missing")
    for work in (
        lambda: instarfs.check(missing),
        lambda: instarfs.plan(missing, "all"),
        lambda: instarfs.repair(missing, "all"),
        lambda: instarfs.undo(missing),
        lambda: instarfs.trim(missing),
    ):
        with pytest.raises(InstarfsError) as refused:
            work()
        assert isinstance(refused.value, ImageMissing)


def test_what_a_machine_has_open_is_neither_checked_nor_planned_nor_repaired(path: Path) -> None:
    with path.open("r+b") as other, locks.held(other.fileno(), "", locks.READ_WRITE):
        with pytest.raises(ImageInUse):
            instarfs.check(path)
        with pytest.raises(ImageInUse):
            instarfs.plan(path, "all")
        assert isinstance(instarfs.repair(path, "all").error, ImageInUse)
    assert path.read_bytes() == content(*LEAKY)


class Told:
    """A progress that keeps what it is told, and raises *error* when it is told of *stage*."""

    def __init__(self, stage: str = "", error: type[Exception] = Cancelled) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self._stage, self._error = stage, error

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.steps.append((stage, done, total))
        if stage == self._stage and (done or stage != "trimming"):
            raise self._error

    @property
    def stages(self) -> set[str]:
        return {stage for stage, _, _ in self.steps}


CHECKING = {"census", "refcounts", "owners"}


def test_progress_is_told_of_everything(path: Path) -> None:
    for work, stages in (
        (instarfs.check, CHECKING),
        (partial(instarfs.plan, tier="all"), {*CHECKING, "leaks"}),
        (partial(instarfs.repair, tier="all"), {*CHECKING, "leaks", "writing"}),
        (instarfs.trim, {*CHECKING, "trimming"}),
        (instarfs.undo, {*CHECKING, "writing"}),
    ):
        told = Told()
        work(path, progress=told)
        assert told.stages == stages
        assert all(0 <= done <= max(total, done) for _, done, total in told.steps)


def test_who_is_told_can_end_it(path: Path) -> None:
    with pytest.raises(Cancelled):
        instarfs.check(path, progress=Told("refcounts"))
    with pytest.raises(Cancelled):
        instarfs.plan(path, "all", progress=Told("leaks"))
    for stage in ("census", "leaks", "writing"):
        outcome = instarfs.repair(path, "all", progress=Told(stage))
        assert isinstance(outcome.error, RepairCancelled)
        assert path.read_bytes() == content(*LEAKY)
    assert instarfs.repair(path, "all").stands
    repaired = path.read_bytes()
    assert isinstance(instarfs.undo(path, progress=Told("writing")).error, RepairCancelled)
    assert path.read_bytes() == repaired
    assert isinstance(instarfs.trim(path, progress=Told("trimming")).error, TrimCancelled)
    assert instarfs.check(path).verdict == "clean"


@pytest.mark.parametrize("error", [ZeroDivisionError, BrokenPipeError, KeyError])
@pytest.mark.parametrize("stage", ["census", "leaks", "writing"])
def test_what_else_it_raises_comes_out_and_the_image_is_as_it_was(
    path: Path, stage: str, error: type[Exception]
) -> None:
    """An error of a terminal, or of a pipe, is none of the disk's."""
    with pytest.raises(error):
        instarfs.repair(path, "all", progress=Told(stage, error))
    assert path.read_bytes() == content(*LEAKY)
    assert not path.with_name(path.name + SUFFIX).exists()
    instarfs.repair(path, "all")
    with pytest.raises(error):
        instarfs.trim(path, progress=Told("trimming", error))


def test_what_is_no_image_has_a_report_that_says_so(path: Path) -> None:
    path.write_text("some text")
    report = instarfs.check(path)
    assert (report.verdict, type(report.error)) == ("unreadable", NotQcow2)


def test_no_limit_of_the_process_is_touched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert instarfs.plan(path, "all").planned
    assert instarfs.repair(path, "all").error is None


@pytest.mark.parametrize("first", ["", "import instarfs.repair.run; ", "instarfs.check; "])
def test_repair_is_a_function_whatever_was_loaded_before(first: str, path: Path) -> None:
    program = (
        f"import sys, instarfs; {first}import inspect;"
        "print(instarfs.repair(sys.argv[1], 'all').status, inspect.signature(instarfs.repair))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("repaired (path: ")
