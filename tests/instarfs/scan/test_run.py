"""A scan from end to end: what it finds, what it says of each, what it leaves out the next time."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

import instarfs
from instarfs.image.directory import SUFFIX
from instarfs.scan.pool import Pool
from instarfs.scan.state import State
from instarfs.scan.values import GONE, NOT_QCOW2, Shard, Stamp
from instarfs.scan.workers import Nursery
from tests.images.corpus import RULES
from tests.instarfs.repair.test_run import damaged, healthy
from tests.instarfs.scan.scans import JOBS, Recorded, never, scan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and a folder with one more."""
    there = tmp_path / "images"
    (there / "deep" / "er").mkdir(parents=True)
    for name in ("clean.qcow2", "disk", "deep/er/notes.txt"):
        (there / name).write_bytes(healthy())
    (there / "leaky").write_bytes(damaged("leaked-clusters"))
    settle(there)
    return there


def settle(folder: Path) -> None:
    """Let every file be older than what could be written to it unseen."""
    old = time.time_ns() - 3600 * 10**9
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, ns=(old, old))


VERDICTS = {"clean.qcow2": "clean", "disk": "clean", "notes.txt": "clean", "leaky": "leaks"}


# ---- what is found ----


def test_images_are_found_by_how_they_begin_and_worst_counts(
    folder: Path, nursery: Nursery
) -> None:
    (folder / "text.qcow2").write_bytes(b"no image")
    (folder / "empty").touch()
    told = scan(nursery, [folder])
    assert told.verdicts() == VERDICTS
    assert told.code == 3
    assert [path.rpartition(b"/")[2] for path in told.skipped] == [b"text.qcow2"]


def test_links_lead_nowhere_and_other_names_and_strange_files_count_once(
    folder: Path, nursery: Nursery, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "image").write_bytes(healthy())
    (folder / "out").symlink_to(outside)
    (folder / "alias").symlink_to(outside / "image")
    (folder / "loop").symlink_to(folder)
    os.link(folder / "disk", folder / "zzz")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket"))
    told = scan(nursery, [folder])
    assert told.verdicts() == VERDICTS
    assert told.code == 3
    assert {path.rpartition(b"/")[2] for path in told.skipped} == {
        *(b"out", b"alias", b"loop", b"zzz", b"pipe", b"socket")
    }


def test_a_path_that_is_named_is_followed_and_met_once(folder: Path, nursery: Nursery) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    told = scan(nursery, [link, folder, folder / "disk", folder / "deep"])
    assert told.verdicts() == VERDICTS


def test_names_are_bytes(folder: Path, nursery: Nursery) -> None:
    names = [b"a\nb", b"\xff\xfe", b"\x1b[31m", b" ", b"-rf", "é".encode(), b"x" * 255]
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(healthy())
    told = scan(nursery, [folder])
    assert {path.rpartition(b"/")[2] for path in told.rows} >= set(names)
    assert {row.verdict for row in told.rows.values()} == {"clean", "leaks"}


def test_what_cannot_be_looked_at_is_said_and_the_rest_is_scanned(
    folder: Path, nursery: Nursery
) -> None:
    told = scan(nursery, [folder, folder / "missing"])
    assert told.verdicts() == VERDICTS
    assert told.code == 1
    (skipped,) = told.skipped.values()
    assert skipped.is_failure
    assert skipped.path.endswith(b"/missing")


def test_a_file_that_vanishes_or_becomes_another_is_no_error(
    folder: Path, nursery: Nursery
) -> None:
    class Meanwhile(Recorded):
        def run(self, candidates):
            found = list(candidates)
            (folder / "clean.qcow2").unlink()
            (folder / "new").write_bytes(healthy())
            (folder / "new").rename(folder / "disk")
            return super().run(iter(found))

    told = scan(nursery, [folder], engine=Meanwhile(Pool(nursery, JOBS, never)))
    assert told.verdicts() == {"notes.txt": "clean", "leaky": "leaks", "disk": "error"}
    assert "taken its place" in next(
        row.error for path, row in told.rows.items() if path.endswith(b"disk")
    )
    assert [path.rpartition(b"/")[2] for path in told.skipped] == [b"clean.qcow2"]


# ---- what is said ----


def test_every_verdict_is_that_of_a_check(tmp_path: Path, nursery: Nursery) -> None:
    for name, make in RULES.items():
        (tmp_path / name).write_bytes(make().image.data)
    (tmp_path / "healthy").write_bytes(healthy())
    (tmp_path / "cut").write_bytes(healthy()[:300])
    told = scan(nursery, [tmp_path])
    assert len(told.rows) == len(RULES) + 2
    for path, row in told.rows.items():
        report = instarfs.check(os.fsdecode(path))
        said = (row.verdict, row.exit_code, row.counters)
        assert said == (report.verdict, report.exit_code, report.counters), path
        assert row.error == (str(report.error) if report.error else "")


