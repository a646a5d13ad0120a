"""The file in which a scan keeps what is known: whose it is, and what can be wrong with it."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from instarfs.errors import StateFailed, StateInUse, StateMissing, StateTooNew
from instarfs.scan.state import VERSION, State
from instarfs.scan.values import Row, Run, Skipped, Stamp
from planner.check.report import CheckCounters
from tests.fuzz.scan_states import DEEPEST, FOREIGN, SCHEMA, alias, lengthen
from tests.images.poison import POISON

STAMP = Stamp((1 << 64) - 1, 1 << 62, 3, 4)
COUNTERS = CheckCounters(1, 2, 3, 4, 5, 6, 7, 8)
ROW = Row(
    path=b"/srv/\xff\n",
    device=(1 << 63) + 5,
    stamp=STAMP,
    header=b"h" * 32,
    verdict="corrupt",
    exit_code=2,
    counters=COUNTERS,
    as_of=1000.5,
    seconds=0.25,
    bytes_read=4096,
    in_use=True,
    confirmed=7,
    in_motion=9,
    error="why \udcff",
    lasts=True,
    interrupted="a repair of \udcff was",
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "state")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda it: it.symlink_to("/dev/null")])
def test_what_is_no_file_is_no_state(path: str, make: Callable[[Path], None]) -> None:
    make(Path(path))
    with pytest.raises(StateFailed, match="it is no file"):
        State.open(path)
    assert list(Path(path).parent.iterdir()) == [Path(path)]


def test_a_row_comes_back_as_it_was(path: str) -> None:
    with State.open(path) as state:
        state.begin("1", 1.0)
        state.record(ROW, "1")
    with State.read(path) as state:
        known = state.known(ROW.path)
        assert known is not None
        assert known.program == "1"
        shown, interrupted = "why \\udcff", "a repair of \\udcff was"
        assert known.row == replace(ROW, error=shown, interrupted=interrupted)
        assert list(state.rows("corrupt")) == [known.row]
        assert state.counts() == {"corrupt": 1}
        assert state.oldest() == 1000.5


TEXT = POISON.decode(errors="ignore")
NO_BYTES: tuple[object, ...] = (TEXT, 7, None)
NO_TEXT: tuple[object, ...] = (POISON,)
NO_NUMBER: tuple[object, ...] = (TEXT, POISON, 1.5, math.inf)
NO_TIME: tuple[object, ...] = (TEXT, POISON, math.inf, -math.inf, -1, 1 << 62)
NO_VERDICT: tuple[object, ...] = (TEXT, POISON, 7, "")
WRONG: dict[str, dict[str, tuple[object, ...]]] = {
    "images": {
        "path": (*NO_BYTES[:2], b"a\0b"),
        "header": NO_BYTES,
        **dict.fromkeys(("device", "inode", "size", "mtime_ns", "ctime_ns"), (*NO_NUMBER, None)),
        **dict.fromkeys(("leaks", "bytes_read", "in_use", "in_motion", "lasts"), NO_NUMBER),
        "verdict": NO_VERDICT,
        "exit_code": (*NO_NUMBER, 5, -1),
        **dict.fromkeys(("as_of", "seconds"), NO_TIME),
        **dict.fromkeys(("error", "program"), NO_TEXT),
    },
    "history": {
        "path": (*NO_BYTES[:2], b"a\0b"),
        "as_of": NO_TIME,
        **dict.fromkeys(("before", "verdict"), NO_VERDICT),
    },
    "runs": {
        **dict.fromkeys(("began", "ended"), NO_TIME),
        **dict.fromkeys(("checked", "unchanged", "skipped", "bytes_read", "complete"), NO_NUMBER),
    },
    "unseen": {"path": (*NO_BYTES[:2], b"a\0b"), "reason": NO_TEXT},
}
"""What no column of a state has, unless somebody put it there: SQLite keeps anything in any."""


def read_all(state: State) -> None:
    for verdict in state.counts():
        list(state.rows(verdict))
    state.known(ROW.path)
    state.exit_codes()
    state.oldest()
    state.last_run()
    list(state.changes())
    state.history(ROW.path)
    list(state.unseen())


@pytest.mark.parametrize(
    ("table", "column"), [(table, column) for table, columns in WRONG.items() for column in columns]
)
def test_what_it_does_not_hold_is_refused(path: str, table: str, column: str) -> None:
    with State.open(path) as state:
        for verdict in ("leaks", ROW.verdict):
            state.begin("1", 1.0)
            state.record(replace(ROW, verdict=verdict), "1")
            state.skip(Skipped(b"unseen", "why", is_failure=True))
            state.end(Run(1.0, 2.0, 3, 4, 5, 6, complete=True))
    with State.read(path) as state:
        read_all(state)
    whole = Path(path).read_bytes()
    for value in WRONG[table][column]:
        Path(path).write_bytes(whole)
        with contextlib.closing(sqlite3.connect(path)) as database:
            last = "run = (SELECT MAX(run) FROM runs)" if table != "images" else "1"
            database.execute(f"UPDATE {table} SET {column} = ? WHERE {last}", [value])  # noqa: S608
            database.commit()
        with State.read(path) as state, pytest.raises(StateFailed, match="it is damaged"):
            read_all(state)


def test_it_is_for_its_owner_alone(path: str) -> None:
    with State.open(path):
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


def test_one_scan_at_a_time_and_reports_meanwhile(path: str) -> None:
    with State.open(path) as state:
        state.begin("1", 1.0)
        state.record(ROW, "1")
        with pytest.raises(StateInUse):
            State.open(path)
        with State.read(path) as report:
            assert report.counts() == {"corrupt": 1}
    with State.open(path):
        pass


def test_one_that_another_program_writes_to_is_in_use(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instarfs.scan.state._BUSY_SECONDS", 0.01)
    with State.open(path):
        pass
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StateInUse):
        State.open(path)
    other.close()


def spoilt(path: Path) -> None:
    with State.open(str(path)) as state:
        state.begin("1", 1.0)
        for number in range(2000):
            state.record(replace(ROW, path=b"/%d" % number), "1")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 400_000)


def of_another_program(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE images(path)")
    database.commit()
    database.close()


def use(path: str) -> None:
    with State.open(path) as state:
        state.begin("1", 1.0)
        state.record(ROW, "1")
        list(state.rows("corrupt"))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"QFI\xfb" + bytes(9000)),
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.symlink_to("/nowhere/at/all"),
        of_another_program,
        spoilt,
    ],
    ids=["an image", "a folder", "a pipe", "a link", "another program's", "spoilt"],
)
def test_what_is_no_state_is_told_in_a_line_and_left_alone(make, tmp_path: Path) -> None:
    path = tmp_path / "state"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StateFailed) as raised:
        use(str(path))
    assert str(path) in str(raised.value)
    if before is not None:
        assert path.read_bytes() == before


@pytest.mark.parametrize("statements", FOREIGN)
def test_one_with_more_in_it_than_tables_is_refused(path: str, statements: str) -> None:
    State.open(path).__exit__(None, None, None)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(statements)
    for opened in (State.open, State.read):
        with pytest.raises(StateFailed, match="it is damaged"):
            opened(path)


def full(path: str) -> Path:
    with State.open(path) as state:
        state.begin("1", 1.0)
        for number in range(300):
            state.record(replace(ROW, path=b"/%d" % number), "1")
            state.record(replace(ROW, path=b"/%d" % number, verdict="leaks"), "1")
            state.skip(Skipped(b"/%d" % number, "why", is_failure=True))
    return Path(path)


@pytest.mark.parametrize("name", ["images", "history_by_run", "unseen", SCHEMA])
@pytest.mark.parametrize("levels", [1, DEEPEST])
def test_one_whose_pages_lead_to_each_other_is_refused(path: str, name: str, levels: int) -> None:
    alias(full(path), name, levels)
    with pytest.raises(StateFailed), State.read(path) as state:
        read_all(state)


def test_one_with_a_row_that_is_longer_than_any_is_refused(path: str) -> None:
    lengthen(full(path), "images", 100_000_000)
    with pytest.raises(StateFailed, match="it is damaged"), State.read(path) as state:
        read_all(state)


def test_the_longest_names_that_there_can_be_are_kept(path: str) -> None:
    name = b"/" + b"\xff" * 4094
    told = f"{os.fsdecode(name)}: not what {os.fsdecode(name)} was"
    row = replace(ROW, path=name, error=told, interrupted=told)
    with State.open(path) as state:
        state.begin("1", 1.0)
        state.record(row, "1")
        read_all(state)


def test_one_of_a_newer_version_is_left_alone(path: str) -> None:
    with State.open(path):
        pass
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {VERSION + 1}")
    database.close()
    for use in (State.open, State.read):
        with pytest.raises(StateTooNew):
            use(path)


def test_one_of_the_version_before_is_renewed_by_the_next_scan(path: str) -> None:
    with State.open(path) as state:
        state.begin("1", 1.0)
        state.record(replace(ROW, error=""), "1")
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE images DROP COLUMN interrupted")
        database.execute("PRAGMA user_version = 1")
    with pytest.raises(StateFailed, match="an earlier version wrote it: the next scan renews it"):
        State.read(path)
    with State.open(path):
        pass
    with State.read(path) as state:
        known = state.known(ROW.path)
        assert known is not None
        assert known.row == replace(ROW, error="", interrupted="")


def test_a_report_makes_no_state(path: str) -> None:
    with pytest.raises(StateMissing):
        State.read(path)
    assert not Path(path).exists()


def test_the_history_has_a_line_for_each_change(path: str) -> None:
    with State.open(path) as state:
        for verdict in ("clean", "clean", "corrupt", "clean"):
            state.begin("1", 1.0)
            state.record(replace(ROW, verdict=verdict), "1")
        assert [verdict for _, verdict in state.history(ROW.path)] == ["clean", "corrupt", "clean"]
        assert [(each.before, each.verdict) for each in state.changes()] == [("corrupt", "clean")]


def test_what_could_not_be_looked_at_is_known_until_the_next_scan(path: str) -> None:
    with State.open(path) as state:
        state.begin("1", 1.0)
        skipped = Skipped(b"/srv/\xff", "Permission denied", is_failure=True)
        state.skip(skipped)
        assert list(state.unseen()) == [skipped]
        state.begin("1", 2.0)
        assert not list(state.unseen())
