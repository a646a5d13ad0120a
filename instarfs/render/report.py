"""``check/report.txt``: a check for a reader who has to decide something at three in the morning.

The verdict first, then what it means for the guest, what looks lost, what each tier would do, and
the commands to go on with; the findings last, long lists by reference. All from values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from instarfs.errors import LeaksInMotion
from instarfs.render.advice import bring_back, is_mended_by_qemu, what_to_do
from instarfs.render.aftermath import Aftermath, Proposals
from instarfs.render.check import (
    LISTED,
    VERDICTS,
    counters_phrase,
    cut_off_lines,
    fact,
    snapshot_name,
    worst_first,
)
from instarfs.render.files import files_lines
from instarfs.render.live import live_lines
from instarfs.render.repair import left_lines, quote_warning, quoting
from instarfs.render.triage import triage_lines
from instarfs.text import shell_path, shell_word, text_lines
from planner.arrays import I64
from planner.check.report import Report
from planner.errors import RepairError
from planner.findings.kinds import KINDS, FindingKind, Severity, Structure
from planner.findings.wording import plural
from planner.guest.chain import Role
from planner.guestfs.files import FilesUnknown
from planner.qcow2.bitmaps import Bitmap
from planner.qcow2.names import brief_name, decode_name
from planner.repair.plan import Plan, RepairTier
from planner.repair.tiers import Proposal
from planner.triage.impact import Harm, Ranges, guest_impact
from planner.triage.l1_holes import PlaceKind
from planner.triage.losses import Losses
from planner.triage.triage import Triage

LISTED_RANGES = 5
"""Guest ranges of one sort that are listed; all findings are in the files of ``check/``."""

LISTED_TABLES = 100
"""Tables that are gone: each may hold something else now."""

LOOKED_AT_SNAPSHOTS = 64
"""Of so many that findings are about it is told what they mean; each costs a look at them all."""

LISTED_SNAPSHOTS = LISTED_BITMAPS = 10

_NAMED = ("check/findings.jsonl", "lost/triage.json", "image/bitmaps.json")
"""Files of a mount that a report may send a reader to."""

OUT_OF_DATE = (
    "The image was not closed properly (dirty bit): its refcounts are out of date, and its tables"
    " show nothing else that is wrong. QEMU mends that by itself when it next opens the image for"
    " writing; so does `all`, which shows every change before."
)
"""Instead of that of the verdict, where it is so."""

_LOSS = (
    "Something may be lost: leaked clusters hold data, and there is a place that it could have come"
    " from. Free nothing, and let nobody write, before you have read what follows."
)
"""What stands beside the verdict's own words, or, of leaks, in their place."""

_EXCHANGED = (
    "Something may be lost: an entry may lead to what is another's, in the place of what it led to."
    " Let nobody write before you have read what follows."
)
"""In the place of that, where all that leaks is in use."""

_HARMS = {
    Harm.LOST: "cannot be read, or read as zeros: what was there is not where the image says",
    Harm.SUSPECT: "may read wrong bytes",
    Harm.AT_RISK: "read well now; the next write may damage them",
}

_LABELS = {Harm.LOST: "lost", Harm.SUSPECT: "suspect", Harm.AT_RISK: "at risk"}


def report_txt(report: Report, filename: str, known: Aftermath | None = None) -> bytes:
    """The report for a reader."""
    known = known or Aftermath()
    preview = known.mounted.preview if known.mounted else None
    if preview is not None:
        return _preview_txt(report, filename, known, preview)
    sections = [_verdict(report, filename, known), bring_back(filename, known)]
    if report.error is None:
        sections += [
            _guest(report, known),
            _files(report, filename, known),
            _elsewhere(report, known),
            *_bitmaps(report, filename, known),
            _beyond_disk(report, filename),
            _leaked(known.triage),
            _tiers(known.proposals),
        ]
    sections += what_to_do(report, filename, known)
    if report.error is None:
        sections += _findings(report)
    text = "\n".join(text_lines(lines) for lines in sections if lines)
    if known.mounted is None and any(name in text for name in _NAMED):
        text += f"\nFiles that are named here, as {_NAMED[0]}, are in a mount of the image.\n"
    return text.encode()


def _preview_txt(report: Report, filename: str, known: Aftermath, plan: Plan) -> bytes:
    """Of an image as it would be: what would be left, and how to have it so."""
    quoted = f"{quoting(plan)} -- {shell_path(filename)}"
    sections = [
        [
            f"A preview: the image as it would be after `{plan.tier}`, plan {plan.id}.",
            "Nothing has been written.",
            *([] if plan.changes_nothing else ["To have it so:", f"      {quoted}"]),
        ],
        _verdict(report, filename, known),
    ]
    if report.error is None:
        sections += [
            _guest(report, known),
            _elsewhere(report, known),
            _leaked(known.triage),
            *_findings(report),
        ]
    return "\n".join(text_lines(lines) for lines in sections if lines).encode()


