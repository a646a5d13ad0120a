"""One offset explained: the way to a guest byte, and who uses a host cluster.

Walks the tables themselves and needs no check. What cannot be followed ends the way there and says
so; who uses a cluster is asked of every table all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, Cluster, GuestOffset, HostOffset
from planner.check.owners import OwnersFinder, contested_clusters
from planner.errors import ImageError
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import ACTIVE, Owner, Structure
from planner.guest.mapping import Flaw, RunKind, runs_of_entries
from planner.metadata.cluster_counters import ClusterIndex
from planner.metadata.gone_tables import GoneTables
from planner.metadata.locate import Survey, take_survey
from planner.progress import Meter, Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.entries import NO_HOST, ClusterType
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import read_refcount_in_block
from planner.qcow2.snapshots import Snapshot
from planner.source import READABLE_END, SECTOR, Source, nonzero_words, read_bytes
from planner.views.table_view import read_l2_page

LISTED_OWNERS = 20
"""Users of a cluster that are named; of more only the number is known."""


@dataclass(frozen=True, slots=True)
class RefcountPath:
    """How the stored refcount of a cluster is looked up.

    ``index``, ``entry_at``, ``word``: the refcount table entry, where it stands, and what it is.
    ``block``: host offset of the refcount block; 0: there is none, the refcount is 0.
    ``position``, ``at``: which refcount of the block, and the byte that it stands in. ``refcount``:
    None where the block is not where one can be.
    """

    index: int
    entry_at: int
    word: int
    block: int
    position: int
    at: int
    refcount: int | None


@dataclass(frozen=True, slots=True)
class HostCluster:
    """A host cluster: ``number``, its refcount, and its users.

    ``owners``: the first `LISTED_OWNERS` of ``references``; ``is_all``: there are no more of these
    than were counted. ``contested``: how many of them cannot all be right; 0 where they can.
    ``snapshots``, by number, and ``l2_tables``, by snapshot and L1 index: those that the owners are
    or are in. ``stopped``: tables that could not be read, and might refer to it too.
    """

    layout: Layout
    number: Cluster
    refcount: RefcountPath
    owners: tuple[Owner, ...]
    references: int
    is_all: bool
    contested: int
    snapshots: dict[int, Snapshot]
    l2_tables: dict[tuple[int, int], int]
    stopped: tuple[ImageError, ...]

    @property
    def offset(self) -> HostOffset:
        return HostOffset(self.number << self.layout.geometry.cluster_bits)

    def l1_table(self, snapshot: int) -> HostOffset:
        """Where the L1 table is of a *snapshot* of an owner, or of the active disk."""
        if snapshot == ACTIVE:
            return HostOffset(self.layout.header.l1_table_offset)
        return HostOffset(self.snapshots[snapshot].l1_table_offset)

    @property
    def is_leaked(self) -> bool:
        return bool(self.refcount.refcount) and not self.references


@dataclass(frozen=True, slots=True)
class HostExplanation:
    """A byte of the image file, and its cluster.

    ``guest``: for each owner the guest offset that reads this byte; None for what is no plain data.
    """

    offset: HostOffset
    cluster: HostCluster
    guest: tuple[GuestOffset | None, ...]


@dataclass(frozen=True, slots=True)
class GuestExplanation:
    """The way to a byte of the active disk.

    ``l1_at``, ``l1_word``, ``l1_findings``: the L1 entry; ``l2_table``: where it leads, 0 for
    nowhere. ``l2_at``, ``l2_word``, ``bitmap``, ``type``, ``l2_findings``: the L2 entry.
    ``subcluster``: of extended L2 entries. ``kind``, ``flaw``: what is read, and why nothing can
    be. ``host``, ``length``: the bytes that the entry refers to, `NO_HOST` for none; ``read_from``:
    where exactly the byte is. ``gone``: the table on the way that was overwritten with something
    else, so that whatever is read there was never the guest's. ``clusters``: the host clusters of
    the L2 table, and of the data.
    """

    layout: Layout
    offset: GuestOffset
    l1_index: int
    l1_at: int
    l1_word: int
    l1_findings: int
    l2_table: int
    l2_index: int
    l2_at: int
    l2_word: int
    l2_findings: int
    bitmap: int | None
    type: ClusterType
    subcluster: int | None
    kind: RunKind
    flaw: Flaw
    host: int
    length: int
    read_from: int
    gone: Structure | None
    clusters: tuple[HostCluster, ...]


def explain_host(
    source: Source, offset: HostOffset, progress: Progress = tell_nobody
) -> HostExplanation:
    """Who uses the cluster of the host *offset*. *progress*: bytes of tables read.

    Raises `ImageError` where the header does not say where anything is.
    """
    layout = Layout.read(source)
    number = Cluster(offset >> layout.geometry.cluster_bits)
    (cluster,) = _clusters(source, layout, [number], progress)
    guest = tuple(_guest_byte(source, offset, cluster, owner) for owner in cluster.owners)
    return HostExplanation(offset, cluster, guest)


def _guest_byte(
    source: Source, offset: HostOffset, cluster: HostCluster, owner: Owner
) -> GuestOffset | None:
    """The guest offset that an owner of a host *offset* reads it at."""
    geometry = cluster.layout.geometry
    table = cluster.l2_tables.get((owner.snapshot, owner.l1_index))
    if owner.structure is not Structure.DATA or table is None:
        return None
    at = table + owner.l2_index * geometry.l2_entry_size
    start = int.from_bytes(read_bytes(source, at, 8), "big") & entries.L2_OFFSET
    if not start <= offset < start + geometry.cluster_size:
        return None
    guest = owner.l1_index * geometry.l2_coverage + owner.l2_index * geometry.cluster_size
    return GuestOffset(guest + offset - start)


def explain_guest(
    source: Source, offset: GuestOffset, progress: Progress = tell_nobody
) -> GuestExplanation:
    """The way to the guest *offset*. Raises as `explain_host`, and for one past the disk's end."""
    layout = Layout.read(source)
    geometry = layout.geometry
    if offset >= geometry.virtual_size:
        problem = f"the disk ends at {geometry.virtual_size}"
        raise ImageError("offset", offset, problem)
    l1_index, inside = divmod(offset, geometry.l2_coverage)
    l2_index = inside >> geometry.cluster_bits
    page = read_l2_page(source, l1_index)
    word = page.words[l2_index : l2_index + 1]
    bitmap = None if page.bitmaps is None else page.bitmaps[l2_index : l2_index + 1]
    start = np.array([offset >> geometry.cluster_bits << geometry.cluster_bits])
    misaligned = page.offset % geometry.cluster_size != 0
    flaw = np.array([Flaw.L2_MISALIGNED if misaligned else Flaw.NONE], dtype=np.uint8)
    run = runs_of_entries(start, word, bitmap, geometry, flaw).cut(offset, offset + 1)
    types = entries.cluster_types(word, geometry)
    host, length = (int(each[0]) for each in entries.host_ranges(word, types, geometry))
    numbers = [page.offset >> geometry.cluster_bits] if page.offset else []
    if host != NO_HOST and not geometry.external_data:
        last = host + length - 1
        numbers += range(host >> geometry.cluster_bits, (last >> geometry.cluster_bits) + 1)
    sub = geometry.cluster_size // 32
    return GuestExplanation(
        layout=layout,
        offset=offset,
        l1_index=l1_index,
        l1_at=layout.header.l1_table_offset + 8 * l1_index,
        l1_word=page.l1_word,
        l1_findings=page.l1_findings,
        l2_table=page.offset,
        l2_index=l2_index,
        l2_at=page.offset + l2_index * geometry.l2_entry_size,
        l2_word=int(word[0]),
        l2_findings=int(page.findings[l2_index]),
        bitmap=None if bitmap is None else int(bitmap[0]),
        type=ClusterType(int(types[0])),
        subcluster=None if bitmap is None else (offset & (geometry.cluster_size - 1)) // sub,
        kind=RunKind(int(run.kind[0])),
        flaw=Flaw(int(run.flaw[0])),
        host=host,
        length=length,
        read_from=int(run.host[0]),
        gone=_gone_table(source, layout, page.offset, l2_index),
        clusters=_clusters(source, layout, numbers, progress),
    )


