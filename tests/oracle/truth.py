"""What is said to be safe, held against the truth, byte by byte.

The disk is read before the damage and after it. What reads otherwise must be in a range that the
report names, or be counted as missing; and no more may be missing than can be. What no metadata
tells of is left out: `UNKNOWABLE`, and what a compressed cluster unpacks to. Nothing here makes or
damages images.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from instarfs.errors import InstarfsError
from instarfs.guest.disk import Disk
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from planner.arrays import I64, Mask
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import PlannerError
from planner.findings.kinds import FindingKind
from planner.guest.mapping import RunKind, Runs
from planner.qcow2.entries import NO_HOST, REFTABLE_OFFSET
from planner.qcow2.header import read_header
from planner.qcow2.refcounts import unpack_refcounts
from planner.source import SECTOR, nonzero_words, read_bytes
from planner.triage.impact import Harm, Ranges, guest_impact
from planner.triage.triage import Triage, triage_leaks
from tests.images.matrix import Row, describe
from tests.oracle.campaign import images_of_group, row_of
from tests.oracle.patched import Patched
from tests.oracle.scene import FileSource

CHUNK = 1 << 20

UNKNOWABLE = (
    frozenset({"cluster-overwritten"}),
    frozenset({"header-version"}),
    frozenset({"header-refcount_order"}),
    frozenset({"header-incompatible_features"}),
    frozenset({"subclusters-zeroed"}),
)
"""Kinds of damage that, together, may leave no trace: an older copy of a table in its place; a
field of the header under which all words mean something else.
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``faults``: what was said and is not so. ``vouched``: whether anything was called safe."""

    faults: tuple[str, ...] = ()
    vouched: bool = False
    changed: int = 0
    missing: int = 0


@dataclass(frozen=True, slots=True)
class TruthCase:
    """One damaged image, and whether its report was true."""

    seed: int
    number: int
    row: Row
    damages: tuple[str, ...]
    verdict: Verdict

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, case {self.number}, row {self.row.name} ({describe(self.row)})",
            *(f"  damage: {damage}" for damage in self.damages),
            *(f"  fault:  {fault}" for fault in self.verdict.faults),
        ]
        return "\n".join(lines)


def run_truth_group(seed: int, group: int, cases: int) -> Iterator[TruthCase]:
    """Judge the cases of *group*, those below *cases*; the first is undamaged."""
    row = row_of(seed, group)
    truth: Truth | None = None
    for number, damages, image in images_of_group(seed, group, range(cases)):
        truth = truth or Truth(image.with_name("base.qcow2"))
        kinds = {damage.partition(":")[0] for damage in damages}
        is_unknowable = any(each <= kinds for each in UNKNOWABLE) or _counts_in_data(damages)
        if not is_unknowable and not _is_long_again(image, damages):
            yield TruthCase(seed, number, row, tuple(damages), truth.judge(image))


def _counts_in_data(damages: list[str]) -> bool:
    """Whether a refcount was changed where the refcount table had been made to lead.

    There it may be the guest's data, and nothing shows that it is not what was written.
    """
    tables = [at for at, each in enumerate(damages) if "reftable" in each or "refcount_t" in each]
    return any(
        each.startswith(("refcount-", "refblock-"))
        for each in damages[min(tables, default=len(damages)) :]
    )


def _is_long_again(image: Path, damages: Iterable[str]) -> bool:
    """Whether the file was cut off and then grew, or was written to behind its end.

    What was there reads as zeros, and nothing shows that it is not what was written.
    """
    cuts = [int(each.rpartition(" ")[2]) for each in damages if each.startswith("cut-")]
    return image.stat().st_size > min(cuts, default=image.stat().st_size)


@dataclass(slots=True)
class Truth:
    """The disk of the undamaged *base*."""

    base: Path
    _disk: Patched | None = field(default=None, init=False)

    def judge(self, image: Path) -> Verdict:
        """Whether the report of *image*, a damaged copy of the base, is true."""
        with image.open("rb") as file:
            source = FileSource(file.fileno())
            report = check_image(source)
            if report.error is not None:
                return Verdict()
            triage = triage_leaks(source, report)
        before, after = self._before(), open_disk(image)
        if before is None or after is None:
            return Verdict()
        # An entry that says zeros says so, whoever set its flag; what is compressed was not
        # unpacked, and that is said.
        told = _ranges(after.disk, RunKind.ZERO, RunKind.COMPRESSED)
        changed = _changed(before, after, told)
        for each in (told, _unwritten(before.disk), _unwritten(after.disk)):
            changed = changed[~_touches(each, changed)]
        missing = triage.losses.missing
        faults = [*_faults_of_safe(report, triage, changed)]
        if missing:
            behind = self._behind(image, before.disk, report)
            faults += _faults_of_missing(
                report, triage, before, after, changed=changed, behind=behind
            )
        return Verdict(tuple(faults), True, len(changed) * SECTOR, missing)

    def _behind(self, image: Path, disk: Disk, report: Report) -> int:
        """How many clusters of *image* lay behind its end, or are said to by what damage wrote.

        A refcount that was written over counts clusters that nobody can know were never there. And
        where tables lay there too, nobody can know which of the references were the disk's, and
        which a snapshot's, or those of bitmaps.
        """
        end = image.stat().st_size
        with image.open("rb") as now, self.base.open("rb") as then:
            said = _counted_behind(FileSource(now.fileno()), end)
            were = _counted_behind(FileSource(then.fileno()), end)
        has_lost_tables = any(
            not row.structure.is_guest for row in report.rows(FindingKind.PAST_END)
        )
        had = were if has_lost_tables else _behind(disk, end)
        return had + max(0, said - were)

    def _before(self) -> Patched | None:
        if self._disk is None:
            self._disk = open_disk(self.base)
        return self._disk


def open_disk(image: Path) -> Patched | None:
    """The guest's disk of *image*; None where nothing of it can be read."""
    with suppress(InstarfsError, PlannerError):
        guest = Guest(Image.open(str(image)), Follow([str(image.parent)]))
        return Patched(guest.find(Place(Part.DISK)))
    return None


