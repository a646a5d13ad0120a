"""``explain/``: one offset, in sentences, with every word on the way to it as it stands.

Where a check has been run, what it found on that way stands at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from instarfs.render.check import owner_phrase, sentence
from instarfs.render.files import owner_lines
from instarfs.render.tables import TYPE_LABELS
from instarfs.text import text_lines
from planner.check.report import Report
from planner.errors import ImageError
from planner.findings.kinds import KINDS, Finding, FindingKind, Owner, Structure
from planner.findings.wording import plural
from planner.guest.mapping import FLAW_SENTENCES, RunKind
from planner.guestfs.files import FilesUnknown, HitFiles
from planner.qcow2 import entries
from planner.qcow2.entries import NO_HOST, ClusterType
from planner.qcow2.geometry import SECTOR
from planner.views.explain import GuestExplanation, HostCluster, HostExplanation
from planner.views.host_map import kinds_in

LISTED = 20
"""Findings of a check, and users of a cluster, that are told."""


def host_txt(it: HostExplanation | ImageError, offset: int, report: Report | None) -> bytes:
    """What a byte of the image file is used for. *report*: of a check, if there was one."""
    lines = [f"host offset {offset} ({offset:#x})", ""]
    if isinstance(it, ImageError):
        return _text([*lines, f"Nothing is known of it: {it}."])
    cluster, size = it.cluster, it.cluster.layout.file_size
    if offset >= size:
        lines.append(
            f"It is past the end of the file, which has {plural(size, 'byte')}: it reads as zero."
        )
    inside = offset - cluster.offset
    lines.append(f"It is byte {inside} of host cluster {cluster.number}, at {cluster.offset}.")
    lines += ["", *_cluster_lines(cluster, it)]
    return _text([*lines, *_findings(report, [cluster], [])])


def guest_txt(
    it: GuestExplanation | ImageError,
    offset: int,
    report: Report | None,
    owner: HitFiles | FilesUnknown | None = None,
) -> bytes:
    """The way to a byte of the active disk, and whose it is there.

    *report*: of a check, if there was one. *owner*: what was found of that byte.
    """
    lines = [f"guest offset {offset} ({offset:#x})", ""]
    if isinstance(it, ImageError):
        return _text([*lines, f"There is no way to it: {it}."])
    lines += [*_l1_lines(it), *_l2_lines(it), "", _reading(it), *_gone(it)]
    for number, cluster in enumerate(it.clusters):
        what = "the L2 table" if it.l2_table and not number else "the data"
        head = f"Host cluster {cluster.number}, at {cluster.offset}: {what}"
        lines += ["", head, *(f"  {line}" for line in _cluster_lines(cluster))]
    words = [it.l1_at, it.l2_at] if it.l2_table else [it.l1_at]
    return _text([*lines, *_findings(report, it.clusters, words), *owner_lines(owner)])


def _text(lines: list[str]) -> bytes:
    return text_lines(lines).encode()


# ---- the way to a guest byte ----


def _l1_lines(it: GuestExplanation) -> Iterator[str]:
    yield f"L1 entry {it.l1_index}, at host offset {it.l1_at}: {it.l1_word:#018x}"
    if not it.l2_table:
        yield "  no L2 table: the way ends here"
    else:
        yield f"  L2 table at host offset {it.l2_table}, {_copied(it.l1_word)}"
    yield from _wrong(it.l1_findings)


def _l2_lines(it: GuestExplanation) -> Iterator[str]:
    if not it.l2_table:
        return
    yield f"L2 entry {it.l2_index}, at host offset {it.l2_at}: {it.l2_word:#018x}"
    if it.bitmap is not None:
        yield f"  subclusters {it.bitmap:#018x}; the offset is in number {it.subcluster}"
    label = TYPE_LABELS[it.type]
    if it.type is ClusterType.COMPRESSED:
        yield f"  {label}: {it.length} bytes from host offset {it.host} on"
    elif it.host != NO_HOST:
        yield f"  {label}: cluster at host offset {it.host}, {_copied(it.l2_word)}"
    else:
        yield f"  {label}"
    yield from _wrong(it.l2_findings)


def _copied(word: int) -> str:
    return f"COPIED flag {int(word >= entries.COPIED)}"


def _wrong(findings: int) -> Iterator[str]:
    for kind in kinds_in(findings):
        yield f"  WRONG: {kind.label}: {KINDS[kind].meaning}"


_CUT_OFF = (
    "The guest cannot read it, unless what is left of the compressed cluster unpacks: the end of it"
    " is not in this file."
)


def _reading(it: GuestExplanation) -> str:
    """What the guest reads there."""
    geometry, lost = it.layout.geometry, 1 << FindingKind.PAST_END
    where = "the external data file" if geometry.external_data else "this file"
    match it.kind:
        case RunKind.DAMAGED:
            return f"The guest cannot read it: {FLAW_SENTENCES[it.flaw]}."
        case RunKind.UNALLOCATED if it.layout.backing_file:
            return "The guest reads what the backing file has there."
        case RunKind.UNALLOCATED:
            lost_table = it.l1_findings & lost
            why = "the L2 table is not in the file" if lost_table else "nothing is allocated there"
            return f"The guest reads zeros: {why}."
        case RunKind.ZERO:
            return "The guest reads zeros: the entry says so."
        case RunKind.COMPRESSED:
            cut = it.host + it.length - it.layout.file_size >= SECTOR
            return _CUT_OFF if cut else "The guest reads it out of the compressed cluster."
        case _:
            past = not geometry.external_data and it.read_from >= it.layout.file_size
            end = "; that is past its end: zeros" if past else ""
            return f"The guest reads the byte at offset {it.read_from} of {where}{end}."


def _gone(it: GuestExplanation) -> Iterator[str]:
    if it.gone is not None:
        yield (
            f"That is not what the guest wrote: the {it.gone.label} was overwritten there with"
            " something else, and what it led to is lost."
        )


# ---- host clusters ----


def _cluster_lines(cluster: HostCluster, it: HostExplanation | None = None) -> Iterator[str]:
    """Users, refcount, and what is wrong between them; of *it* also where in them it is."""
    if not cluster.references:
        yield _unused(cluster)
    else:
        yield f"Used {_times(cluster)}:"
        for number, owner in enumerate(cluster.owners):
            phrase = owner_phrase(owner, cluster.layout.geometry, cluster.snapshots)
            detail = _place_in(it, owner, it.guest[number]) if it else ""
            yield f"  - {phrase}{detail}"
        if more := cluster.references - len(cluster.owners):
            yield f"  ... and {more} more"
    yield from _refcount_lines(cluster)
    yield from _contradictions(cluster)
    if cluster.stopped:
        yield "Not every table could be read; what follows may refer to it, too:"
        yield from (f"  - {error}" for error in cluster.stopped[:LISTED])


def _times(cluster: HostCluster) -> str:
    if cluster.references == 1:
        return "once"
    return f"{'' if cluster.is_all else 'at least '}{plural(cluster.references, 'time')}"


def _unused(cluster: HostCluster) -> str:
    if cluster.is_leaked:
        return (
            "Nothing refers to it, and it is counted as used: it is leaked. That is wasted space,"
            " or what is left of something lost: see lost/ before you reclaim it."
        )
    if cluster.refcount.refcount is None or cluster.offset >= cluster.layout.file_size:
        return "Nothing refers to it."
    return "Nothing refers to it, and it is not counted as used: it is free."


def _refcount_lines(cluster: HostCluster) -> Iterator[str]:
    path = cluster.refcount
    if path.index >= cluster.layout.reftable_entries:
        yield f"Refcount: 0, as the refcount table has no entry {path.index}"
        return
    value = "cannot be looked up" if path.refcount is None else str(path.refcount)
    yield f"Refcount: {value}"
    yield f"  refcount table entry {path.index}, at host offset {path.entry_at}: {path.word:#018x}"
    if path.refcount is None:
        yield f"  the way ends here: no refcount block can be at {path.block}"
    elif not path.block:
        yield "  no refcount block: the refcount is 0"
    else:
        at = f"refcount {path.position} of it is at {path.at}"
        yield f"  refcount block at host offset {path.block}; {at}"


def _contradictions(cluster: HostCluster) -> Iterator[str]:
    stored, references = cluster.refcount.refcount, cluster.references
    kinds = []
    if cluster.contested:
        kinds.append(FindingKind.MULTIPLE_OWNERS)
    if stored is None:
        kinds.append(FindingKind.REFCOUNT_UNREADABLE)
    elif cluster.is_all and not stored and references:
        kinds.append(FindingKind.REFCOUNT_MISSING)
    elif cluster.is_all and stored < references:
        kinds.append(FindingKind.REFCOUNT_LOW)
    for kind in kinds:
        yield f"WRONG: {kind.label}: {KINDS[kind].meaning}"
    if stored is not None and cluster.is_all and stored > references > 0:
        yield f"WRONG: the refcount is {stored - references} too high: a leak"


def _place_in(it: HostExplanation, owner: Owner, guest: int | None) -> str:
    """Where in what uses the cluster the byte is."""
    cluster, geometry = it.cluster, it.cluster.layout.geometry
    inside = it.offset - cluster.offset
    match owner.structure:
        case Structure.DATA if guest is not None:
            return f": this byte is guest offset {guest}"
        case Structure.L1_TABLE:
            entry = (it.offset - cluster.l1_table(owner.snapshot)) // 8
            return f": entry {entry}, for guest offset {entry * geometry.l2_coverage} on"
        case Structure.L2_TABLE:
            table = cluster.l2_tables.get((owner.snapshot, owner.l1_index), cluster.offset)
            entry = (it.offset - table) // geometry.l2_entry_size
            start = owner.l1_index * geometry.l2_coverage + entry * geometry.cluster_size
            return f": entry {entry}, for guest offset {start} on"
        case Structure.REFTABLE:
            entry = (it.offset - cluster.layout.header.refcount_table_offset) // 8
            return f": entry {entry}, for host cluster {entry * geometry.refblock_entries} on"
        case Structure.REFBLOCK:
            position = inside * 8 >> geometry.refcount_order
            number = owner.index * geometry.refblock_entries + position
            return f": refcount {position}, of host cluster {number}"
        case _:
            return ""


# ---- what a check found ----


def _findings(
    report: Report | None, clusters: tuple[HostCluster, ...] | list[HostCluster], words: list[int]
) -> Iterator[str]:
    """The findings about these host clusters and the words at these host offsets."""
    if report is None or report.layout is None:
        return
    size = report.geometry.cluster_size
    rows: list[Finding] = []
    for found in report.findings.groups.values():
        end = found.host_offset + np.maximum(found.length, 1)
        about = np.zeros(len(found), dtype=np.bool_)
        for word in words:
            about |= (found.host_offset <= word) & (word < end)
        for cluster in clusters:
            first = cluster.offset
            about |= (found.host_offset < first + size) & (first < end) & (found.length >= size)
        rows += found.select(np.flatnonzero(about)[:LISTED]).rows()
    if report.entries is not None:
        rows += [row for word in words for row in report.entries.at(word).rows()]
        whole = (row for each in clusters for row in report.entries.at(each.offset).rows())
        rows += [row for row in whole if row.length >= size]
    chosen = sorted(set(rows), key=lambda row: (-row.info.severity, row.kind, row.host_offset))
    if chosen:
        yield from ("", "The check says of these words and clusters:")
        yield from (f"  - {sentence(report, finding)}" for finding in chosen[:LISTED])
    if report.torn:
        yield from ("", "That check was torn: what it says belongs to no single moment.")
