"""States of scans that somebody made up: tables whose pages lead to each other, rows of which next
to nothing is there, and columns that take long to compute.

Source: "Database File Format", https://sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import struct
import tempfile
from pathlib import Path

from instarfs.scan.state import State
from instarfs.scan.values import Row, Skipped, Stamp
from planner.check.report import CheckCounters

INDEX_INTERIOR, TABLE_INTERIOR, INDEX_LEAF, TABLE_LEAF = 2, 5, 10, 13
PAGE = 4096
SCHEMA = "sqlite_schema"
DEEPEST = 18
"""Levels of pages that SQLite follows, below the first."""

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c"
LONG = "hex(zeroblob(300000000))"
SLOW = "replace(hex(zeroblob(20000000)), hex(zeroblob(9000000)) || 'a', 'b')"
RENAMED = "ALTER TABLE images RENAME COLUMN error TO was"
FOREIGN = (
    f"ALTER TABLE images RENAME TO before; CREATE VIEW images AS {ENDLESS}",
    "CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM images; END",
    f"ALTER TABLE runs ADD COLUMN long TEXT AS ({LONG})",
    f"{RENAMED}; ALTER TABLE images ADD COLUMN error TEXT AS ({LONG})",
    f"{RENAMED}; ALTER TABLE images ADD COLUMN error TEXT AS ({SLOW})",
    f"CREATE INDEX long ON images(verdict) WHERE {LONG} = error",
)
"""What no scan has put there."""


def make_state(rng: random.Random) -> bytes:
    """A state with a few rows that make sense, and what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        with State.open(str(path)) as state:
            state.begin("1", 1.0)
            for number in range(rng.choice((1, 3, 500))):
                state.record(_row(b"/%d" % number, rng.choice(("clean", "corrupt"))), "1")
            state.skip(Skipped(b"/", "why", is_failure=True))
        kind = rng.choice(("foreign", "aliased", "long", "aliased and long", "schema"))
        if kind == "foreign":
            with contextlib.closing(sqlite3.connect(path)) as database:
                database.executescript(rng.choice(FOREIGN))
        name = rng.choice(sorted(_roots(path).keys() - {SCHEMA}))
        if kind == "schema" or kind.startswith("aliased"):
            alias(path, SCHEMA if kind == "schema" else name, rng.choice((1, 2, 3, DEEPEST)))
        if kind.endswith("long"):
            lengthen(path, name, rng.choice((60_000, 1 << 24, 1_000_000_000)))
        return path.read_bytes()


def alias(path: Path, name: str, levels: int) -> None:
    """Have each entry of each page of so many levels of a table lead to the same page."""
    data = bytearray(path.read_bytes())
    _alias(data, _roots(path)[name], levels)
    path.write_bytes(data)


def lengthen(path: Path, name: str, length: int) -> None:
    """Have the first page of a table hold a row as long as that, which is next to nowhere."""
    data = bytearray(path.read_bytes())
    _lengthen(data, _roots(path)[name], length)
    path.write_bytes(data)


def _row(path: bytes, verdict: str) -> Row:
    return Row(
        *(path, 1, Stamp(1, 2, 3, 4), b"h" * 32, verdict, 2 if verdict == "corrupt" else 0),
        counters=CheckCounters(),
        as_of=1000.5,
        seconds=0.25,
        bytes_read=4096,
        in_use=False,
        confirmed=0,
        in_motion=0,
        error="",
        lasts=True,
        interrupted="",
    )


