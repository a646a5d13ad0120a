"""What is known of every image, in one file that outlives a scan: SQLite, with a write-ahead log.

Each row is durable against the end of the process when it is recorded. One scan at a time writes to
a state; reports read it meanwhile. Its layout is here and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import quote_from_bytes

from instarfs.errors import (
    WORST_FIRST,
    StateFailed,
    StateFull,
    StateInUse,
    StateMissing,
    StateTooNew,
    reason_of,
)
from instarfs.image.directory import MODE, kept_readable
from instarfs.scan.values import GONE, VERDICTS, Candidate, Change, Row, Run, Skipped, Stamp
from planner.check.report import CheckCounters
from planner.source import SECTOR

VERSION = 2
APPLICATION = 0x69736673
"""In the file's header, so that no database of another program is taken for a state."""

_BUSY_SECONDS = 10.0

# SQLite believes a file: its pages may lead to each other, so that there are rows without end, or
# one that is as long as it says.
_ROW_BYTES = 1 << 17
"""Of a row, at most; what a scan records is names, of which two may be in an error, escaped."""
_STEPS_A_CALL = 10_000
_STEPS = 100_000
"""Of SQLite's machine, that a statement may take, and one more for each byte that there is."""

_WORD = 1 << 64
_DAMAGED = "it is damaged"

_COUNTERS = [field.name for field in dataclasses.fields(CheckCounters)]
_COLUMNS = [
    "path",
    "device",
    "inode",
    "size",
    "mtime_ns",
    "ctime_ns",
    "header",
    "verdict",
    "exit_code",
    *_COUNTERS,
    "as_of",
    "seconds",
    "bytes_read",
    "in_use",
    "confirmed",
    "in_motion",
    "error",
    "lasts",
    "interrupted",
    "program",
]

# SQLite keeps anything in any column: what each may hold is looked at when it is read.
_END_OF_TIME = 253_402_300_800.0
"""The year 10,000, which no date is made of."""


def _is_number(value: object) -> bool:
    return type(value) is int


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < _END_OF_TIME


_MAY_BE: dict[str, Callable[[object], bool]] = {
    "path": lambda value: isinstance(value, bytes) and b"\0" not in value,
    "bytes": lambda value: isinstance(value, bytes),
    "text": lambda value: isinstance(value, str),
    "number": _is_number,
    "time": _is_time,
    "time, or none": lambda value: value is None or _is_time(value),
    "verdict": lambda value: value in (*VERDICTS, GONE),
    "exit code": lambda value: _is_number(value) and value in WORST_FIRST,
}
_NOT_NUMBERS = {
    "path": "path",
    "header": "bytes",
    "verdict": "verdict",
    "exit_code": "exit code",
    "as_of": "time",
    "seconds": "time",
    "error": "text",
    "interrupted": "text",
    "program": "text",
}
_KINDS = tuple(_NOT_NUMBERS.get(name, "number") for name in _COLUMNS)