def _verdict(report: Report, filename: str, known: Aftermath) -> list[str]:
    pending, triage = known.pending, known.triage
    sentences = [VERDICTS[report.verdict]]
    if is_mended_by_qemu(report, known):
        sentences = [OUT_OF_DATE]
    elif isinstance(triage, Triage) and triage.is_evidence:
        loss = _LOSS if triage.is_buried else _EXCHANGED
        sentences = [*(sentences if report.verdict != "leaks" else []), loss]
    lines = [f"{filename}: {report.verdict}", "", *sentences]
    if pending is not None:
        lines += ["", f"Not finished: {pending.sentence}."]
    if report.error is not None:
        return [*lines, "", str(report.error)]
    lines += live_lines(report)
    if report.torn and report.live is None:
        lines.append(
            "The image is in use: a program has it open for writing; check again when it has ended."
            if report.in_use
            else "It was written to during the check; check again."
        )
    lines += cut_off_lines(report)
    lines += ["", *map(str, report.stopped)]
    counters = report.counters
    return [
        *lines,
        f"{counters_phrase(counters)}.",
        (
            f"{counters.allocated_clusters} of {counters.total_clusters} guest clusters are"
            f" allocated; the last used cluster ends at offset {counters.image_end_offset}."
        ),
    ]


# ---- the guest ----


def _guest(report: Report, known: Aftermath) -> list[str]:
    """What became of the bytes of the active disk, and of the snapshots."""
    triage, elsewhere = known.triage, known.beside.in_data_file
    losses = triage.losses if isinstance(triage, Triage) else Losses()
    impact = guest_impact(report, losses=losses)
    missing = losses.missing
    lost_snapshot = isinstance(triage, Triage) and _has_lost_snapshot(triage)
    snapshots = list(_snapshot_lines(report, triage, losses))
    is_safe = impact.safe == impact.size and impact.is_whole
    if is_safe and not missing and not lost_snapshot and not snapshots:
        return list(_unlooked_lines(report))
    lines = [f"What it means for the guest's disk of {impact.size} bytes:"]
    lines += [line for harm in Harm for line in _harm_lines(harm, impact.ranges[harm])]
    if missing:
        backed = report.layout is not None and report.layout.header.backing_file_offset != 0
        lines.append(
            f"  missing: up to {missing} bytes, which leaked clusters may hold: they read as"
            f" {'the backing file' if backed else 'zeros'} now; see below"
        )
    if losses.behind and report.cut_off is None:
        lines.append(
            f"  {plural(losses.behind, 'cluster')} {'is' if losses.behind == 1 else 'are'} counted"
            " behind the end of the file: a table that is lost may have led there, before the file"
            " was cut off; or a program ended while the file grew"
        )
    if lost_snapshot:
        lines.append("  missing: a snapshot that the image no longer counts; see below")
    harmed = impact.size - impact.safe
    least = "at least " if missing or (elsewhere and harmed) else ""
    vouched = max(0, impact.safe - missing - elsewhere)
    safe = f"  safe: {least}{vouched} of {impact.size} bytes"
    safe += "" if impact.is_whole else ", as far as could be looked at"
    unlooked = (f"  {line}" for line in _unlooked_lines(report))
    return [*lines, safe, *unlooked, *snapshots]


def _unlooked_lines(report: Report) -> Iterator[str]:
    """That there is data which can be broken in itself, and that nobody has looked."""
    if report.holds_compressed and not report.compressed_looked_at:
        yield "compressed clusters were not unpacked; this does: instarfs check --data"


def _has_lost_snapshot(triage: Triage) -> bool:
    return bool(triage.snapshots) or any(table.is_l1 for table in triage.suspects)


def _harm_lines(harm: Harm, ranges: Ranges) -> list[str]:
    if not len(ranges):
        return []
    number = plural(len(ranges), "range")
    lines = [f"  {_LABELS[harm]}: {plural(ranges.size, 'byte')} in {number}: {_HARMS[harm]}"]
    lines += [
        f"    {plural(length, 'byte')} at guest offset {offset}"
        for offset, length in ranges.first(LISTED_RANGES)
    ]
    if len(ranges) > LISTED_RANGES:
        lines.append("    ... by finding: check/findings.jsonl")
    return lines


def _missed_in_snapshots(triage: Triage | Exception) -> I64:
    """Of which snapshots a table is gone, so that leaked clusters may be theirs."""
    if not isinstance(triage, Triage):
        return np.zeros(0, dtype=np.int64)
    numbers = {cause.snapshot for cause in triage.losses.causes} | set(triage.losses.snapshots)
    numbers |= {
        place.snapshot
        for table in triage.suspects
        for place in table.places
        if place.kind is not PlaceKind.LOST
    }
    return np.array(sorted(numbers), dtype=np.int64)