def _roots(path: Path) -> dict[str, int]:
    """The first page of each table and index, counted from 1."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        query = "SELECT name, rootpage FROM sqlite_schema WHERE rootpage"
        return {SCHEMA: 1, **dict(database.execute(query).fetchall())}


def _cells(data: bytearray, page: int) -> tuple[int, int, list[int]]:
    """Of a leaf: where its header is, its kind, and where its cells are."""
    at = (page - 1) * PAGE
    head = at + (100 if page == 1 else 0)
    count = int.from_bytes(data[head + 3 : head + 5], "big")
    starts = struct.unpack_from(f">{count}H", data, head + 8)
    return head, data[head], [at + start for start in starts]


def _leaf(data: bytearray, page: int) -> int:
    """The first leaf of a table."""
    while True:
        head = (page - 1) * PAGE + (100 if page == 1 else 0)
        if data[head] in (INDEX_LEAF, TABLE_LEAF):
            return page
        (first,) = struct.unpack_from(">H", data, head + 12)
        (page,) = struct.unpack_from(">I", data, (page - 1) * PAGE + first)


def _alias(data: bytearray, root: int, levels: int) -> None:
    leaf = _leaf(data, root)
    _, kind, cells = _cells(data, leaf)
    if not cells:
        return
    is_index = kind == INDEX_LEAF
    pages = len(data) // PAGE
    if leaf == root:  # its content moves to a page of its own
        pages += 1
        copy = bytearray(data[(leaf - 1) * PAGE : leaf * PAGE])
        if leaf == 1:  # where the header of the file is no cell can be
            copy[:PAGE] = copy[100:].ljust(PAGE, b"\0")
            ends = [cell - 100 for cell in cells]
            struct.pack_into(f">{len(ends)}H", copy, 8, *ends)
            struct.pack_into(">H", copy, 5, min(ends))
        data += copy
        leaf = pages
    record = bytes(data[cells[0] : cells[0] + 400])
    length, used = _varint(record)
    record = record[: used + length] if is_index else b"\1"
    below = leaf
    for level in range(levels):
        page = root if level == levels - 1 else pages + 1
        at = (page - 1) * PAGE
        if page != root:
            data += bytes(PAGE)
            pages += 1
        start = at + (100 if page == 1 else 0)
        data[start : at + PAGE] = bytes(at + PAGE - start)
        cell = struct.pack(">I", below) + record
        count = min(400, (at + PAGE - start - 12) // (len(cell) + 2))
        struct.pack_into(
            ">BHHHBI",
            *(data, start, INDEX_INTERIOR if is_index else TABLE_INTERIOR, 0, count),
            *(PAGE - count * len(cell), 0, below),
        )
        for number in range(count):
            to = PAGE - (number + 1) * len(cell)
            struct.pack_into(">H", data, start + 12 + 2 * number, to)
            data[at + to : at + to + len(cell)] = cell
        below = page
    struct.pack_into(">I", data, 28, pages)


def _varint(data: bytes) -> tuple[int, int]:
    """A number, and how many bytes it takes."""
    value = 0
    for at, byte in enumerate(data[:8]):
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + 1
    return value << 8 | data[8], 9


def _to_varint(value: int) -> bytes:
    """The same of up to 2^35, in five bytes."""
    return bytes(0x80 | value >> shift & 0x7F for shift in (28, 21, 14, 7)) + bytes([value & 0x7F])


def _lengthen(data: bytearray, root: int, length: int) -> None:
    head, kind, cells = _cells(data, _leaf(data, root))
    if not cells:
        return
    pages = len(data) // PAGE + 1
    row = b"" if kind == INDEX_LEAF else b"\x7f"
    # On a page that follows itself: a column, a blob that is all of the row; the others are NULL.
    record = b"\6" + _to_varint(2 * length + 12)
    usable = PAGE
    least = (usable - 12) * 32 // 255 - 23
    most = (usable - 12) * 64 // 255 - 23 if kind == INDEX_LEAF else usable - 35
    total = length + len(record)
    local = least + (total - least) % (usable - 4)
    local = local if local <= most else least
    cell = _to_varint(total) + row + (record + b"/" * local)[:local] + struct.pack(">I", pages)
    page = head // PAGE * PAGE
    data[page + PAGE - len(cell) : page + PAGE] = cell
    struct.pack_into(">BHHHB", data, head, kind, 0, 1, PAGE - len(cell), 0)
    struct.pack_into(">H", data, head + 8, PAGE - len(cell))
    data += struct.pack(">I", pages) + b"a" * (PAGE - 4)
    struct.pack_into(">I", data, 28, pages)