_SCHEMA = f"""
CREATE TABLE images(
    path BLOB PRIMARY KEY, device INTEGER, inode INTEGER, size INTEGER, mtime_ns INTEGER,
    ctime_ns INTEGER, header BLOB, verdict TEXT NOT NULL, exit_code INTEGER NOT NULL,
    {", ".join(f"{name} INTEGER NOT NULL" for name in _COUNTERS)},
    as_of REAL NOT NULL, seconds REAL NOT NULL, bytes_read INTEGER NOT NULL,
    in_use INTEGER NOT NULL, confirmed INTEGER NOT NULL, in_motion INTEGER NOT NULL,
    error TEXT NOT NULL, lasts INTEGER NOT NULL, interrupted TEXT NOT NULL DEFAULT '',
    program TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX images_by_verdict ON images(verdict) WHERE verdict != 'clean';
CREATE TABLE history(
    path BLOB NOT NULL, run INTEGER NOT NULL, as_of REAL NOT NULL, before TEXT,
    verdict TEXT NOT NULL, PRIMARY KEY (path, run)
) WITHOUT ROWID;
CREATE INDEX history_by_run ON history(run) WHERE before IS NOT NULL;
CREATE TABLE runs(
    run INTEGER PRIMARY KEY, program TEXT NOT NULL, began REAL NOT NULL, ended REAL,
    checked INTEGER NOT NULL DEFAULT 0, unchanged INTEGER NOT NULL DEFAULT 0,
    skipped INTEGER NOT NULL DEFAULT 0, bytes_read INTEGER NOT NULL DEFAULT 0,
    complete INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE unseen(
    run INTEGER NOT NULL, path BLOB NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (run, path)
) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""


def _squeezed(statement: str) -> str:
    """What SQLite keeps of a statement, however its lines were broken."""
    return "".join(statement.split())


_INTERRUPTED = "interrupted TEXT NOT NULL DEFAULT ''"
_LAYOUT = {_squeezed(statement) for statement in _SCHEMA.split(";")}
# As version 1 made it, and as it is once it was brought up: with the new column last.
(_IMAGES,) = (it for it in _LAYOUT if it.startswith("CREATETABLEimages"))
_IMAGES_1 = _IMAGES.replace(f"{_squeezed(_INTERRUPTED)},", "")
_IMAGES_2 = _IMAGES_1.replace(")WITHOUT", f",{_squeezed(_INTERRUPTED)})WITHOUT")
_LAYOUT |= {_IMAGES_1, _IMAGES_2}

# Of one scan: what it has met, and what it has put off.
_TEMPORARY = """
CREATE TEMP TABLE met(path BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE due(
    as_of REAL, path BLOB, device INTEGER, inode INTEGER, size INTEGER, mtime_ns INTEGER,
    ctime_ns INTEGER, stored INTEGER, PRIMARY KEY (as_of, path)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Known:
    """An image that has a row, and the version of this program that gave it."""

    row: Row
    program: str


class State:
    """The state of scans. Use `State.open`, `State.read` or `State.none`, as a context."""

    def __init__(self, name: str, database: sqlite3.Connection, held: ExitStack) -> None:
        """Takes *held* over, what is to be closed with it."""
        self.name, self._database, self._held = name, database, held
        self._run = 0

    @classmethod
    def open(cls, path: str) -> State:
        """The state at *path*, to be written to; made if there is none.

        Raises `StateInUse`, `StateTooNew`, `StateFailed`.
        """
        with ExitStack() as held:
            held.enter_context(_locked(path))
            with _explained(path):
                database = held.enter_context(_connected(path))
                _prepare(path, database)
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = NORMAL")
                database.executescript(_TEMPORARY)
            return cls(path, database, held.pop_all())

    @classmethod
    def read(cls, path: str) -> State:
        """The state at *path*, to be read. Raises `StateMissing` and as `open` does."""
        if not os.path.exists(path):  # noqa: PTH110
            raise StateMissing(path)
        with ExitStack() as held, _explained(path):
            database = held.enter_context(_connected(path, "mode=ro"))
            if _version(path, database) < VERSION:
                raise StateFailed(path, "an earlier version wrote it: the next scan renews it")
            return cls(path, database, held.pop_all())

    @classmethod
    def none(cls) -> State:
        """A state of one scan, which nothing is left of."""
        with ExitStack() as held:
            database = held.enter_context(contextlib.closing(sqlite3.connect(":memory:")))
            database.isolation_level = None
            database.executescript(_SCHEMA + _TEMPORARY)
            return cls("", database, held.pop_all())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _explained(self.name) if error is None else contextlib.suppress(sqlite3.Error):
            self._held.close()

    # ---- a scan writes ----

    def begin(self, program: str, now: float) -> None:
        """A scan begins."""
        with self._writing() as database:
            added = database.execute(
                "INSERT INTO runs(program, began) VALUES (?, ?)", (program, now)
            )
            self._run = int(added.lastrowid or 0)
            database.execute("DELETE FROM unseen WHERE run < ?", (self._run,))
            database.execute("DELETE FROM met")
            database.execute("DELETE FROM due")

    def record(self, row: Row, program: str) -> None:
        """What is known of an image by now."""
        with self._writing() as database:
            self._note(row.path, row.as_of, row.verdict)
            database.execute(_UPSERT, _values(row, program))
            database.execute("INSERT OR IGNORE INTO met VALUES (?)", (row.path,))

    def meet(self, path: bytes, device: int, was: int) -> None:
        """The image at *path* is there, and what is known of it holds; it *was* on that device."""
        with self._asking() as database:
            database.execute("INSERT OR IGNORE INTO met VALUES (?)", (path,))
            if device != was:
                values = (_signed(device), path)
                database.execute("UPDATE images SET device = ? WHERE path = ?", values)

    def forget(self, path: bytes, verdict: str | None, now: float) -> None:
        """There is no image at *path* any more; the history says *verdict*, if there was one."""
        with self._writing() as database:
            if verdict is not None:
                self._note(path, now, verdict)
            database.execute("DELETE FROM images WHERE path = ?", (path,))

    def skip(self, skipped: Skipped) -> None:
        """Something could not be looked at."""
        with self._writing() as database:
            values = (self._run, skipped.path, skipped.reason)
            database.execute("INSERT OR REPLACE INTO unseen VALUES (?, ?, ?)", values)

    def put_off(self, candidate: Candidate, as_of: float) -> None:
        """Have *candidate*, which was seen at *as_of*, looked at when all that is new was."""
        stamp = candidate.stamp
        words = (candidate.device, stamp.inode, stamp.size, stamp.mtime_ns, stamp.ctime_ns)
        values = (as_of, candidate.path, *map(_signed, words), candidate.stored)
        with self._asking() as database:
            database.execute("INSERT OR REPLACE INTO due VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)

    def due(self) -> Iterator[Candidate]:
        """What was put off, what was seen longest ago first."""
        after: tuple[float, bytes] = (float("-inf"), b"")
        kinds = ("time", "path", *["number"] * 6)
        query = "SELECT * FROM due WHERE (as_of, path) > (?, ?) ORDER BY as_of, path LIMIT 500"
        while part := self._rows(query, kinds, after):
            for as_of, path, device, inode, size, mtime_ns, ctime_ns, stored in part:
                stamp = Stamp(_unsigned(inode), size, mtime_ns, ctime_ns)
                yield Candidate(path, _unsigned(device), stamp, stored)
                after = as_of, path

    def not_met(self, root: bytes) -> Iterator[bytes]:
        """Images at *root* or below it that have a row, and that this scan has not met."""
        inside = root.rstrip(b"/") + b"/"
        query = (
            "SELECT path FROM images WHERE (path = ? OR (path > ? AND path < ?))"
            " AND path NOT IN (SELECT path FROM met)"
        )
        values = (root, inside, inside[:-1] + b"0")
        yield from (path for (path,) in self._by_path(query, ["path"], values))

    def end(self, run: Run) -> None:
        """The scan is over."""
        with self._writing() as database:
            database.execute(
                "UPDATE runs SET ended = ?, checked = ?, unchanged = ?, skipped = ?,"
                " bytes_read = ?, complete = ? WHERE run = ?",
                (
                    run.ended,
                    run.checked,
                    run.unchanged,
                    run.skipped,
                    run.bytes_read,
                    run.complete,
                    self._run,
                ),
            )

    # ---- anybody reads ----

    def known(self, path: bytes) -> Known | None:
        """What is known of the image at *path*."""
        found = self._rows(_SELECT_ONE, _KINDS, (path,))
        return Known(_row(found[0]), found[0][-1]) if found else None

    def rows(self, verdict: str) -> Iterator[Row]:
        """The images of a verdict, by path."""
        yield from map(_row, self._by_path(_SELECT + "verdict = ?", _KINDS, (verdict,)))

    def counts(self) -> dict[str, int]:
        """How many images there are of each verdict that there is, worst first."""
        query = "SELECT verdict, COUNT(*) FROM images GROUP BY verdict"
        counts = dict(self._rows(query, ["verdict", "number"]))
        return {verdict: counts[verdict] for verdict in VERDICTS if verdict in counts}

    def exit_codes(self) -> set[int]:
        """Those that there are of images."""
        query = "SELECT DISTINCT exit_code FROM images"
        return {code for (code,) in self._rows(query, ["exit code"])}

    def oldest(self) -> float | None:
        """When the image was checked that was checked longest ago; None where there is none."""
        ((oldest,),) = self._rows("SELECT MIN(as_of) FROM images", ["time, or none"])
        return None if oldest is None else float(oldest)

    def last_run(self) -> Run | None:
        """The last scan; it may be going on, or have been killed."""
        found = self._rows(
            "SELECT began, ended, checked, unchanged, skipped, bytes_read, complete FROM runs"
            " ORDER BY run DESC LIMIT 1",
            ["time", "time, or none", *["number"] * 5],
        )
        if not found:
            return None
        began, ended, checked, unchanged, skipped, bytes_read, complete = found[0]
        return Run(began, ended, checked, unchanged, skipped, bytes_read, bool(complete))

    def changes(self) -> Iterator[Change]:
        """What the last scan found to be otherwise than it was."""
        query = (
            "SELECT path, before, verdict FROM history WHERE before IS NOT NULL"
            " AND run = (SELECT MAX(run) FROM runs)"
        )
        kinds = ["path", "verdict", "verdict"]
        yield from (Change(*found) for found in self._by_path(query, kinds))

    def history(self, path: bytes) -> list[tuple[float, str]]:
        """The verdicts of an image, each since when it was given, oldest first."""
        query = "SELECT as_of, verdict FROM history WHERE path = ? ORDER BY run"
        return list(self._rows(query, ["time", "verdict"], (path,)))

    def unseen(self) -> Iterator[Skipped]:
        """What the last scan could not look at."""
        query = "SELECT path, reason FROM unseen WHERE run = (SELECT MAX(run) FROM runs)"
        found = self._by_path(query, ["path", "text"])
        yield from (Skipped(path, reason, is_failure=True) for path, reason in found)

    # ---- within ----

    def _note(self, path: bytes, as_of: float, verdict: str) -> None:
        """In the history, if the verdict is another than it was."""
        last = self._rows(
            "SELECT verdict, run FROM history WHERE path = ? ORDER BY run DESC LIMIT 1",
            ["verdict", "number"],
            (path,),
        )
        if last and last[0][0] == verdict:
            return
        before = last[0][0] if last and last[0][0] != GONE else None
        values = (path, self._run, as_of, before, verdict)
        self._database.execute("INSERT OR REPLACE INTO history VALUES (?, ?, ?, ?, ?)", values)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        with self._asking() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    @contextmanager
    def _asking(self) -> Iterator[sqlite3.Connection]:
        """Statements that together do no more than there is to do."""
        with _explained(self.name):
            _bound(self._database, self.name)
            yield self._database

    def _by_path(
        self, query: str, kinds: Sequence[str], values: Iterable[object] = ()
    ) -> Iterator[tuple]:  # type: ignore[type-arg]
        """What *query* gives, the first column of which is a path, in the order of these."""
        after: object = float("-inf")  # before all that SQLite may hold, paths or not
        query += " AND path > ? ORDER BY path LIMIT 500"
        while part := self._rows(query, kinds, (*values, after)):
            for row in part:
                # Pages that lead to each other have the same again.
                if isinstance(after, bytes) and row[0] <= after:
                    raise StateFailed(self.name, _DAMAGED)
                after = row[0]
                yield row

    def _rows(self, query: str, kinds: Sequence[str], values: Iterable[object] = ()) -> list[tuple]:  # type: ignore[type-arg]
        """What *query* gives, whose columns are of these *kinds* (`_MAY_BE`)."""
        with self._asking() as database:
            found = database.execute(query, tuple(values)).fetchall()
        tests = [_MAY_BE[kind] for kind in kinds]
        for row in found:
            if not all(may_be(value) for may_be, value in zip(tests, row, strict=True)):
                raise StateFailed(self.name, _DAMAGED)
        return found


_ALL = ", ".join(_COLUMNS)
_SELECT = f"SELECT {_ALL} FROM images WHERE "  # noqa: S608 - names of columns
_SELECT_ONE = _SELECT + "path = ?"
_UPSERT = f"INSERT OR REPLACE INTO images({_ALL}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608


def _values(row: Row, program: str) -> tuple[object, ...]:
    stamp = row.stamp
    return (
        row.path,
        _signed(row.device),
        *map(_signed, (stamp.inode, stamp.size, stamp.mtime_ns, stamp.ctime_ns)),
        row.header,
        row.verdict,
        row.exit_code,
        *(_signed(getattr(row.counters, name)) for name in _COUNTERS),
        row.as_of,
        row.seconds,
        row.bytes_read,
        row.in_use,
        row.confirmed,
        row.in_motion,
        _storable(row.error),
        row.lasts,
        _storable(row.interrupted),
        program,
    )


def _row(found: tuple) -> Row:  # type: ignore[type-arg]
    value = dict(zip(_COLUMNS, found, strict=True))
    stamp = Stamp(_unsigned(value["inode"]), value["size"], value["mtime_ns"], value["ctime_ns"])
    return Row(
        value["path"],
        _unsigned(value["device"]),
        stamp,
        value["header"],
        value["verdict"],
        value["exit_code"],
        counters=CheckCounters(**{name: value[name] for name in _COUNTERS}),
        as_of=value["as_of"],
        seconds=value["seconds"],
        bytes_read=value["bytes_read"],
        in_use=bool(value["in_use"]),
        confirmed=value["confirmed"],
        in_motion=value["in_motion"],
        error=value["error"],
        lasts=bool(value["lasts"]),
        interrupted=value["interrupted"],
    )


def _signed(number: int) -> int:
    """A word of 64 bits as SQLite has them: some file systems number their files by hashes."""
    return number - _WORD if number >= _WORD >> 1 else number


def _unsigned(number: int) -> int:
    return number % _WORD


def _storable(text: str) -> str:
    """Text of SQLite is UTF-8; what is none in it came from a name."""
    return text.encode("utf-8", "backslashreplace").decode()


# ---- the file ----


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Held by the one scan that writes to it. The file is made if there is none, for its owner."""
    try:
        # SQLite makes files beside whatever it opens, a device too, and to open some has effects.
        if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
            raise StateFailed(path, "it is no file")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        fd = kept_readable(os.open(path, flags, MODE))
    except OSError as error:
        raise StateFailed(path, reason_of(error)) from error
    # Closed after the database: that would lose its own locks with any descriptor of the file.
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise StateInUse(path) from error
        raise StateFailed(path, reason_of(error)) from error
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def _connected(path: str, mode: str = "mode=rw") -> Iterator[sqlite3.Connection]:
    uri = f"file:{quote_from_bytes(os.path.abspath(os.fsencode(path)))}?{mode}"  # noqa: PTH100
    with contextlib.closing(
        sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    ) as database:
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _ROW_BYTES)
        _bound(database, path)
        yield database


def _bound(database: sqlite3.Connection, path: str) -> None:
    """Have the next statements end that do more than what there is of a state gives them to do."""
    calls = itertools.count(1)

    def is_too_much() -> bool:
        return next(calls) * _STEPS_A_CALL > _STEPS + _occupied(path)

    if path:
        database.set_progress_handler(is_too_much, _STEPS_A_CALL)


def _occupied(path: str) -> int:
    """Bytes that there are of a state, its log with it."""
    found = 0
    for name in (path, f"{path}-wal"):
        with contextlib.suppress(OSError):
            found += os.stat(name).st_blocks * SECTOR  # noqa: PTH116
    return found


def _prepare(path: str, database: sqlite3.Connection) -> None:
    """Make it what it is to be, where it is empty; else see to it that it is."""
    database.execute("BEGIN IMMEDIATE")
    ((tables,),) = database.execute("SELECT COUNT(*) FROM sqlite_schema").fetchall()
    if tables:
        _bring_up(path, database)
        database.execute("COMMIT")
        return
    for statement in _SCHEMA.split(";"):
        database.execute(statement)
    database.execute("COMMIT")


def _bring_up(path: str, database: sqlite3.Connection) -> None:
    """Make a state of an earlier version one of this. Within a transaction."""
    if _version(path, database) < VERSION:
        database.execute(f"ALTER TABLE images ADD COLUMN {_INTERRUPTED}")
        database.execute(f"PRAGMA user_version = {VERSION}")


def _version(path: str, database: sqlite3.Connection) -> int:
    """Of the layout; not beyond this one. Raises `StateFailed`, `StateTooNew`."""
    ((application,),) = database.execute("PRAGMA application_id").fetchall()
    ((version,),) = database.execute("PRAGMA user_version").fetchall()
    if application != APPLICATION:
        raise StateFailed(path, "it is no state of a scan")
    if version > VERSION:
        raise StateTooNew(path, version)
    # A view may have rows without an end, a trigger do anything, and a column be computed.
    statements = database.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")
    if any(_squeezed(statement) not in _LAYOUT for (statement,) in statements):
        raise StateFailed(path, _DAMAGED)
    return int(version)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What SQLite says, as an error of ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)
        number = code & 0xFF
        if code in _NO_SPACE:
            raise StateFull(path, os.strerror(errno.ENOSPC)) from error
        if number in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StateInUse(path) from error
        if number in (sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_TOOBIG):
            raise StateFailed(path, _DAMAGED) from error
        raise StateFailed(path, str(error)) from error


# The latter: no room for what SQLite keeps beside its log, which it calls an I/O error.
_NO_SPACE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
