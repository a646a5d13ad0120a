"""Which files of a guest a check's findings hit: its disk as a source, and the search on it.

What the damage is, and how file systems are read, is the planner's business; here they meet the
guest's bytes, which are read through the mapping as it is.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from instarfs.errors import (
    GuestDamaged,
    GuestElsewhere,
    GuestEncrypted,
    ImageReadFailed,
    SnapshotMissing,
)
from instarfs.guest.disk import Disk, Missing, Qcow2Layer, RawLayer
from instarfs.guest.guest import Guest, disk_extents, disk_stratum
from instarfs.guest.place import Part, Place
from planner.arrays import I64, Mask, join_ranges
from planner.check.report import Report
from planner.errors import ImageError, ReadFailed
from planner.findings.kinds import ACTIVE, FindingKind
from planner.guest.extents import UNKNOWN, Extents, Stratum, extents
from planner.guest.mapping import Flaw
from planner.guestfs.files import Damage, FilesUnknown, HitFiles
from planner.guestfs.overlaps import overlaps
from planner.guestfs.search import find_files
from planner.guestfs.work import Work, WorkSpent
from planner.progress import Progress, tell_nobody
from planner.qcow2.entries import NO_HOST
from planner.source import MAX_EXTENTS, join_extents
from planner.triage.guest_damage import guest_damage, missing_places
from planner.triage.impact import Harm, Impact, Ranges, guest_impact
from planner.triage.triage import Triage

MAX_KEPT = 1 << 18
"""Extents of a disk that are kept for who asks again: 4 MiB."""


class DiskUnread(ReadFailed):
    """Bytes of a guest's disk that cannot be read."""


