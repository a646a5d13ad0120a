"""instarfs.repair.checking: the steps of a check, and what of them makes a report torn."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from instarfs.errors import ImageInUse
from instarfs.image import locks
from instarfs.image.file import FileSource, Image
from instarfs.repair import library
from instarfs.repair.checking import LiveCheck, run_check
from planner.check.check import check_image
from planner.check.report import Report
from planner.source import Source
from tests.instarfs.repair.test_run import healthy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    path.write_bytes(healthy())
    os.utime(path, (0, 0))  # so that a write shows in its times, whatever the clock's tick
    return path


def after(step: Callable[[], object]) -> Callable[[Source], Report]:
    """A check at the end of which *step* is done."""

    def check(source: Source) -> Report:
        report = check_image(source)
        step()
        return report

    return check


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"Q")


def test_nothing_happens_meanwhile(path: Path) -> None:
    with Image.open(str(path)) as image:
        checked = run_check(image, check_image)
        assert (checked.report.verdict, checked.pending) == ("clean", None)
        assert checked.still_holds
        assert checked.report_now() is checked.report


def test_written_to_during_the_check(path: Path) -> None:
    with Image.open(str(path)) as image:
        checked = run_check(image, after(lambda: write(path)))
        assert (checked.report.changed, checked.report.verdict) == (True, "torn")


def test_written_to_after_the_check(path: Path) -> None:
    with Image.open(str(path)) as image:
        checked = run_check(image, check_image)
        write(path)
        assert not checked.report.torn
        assert checked.report_now().verdict == "torn"


def test_opened_for_writing_before_the_check_or_during_it(path: Path) -> None:
    with Image.open(str(path)) as image, path.open("r+b") as other:
        with locks.held(other.fileno(), str(path), locks.READ_WRITE):
            assert run_check(image, check_image).report.in_use
        assert not run_check(image, check_image).report.in_use
        lock = locks.held(other.fileno(), str(path), locks.READ_WRITE)
        checked = run_check(image, after(lock.__enter__))
        assert (checked.report.in_use, checked.report.changed) == (True, False)
        lock.__exit__(None, None, None)


# ---- an image that is written to meanwhile ----


def in_use(path: Path) -> ExitStack:
    """A program that has it open for writing, until it is closed."""
    stack = ExitStack()
    other = stack.enter_context(path.open("r+b"))
    stack.enter_context(locks.held(other.fileno(), str(path), locks.READ_WRITE))
    return stack


def test_in_use_it_is_of_a_moment_between_now_and_before(path: Path) -> None:
    with Image.open(str(path)) as image, in_use(path):
        before = time.time()
        report = run_check(image, check_image, live=LiveCheck()).report
    assert (report.verdict, report.in_use, report.changed) == ("clean", True, False)
    assert report.live is not None
    assert report.live.as_of is not None
    assert before - 0.1 <= report.live.as_of <= time.time() + 0.1


def test_left_alone_it_is_checked_once_and_as_ever(path: Path) -> None:
    checks: list[Source] = []
    with Image.open(str(path)) as image:
        check = after(lambda: checks.append(image.source()))
        report = run_check(image, check, live=LiveCheck()).report
    assert (report.verdict, report.live, len(checks)) == ("clean", None, 1)


def test_written_to_without_a_lock_it_is_looked_at_once_more(path: Path) -> None:
    left = iter([write])
    with Image.open(str(path)) as image:
        check = after(lambda: next(left, lambda _: None)(path))
        report = run_check(image, check, live=LiveCheck()).report
    assert (report.verdict, report.in_use, report.changed) == ("clean", False, True)
    assert report.live is not None


def test_what_never_holds_still_is_unsettled_in_its_time(path: Path) -> None:
    """A word of its L1 table turns with each look."""
    content = path.read_bytes()
    l1_at = int.from_bytes(content[40:48], "big")
    free = l1_at + 8 * int.from_bytes(content[36:40], "big") - 8
    with path.open("r+b", buffering=0) as file, Image.open(str(path)) as image:
        turn = itertools.cycle((content[free : free + 8], bytes([0x80, *[0] * 7])))
        source = image.source

        def look() -> FileSource:
            file.seek(free)
            file.write(next(turn))
            return source()

        image.source = look  # type: ignore[assignment, method-assign]
        begun = time.monotonic()
        with in_use(path):
            report = run_check(image, check_image, live=LiveCheck(0.2)).report
    assert (report.verdict, report.exit_code) == ("unsettled", 1)
    assert report.live is not None
    assert report.live.in_motion > 0
    assert 0.2 <= time.monotonic() - begun < 10


def test_the_library_looks_at_what_is_in_use_only_when_told_to(path: Path) -> None:
    with in_use(path):
        with pytest.raises(ImageInUse):
            library.check(path)
        report = library.check(path, force_share=True, settle=1)
    assert (report.verdict, report.live is not None) == ("clean", True)
