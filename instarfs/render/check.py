"""A check's `Report` as JSON, text and TSV: the files of ``check/``, what `instarfs check` prints.

What a kind of finding means is said in `planner.findings.kinds.KINDS`; here it becomes sentences.
Numbers are decimal, offsets and lengths in bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from instarfs.image.surroundings import Gone
from instarfs.render import columns, lengths
from instarfs.render.columns import Cells, T, tsv
from instarfs.render.live import live_lines, live_value
from instarfs.render.outcome import pending_value, repair_value
from instarfs.text import json_bytes, printable
from planner.arrays import I64, U8, U64
from planner.check.classify import content_name
from planner.check.report import CheckCounters, Report
from planner.errors import ImageError
from planner.findings.kinds import (
    ACTIVE,
    KINDS,
    NONE,
    NOWHERE,
    Finding,
    FindingKind,
    Findings,
    Owner,
    Severity,
    Structure,
)
from planner.findings.wording import plural
from planner.qcow2.geometry import Geometry
from planner.qcow2.names import brief_name
from planner.qcow2.snapshots import Snapshot

if TYPE_CHECKING:  # a check alone loads nothing of repairs
    from instarfs.repair.outcome import Pending, RepairOutcome
    from planner.repair.plan import Plan

_Snapshots = Sequence[Snapshot] | Mapping[int, Snapshot]
"""All of an image, or by their numbers those that are asked for."""

REFCOUNT_KINDS = (FindingKind.REFCOUNT_MISSING, FindingKind.REFCOUNT_LOW, FindingKind.LEAK)
HEX_COLUMNS = {"entry", "subcluster bitmap", "refcount table entry"}
ALWAYS = ("check-errors",)
"""Of the counters of ``qemu-img check``, those that it prints also where they are 0."""
LISTED = 10
"""Findings of one kind that a text for reading lists; the rest are in the files it names."""

VERDICTS = {
    "clean": "No errors were found: the metadata of this image is consistent.",
    "dirty": "The metadata is consistent, but the image was not closed properly (dirty bit).",
    "marked-corrupt": (
        "The metadata is consistent, but the image is marked corrupt: QEMU found something wrong"
        " earlier and refuses to write to it."
    ),
    "leaks": "Leaked clusters: space is wasted, or they are what is left of something lost. Look"
    " before you reclaim them.",
    "corrupt": "The image is damaged: data is, or may become, wrong. Do not write to it.",
    "incomplete": "The check could not look at everything: what follows is not the whole truth.",
    "torn": "What was read belongs to no single moment: nothing below can be relied on.",
    "unsettled": (
        "The image never held still for long enough, and nothing was confirmed to be wrong: whether"
        " it is healthy is not known. Check again, or for longer."
    ),
    "unreadable": "The header cannot be interpreted: `instarfs rescue` looks for what it said.",
}
"""What a person should believe of an image, in a sentence or two."""


# ---- JSON ----


def result_json(
    report: Report,
    filename: str,
    repair: RepairOutcome | None = None,
    pending: Pending | None = None,
    *,
    zeros: bool = True,
    exit_code: int | None = None,
    gone: Gone | None = None,
    preview: Plan | None = None,
) -> bytes:
    """The keys of ``qemu-img check --output=json``, then ours.

    *repair*: the one that the check belongs to, if any. *pending*: one that was interrupted.
    *zeros*: print counters of QEMU's that are 0; `qemu-img` leaves them out, and callers ask for
    the key. *exit_code*: of the command that prints it, where that is not the check's. *gone*: that
    the file has no name any more. *preview*: the plan that is laid over it.
    """
    counters = {
        **counters_value(report),
        "corruptions-fixed": repair.corruptions_fixed if repair else 0,
        "leaks-fixed": repair.leaks_fixed if repair else 0,
    }
    value: dict[str, object] = {
        "filename": filename,
        "format": "qcow2",
        **{key: count for key, count in counters.items() if zeros or count or key in ALWAYS},
        "verdict": report.verdict,
        "exit-code": report.exit_code if exit_code is None else exit_code,
        "dirty": report.layout is not None and report.layout.header.dirty,
        "corrupt": report.layout is not None and report.layout.header.corrupt,
        "image-in-use": report.in_use,
        "changed-during-check": report.changed,
        **live_value(report),
        "complete": report.complete,
        "refcount-rebuild-needed": report.needs_rebuild,
        "cut-off": _cut_off_value(report),
        "compressed-looked-at": report.compressed_looked_at,
        "counts": {kind.label: number for kind, number in sorted(report.counts().items())},
    }
    if report.error is not None:
        value["error"] = _error_value(report.error)
    if report.luks_error is not None:
        value["luks-error"] = _error_value(report.luks_error)
    if report.stopped:
        value["stopped"] = [_error_value(error) for error in report.stopped]
    if repair is not None:
        value |= {"repair-status": repair.status.value, **repair_value(repair)}
    if pending is not None:
        value["interrupted-repair"] = pending_value(pending)
    if gone is not None:
        value["image-gone"] = "deleted" if gone.is_deleted else "moved"
    if preview is not None:
        value["preview"] = {"tier": str(preview.tier), "plan-id": preview.id}
    return json_bytes(value)


def unchecked_json(filename: str, error: str, exit_code: int) -> bytes:
    """In place of `result_json`, among those of other images, of one that was not checked."""
    return json_bytes({"filename": filename, "error": {"message": error}, "exit-code": exit_code})


def _cut_off_value(report: Report) -> dict[str, int] | None:
    """Where a file that is too short ends, and where it should."""
    cut = report.cut_off
    return {"ends-at": cut.ends_at, "needs": cut.needs} if cut else None


def counters_value(report: Report) -> dict[str, int]:
    """The counters under QEMU's keys; a header that cannot be read is an error, too."""
    counters = keyed_counters(report.counters)
    return counters | {"check-errors": counters["check-errors"] or int(report.error is not None)}