class DiskSource:
    """A guest's disk as a source of the planner; what cannot be read raises `DiskUnread`.

    What it does is taken from *work*, and raises `WorkSpent` where that is done.
    """

    def __init__(self, disk: Disk, work: Work) -> None:
        self._disk, self._work = disk, work
        self._found: list[_Found] = []  # Ascending by where they start.
        self._kept = 0

    @property
    def size(self) -> int:
        return self._disk.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), self.size - offset))
        layer = self._disk.layer
        before = layer.unpacked_bytes
        self._work.read(inside)
        try:
            layer.fill(self._disk.start + offset, buffer[:inside], wait=True)
        except (GuestDamaged, GuestElsewhere, ImageReadFailed) as error:
            raise DiskUnread(str(error)) from None
        finally:
            self._work.read(layer.unpacked_bytes - before)
        buffer[inside:] = bytes(len(buffer) - inside)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        self._work.ask()
        return join_extents(self._extents(offset, min(offset + length, self.size)))

    def _extents(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """From what was found before: who leaps along asks very often, and others ask again."""
        position = offset
        try:
            while position < end:
                found = self._known(position) or self._find(position)
                yield from found.between(position, end)
                position = found.end
        except (ImageReadFailed, ImageError):
            yield position, end

    def _known(self, position: int) -> _Found | None:
        """What was found from *position* on; None: nothing by now."""
        at = bisect_right(self._found, position, key=lambda found: found.start) - 1
        is_known = at >= 0 and position < self._found[at].end
        return self._found[at] if is_known else None

    def _find(self, position: int) -> _Found:
        """Find what there is from *position* on, as far as that is known at once."""
        found = self._look(position)
        if self._kept > MAX_KEPT:
            self._found.clear()
            self._kept = 0
        insort(self._found, found, key=lambda each: each.start)
        self._kept += 1 + len(found.starts)
        return found

    def _look(self, position: int) -> _Found:
        start = self._disk.start
        rows = next(
            extents(self._stratum, start + position, start + self.size, self._work.entries), None
        )
        if rows is None:  # behind the end of what the disk lies in
            return _Found(position, self.size, *_nothing())
        self._work.extents(len(rows))
        # What is damaged too: that it cannot be read is to be seen.
        some = (rows.data & ~rows.zero) | (rows.flaw != Flaw.NONE)
        low = rows.start[some] - start
        end = int(rows.start[-1] + rows.length[-1]) - start
        return _Found(position, end, low, low + rows.length[some])

    @cached_property
    def _stratum(self) -> Stratum:
        return disk_stratum(self._disk)


@dataclass(frozen=True, slots=True)
class _Found:
    """What there is of a disk from ``start`` to ``end``: ascending extents."""

    start: int
    end: int
    starts: I64
    stops: I64

    def between(self, position: int, end: int) -> Iterator[tuple[int, int]]:
        """The extents there, more and more at a time: who leaps along takes the first alone."""
        at = int(np.searchsorted(self.stops, position, side="right"))
        last, number = int(np.searchsorted(self.starts, end)), 1
        while at < last:
            part = slice(at, min(at + number, last))
            starts = np.maximum(self.starts[part], position).tolist()
            yield from zip(starts, np.minimum(self.stops[part], end).tolist(), strict=True)
            at, number = part.stop, min(2 * number, MAX_EXTENTS)


def hit_files(
    guest: Guest,
    place: Place,
    report: Report,
    triage: Triage | Exception,
    progress: Progress = tell_nobody,
) -> HitFiles | FilesUnknown:
    """The files of the disk at *place* that what *report* found hits.

    Raises what *progress* raises, and nothing else.
    """
    snapshot = ACTIVE if place.part is Part.DISK else place.index
    try:
        disk = guest.find(place)
    except (GuestEncrypted, SnapshotMissing, ImageError) as error:
        return FilesUnknown(str(error))
    known, work = triage if isinstance(triage, Triage) else Triage(), Work(_stored(disk.layer))
    try:
        impact = _impact(disk, report, known, snapshot, work)
        missing = _unmapped(disk, missing_places(known, disk.size, snapshot), work)
        elsewhere = _elsewhere(disk, work)
    except (ImageReadFailed, ImageError, WorkSpent) as error:
        return FilesUnknown(str(error))
    damage = guest_damage(impact, missing)
    return find_files(
        DiskSource(disk, work),
        _cut(damage, disk.size),
        unread=(elsewhere.start, elsewhere.end),
        work=work,
        progress=progress,
    )


def owner_of(
    guest: Guest, offset: int, progress: Progress = tell_nobody
) -> HitFiles | FilesUnknown:
    """Whose the byte at *offset* of the active disk is, wherever it can be read and whatever is
    wrong with it. Raises as `hit_files` does.
    """
    try:
        disk = guest.find(Place(Part.DISK))
        work = Work(_stored(disk.layer))
        elsewhere = _elsewhere(disk, work)
    except (GuestEncrypted, ImageReadFailed, ImageError, WorkSpent) as error:
        return FilesUnknown(str(error))
    at = np.array([offset], dtype=np.int64)
    no = np.zeros(1, dtype=np.bool_)
    byte = Damage(at, at + 1, np.zeros(1, dtype=np.uint8), unreadable=no, doubtful=no)
    return find_files(
        DiskSource(disk, work),
        byte,
        unread=(elsewhere.start, elsewhere.end),
        work=work,
        progress=progress,
    )


def _impact(disk: Disk, report: Report, triage: Triage, snapshot: int, work: Work) -> Impact:
    """What became of the bytes of *disk*, of a snapshot's those too that it shares with others.

    And what could not be looked at, where the check was not complete.
    """
    impact = guest_impact(report, snapshot, triage.losses)
    if snapshot == ACTIVE and report.complete:
        return impact
    contested = np.sort(report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset)
    end = contested + report.geometry.cluster_size
    beyond = np.array([[_file_end(report)], [_NOWHERE]], dtype=np.int64)
    lost: list[Ranges] = []
    suspect: list[Ranges] = []
    for rows in _watched(disk_extents(disk, 0, disk.size, work.entries), work):
        lost.append(_ranges(disk, rows, (rows.flaw != Flaw.NONE) & (rows.flaw != UNKNOWN)))
        here = np.flatnonzero((rows.offset != NO_HOST) & (rows.depth == 0) & rows.data)
        host, guest = rows.offset[here], rows.start[here] - disk.start
        for known, harmed in (((contested, end), suspect), (beyond, lost)):
            over = overlaps(host, host + rows.length[here], *known)
            shift = guest[over.row] - host[over.row]
            harmed.append(Ranges(over.start + shift, over.end + shift))
    return impact.with_more({Harm.LOST: lost, Harm.SUSPECT: suspect})


_NOWHERE = 1 << 62
"""Behind every file."""


def _file_end(report: Report) -> int:
    """Where the file with the data ends, as far as that is the image."""
    if report.layout is None or report.geometry.external_data:
        return _NOWHERE
    return report.layout.file_size


def _ranges(disk: Disk, rows: Extents, which: Mask) -> Ranges:
    start = rows.start[which] - disk.start
    return Ranges(start, start + rows.length[which])


def _watched(batches: Iterable[Extents], work: Work) -> Iterator[Extents]:
    for rows in batches:
        work.extents(len(rows))
        yield rows


def _unmapped(disk: Disk, places: Ranges, work: Work) -> Ranges:
    """What of *places* nothing is mapped to."""
    found = [Ranges(*_nothing())]
    stratum, shift = disk_stratum(disk), disk.start
    for start, length in places.first(len(places)):
        low, high = shift + start, shift + start + length
        for rows in _watched(extents(stratum, low, high, work.entries), work):
            part = _ranges(disk, rows, ~rows.data & (rows.flaw == Flaw.NONE))
            found.append(
                Ranges(np.maximum(part.start, start), np.minimum(part.end, start + length))
            )
    return _joined(found)


def _elsewhere(disk: Disk, work: Work) -> Ranges:
    """What of *disk* is in files that are not read. Looked for only where there are such files."""
    if not _lacks_files(disk.layer):
        return Ranges(*_nothing())
    return _joined(
        [
            _ranges(disk, rows, rows.flaw == UNKNOWN)
            for rows in _watched(disk_extents(disk, 0, disk.size, work.entries), work)
        ]
    )


def _stored(layer: RawLayer | Qcow2Layer | Missing | None) -> int:
    """Bytes that there are of a disk and of those beneath it, in all their files."""
    stored, below = 0, layer
    while isinstance(below, Qcow2Layer):
        stored += below.file.source().stored_bytes()
        if not isinstance(below.data, Missing) and below.data is not below.file:
            stored += below.data.source().stored_bytes()
        below = below.backing
    return stored + (below.file.source().stored_bytes() if isinstance(below, RawLayer) else 0)


def _lacks_files(layer: Qcow2Layer) -> bool:
    below: RawLayer | Qcow2Layer | Missing | None = layer
    while isinstance(below, Qcow2Layer):
        if isinstance(below.data, Missing):
            return True
        below = below.backing
    return isinstance(below, Missing)


def _nothing() -> tuple[I64, I64]:
    return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)


def _joined(parts: list[Ranges]) -> Ranges:
    nothing = np.zeros(0, dtype=np.int64)
    return Ranges(
        *join_ranges(
            np.concatenate([nothing, *(part.start for part in parts)]),
            np.concatenate([nothing, *(part.end for part in parts)]),
        )
    )


def _cut(damage: Damage, size: int) -> Damage:
    """*damage* within the disk."""
    inside = damage.start < size
    return Damage(
        damage.start[inside],
        np.minimum(damage.end[inside], size),
        damage.harm[inside],
        damage.unreadable[inside],
        damage.doubtful[inside],
    )
