"""A scan where something hangs, and beside machines that run: each costs itself, and no other."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from instarfs.scan.pool import Pool
from instarfs.scan.state import State
from instarfs.scan.values import Candidate, Outcome
from instarfs.scan.workers import Nursery
from tests.instarfs.repair.test_run import damaged, healthy
from tests.instarfs.scan.scans import JOBS, limits, never, scan
from tests.mount.mounts import settle
from tests.mount.test_bad_disk import Disk, disk

__all__ = ["disk"]  # a fixture

TIMEOUT = 1.0


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery(JOBS, limits(timeout=TIMEOUT)) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path, disk: Disk) -> Path:
    """Below it lies a disk, beside other folders with images."""
    for name in ("after", "zoo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image").write_bytes(healthy())
        settle(tmp_path / name / "image")
    return tmp_path


def names_in(folder: Path, paths: Iterable[bytes]) -> set[str]:
    return {str(Path(os.fsdecode(path)).relative_to(folder)) for path in paths}


OTHERS = {"after/image", "beneath/image.qcow2", "zoo/image"}


def test_a_folder_that_does_not_answer_is_one_line_and_forgets_nothing(
    folder: Path, disk: Disk, nursery: Nursery
) -> None:
    with State.open(str(folder / "state")) as state:
        assert names_in(folder, scan(nursery, [folder], state).rows) == OTHERS | {
            "disk/image.qcow2"
        }
        with disk.silent():
            told = scan(nursery, [folder], state)
        assert told.code == 1
        assert names_in(folder, told.rows) == OTHERS
        failed = {path: skipped for path, skipped in told.skipped.items() if skipped.is_failure}
        assert names_in(folder, failed) == {"disk"}
        assert "did not answer for 1 seconds" in failed[os.fsencode(folder / "disk")].reason
        assert state.known(os.fsencode(disk.path)) is not None
        assert not list(state.changes())


def test_a_path_that_does_not_answer_is_one_line(
    folder: Path, disk: Disk, nursery: Nursery
) -> None:
    with disk.silent():
        told = scan(nursery, [folder / "disk", folder / "zoo"])
    assert (told.code, names_in(folder, told.rows)) == (1, {"zoo/image"})
    assert names_in(folder, told.skipped) == {"disk"}


class Silenced:
    """An engine that begins when all was found, and the disk has fallen silent."""

    def __init__(self, engine: Pool, disk: Disk) -> None:
        self._engine, self._disk = engine, disk

    def run(self, candidates: Iterator[Candidate]) -> Iterator[Outcome]:
        found = list(candidates)
        with self._disk.silent():
            yield from self._engine.run(iter(found))


def test_an_image_that_does_not_answer_is_one_row(
    folder: Path, disk: Disk, nursery: Nursery
) -> None:
    engine = Silenced(Pool(nursery, JOBS, never), disk)
    told = scan(nursery, [folder], engine=engine)
    assert names_in(folder, told.rows) == OTHERS | {"disk/image.qcow2"}
    row = told.rows.pop(os.fsencode(disk.path))
    assert row.verdict == "error"
    assert row.error == "the check took longer than 1 seconds: --timeout"
    assert {each.verdict for each in told.rows.values()} == {"clean", "leaks"}


# ---- machines that run ----


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What a machine has open: damage that it does not see, and nothing else."""
    path = tmp_path / "image.qcow2"
    path.write_bytes(damaged("low-refcount"))
    return path


def test_an_image_in_use_has_the_verdict_of_a_moment_and_is_not_touched(
    image: Path, vm: subprocess.Popen[str]
) -> None:
    before, began = image.read_bytes(), time.time()
    with Nursery(JOBS, limits()) as nursery:
        (row,) = scan(nursery, [image]).rows.values()
    assert (row.verdict, row.exit_code, row.in_use) == ("corrupt", 2, True)
    assert row.confirmed == row.counters.corruptions > 0
    assert began <= row.as_of <= time.time()
    assert image.read_bytes() == before
    assert vm.poll() is None