def keyed_counters(counters: CheckCounters) -> dict[str, int]:
    """Counters under QEMU's keys."""
    return {
        "check-errors": counters.check_errors,
        "corruptions": counters.corruptions,
        "leaks": counters.leaks,
        "image-end-offset": counters.image_end_offset,
        "total-clusters": counters.total_clusters,
        "allocated-clusters": counters.allocated_clusters,
        "fragmented-clusters": counters.fragmented_clusters,
        "compressed-clusters": counters.compressed_clusters,
    }


def counters_phrase(counters: CheckCounters) -> str:
    """What is wrong, in three numbers."""
    return (
        f"{plural(counters.corruptions, 'corruption')},"
        f" {plural(counters.leaks, 'leaked cluster')},"
        f" {plural(counters.check_errors, 'check error')}"
    )


def _error_value(error: ImageError) -> dict[str, object]:
    return {"field": error.field, "value": error.value, "message": printable(str(error))}


def result_bin(report: Report, repair: RepairOutcome | None = None) -> bytes:
    """The `CheckResult`, 80 bytes; with what the *repair* that it belongs to has mended."""
    from planner.check.wire import CheckResult  # noqa: PLC0415 - for nothing but this file

    return CheckResult.of(report, repair.counters if repair else None).to_bytes()


def finding_value(report: Report, finding: Finding) -> dict[str, object]:
    """A finding as an object of ``findings.jsonl``; what does not apply is left out."""
    info = finding.info
    value: dict[str, object] = {
        "kind": finding.kind.label,
        "severity": info.severity.label,
        "structure": finding.structure.label,
        "host-offset": finding.host_offset,
        "length": finding.length,
        "count": finding.count,
    }
    if finding.snapshot != NOWHERE:
        value["snapshot"] = None if finding.snapshot == ACTIVE else finding.snapshot
    places = {
        "l1-index": finding.l1_index,
        "l2-index": finding.l2_index,
        "index": finding.index,
    }
    value |= {name: number for name, number in places.items() if number != NONE}
    if finding.guest_offset != NONE:
        value["guest-offset"] = finding.guest_offset
        value["guest-length"] = finding.guest_length
    value["found"] = _number(info.found, finding.found)
    if finding.kind is FindingKind.TABLE_OVERWRITTEN:
        value["found"] = content_name(finding.found)
    if info.expected:
        value["expected"] = _number(info.expected, finding.expected)
    value["repaired-by"] = info.tier or info.choice
    if info.left:
        value["left-because"] = info.left
    owners = owners_of(report, finding)
    if owners:
        value["owners"] = [owner_value(report, owner) for owner in owners]
    value["message"] = sentence(report, finding)
    return value


