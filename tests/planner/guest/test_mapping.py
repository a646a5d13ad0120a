"""Runs of guest bytes from random tables, against the specification read entry by entry."""

import random
import struct
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from planner.arrays import I64
from planner.errors import ReadFailed
from planner.guest.mapping import (
    FLAW_SENTENCES,
    MAX_LAID,
    Flaw,
    Mapping,
    RunKind,
    Runs,
    runs_of_entries,
)
from planner.qcow2.entries import COMPRESSED, COPIED, NO_HOST
from planner.qcow2.geometry import Geometry
from planner.source import Bytes
from tests.planner.sources import Sparse

L1_OFFSET = 1 << 16


@dataclass(frozen=True)
class Piece:
    """What one subcluster is read from."""

    kind: RunKind
    host: int = NO_HOST
    stored: int = 0
    flaw: Flaw = Flaw.NONE


def damaged(flaw: Flaw) -> Piece:
    return Piece(RunKind.DAMAGED, flaw=flaw)


def expected(  # noqa: PLR0911 - as QEMU's
    guest: int, word: int, bitmap: int, number: int, geometry: Geometry
) -> Piece:
    """Subcluster *number* of the guest cluster at *guest*: qcow2_get_host_offset, one at a time."""
    size = geometry.cluster_size
    if word & COMPRESSED:
        if geometry.external_data:
            return damaged(Flaw.COMPRESSED_EXTERNAL)
        shift = geometry.compressed_shift
        offset = word & ((1 << shift) - 1)
        sectors = (word >> shift & ((1 << geometry.cluster_bits - 8) - 1)) + 1
        return Piece(RunKind.COMPRESSED, offset, sectors * 512 - offset % 512)
    offset = word & 0x00FF_FFFF_FFFF_FE00
    allocated = bool(offset) or (geometry.external_data and bool(word & COPIED))
    if geometry.extended_l2:
        low, high = bitmap & 0xFFFF_FFFF, bitmap >> 32
        if low & high if allocated else low:
            return damaged(Flaw.SUBCLUSTERS)
        is_zero, is_data = bool(high >> number & 1), bool(low >> number & 1)
    else:
        is_zero, is_data = bool(word & 1), allocated
    # Without subclusters a zero flag on an entry with no offset is zero, whatever COPIED says.
    placed = allocated if geometry.extended_l2 or not is_zero else bool(offset)
    if is_zero and geometry.version < 3:
        return damaged(Flaw.ZERO_IN_V2)
    if placed and offset % size:
        return damaged(Flaw.CLUSTER_MISALIGNED)
    if placed and geometry.external_data and offset != guest:
        return damaged(Flaw.NOT_IN_PLACE)
    kind = RunKind.ZERO if is_zero else RunKind.DATA if is_data else RunKind.UNALLOCATED
    host = offset + number * (size // 32 if geometry.extended_l2 else 0) if placed else NO_HOST
    return Piece(kind, host)


class RandomImage:
    """Tables full of random entries, of which most make sense."""

    def __init__(self, geometry: Geometry, rng: random.Random) -> None:
        self.geometry, self.rng = geometry, rng
        self.l1_size = rng.randrange(2, 5)
        self.tables: dict[int, list[tuple[int, int]]] = {}
        self.misaligned: set[int] = set()
        data = bytearray(L1_OFFSET + self.l1_size * 8)
        for index in range(self.l1_size):
            fate = rng.random()
            if index != 1 and fate < 0.25:
                continue
            data += bytes(-len(data) % geometry.cluster_size)
            offset = len(data)
            if index == 1:
                self.misaligned.add(index)
                offset += 512 if geometry.cluster_size > 512 else 0
            self.tables[index] = self._entries(index)
            for word, bitmap in self.tables[index]:
                data += word.to_bytes(8, "big")
                data += bitmap.to_bytes(8, "big") if geometry.extended_l2 else b""
            at = L1_OFFSET + index * 8
            data[at : at + 8] = (offset | COPIED).to_bytes(8, "big")
        if geometry.cluster_size == 512:
            self.misaligned.clear()
        self.source = Bytes(bytes(data))
        self.mapping = Mapping(self.source, geometry, L1_OFFSET, self.l1_size)

    def _entries(self, index: int) -> list[tuple[int, int]]:
        """An L2 table, a few entries in a row alike; some contradict themselves."""
        rng, geometry = self.rng, self.geometry
        found: list[tuple[int, int]] = []
        while len(found) < geometry.l2_entries:
            fate, base = rng.randrange(8), rng.randrange(1, 1 << 20) << geometry.cluster_bits
            bitmap = rng.choice((0, 0xFFFF_FFFF, 0xFFFF_FFFF << 32, rng.getrandbits(64)))
            if rng.random() < 0.8:
                bitmap &= ~(bitmap >> 32)
            for number in range(rng.randrange(1, 40)):
                guest = (index * geometry.l2_entries + len(found)) << geometry.cluster_bits
                at = guest if geometry.external_data and rng.random() < 0.9 else base
                at += number * geometry.cluster_size
                word = (0, at | COPIED, at, at | 1, 1, COPIED, COMPRESSED | at >> 3, at | 512)[fate]
                found.append((word, bitmap))
        return found[: geometry.l2_entries]

    def piece(self, offset: int) -> Piece:
        """What the guest byte at *offset* is read from."""
        size = self.geometry.cluster_size
        index, inside = divmod(offset, self.geometry.l2_coverage)
        if index not in self.tables:
            return Piece(RunKind.UNALLOCATED)
        if index in self.misaligned:
            return damaged(Flaw.L2_MISALIGNED)
        word, bitmap = self.tables[index][inside // size]
        number = inside % size // (size // 32)
        guest = offset // size * size
        return expected(guest, word, bitmap, number, self.geometry)


def pieces(runs: Runs, geometry: Geometry) -> list[Piece]:
    """The runs as pieces of the smallest size that any of them can have."""
    step = geometry.cluster_size // 32 if geometry.extended_l2 else geometry.cluster_size
    found = []
    for guest, length, kind, host, stored, flaw in zip(
        *(
            column.tolist()
            for column in (
                runs.guest, runs.length, runs.kind, runs.host, runs.stored, runs.flaw
            )
        ),
        strict=True,
    ):  # fmt: skip
        assert guest % step == length % step == 0
        for at in range(0, length, step):
            moved = host if host == NO_HOST or stored else host + at
            found.append(Piece(RunKind(kind), moved, stored, Flaw(flaw)))
    return found


GEOMETRIES = {
    "512": (Geometry(3, 9, 4, 0), set()),
    "4k": (Geometry(3, 12, 4, 0), {Flaw.CLUSTER_MISALIGNED}),
    "version 2": (Geometry(2, 12, 4, 0), {Flaw.CLUSTER_MISALIGNED, Flaw.ZERO_IN_V2}),
    "external": (
        Geometry(3, 12, 4, 0, external_data=True),
        {Flaw.NOT_IN_PLACE, Flaw.COMPRESSED_EXTERNAL},
    ),
    "subclusters": (Geometry(3, 14, 4, 0, extended_l2=True), {Flaw.SUBCLUSTERS}),
    "external subclusters": (
        Geometry(3, 14, 4, 0, extended_l2=True, external_data=True),
        {Flaw.SUBCLUSTERS, Flaw.NOT_IN_PLACE, Flaw.COMPRESSED_EXTERNAL},
    ),
}
"""With the flaws that must turn up, besides an L2 table that is not aligned."""


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_byte_is_where_the_specification_says(name: str) -> None:
    geometry, flaws = GEOMETRIES[name]
    if geometry.cluster_size > 512:
        flaws = flaws | {Flaw.L2_MISALIGNED}
    rng = random.Random(name)
    step = geometry.cluster_size // 32 if geometry.extended_l2 else geometry.cluster_size
    seen: set[tuple[RunKind, Flaw]] = set()
    for _ in range(1 if geometry.extended_l2 else 3):
        image = RandomImage(geometry, rng)
        end = (image.l1_size + 1) * geometry.l2_coverage
        truth = [image.piece(at) for at in range(0, end, step)]
        seen.update((piece.kind, piece.flaw) for piece in truth)
        walked = Runs.concatenate(list(image.mapping.walk(0, end)))
        assert pieces(walked, geometry) == truth
        for _ in range(5):
            low, high = sorted(rng.sample(range(0, end + 1, step), 2))
            for runs in (
                image.mapping.runs(low, high),
                Runs.concatenate(list(image.mapping.walk(low, high))),
            ):
                assert pieces(runs, geometry) == truth[low // step : high // step]
                assert runs.guest[0] == low
    assert {kind for kind, _ in seen} >= {RunKind.UNALLOCATED, RunKind.DATA}
    assert {flaw for _, flaw in seen} >= flaws


def test_a_part_of_a_run_begins_where_it_begins() -> None:
    image = RandomImage(GEOMETRIES["4k"][0], random.Random(1))
    whole = image.mapping.runs(0, 1 << 20)
    which = int(np.flatnonzero(whole.kind == RunKind.DATA)[0])
    guest, host = int(whole.guest[which]), int(whole.host[which])
    part = image.mapping.runs(guest + 5, guest + 9)
    assert (part.guest.tolist(), part.length.tolist(), part.host.tolist()) == (
        [guest + 5], [4], [host + 5],
    )  # fmt: skip
    which = int(np.flatnonzero(whole.kind == RunKind.COMPRESSED)[0])
    guest, host = int(whole.guest[which]), int(whole.host[which])
    assert image.mapping.runs(guest + 5, guest + 9).host.tolist() == [host]


def test_tables_of_nothing_cost_nothing() -> None:
    geometry = Geometry(3, 16, 4, 1 << 62)
    mapping = Mapping(Bytes(b""), geometry, 0, 1 << 22)
    runs = list(mapping.walk(0, geometry.virtual_size))
    assert [len(each) for each in runs] == [1]
    assert runs[0].length.tolist() == [1 << 62]
    assert mapping.runs(1 << 61, (1 << 61) + 10).kind.tolist() == [RunKind.UNALLOCATED]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.guest.mapping.KEPT_RUNS", 1 << 10)
    image = RandomImage(GEOMETRIES["4k"][0], random.Random(2))
    end = image.l1_size * image.geometry.l2_coverage
    first = pieces(image.mapping.runs(0, end), image.geometry)
    assert 1 <= len(image.mapping._kept) <= 2
    assert pieces(image.mapping.runs(0, end), image.geometry) == first


def test_every_flaw_has_its_sentence() -> None:
    assert FLAW_SENTENCES.keys() == set(Flaw) - {Flaw.NONE}


@dataclass
class BadDisk:
    """A source some sectors of which cannot be read."""

    source: Bytes
    bad: set[int]

    @property
    def size(self) -> int:
        return self.source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        touched = range(offset // 512, -(-(offset + len(buffer)) // 512))
        if not self.bad.isdisjoint(touched):
            raise ReadFailed
        self.source.read_into(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self.source.data_extents(offset, length)


def with_lost(image: RandomImage, disk: BadDisk, data_end: int) -> list[Piece]:
    """What the whole disk is read from, tables being on *disk*, data up to *data_end*."""
    geometry, found = image.geometry, []
    width, smallest = geometry.l2_entry_size, geometry.cluster_size // 32
    step = smallest if geometry.extended_l2 else geometry.cluster_size

    def is_lost(start: int, length: int) -> bool:
        sectors = range(start // 512, -(-(start + length) // 512))
        return start + length > disk.size or not disk.bad.isdisjoint(sectors)

    for at in range(0, (image.l1_size + 1) * geometry.l2_coverage, step):
        index, inside = divmod(at, geometry.l2_coverage)
        l1_at = L1_OFFSET + index * 8
        if index < image.l1_size and is_lost(l1_at, 8):
            found.append(damaged(Flaw.TABLE_LOST))
            continue
        piece = image.piece(at)
        table = int.from_bytes(image.source.data[l1_at : l1_at + 8], "big") & ~COPIED
        if index in image.tables and index not in image.misaligned:
            entry = table + inside // geometry.cluster_size * width
            if is_lost(entry, width):
                piece = damaged(Flaw.TABLE_LOST)
        if piece.kind == RunKind.DATA and piece.host + step > data_end:
            piece = damaged(Flaw.CLUSTER_LOST)
        found.append(piece)
    return found


@pytest.fixture
def any_table_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of random words are not taken for overwritten ones."""
    monkeypatch.setattr("planner.metadata.gone_tables.MIN_WILD", 1 << 62)


@pytest.mark.usefixtures("any_table_is_one")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_what_is_not_there_is_told_from_zeros(name: str) -> None:
    geometry, rng = GEOMETRIES[name][0], random.Random(f"lost {name}")
    step = geometry.cluster_size // 32 if geometry.extended_l2 else geometry.cluster_size
    seen: set[Flaw] = set()
    cuts: tuple[int, ...] = (-5000, L1_OFFSET + 8)
    if not geometry.extended_l2:
        cuts = (-1, -5000, -30_000, L1_OFFSET + 8, L1_OFFSET) * 3
    for cut in cuts:
        image = RandomImage(geometry, rng)
        size = max(L1_OFFSET, len(image.source.data) + cut) if cut < 0 else cut
        sectors = range(L1_OFFSET // 512, -(-len(image.source.data) // 512))
        bad = set(rng.sample(sectors, min(3, len(sectors) // 3)))
        disk = BadDisk(Bytes(image.source.data[:size]), bad)
        most = image.l1_size * geometry.l2_entries if geometry.external_data else 1 << 12
        data_end = rng.randrange(most) << geometry.cluster_bits
        truth = with_lost(image, disk, data_end)
        seen.update(piece.flaw for piece in truth)
        mapping = Mapping(disk, geometry, L1_OFFSET, image.l1_size, data_end=data_end)
        end = len(truth) * step
        assert pieces(Runs.concatenate(list(mapping.walk(0, end))), geometry) == truth
        assert pieces(mapping.runs(0, end, Bytes(b"")), geometry) == truth
    assert seen >= {Flaw.TABLE_LOST, Flaw.CLUSTER_LOST}


def test_a_cluster_that_the_end_cuts_is_there_up_to_the_end() -> None:
    image = RandomImage(GEOMETRIES["4k"][0], random.Random(3))
    whole = image.mapping.runs(0, image.geometry.l2_coverage)
    which = int(np.flatnonzero(whole.kind == RunKind.DATA)[1])
    end = int(whole.host[which]) + 1000
    runs = whole.without_lost(end)
    at = int(np.flatnonzero(runs.host == whole.host[which])[0])
    assert runs.length[at : at + 2].tolist() == [1000, whole.length[which] - 1000]
    assert runs.guest[at + 1] == whole.guest[which] + 1000
    assert runs.flaw[at : at + 2].tolist() == [Flaw.NONE, Flaw.CLUSTER_LOST]
    assert (runs.guest[1:] == (runs.guest + runs.length)[:-1]).all()
    held = runs.select(runs.kind == RunKind.DATA)
    assert (held.host + held.length <= end).all()
    assert whole.without_lost(1 << 60) is whole


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_table_at_several_places_is_there_at_each(name: str) -> None:
    geometry, rng = GEOMETRIES[name][0], random.Random(f"repeats {name}")
    image = RandomImage(geometry, rng)
    first = image.source.data[L1_OFFSET : L1_OFFSET + image.l1_size * 8]
    words = [*(first[at : at + 8] for at in range(0, len(first), 8)), bytes(8)]
    count = 6 if geometry.extended_l2 else 12
    l1 = b"".join(rng.choice(words) for _ in range(count))
    start = -(-len(image.source.data) // 512) * 512
    source = Bytes(image.source.data.ljust(start, b"\0") + l1)
    mapping = Mapping(source, geometry, start, count)
    end = count * geometry.l2_coverage
    read = mapping.runs(0, end)
    assert pieces(Runs.concatenate(list(mapping.walk(0, end))), geometry) == pieces(read, geometry)
    low, high = (end // 5, end // 3) if geometry.extended_l2 else (end // 3, 5 * end // 6)
    low, high = low // geometry.cluster_size * geometry.cluster_size, high // 65536 * 65536
    part = Runs.concatenate(list(mapping.walk(low, high)))
    assert pieces(part, geometry) == pieces(mapping.runs(low, high), geometry)


def test_a_table_at_many_places_is_read_once() -> None:
    geometry = Geometry(3, 16, 4, 0)
    packed = COMPRESSED | 5 << 16
    table = np.full(geometry.l2_entries, packed, dtype=">u8").tobytes()
    l1 = np.full(10_000, 1 << 16, dtype=">u8").tobytes()
    source = Sparse.of(bytes(1 << 16) + table + l1, 1 << 30, 1 << 16)
    mapping = Mapping(source, geometry, 2 << 16, 10_000)
    before = source.bytes_read
    rows = Runs.concatenate(list(mapping.walk(0, 10_000 * geometry.l2_coverage, packed=True)))
    assert source.bytes_read == before + (1 << 16)
    assert rows.joined(packed=True).length.tolist() == [10_000 * geometry.l2_coverage]


@pytest.mark.parametrize(("is_external", "times"), [(False, 1), (True, 2)])
def test_a_walk_tells_how_many_entries_it_reads_before_it_does(
    is_external: bool, times: int
) -> None:
    """With an external data file: for where its entries belong, and for all of it."""
    geometry = Geometry(3, 16, 4, 0, external_data=is_external)
    table = np.full(geometry.l2_entries, 1 << 30, dtype=">u8").tobytes()
    source = Bytes(bytes(1 << 16) + table + np.full(64, 1 << 16, dtype=">u8").tobytes())
    mapping, told = Mapping(source, geometry, 2 << 16, 64), list[int]()
    whole = 64 * geometry.l2_coverage
    assert list(mapping.walk(0, whole, reading=told.append))
    assert sum(told) == times * geometry.l2_entries

    def refuse(_entries: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        list(mapping.walk(0, whole, reading=refuse))


@pytest.mark.parametrize(("bits", "is_extended"), [(9, False), (14, False), (14, True)])
def test_a_table_of_a_data_file_is_read_anew_only_where_an_entry_is_in_its_place(
    bits: int, is_extended: bool
) -> None:
    geometry, count = Geometry(3, bits, 4, 0, is_extended, external_data=True), 30
    # Entries that are in their place at one index each, one of them zeros, and one that nowhere is.
    places = {0: 0, 3: 3, 7: 20, 9: 29}
    words = np.zeros((geometry.l2_entries, geometry.l2_entry_size // 8), dtype=">u8")
    for entry, number in places.items():
        at = (number * geometry.l2_entries + entry) << bits
        words[entry] = (at | COPIED, 0xFFFF_FFFF)[: words.shape[1]]
    words[3, 0] |= 0 if is_extended else 1
    words[20] = (1 << 50 | COPIED, 0xFFFF_FFFF)[: words.shape[1]]
    start = 2 << 16
    data = bytes(1 << 16) + words.tobytes()
    l1 = np.full(count, 1 << 16, dtype=">u8").tobytes()
    mapping = Mapping(Bytes(data.ljust(start, b"\0") + l1), geometry, start, count)
    end, told = count * geometry.l2_coverage, list[int]()
    walked = Runs.concatenate(list(mapping.walk(0, end, reading=told.append)))
    read = mapping.runs(0, end)
    for name in ("guest", "length", "kind", "host", "stored", "flaw"):
        assert getattr(walked.joined(), name).tolist() == getattr(read.joined(), name).tolist()
    assert sum(told) == 2 * geometry.l2_entries
    # From the middle of one on, and where it stands once.
    low, high = geometry.l2_coverage * 3 // 2, geometry.l2_coverage * 4
    for until in (high, geometry.l2_coverage * 2):
        part = Runs.concatenate(list(mapping.walk(low, until))).joined()
        assert part.host.tolist() == mapping.runs(low, until).joined().host.tolist()


@pytest.mark.parametrize("is_external", [False, True])
@pytest.mark.parametrize("between", [2 << 21, 0, (2 << 21) + 512], ids=["table", "none", "flaw"])
def test_tables_that_take_turns_are_laid_out_many_at_a_time(
    between: int, is_external: bool
) -> None:
    geometry, count = Geometry(3, 21, 4, 0, external_data=is_external), 4096
    blocks = {at: bytes(4088) + (COPIED | 1 << 50).to_bytes(8, "big") for at in (512, 1024)}
    l1 = np.resize([1 << 21, between], count).astype(">u8").tobytes()
    blocks |= {at // 4096: l1[at : at + 4096] for at in range(0, len(l1), 4096)}
    mapping, told = Mapping(Sparse(blocks, 1 << 30, 4096), geometry, 0, count), list[int]()
    parts = list(mapping.walk(0, count * geometry.l2_coverage, reading=told.append))
    # And what is behind the last.
    assert len(parts) <= 2
    # Of either table a part is there; with a data file that is read once more for homes.
    assert sum(told) == (1 + (between == 2 << 21)) * (1 + is_external) << 13
    start = geometry.l2_coverage * 100
    low, high = start - geometry.cluster_size, start + 512 * geometry.cluster_size
    shown, read = parts[0].cut(low, high).joined(), mapping.runs(low, high).joined()
    assert shown.guest.tolist() == read.guest.tolist()
    assert shown.flaw.tolist() == read.flaw.tolist()


@pytest.mark.parametrize("is_extended", [False, True])
def test_of_a_table_no_more_is_decoded_than_lies_around_what_is_there(is_extended: bool) -> None:
    geometry, table = Geometry(3, 21, 4, 0, extended_l2=is_extended), 1 << 21
    size = 4096
    words = np.full((size // geometry.l2_entry_size, geometry.l2_entry_size // 8), 1 << 32 - 21)
    words = words.astype(np.uint64) + np.arange(len(words), dtype=np.uint64)[:, None]
    words[:, 0] <<= np.uint64(21)
    pages = [3, 15, 16, 300, 511]
    blocks = {(table // size) + page: words.astype(">u8").tobytes() for page in pages}
    l1 = np.array([table, 0, table], dtype=">u8").tobytes()
    mapping, told = Mapping(Sparse(blocks | {0: l1}, 1 << 33, size), geometry, 0, 3), list[int]()
    end = 3 * geometry.l2_coverage
    walked = Runs.concatenate(list(mapping.walk(0, end, reading=told.append))).joined()
    assert sum(told) <= len(pages) << 13
    near = [page * len(words) << 21 for page in pages]
    for low in (0, *near, *(2 * geometry.l2_coverage + at for at in near)):
        high = min(end, low + (2 * len(words) << 21))
        shown, read = walked.cut(low, high), mapping.runs(low, high).joined()
        for name in ("guest", "length", "kind", "host", "flaw"):
            assert getattr(shown, name).tolist() == getattr(read, name).tolist()


@pytest.mark.parametrize("is_external", [False, True])
def test_of_a_table_with_very_many_runs_a_part_is_in_memory(is_external: bool) -> None:
    geometry = Geometry(3, 21, 4, 0, extended_l2=True, external_data=is_external)
    words = np.zeros((1 << 15, 2), dtype=np.uint64)
    # Zeros and nothing in turn, and entries of data that are in their place at the second of three.
    words[:, 1] = 0x5555_5555 << 32
    words[5::97, 0] = (COPIED | (1 << 36)) + (np.arange(5, 1 << 15, 97) << 21).astype(np.uint64)
    words[5::97, 1] = 0x5555_5555
    l1 = np.full(3, 1 << 21, dtype=">u8").tobytes()
    blocks = {512 + at: part for at, part in enumerate(np.split(words.astype(">u8"), 128))}
    table = {at: part.tobytes() for at, part in blocks.items()}
    mapping = Mapping(Sparse(table | {0: l1}, 1 << 30, 4096), geometry, 0, 3)
    parts = list(mapping.walk(0, 3 * geometry.l2_coverage))
    assert max(len(part) for part in parts) <= 2 * MAX_LAID
    walked = Runs.concatenate(parts).joined()
    assert walked.length.sum() == 3 * geometry.l2_coverage
    low = geometry.l2_coverage - (3 << 30)
    shown, read = walked.cut(low, low + (6 << 30)), mapping.runs(low, low + (6 << 30)).joined()
    for name in ("guest", "length", "kind", "host", "flaw"):
        assert getattr(shown, name).tolist() == getattr(read, name).tolist()
    # From the middle of it on, and to the middle.
    for begin in (low, geometry.l2_coverage + (9 << 30) + 4096):
        told = list[int]()
        within = list(mapping.walk(begin, begin + (6 << 30), reading=told.append))
        assert all((part.length > 0).all() for part in within)
        shown, read = (
            Runs.concatenate(within).joined(),
            mapping.runs(begin, begin + (6 << 30)).joined(),
        )
        for name in ("guest", "length", "kind", "host", "flaw"):
            assert getattr(shown, name).tolist() == getattr(read, name).tolist()
        if not is_external:  # each table is begun to see that it has very many
            assert sum(told) <= (4 + 2 * 2) << 11


@pytest.mark.parametrize("seed", range(30))
def test_tables_that_stand_anywhere_are_walked_as_they_are_read(seed: int) -> None:
    rng = random.Random(seed)
    is_extended = rng.random() < 0.5
    geometry = Geometry(3, 14, 4, 0, is_extended, external_data=rng.random() < 0.7)
    count, step = 40, geometry.l2_entry_size // 8
    tables = np.zeros((4, geometry.l2_entries, step), dtype=">u8")
    for table in tables:
        for entry in rng.sample(range(geometry.l2_entries), 12):
            place = (rng.randrange(count) * geometry.l2_entries + entry) << 14
            word = rng.choice((0, COPIED, COPIED | place, COPIED | place, 1 << 40, 512))
            table[entry] = (word, rng.choice((0, 0xFFFF, 0xFF << 40)))[:step]
    l1 = [rng.choice((0, 1, 1, 2, 3, 4, 4, 99)) << 14 for _ in range(count)]
    l1 = [word + 512 * (rng.random() < 0.1) for word in l1]
    data = bytes(1 << 14) + tables.tobytes() + struct.pack(f">{count}Q", *l1)
    mapping = Mapping(Bytes(data), geometry, 5 << 14, count)
    low, end = sorted(rng.sample(range(0, count * geometry.l2_coverage, 512), 2))
    walked = Runs.concatenate(list(mapping.walk(low, end))).joined()
    read = mapping.runs(low, end).joined()
    for name in ("guest", "length", "kind", "host", "stored", "flaw"):
        assert getattr(walked, name).tolist() == getattr(read, name).tolist()


@pytest.mark.usefixtures("any_table_is_one")
def test_tables_in_holes_and_out_of_place_are_not_gone_through() -> None:
    geometry, count = Geometry(3, 21, 4, 0), 1 << 18
    words = (np.arange(count, dtype=np.uint64) + np.uint64(100)) << np.uint64(21)
    words[count // 2 :] |= np.uint64(512)
    l1 = words.astype(">u8").tobytes()
    mapping = Mapping(Sparse.of(l1, 1 << 60, 1 << 16), geometry, 0, count)
    size = count * geometry.l2_coverage
    runs = Runs.concatenate(list(mapping.walk(0, size)))
    assert runs.length.tolist() == [size // 2, size // 2]
    assert runs.flaw.tolist() == [Flaw.NONE, Flaw.L2_MISALIGNED]
    strict = Mapping(Sparse.of(l1, 1 << 25, 1 << 16), geometry, 0, count, data_end=0)
    runs = Runs.concatenate(list(strict.walk(0, size)))
    assert set(runs.flaw.tolist()) == {Flaw.L2_MISALIGNED, Flaw.TABLE_LOST}


def test_an_l1_table_past_the_end_of_the_file_takes_little_memory_whatever_it_claims() -> None:
    geometry, count = Geometry(3, 12, 4, 0), 1 << 22
    # A word of it is there, and leads to a table in a hole.
    start = (1 << 16) - 8
    source = Bytes(bytes(start) + (1 << 12).to_bytes(8, "big"))
    tracemalloc.start()
    try:
        mapping = Mapping(source, geometry, start, count, data_end=source.size)
        runs = Runs.concatenate(list(mapping.walk(0, count * geometry.l2_coverage)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert runs.length.tolist() == [
        geometry.l2_coverage,
        (count - 1) * geometry.l2_coverage,
    ]
    assert runs.flaw.tolist() == [Flaw.NONE, Flaw.TABLE_LOST]
    assert peak < 32 << 20


def walked(mapping: Mapping, size: int) -> tuple[Runs, int]:
    """All runs from 0 to *size*, in one; and how many entries were decoded for them."""
    told = list[int]()
    runs = Runs.concatenate(list(mapping.walk(0, size, reading=told.append))).joined()
    return runs, sum(told)


@pytest.mark.parametrize("alike", [False, True], ids=["each alone", "many at one place"])
@pytest.mark.parametrize("data_end", [None, 1 << 62])
def test_of_a_table_that_is_a_hole_for_the_most_only_the_rest_is_gone_through(
    alike: bool, data_end: int | None
) -> None:
    geometry, count = Geometry(3, 21, 4, 0), 64
    block = 4096
    tables = (np.arange(count, dtype=np.uint64) // np.uint64(1 + alike) + np.uint64(1)) << 21
    blocks = {0: tables.astype(">u8").tobytes().ljust(block, b"\0")}
    for table in tables.tolist():
        entry = COPIED | (table << 8 & ((1 << 40) - 1))
        blocks[(table + (1 << 20)) // block] = entry.to_bytes(8, "big").ljust(block, b"\0")
    # The last table ends past the end of the file.
    size = int(tables[-1]) + (1 << 20) + block
    mapping = Mapping(Sparse(blocks, size, block), geometry, 0, count, data_end=data_end)
    end = count * geometry.l2_coverage
    runs, decoded = walked(mapping, end)
    data = runs.select(runs.kind == RunKind.DATA)
    middle = geometry.l2_coverage // 2
    assert data.guest.tolist() == [at * geometry.l2_coverage + middle for at in range(count)]
    assert data.length.tolist() == [geometry.cluster_size] * count
    # Of the last what is cut off is looked at too, for it is lost.
    assert decoded <= (count + 4) * geometry.l2_entries // 4
    lost = int(runs.length[runs.flaw == Flaw.TABLE_LOST].sum())
    after = (middle // geometry.cluster_size - block // 8) * geometry.cluster_size
    assert lost == (after * (1 + alike) if data_end is not None else 0)


@pytest.mark.parametrize("is_extended", [False, True])
def test_tables_that_are_holes_for_the_most_are_decoded_together(
    is_extended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what says nothing in them, and clusters that are all alike, are a run each."""
    geometry, count, block = Geometry(3, 21, 4, 0, extended_l2=is_extended), 64, 4096
    tables = (np.arange(count, dtype=np.uint64) + np.uint64(1)) << 21
    blocks = {0: tables.astype(">u8").tobytes().ljust(block, b"\0")}
    for table in tables.tolist():
        entry = (COPIED | table << 8).to_bytes(8, "big") + (is_extended * 0xFFFF_FFFF).to_bytes(
            8, "big"
        )
        blocks[table // block] = bytes(64) + entry[: geometry.l2_entry_size] + bytes(block - 80)
    decoded = list[tuple[int, int]]()

    def noting(guest: I64, *arguments: Any, **options: Any) -> Runs:
        runs = runs_of_entries(guest, *arguments, **options)
        decoded.append((len(guest), len(runs)))
        return runs

    monkeypatch.setattr("planner.guest.mapping.runs_of_entries", noting)
    mapping = Mapping(Sparse(blocks, 1 << 30, block), geometry, 0, count)
    runs, _ = walked(mapping, count * geometry.l2_coverage)
    place = 64 // geometry.l2_entry_size * geometry.cluster_size
    data = runs.select(runs.kind == RunKind.DATA)
    assert data.guest.tolist() == [at * geometry.l2_coverage + place for at in range(count)]
    assert data.host.tolist() == (tables << 8).tolist()
    assert len(decoded) <= count // 4
    assert sum(entries for entries, _ in decoded) == sum(runs for _, runs in decoded) == 3 * count


def test_of_tables_that_stand_alone_no_neighbours_are_gone_through() -> None:
    geometry, count = Geometry(3, 14, 4, 0), 1 << 13
    l1 = np.zeros(count, dtype=">u8")
    l1[::32] = (np.arange(count // 32, dtype=np.uint64) + np.uint64(8)) << np.uint64(14)
    entry = (COPIED | 1 << 30).to_bytes(8, "big")
    source = Bytes(l1.tobytes().ljust(8 << 14, b"\0") + entry.ljust(1 << 14, b"\0") * (count // 32))
    runs, decoded = walked(Mapping(source, geometry, 0, count), count * geometry.l2_coverage)
    assert decoded == count // 32 * geometry.l2_entries
    places = np.flatnonzero(l1) * geometry.l2_coverage
    assert runs.guest[runs.kind == RunKind.DATA].tolist() == places.tolist()