def _changed(before: Patched, after: Patched, told: Ranges) -> I64:
    """The sectors that read otherwise, or not at all any more; those of both disks.

    *told* is not read where it is all that would be: a table of garbage refers to thousands of
    clusters that do not unpack.
    """
    end = min(before.size, after.size)
    found, reached = [np.zeros(0, dtype=np.int64)], 0
    extents = heapq.merge(before.data_extents(0, end), after.data_extents(0, end))
    for start, stop in extents:
        for offset in range(max(reached, start // SECTOR * SECTOR), min(stop, end), CHUNK):
            length = -(-min(CHUNK, min(stop, end) - offset) // SECTOR) * SECTOR
            if _holds(told, offset, offset + length):
                continue
            rows = [
                np.frombuffer(read_bytes(disk, offset, length), dtype=np.uint8).reshape(-1, SECTOR)
                for disk in (before, after)
            ]
            found.append(np.flatnonzero((rows[0] != rows[1]).any(axis=1)) + offset // SECTOR)
        reached = max(reached, -(-stop // SECTOR) * SECTOR)
    lost = np.array(sorted(after.unreadable - before.unreadable), dtype=np.int64)
    return np.unique(np.concatenate([*found, lost]))


def _faults_of_safe(report: Report, triage: Triage, changed: I64) -> Iterator[str]:
    """What reads otherwise, is in no range that is named, and is not counted as missing."""
    impact = guest_impact(report, losses=triage.losses)
    inside = np.zeros(len(changed), dtype=np.bool_)
    for harm in (Harm.LOST, Harm.SUSPECT):
        inside |= _touches(impact.ranges[harm], changed)
    unnamed = changed[~inside]
    if len(unnamed) * SECTOR > triage.losses.missing and impact.is_whole:
        yield (
            f"{len(unnamed) * SECTOR} bytes read otherwise and are called safe, the first at"
            f" {int(unnamed[0]) * SECTOR}; missing: {triage.losses.missing}"
        )


def _holds(ranges: Ranges, start: int, end: int) -> bool:
    """Whether one of *ranges* holds all bytes from *start* to *end*."""
    at = int(np.searchsorted(ranges.start, start, side="right")) - 1
    return at >= 0 and end <= int(ranges.end[at])


def _touches(ranges: Ranges, sectors: I64) -> np.ndarray:
    """Which sectors have a byte in *ranges*: a file may end in the middle of one."""
    at = np.searchsorted(ranges.start, (sectors + 1) * SECTOR) - 1
    inside = at >= 0
    inside[inside] = sectors[inside] * SECTOR < ranges.end[at[inside]]
    return inside


def _faults_of_missing(
    report: Report,
    triage: Triage,
    before: Patched,
    after: Patched,
    *,
    changed: I64,
    behind: int,
) -> Iterator[str]:
    """More missing than leaked clusters can have held, and the clusters *behind* the end that the
    file has now, or all that there was where refcounts are lost; and more than is gone. Or than the
    disk has room for.
    """
    missing = triage.losses.missing
    leaks = sum((row.found - row.expected) * row.count for row in report.rows(FindingKind.LEAK))
    # What has two owners by now shows no leak where one makes up for a reference that is lost.
    leaks += len(report.findings.of(FindingKind.MULTIPLE_OWNERS))
    leaks += len(triage.uncounted) + behind
    bound = leaks * report.geometry.cluster_size
    # So may whatever the words of a table that was overwritten seem to lead to.
    if report.counts().keys() & {FindingKind.REFCOUNT_MISSING, FindingKind.TABLE_OVERWRITTEN}:
        held = RunKind.ZERO, RunKind.DATA, RunKind.COMPRESSED
        bound += _ranges(before.disk, *held).size
    has_backing = report.layout is not None and report.layout.header.backing_file_offset
    # What was lost without a refcount nobody can count: in compressed clusters, or as zeros.
    is_bounded = not has_backing and not len(triage.uncounted)
    gone = np.unique(changed * SECTOR >> report.geometry.cluster_bits)
    bound = max(bound, len(gone) * report.geometry.cluster_size)
    if missing > bound and is_bounded:
        yield f"{missing} bytes missing, and what leaks held {bound} at most"
    room = _ranges(after.disk, RunKind.UNALLOCATED).size
    if missing > room + report.geometry.cluster_size:  # the last cluster of a disk may be cut off
        yield f"{missing} bytes missing, and only {room} read as nothing"


def _behind(disk: Disk, end: int) -> int:
    """How many guest clusters of *disk* had something behind *end*, where its file ends now."""
    bits, count = disk.layer.mapping.geometry.cluster_bits, 0
    for runs in disk.layer.mapping.walk(0, disk.size):
        held = runs.select((runs.host != NO_HOST) & (runs.host + runs.length + runs.stored > end))
        start = held.guest + np.maximum(0, np.where(held.stored == 0, end - held.host, 0))
        last = held.guest + held.length - 1
        count += int(((last >> bits) - (start >> bits) + 1).sum())
    return count


def _counted_behind(source: FileSource, end: int) -> int:
    """How many references the refcount blocks of an image count from offset *end* on."""
    header, count = read_header(source), 0
    geometry, first = header.geometry, -(-end >> header.cluster_bits)
    words = header.refcount_table_clusters << header.cluster_bits >> 3
    index, word = nonzero_words(source, header.refcount_table_offset, words)
    # Garbage leads to the same few places thousands of times, and to none in the file.
    word &= np.uint64(REFTABLE_OFFSET)
    there = (word % geometry.cluster_size == 0) & (word < source.size)
    skipped = np.maximum(0, first - index[there] * geometry.refblock_entries)
    places = zip(word[there].tolist(), skipped.tolist(), strict=True)
    for (at, start), times in Counter(places).items():
        if start < geometry.refblock_entries:
            block = np.frombuffer(read_bytes(source, at, geometry.cluster_size), dtype=np.uint8)
            behind = unpack_refcounts(block, header.refcount_order)[start:].astype(np.uint64)
            count += times * int(np.minimum(behind, geometry.guest_clusters).sum())
    return count


def _unwritten(disk: Disk) -> Ranges:
    """The subclusters that were never written, in clusters that the file has.

    One bit says so, and nothing else does: whoever set or cleared it left no trace.
    """
    return _chosen(disk, lambda runs: (runs.kind == RunKind.UNALLOCATED) & (runs.host != NO_HOST))


def _ranges(disk: Disk, *kinds: RunKind) -> Ranges:
    """The guest bytes that are in runs of these kinds."""
    return _chosen(disk, lambda runs: np.isin(runs.kind, kinds))


def _chosen(disk: Disk, which: Callable[[Runs], Mask]) -> Ranges:
    start, end = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for runs in disk.layer.mapping.walk(0, disk.size):
        chosen = runs.select(which(runs))
        start.append(chosen.guest)
        end.append(chosen.guest + chosen.length)
    return Ranges(np.concatenate(start), np.concatenate(end))