def owner_value(report: Report, owner: Owner) -> dict[str, object]:
    """An owner as an object of ``findings.jsonl``; what does not apply is left out."""
    value: dict[str, object] = {
        "structure": owner.structure.label,
        "class": "guest" if owner.structure.is_guest else "metadata",
    }
    if owner.snapshot != NOWHERE:
        value["snapshot"] = None if owner.snapshot == ACTIVE else owner.snapshot
    if owner.l1_index != NONE:
        value["l1-index"] = owner.l1_index
    if owner.l2_index != NONE:
        value["l2-index"] = owner.l2_index
        value["guest-offset"] = guest_offset_of(owner, report.geometry)
    if owner.index != NONE:
        value["index"] = owner.index
    return value


def _number(column: str, value: int) -> int | str:
    return f"{value:#018x}" if column in HEX_COLUMNS else value


def guest_offset_of(owner: Owner, geometry: Geometry) -> int:
    """Of the guest cluster that an owner is."""
    return owner.l1_index * geometry.l2_coverage + owner.l2_index * geometry.cluster_size


# ---- TSV ----


_LEAKS = ("offset", "length", "refcount", "references")
_REFCOUNTS = (*_LEAKS, "kind")
_CORRUPTIONS = (
    "offset",
    "length",
    "kind",
    "count",
    "structure",
    "snapshot",
    "l1_index",
    "l2_index",
    "guest_offset",
    "guest_length",
    "found",
    "expected",
)


def leaks_tsv(report: Report) -> Iterator[bytes]:
    """Leaked runs: offset, length, stored refcount, references."""
    return tsv(_LEAKS, map(columns.content, _leak_rows(columns, report)))


def leaks_tsv_length(report: Report) -> int:
    """How many bytes `leaks_tsv` gives, in a fraction of the time."""
    return lengths.tsv(_LEAKS, map(lengths.content, _leak_rows(lengths, report)))


def _leak_rows(cells: Cells[T], report: Report) -> Iterator[T]:
    for batch in report.batches(FindingKind.LEAK):
        yield cells.tabbed(*map(cells.decimals, _refcount_numbers(batch)))


def refcounts_tsv(report: Report) -> Iterator[bytes]:
    """Every run of clusters whose stored refcount is not its number of references."""
    return tsv(_REFCOUNTS, map(columns.content, _refcount_rows(columns, report)))


def refcounts_tsv_length(report: Report) -> int:
    """How many bytes `refcounts_tsv` gives, in a fraction of the time."""
    return lengths.tsv(_REFCOUNTS, map(lengths.content, _refcount_rows(lengths, report)))


def _refcount_rows(cells: Cells[T], report: Report) -> Iterator[T]:
    for batch in report.batches(*REFCOUNT_KINDS):
        numbers = map(cells.decimals, _refcount_numbers(batch))
        yield cells.tabbed(*numbers, _kind_labels(cells, batch))


def _refcount_numbers(batch: Findings) -> tuple[I64, I64, U64, U64]:
    return batch.host_offset, batch.length, batch.found, batch.expected


def _kind_labels(cells: Cells[T], batch: Findings) -> T:
    return cells.labels([kind.label for kind in FindingKind], batch.kind)


def corruptions_tsv(report: Report) -> Iterator[bytes]:
    """Everything that is, or may become, wrong."""
    return tsv(_CORRUPTIONS, map(columns.content, _corruption_rows(columns, report)))


def corruptions_tsv_length(report: Report) -> int:
    """How many bytes `corruptions_tsv` gives, in a fraction of the time."""
    return lengths.tsv(_CORRUPTIONS, map(lengths.content, _corruption_rows(lengths, report)))


def _corruption_rows(cells: Cells[T], report: Report) -> Iterator[T]:
    kinds = [
        kind
        for kind, info in KINDS.items()
        if info.severity in (Severity.CORRUPTION, Severity.CHECK_ERROR)
    ]
    for batch in report.batches(*kinds):
        yield _corruption_lines(cells, batch)


def _corruption_lines(cells: Cells[T], batch: Findings) -> T:
    has_guest, snapshot = batch.guest_offset != NONE, batch.snapshot
    of_snapshot = cells.decimals(np.maximum(snapshot, NONE))
    expected = _number_cells(cells, batch.expected, batch.kind, _EXPECTED)
    return cells.tabbed(
        cells.decimals(batch.host_offset),
        cells.decimals(batch.length),
        _kind_labels(cells, batch),
        cells.decimals(batch.count),
        cells.labels([structure.label for structure in Structure], batch.structure),
        cells.either(snapshot == ACTIVE, cells.same(b"active"), of_snapshot),
        cells.decimals(batch.l1_index),
        cells.decimals(batch.l2_index),
        cells.decimals(batch.guest_offset),
        cells.decimals(np.where(has_guest, batch.guest_length, NONE)),
        _number_cells(cells, batch.found, batch.kind, _FOUND),
        cells.either(_EXPECTS_NOTHING[batch.kind], cells.same(b"-"), expected),
    )