def _snapshot_lines(report: Report, triage: Triage | Exception, losses: Losses) -> Iterator[str]:
    """What is known of snapshots on their own; what they share with the disk is told there."""
    told = 0
    groups, of_entries = report.findings.groups, report.entries
    parts = [group.snapshot for group in groups.values()]
    parts += [
        group.index
        for (kind, structure), group in groups.items()
        # Extra data that an entry lacks harms nobody, and every one of 65,536 may lack it.
        if structure is Structure.SNAPSHOT_TABLE and kind is not FindingKind.SNAPSHOT_EXTRA_DATA
    ]
    parts += [of_entries.snapshots()] if of_entries else []
    missed = _missed_in_snapshots(triage)
    touched = np.unique(np.concatenate((report.owners.snapshot, missed, *map(np.unique, parts))))
    touched = touched[(touched >= 0) & (touched < len(report.snapshots))]
    for number in touched[:LOOKED_AT_SNAPSHOTS].tolist():
        impact = guest_impact(report, number, losses)
        harms = [
            f"{plural(ranges.size, 'byte')} {_LABELS[harm]}"
            for harm, ranges in impact.ranges.items()
            if ranges
        ]
        if number in missed:
            harms.append("a table of it is empty or gone: leaked clusters may be missing from it")
        if not harms:
            continue
        if told == LISTED_SNAPSHOTS:
            yield "  ... more snapshots are harmed: check/findings.jsonl"
            return
        told += 1
        yield f"  {snapshot_name(report, number)}: {', '.join(harms)}"
    more = len(touched) - LOOKED_AT_SNAPSHOTS
    if more > 0:
        yield f"  ... {more} more snapshots with findings: check/findings.jsonl"


def _files(report: Report, filename: str, known: Aftermath) -> list[str]:
    """Which files of the guest are hit; where nothing is wrong nobody asks."""
    if report.verdict == "clean" and isinstance(known.files, FilesUnknown):
        return []
    everything = "check/files.tsv" if known.mounted else f"instarfs files {shell_path(filename)}"
    return files_lines(known.files, where=everything)


# ---- beside the guest's bytes in this file ----


def _elsewhere(report: Report, known: Aftermath) -> list[str]:
    """What other files hold of the disk, and whether they were found."""
    lines = []
    for member in known.beside.members:
        is_backing = member.named.role is Role.BACKING
        size = known.beside.in_backing_file if is_backing else known.beside.in_data_file
        held = f"{size} of {report.geometry.virtual_size} bytes"
        if member.depth:
            held = "what those do not hold"
        what = "is there" if member.refusal is None else f"was not opened: {member.refusal}"
        name = brief_name(member.named.name)
        lines.append(f"  {held}: in the {member.named.role} file '{name}', which {what}")
    return ["What of the disk lies in other files, and is lost with them:", *lines] if lines else []


def _bitmaps(report: Report, filename: str, known: Aftermath) -> Iterator[list[str]]:
    """What became of the backups that rely on persistent bitmaps, and how those are dropped."""
    if report.torn:
        return
    if known.beside.unsaved:
        yield _unsaved(report, filename, known.beside.unsaved)
    counts = report.counts()
    if any(kind in counts for kind in _INVALID_BITMAPS):
        yield [_NOT_OPENED]
    elif _are_only_bitmaps_cut(report):
        yield [
            _CUT_OFF,
            f"      qemu-img bitmap --remove -- {shell_path(filename)} NAME",
        ]


def _beyond_disk(report: Report, filename: str) -> list[str]:
    """How what is mapped beyond the end of the disk is read, where nothing else is wrong."""
    if report.verdict != "clean" or FindingKind.BEYOND_DISK_END not in report.counts():
        return []
    what = "What is mapped beyond the end of the disk, and how to read that if the disk was larger:"
    return [what, f"      instarfs rescue -- {shell_path(filename)}"]


_UNSAVED = (
    "Bitmaps that are marked as in use, though nobody uses them: they were never saved. QEMU"
    " ignores what they say and makes no others of their names, so a backup that relies on one"
    " must begin anew, with the whole disk:"
)
_NOT_OPENED = (
    "QEMU does not open an image with a bitmap that makes no sense, also not to remove the bitmap."
    " The guest's disk does not depend on it, and can be copied out; `instarfs plan bitmaps` shows"
    " what it is to drop it."
)
_CUT_OFF = (
    "Only bitmaps are damaged. QEMU opens the image; a bitmap that leads nowhere can be removed (it"
    " complains, and the clusters that it had stay leaked), and a backup that relies on it must"
    " begin anew. Its name is in `instarfs info`:"
)
_INVALID_BITMAPS = (FindingKind.BITMAP_ENTRY_INVALID, FindingKind.BITMAP_DIRECTORY_INVALID)