def test_an_overlay_is_checked_alone(tmp_path: Path, nursery: Nursery) -> None:
    from tests.images.builder import ImageBuilder  # noqa: PLC0415

    os.mkfifo(tmp_path / "pipe")
    overlay = ImageBuilder(cluster_bits=12, size=1 << 20, backing_file=b"pipe").build()
    (tmp_path / "overlay").write_bytes(overlay.data)
    assert scan(nursery, [tmp_path]).verdicts() == {"overlay": "clean"}


# ---- from scan to scan ----


@pytest.fixture
def state(tmp_path: Path):
    with State.open(str(tmp_path / "state")) as opened:
        yield opened


def test_what_has_not_changed_is_not_read_again(
    folder: Path, nursery: Nursery, state: State
) -> None:
    assert not scan(nursery, [folder], state).unchanged
    again = scan(nursery, [folder], state)
    assert again.verdicts() == VERDICTS
    assert len(again.unchanged) == len(VERDICTS)
    assert again.code == 3
    asked = Recorded(Pool(nursery, JOBS, never))
    scan(nursery, [folder], state, engine=asked, outdated_after=0.0)
    assert len(asked.asked) == len(VERDICTS)
    assert len(scan(nursery, [folder], state, program="another").unchanged) == 0


def test_what_was_written_is_read_again_whatever_its_time_says(
    folder: Path, nursery: Nursery, state: State
) -> None:
    scan(nursery, [folder], state)
    disk = folder / "disk"
    before = disk.stat()
    disk.write_bytes(damaged("leaked-clusters")[: before.st_size])
    os.utime(disk, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = scan(nursery, [folder], state)
    assert set(again.rows) - again.unchanged == {os.fsencode(disk)}
    assert again.verdicts()["disk"] == "leaks"
    assert [(change.before, change.verdict) for change in state.changes()] == [("clean", "leaks")]
    assert [verdict for _, verdict in state.history(os.fsencode(disk))] == ["clean", "leaks"]


@pytest.mark.parametrize("seconds", [-(10**11), 10**10])
def test_a_file_of_any_time_is_scanned(
    folder: Path, nursery: Nursery, state: State, seconds: int
) -> None:
    """Of the years that file systems keep some are beyond 64 bits of nanoseconds."""
    os.utime(folder / "disk", (seconds, seconds))
    for _ in range(2):
        assert scan(nursery, [folder], state).verdicts() == VERDICTS
    (stamp,) = (row.stamp for row in state.rows("clean") if row.path.endswith(b"/disk"))
    assert (stamp.mtime_ns < 0) == (seconds < 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_of_times_beyond_64_bits_the_nearest_is_taken(sign: int) -> None:
    furthest = (1 << 63) - 1
    assert Stamp.of(1, 2, sign * furthest, sign * furthest * 10).mtime_ns == sign * furthest
    assert abs(Stamp.of(1, 2, 3, sign * furthest * 10).ctime_ns - sign * furthest) <= 1


def test_a_row_of_the_moment_is_asked_again(folder: Path, nursery: Nursery, state: State) -> None:
    """A file that was written just now may be written once more within the same tick."""
    (folder / "young").write_bytes(healthy())
    future = time.time_ns() + 3600 * 10**9
    os.utime(folder / "young", ns=(future, future))
    scan(nursery, [folder], state)
    again = scan(nursery, [folder], state)
    assert set(again.rows) - again.unchanged == {os.fsencode(folder / "young")}


def test_an_image_whose_repair_was_interrupted_is_asked_again(
    folder: Path, nursery: Nursery, state: State
) -> None:
    """The undo file may go while the image stays as it is."""
    disk, undo = folder / "disk", folder / f"disk{SUFFIX}"
    undo.write_bytes(b"no undo file")
    undo.chmod(0o600)
    for _ in range(2):
        told = scan(nursery, [folder], state)
        assert f"{undo}: " in told.rows[os.fsencode(disk)].interrupted
        assert os.fsencode(disk) not in told.unchanged
    undo.unlink()
    told = scan(nursery, [folder], state)
    assert not told.rows[os.fsencode(disk)].interrupted
    assert os.fsencode(disk) in scan(nursery, [folder], state).unchanged


def test_new_images_come_first_and_then_the_oldest(
    folder: Path, nursery: Nursery, state: State
) -> None:
    for number, name in enumerate(("disk", "leaky", "clean.qcow2", "deep/er/notes.txt")):
        (folder / name).rename(folder.parent / "aside")
        (folder / f"n{number}").mkdir()
        (folder.parent / "aside").rename(folder / f"n{number}" / "image")
    for number in (2, 0, 3, 1):
        scan(nursery, [folder / f"n{number}"], state)
    (folder / "new").write_bytes(healthy())
    asked = Recorded(Pool(nursery, 1, never))
    scan(nursery, [folder], state, engine=asked, outdated_after=0.0)
    names = [os.fsdecode(path.removeprefix(os.fsencode(folder) + b"/")) for path in asked.asked]
    assert names == ["new", "n2/image", "n0/image", "n3/image", "n1/image"]


def test_where_time_ends_the_next_scan_goes_on(
    folder: Path, nursery: Nursery, state: State
) -> None:
    told = scan(nursery, [folder], state, max_duration=0.0)
    assert (told.code, told.rows) == (1, {})
    scan(nursery, [folder], state)
    # All have a verdict: old ones that there was no time for are no error.
    assert scan(nursery, [folder], state, max_duration=3600.0, outdated_after=0.0).code == 3


def test_whoever_stops_it_loses_nothing_that_was_recorded(
    folder: Path, nursery: Nursery, state: State
) -> None:
    rows: list[bytes] = []
    told = scan(nursery, [folder], state, jobs=1, stop=lambda: bool(rows) or counted(state, rows))
    assert told.code == 1
    again = scan(nursery, [folder], state)
    assert again.verdicts() == VERDICTS
    assert set(told.rows) <= again.unchanged


def counted(state: State, rows: list[bytes]) -> bool:
    if state.counts():
        rows.append(b"")
    return bool(rows)


def test_what_is_gone_is_told_and_forgotten(folder: Path, nursery: Nursery, state: State) -> None:
    scan(nursery, [folder], state)
    (folder / "leaky").unlink()
    assert scan(nursery, [folder], state).code == 0
    assert [change.verdict for change in state.changes()] == [GONE]
    assert state.counts() == {"clean": 3}


def test_an_image_that_has_lost_its_beginning_is_not_forgotten(
    folder: Path, nursery: Nursery, state: State
) -> None:
    scan(nursery, [folder], state)
    with (folder / "disk").open("r+b") as disk:
        disk.write(bytes(4096))
    for _ in range(2):
        told = scan(nursery, [folder], state)
        assert told.verdicts()["disk"] == NOT_QCOW2
        assert told.code == 63
    # Another file of that name is another matter.
    (folder / "aside").write_bytes(b"raw")
    (folder / "aside").rename(folder / "disk")
    assert scan(nursery, [folder], state).code == 3
    assert state.known(os.fsencode(folder / "disk")) is None


def test_where_a_file_system_is_not_mounted_nothing_is_forgotten(
    folder: Path, nursery: Nursery, state: State
) -> None:
    scan(nursery, [folder], state)
    path = os.fsencode(folder / "disk")
    known = state.known(path)
    assert known is not None
    state.meet(path, known.row.device + 1, known.row.device)
    (folder / "disk").unlink()
    told = scan(nursery, [folder], state)
    assert told.code == 1
    assert "mounted" in told.skipped[path].reason
    assert state.known(path) is not None


# ---- shards ----


def test_shards_together_say_what_one_scan_says(folder: Path, nursery: Nursery) -> None:
    for number in range(20):
        (folder / f"image{number}").write_bytes(healthy())
    os.link(folder / "image3", folder / "zzz")
    whole = scan(nursery, [folder])
    parts = [scan(nursery, [folder], shard=Shard(number, 3)) for number in range(3)]
    assert all(part.rows for part in parts)
    joined = [path for part in parts for path in part.rows]
    assert sorted(joined) == sorted(whole.rows)
    assert {path: row.verdict for part in parts for path, row in part.rows.items()} == {
        path: row.verdict for path, row in whole.rows.items()
    }
    assert min(part.code for part in parts) == 0
    assert max(part.code for part in parts) == whole.code == 3


def test_a_shard_is_the_same_everywhere_and_always() -> None:
    names = [b"/srv/%d" % number for number in range(1000)]
    assert [name for name in names if Shard(0, 100).has(name)][:3] == [
        *(b"/srv/40", b"/srv/53", b"/srv/202")
    ]
    sizes = [sum(Shard(number, 4).has(name) for name in names) for number in range(4)]
    assert sum(sizes) == 1000
    assert min(sizes) > 200