_FOUND = [KINDS[kind].found for kind in FindingKind]
_EXPECTED = [KINDS[kind].expected for kind in FindingKind]
_EXPECTS_NOTHING = np.array([not column for column in _EXPECTED])


def _number_cells(cells: Cells[T], values: U64, kind: U8, names: list[str]) -> T:
    """As `_number`: in decimal or hexadecimal, by what *names* says that a kind has there."""
    is_hex = np.array([name in HEX_COLUMNS for name in names])[kind]
    return cells.either(is_hex, cells.hexadecimals(values), cells.decimals(values))


# ---- sentences ----


def sentence(report: Report, finding: Finding) -> str:
    """One line that stands for itself: where, what it means, what was found and expected."""
    if finding.kind in REFCOUNT_KINDS or finding.kind is FindingKind.MULTIPLE_OWNERS:
        return fact(report, finding)
    return f"{fact(report, finding)}: {finding.info.meaning}"


def fact(report: Report, finding: Finding) -> str:
    """Where, what was found, what was expected; the kind's meaning is said elsewhere."""
    info, kind = finding.info, finding.kind
    owners = "; ".join(
        owner_phrase(owner, report.geometry, report.snapshots)
        for owner in owners_of(report, finding)
    )
    if kind in REFCOUNT_KINDS:
        facts = f"refcount {finding.found}, {plural(finding.expected, 'reference')}"
        facts += f" ({owners})" if owners else ""
        clusters = plural(finding.count, "cluster")
        return f"{clusters} at host offset {finding.host_offset}: {facts}"
    if kind is FindingKind.MULTIPLE_OWNERS:
        return (
            f"host cluster at {finding.host_offset} has {plural(finding.found, 'owner')}: {owners}"
        )
    if kind is FindingKind.CHECK_STOPPED:
        return _place(report, finding)
    if kind in {FindingKind.LUKS_HEADER_INVALID, FindingKind.LUKS_KEY_SLOT_GONE}:
        slot = f"key slot {finding.index}, in sector {finding.found}"
        is_slot = kind is FindingKind.LUKS_KEY_SLOT_GONE
        return (
            f"{_place(report, finding)}: {slot if is_slot else printable(str(report.luks_error))}"
        )
    if kind is FindingKind.TABLE_OVERWRITTEN:
        return f"{_overwritten_place(report, finding)} holds {content_name(finding.found)}"
    fact = f"{info.found} {_number(info.found, finding.found)}"
    if info.expected:
        fact += f", expected {_number(info.expected, finding.expected)}"
    text = f"{_place(report, finding)}: {fact}"
    return text if finding.count == 1 else f"{text}, {finding.count} times"


def _overwritten_place(report: Report, finding: Finding) -> str:
    """Which table, or what part of it."""
    at = f"at host offset {finding.host_offset}"
    if finding.structure is Structure.L1_TABLE:
        place = f"the L1 table {at}"
    else:
        place = f"the L2 table of L1 entry {finding.l1_index}, {at},"
        if finding.l2_index != NONE:
            count = finding.length // report.geometry.l2_entry_size
            last = finding.l2_index + count - 1
            place = f"L2 entries {finding.l2_index} to {last} of L1 entry {finding.l1_index}, {at},"
    if finding.snapshot >= 0:
        place += f" in {snapshot_name(report, finding.snapshot)},"
    return place


def _place(report: Report, finding: Finding) -> str:
    """Which structure, and where in it."""
    at = f"at host offset {finding.host_offset}"
    if finding.l2_index != NONE:
        place = f"L2 entry {finding.l2_index} of L1 entry {finding.l1_index}"
        if finding.structure.is_guest:
            place = f"{finding.structure.label} of {place}"
        place += f" (guest offset {finding.guest_offset})"
    elif finding.l1_index != NONE:
        what = "L2 table of L1 entry" if finding.structure is Structure.L2_TABLE else "L1 entry"
        place = f"{what} {finding.l1_index}"
    elif finding.structure is Structure.REFTABLE and finding.index != NONE:
        return f"refcount table entry {finding.index}"
    elif finding.structure is Structure.SNAPSHOT_TABLE and finding.index != NONE:
        return f"snapshot table entry {finding.index}"
    elif finding.structure in (Structure.BITMAP_TABLE, Structure.BITMAP_DATA):
        return f"{finding.structure.label} of bitmap {finding.index} {at}"
    else:
        place = f"{finding.structure.label} {at}"
    if finding.snapshot >= 0:
        place += f" in {snapshot_name(report, finding.snapshot)}"
    return place


