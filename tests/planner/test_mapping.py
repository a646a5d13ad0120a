"""Runs of guest bytes from random tables, against the specification read entry by entry."""

import random
from dataclasses import dataclass

import numpy as np
import pytest

from planner.mapping import FLAW_SENTENCES, NO_HOST, Flaw, Mapping, RunKind, Runs
from planner.qcow2.entries import COMPRESSED, COPIED
from planner.qcow2.geometry import Geometry
from planner.source import Bytes

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
    monkeypatch.setattr("planner.mapping.KEPT_RUNS", 1 << 10)
    image = RandomImage(GEOMETRIES["4k"][0], random.Random(2))
    end = image.l1_size * image.geometry.l2_coverage
    first = pieces(image.mapping.runs(0, end), image.geometry)
    assert 1 <= len(image.mapping._kept) <= 2
    assert pieces(image.mapping.runs(0, end), image.geometry) == first


def test_every_flaw_has_its_sentence() -> None:
    assert FLAW_SENTENCES.keys() == set(Flaw) - {Flaw.NONE}
