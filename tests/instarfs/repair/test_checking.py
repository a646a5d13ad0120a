"""instarfs.repair.checking: the steps of a check, and what of them makes a report torn."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from instarfs.errors import ImageInUse
from instarfs.image import locks
from instarfs.image.file import Image
from instarfs.repair.checking import opened, run_check
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


def test_what_is_opened_keeps_writers_away_unless_it_is_told_not_to(path: Path) -> None:
    with path.open("r+b") as other:

        def begin_to_write() -> None:
            with locks.held(other.fileno(), str(path), locks.READ_WRITE):
                pass

        with opened(str(path)), pytest.raises(ImageInUse):
            begin_to_write()
        for access in (None, locks.FORCE_SHARE):
            with opened(str(path), access=access):
                begin_to_write()