def snapshot_name(report: Report, number: int) -> str:
    """A snapshot by its index, and by its name where it has one."""
    return _snapshot_name(report.snapshots, number)


def _snapshot_name(snapshots: _Snapshots, number: int) -> str:
    name = b""
    with contextlib.suppress(LookupError):  # behind what could be read of the table
        name = snapshots[number].name
    return f"snapshot {number} ({printable(brief_name(name))})" if name else f"snapshot {number}"


def owner_phrase(owner: Owner, geometry: Geometry, snapshots: _Snapshots) -> str:
    """Who uses a cluster, in a few words."""
    label = owner.structure.label
    if owner.structure.is_guest:
        text = f"guest offset {guest_offset_of(owner, geometry)}"
        if owner.structure is Structure.COMPRESSED:
            text += ", compressed"
    elif owner.structure is Structure.L2_TABLE:
        text = f"{label} of L1 entry {owner.l1_index}"
    elif owner.structure is Structure.L1_TABLE and owner.snapshot == ACTIVE:
        return "active L1 table"
    elif owner.index != NONE and owner.snapshot == NOWHERE:
        text = f"{label} {owner.index}"
    else:
        text = label
    if owner.snapshot >= 0:
        text += f" in {_snapshot_name(snapshots, owner.snapshot)}"
    return text


def owners_of(report: Report, finding: Finding) -> list[Owner]:
    """Who uses the clusters of a finding about host clusters, where that was looked up."""
    if finding.structure is not Structure.CLUSTER:
        return []
    bits = report.geometry.cluster_bits
    return report.owners.of(finding.host_offset >> bits, max(1, finding.length >> bits))


# ---- texts ----


def cut_off_lines(report: Report) -> list[str]:
    """One line where the file is too short, else none."""
    cut = report.cut_off
    return [f"The file is cut off: it ends at {cut.ends_at} and needs {cut.needs}."] if cut else []


def worst_first(counts: dict[FindingKind, int]) -> list[tuple[FindingKind, int]]:
    """By severity, then in the order of the kinds: what loses data before what risks it."""
    return sorted(counts.items(), key=lambda item: (-KINDS[item[0]].severity, item[0]))


def check_messages(report: Report) -> Iterator[str]:
    """What `instarfs check` says on stderr: the findings, at most a few of each kind."""
    yield from (f"NOTE {line}" for line in cut_off_lines(report))
    for kind, number in worst_first(report.counts()):
        word = {Severity.LEAK: "Leaked", Severity.NOTICE: "NOTE"}.get(KINDS[kind].severity, "ERROR")
        for listed, finding in enumerate(report.rows(kind)):
            if listed == LISTED:
                yield f"{word} {kind.label}: {number} in all; mount the image to list them"
                break
            yield f"{word} {sentence(report, finding)}"


_UNCOUNTED = {
    **VERDICTS,
    "clean": "No errors were found on the image.",
    "leaks": "Clusters behind the end of the file are counted as used: something may be lost.",
}
"""By verdict: what is said where every counter of QEMU's is 0."""


def check_human(report: Report) -> str:
    """What ``qemu-img check`` prints on stdout, in its words, but for what it does not know."""
    counters = report.counters
    lines = []
    if not counters.check_errors and not counters.corruptions and not counters.leaks:
        lines.append(_UNCOUNTED[report.verdict])
    if counters.corruptions:
        lines.append(
            f"\n{counters.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if counters.leaks:
        lines.append(
            f"\n{counters.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, or what is left of something lost: look before they"
            " are freed."
        )
    if counters.check_errors:
        lines.append(f"\n{counters.check_errors} internal errors have occurred during the check.")
    lines += live_lines(report)
    total, allocated = counters.total_clusters, counters.allocated_clusters
    if total and allocated:
        lines.append(
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated,"
            f" {counters.fragmented_clusters * 100 / allocated:.2f}% fragmented,"
            f" {counters.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if counters.image_end_offset:
        lines.append(f"Image end offset: {counters.image_end_offset}")
    return "\n".join(lines) + "\n"