_OF_BITMAPS = (Structure.BITMAP_TABLE, Structure.BITMAP_DATA)


def _are_only_bitmaps_cut(report: Report) -> bool:
    """Whether all that is corrupt are bitmaps with something past the end of the file: removing
    one then frees nothing that is not its own.
    """
    corrupt = [k for k in report.counts() if KINDS[k].severity > Severity.LEAK]
    every = len(report.findings.of(FindingKind.PAST_END))
    mine = len(report.findings.of(FindingKind.PAST_END, *_OF_BITMAPS))
    is_elsewhere = report.entries is not None and FindingKind.PAST_END in report.entries.counts()
    return corrupt == [FindingKind.PAST_END] and 0 < every == mine and not is_elsewhere


def _unsaved(report: Report, filename: str, unsaved: Sequence[Bitmap]) -> list[str]:
    """Bitmaps in use that nobody uses; QEMU drops them, where nothing else is wrong."""
    listed = unsaved[:LISTED_BITMAPS]
    lines = [f"  '{brief_name(each.name)}' (granularity {each.granularity})" for each in listed]
    if len(unsaved) > len(listed):
        lines.append(f"  ... and {len(unsaved) - len(listed)} more: image/bitmaps.json")
    lines = [_UNSAVED, *lines]
    if report.verdict != "clean":
        return [*lines, "Once nothing else is wrong: qemu-img bitmap --remove"]
    return [
        *lines,
        "Remove them, so that others of their names can be made:",
        *(
            f"      qemu-img bitmap --remove -- {shell_path(filename)}"
            f" {shell_word(decode_name(each.name))}"
            for each in listed
        ),
    ]


# ---- leaks and repairs ----


def _leaked(triage: Triage | Exception) -> list[str]:
    if isinstance(triage, LeaksInMotion):
        return []  # said with the verdict
    if not isinstance(triage, Triage):
        return ["The leaked clusters could not be looked into:", f"  {triage}"]
    if not triage.leaked:
        return []
    return [
        "What the leaked clusters look like:",
        *(f"  - {line}" for line in triage_lines(triage)),
    ]


def _tiers(proposals: Proposals) -> list[str]:
    if not proposals:
        return []
    lines = ["What a repair would do (nothing is written until you ask for it):"]
    of_all = [each for tier, each in proposals.items() if not tier.is_chosen]
    refusals = {str(each) for each in of_all if isinstance(each, Exception)}
    for tier, proposal in proposals.items():
        is_told = tier.is_chosen and isinstance(proposal, Exception) and str(proposal) in refusals
        if not is_told:
            lines += _tier_lines(tier, proposal)
    return lines


def _tier_lines(tier: RepairTier, proposal: Proposal | Exception) -> list[str]:
    if isinstance(proposal, RepairError):
        finding = f" (because of: {proposal.finding})" if proposal.finding else ""
        return [f"  {tier}: refused{finding}: {proposal}"]
    if not isinstance(proposal, Proposal):
        return [f"  {tier}: cannot be planned: {proposal}"]
    numbers = f"found {proposal.found}, planned {proposal.planned}, left {proposal.left_count}"
    if not proposal.has_something_to_say:
        return []
    if proposal.plan.changes_nothing:
        return [f"  {tier}: nothing to change: {numbers}"]
    after = f"afterwards the check says: {proposal.after.verdict}"
    lines = [f"  {tier}: plan {proposal.plan.id}: {numbers}; {after}"]
    if proposal.needs_quote:
        lines.append(f"    refused without the plan's id: {quote_warning(proposal)}")
    lines += [f"    left: {line}" for line in left_lines(proposal.left)]
    return lines


# ---- the findings ----


def _findings(report: Report) -> Iterator[list[str]]:
    for kind, number in worst_first(report.counts()):
        yield _section(report, kind, number)


def _section(report: Report, kind: FindingKind, number: int) -> list[str]:
    info = KINDS[kind]
    lines = [f"{kind.label} ({number}): {info.meaning}."]
    if info.left:
        choice = f"; `{info.choice}` is for a person who decides it" if info.choice else ""
        lines.append(f"  Cannot be repaired: {info.left}{choice}.")
    limit = LISTED_TABLES if kind is FindingKind.TABLE_OVERWRITTEN else LISTED
    for shown, finding in enumerate(report.rows(kind)):
        if shown == limit:
            lines.append("  ... the rest is in check/findings.jsonl")
            break
        lines.append(f"  - {fact(report, finding)}")
    return lines
