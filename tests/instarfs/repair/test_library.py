"""instarfs.repair.library: what other programs call does what the commands do."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import instarfs
from instarfs.errors import ImageInUse, ImageMissing, InstarfsError
from instarfs.image import locks
from instarfs.image.directory import SUFFIX
from instarfs.repair.outcome import Status
from planner import RepairTier
from planner.errors import AmbiguousCorruption, NotQcow2
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