def _gone_table(source: Source, layout: Layout, table: int, l2_index: int) -> Structure | None:
    """Which of the tables on the way to an entry of the L2 table at *table* was overwritten."""
    geometry, header = layout.geometry, layout.header
    rule = GoneTables(geometry, layout.file_size)
    _, words = nonzero_words(source, header.l1_table_offset, header.l1_size)
    if rule.is_gone_l1(words):
        return Structure.L1_TABLE
    if not table or table % geometry.cluster_size or table >= layout.file_size:
        return None
    row = np.frombuffer(read_bytes(source, table, geometry.cluster_size), dtype=np.uint8)
    sectors, _ = rule.sectors(row.reshape(1, -1))
    is_gone = bool(sectors[0, l2_index * geometry.l2_entry_size // SECTOR])
    return Structure.L2_TABLE if is_gone else None


# ---- host clusters ----


def _clusters(
    source: Source, layout: Layout, numbers: list[int], progress: Progress
) -> tuple[HostCluster, ...]:
    """What is to be said of host clusters, in the order of *numbers*."""
    if not numbers:
        return ()
    survey = take_survey(source, layout, FindingsBuilder())
    index = ClusterIndex(0, np.unique(np.array(numbers, dtype=np.int64)))
    finder = OwnersFinder(
        layout.geometry, index, np.ones(index.slots, dtype=np.bool_), survey.l1, survey.tables
    )
    finder.add_regions(survey.every_region)
    size = len(survey.present) * layout.geometry.cluster_size
    finder.add_entries(source, survey.present, Meter(progress, "owners", size))
    owners = finder.result()
    contested = dict(
        zip(
            *(c.tolist() for c in contested_clusters(owners, layout.geometry.l2_entries)),
            strict=True,
        )
    )
    snapshots, found = survey.snapshots.snapshots, []
    for number in map(Cluster, numbers):
        low, high = np.searchsorted(owners.cluster, [number, number + 1])
        listed = tuple(owners.of(number, limit=LISTED_OWNERS))
        found.append(
            HostCluster(
                layout=layout,
                number=number,
                refcount=_refcount_path(source, layout, number),
                owners=listed,
                references=int(high - low),
                is_all=not owners.truncated,
                contested=contested.get(number, 0),
                snapshots={it: snapshots[it] for it in _snapshots_of(listed)},
                l2_tables=_l2_tables(survey, listed),
                stopped=survey.stopped,
            )
        )
    return tuple(found)


def _snapshots_of(owners: tuple[Owner, ...]) -> set[int]:
    return {owner.snapshot for owner in owners if owner.snapshot >= 0}


def _l2_tables(survey: Survey, owners: tuple[Owner, ...]) -> dict[tuple[int, int], int]:
    """Host offsets of the L2 tables that owners are in or are, by snapshot and L1 index."""
    wanted = {(owner.snapshot, owner.l1_index) for owner in owners}
    l1 = survey.l1
    keys = np.isin(l1.l1_index, np.array([index for _, index in wanted], dtype=np.int64))
    at: I64 = np.flatnonzero(keys)
    places = zip(
        l1.snapshot[at].tolist(), l1.l1_index[at].tolist(), l1.offset[at].tolist(), strict=True
    )
    return {(snapshot, i): offset for snapshot, i, offset in places if (snapshot, i) in wanted}


def _refcount_path(source: Source, layout: Layout, number: int) -> RefcountPath:
    """qcow2_get_refcount, step by step."""
    geometry = layout.geometry
    index, position = divmod(number, geometry.refblock_entries)
    entry_at = layout.header.refcount_table_offset + 8 * index
    word = 0
    if index < layout.reftable_entries:
        word = int.from_bytes(read_bytes(source, entry_at, 8), "big")
    block = word & entries.REFTABLE_OFFSET
    at = block + (position << geometry.refcount_order) // 8
    refcount: int | None = 0
    if block % geometry.cluster_size or block > READABLE_END - geometry.cluster_size:
        refcount = None
    elif block:
        raw = np.frombuffer(read_bytes(source, block, geometry.cluster_size), dtype=np.uint8)
        found = read_refcount_in_block(raw, np.array([position]), geometry.refcount_order)
        refcount = int(found[0])
    return RefcountPath(index, entry_at, word, block, position, at, refcount)
