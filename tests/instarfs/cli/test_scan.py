"""`instarfs scan` as a process: what it prints, what it leaves, how it ends, and being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from mmap import PAGESIZE
from pathlib import Path

import pytest

from instarfs.errors import WORST_FIRST
from instarfs.scan.state import State
from instarfs.scan.values import ERROR, NOT_QCOW2, VERDICTS
from planner.check.report import EXIT_CODES
from tests.instarfs.repair.test_run import damaged, healthy
from tests.mount.mounts import INSTARFS
from tests.mount.small_disk import small_disk
from tests.schemas import require_valid_output

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    there = tmp_path / "images"
    there.mkdir()
    for name, content in (
        ("clean", healthy()),
        ("leaky", damaged("leaked-clusters")),
        ("corrupt", damaged("wrong-copied")),
    ):
        (there / name).write_bytes(content)
        os.utime(there / name, (1e9, 1e9 + 0.5))
    return there


@pytest.fixture
def scan(tmp_path: Path) -> Run:
    def run(*words: str | Path) -> Done:
        done = subprocess.run(
            [*INSTARFS, "scan", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        require_valid_output(words, done.stdout)
        return done

    return run


def lines(done: Done) -> list[dict[str, object]]:
    assert done.stdout.isascii()
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_text_is_worst_first(folder: Path, scan: Run) -> None:
    done = scan(folder, "--state", "state")
    assert (done.returncode, done.stderr) == (2, "")
    text = done.stdout.splitlines()
    assert text[0] == "3 images: 1 corrupt, 1 leaks, 1 clean"
    assert [line.split(":")[0] for line in text if line.startswith("  ")] == [
        *(f"  {folder}/corrupt", f"  {folder}/leaky")
    ]
    report = scan("--report", "--state", "state")
    assert (report.returncode, report.stdout) == (2, done.stdout)


def test_json_lines_say_all_of_each(folder: Path, scan: Run) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_bytes(healthy())
    (folder / "link").symlink_to("clean")
    *rows, last = lines(scan(folder, "--output", "jsonl", "--state", "state"))
    verdicts = {Path(str(row["path"])).name: row.get("verdict") for row in rows}
    assert verdicts == {
        "clean": "clean",
        "leaky": "leaks",
        "corrupt": "corrupt",
        "\ufffd": "clean",
        "link": None,
    }
    assert last["scan"]["verdicts"] == {"corrupt": 1, "leaks": 1, "clean": 2}  # type: ignore[index]
    assert last["scan"]["complete"]  # type: ignore[index]
    *again, _ = lines(scan("--report", "--output=jsonl", "--state", "state"))
    assert [row["verdict"] for row in again] == ["corrupt", "leaks", "clean", "clean"]


def test_the_counters_are_those_of_a_check(folder: Path, scan: Run) -> None:
    *rows, _ = lines(scan(folder, "--output", "jsonl"))
    for row in rows:
        words = [*INSTARFS, "check", "--output=json", str(row["path"])]
        done = subprocess.run(words, capture_output=True, check=False)
        check = json.loads(done.stdout)
        assert {key: row[key] for key in check if key in row} == {
            key: value for key, value in check.items() if key in row
        }
        assert row["exit-code"] == done.returncode


def test_quiet_says_nothing(folder: Path, scan: Run) -> None:
    done = scan("-q", folder)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(
    "words",
    [
        *([], ["--report"], ["--report", "--state", "missing"], ["--shard", "4/4", "x"]),
        *(["--shard", "1", "x"], ["--timeout", "soon", "x"], ["--max-memory", "1M", "x"]),
        *(["--state", "images", "images"], ["--state", "no/where", "images"]),
        *(["--state", "images/clean", "images"], ["missing"], ["--report", "--state", "s", "x"]),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], folder: Path, scan: Run) -> None:
    done = scan("-q", *words) if words == ["missing"] else scan(*words)
    assert done.returncode == 1
    assert done.stderr.count("\n") == (0 if words == ["missing"] else 1)
    assert (folder / "clean").read_bytes() == healthy()


def test_a_second_scan_into_a_state_says_that_there_is_one(
    folder: Path, scan: Run, tmp_path: Path
) -> None:
    with State.open(str(tmp_path / "state")):
        done = scan(folder, "--state", "state")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "another scan" in done.stderr


def test_a_scan_that_is_killed_loses_what_was_under_way_and_nothing_else(
    tmp_path: Path, scan: Run
) -> None:
    folder, count = tmp_path / "many", 30
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}").write_bytes(healthy())
        os.utime(folder / f"{number}", (1e9, 1e9 + 0.5))
    state = tmp_path / "state"
    # So slow that it is surely not through.
    slow = ["--jobs", "1", "--max-read-rate", "400k"]
    words: list[str | Path] = [*INSTARFS, "scan", folder, "--state", state, *slow]
    recorded = 0
    for least in (
        0,
        3,
        7,
    ):  # before there is a state, within the first scan, within one that goes on
        killed = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
        try:
            until = time.monotonic() + 60
            while rows_of(state) < least:
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            os.kill(killed.pid, signal.SIGKILL)
            killed.communicate()
        before, recorded = recorded, rows_of(state)
        assert max(least, before) <= recorded < count
    shown = scan("--report", "--state", state).stdout
    assert "goes on, or was killed" in shown
    *rows, last = lines(scan(folder, "--state", state, "--output", "jsonl"))
    assert len(rows) == count
    assert sum(bool(row["unchanged"]) for row in rows) == recorded
    assert last["scan"]["checked"] == count - recorded  # type: ignore[index]


def rows_of(state: Path) -> int:
    try:
        with State.read(str(state)) as read:
            return sum(read.counts().values())
    except Exception:  # noqa: BLE001 - it is being made
        return 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_scan_that_is_stopped_says_how_far_it_came(number: int, tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / f"{n}").write_bytes(healthy())
    slow = ["--output=jsonl", "--jobs=1", "--max-read-rate=400k"]
    words: list[str | Path] = [*INSTARFS, "scan", tmp_path, *slow]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as stopped:
        assert stopped.stdout is not None
        first = stopped.stdout.readline()
        os.killpg(stopped.pid, number)  # as a terminal or systemd does: all of them
        out, err = stopped.communicate()
    *rows, last = [json.loads(line) for line in (first + out).splitlines()]
    assert (stopped.returncode, err) == (1, "")
    assert not last["scan"]["complete"]
    assert len(rows) == last["scan"]["checked"] < 40
    assert {row["verdict"] for row in rows} == {"clean"}


def test_there_is_a_place_for_every_verdict_worst_first() -> None:
    codes = {**EXIT_CODES, ERROR: 1, NOT_QCOW2: 63}
    assert set(VERDICTS) == set(codes)
    places = [WORST_FIRST.index(codes[verdict]) for verdict in VERDICTS]
    assert places == sorted(places)


@pytest.mark.parametrize("pages", [1, 8, 12])
def test_where_there_is_no_space_for_a_state_none_is_to_be_put_aside(
    pages: int, folder: Path, tmp_path: Path
) -> None:
    here = tmp_path / "small"
    with small_disk(here, pages * PAGESIZE) as disk:
        done = disk.instarfs("scan", "--state", here / "state", folder / "clean")
        assert done.returncode == 1
        assert done.stderr == (
            f"instarfs: {here}/state: the state of the scan cannot be written: No space left on"
            " device; make space (df): the next scan goes on with it\n"
        )
        assert disk.run("mount", "-o", "remount,size=4M", here).returncode == 0
        done = disk.instarfs("scan", "--state", here / "state", folder / "clean")
        assert (done.returncode, done.stderr) == (0, "")
