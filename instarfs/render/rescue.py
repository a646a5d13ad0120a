"""What a rescue found, for a reader and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from instarfs.render.check import counters_phrase
from instarfs.render.outcome import pending_value
from instarfs.repair.known import Known
from instarfs.text import json_parts, shell_path, shell_word, text_lines
from planner.check.report import CheckCounters
from planner.findings.kinds import NONE
from planner.findings.wording import plural
from planner.qcow2.header import CRYPT_LUKS, MAGIC, Header
from planner.rescue.snapshots import MADE_NAME
from planner.triage.triage import snapshot_phrase

if TYPE_CHECKING:  # what searches and places is large, and a mount shows what was found before
    from instarfs.repair.outcome import Pending
    from planner.qcow2.snapshots import Snapshot
    from planner.rescue.hypotheses import Found, Hypothesis
    from planner.rescue.leftovers import Left
    from planner.rescue.placing.placements import Placement, Placements
    from planner.rescue.rescue import Rescue

_NAMES = (
    "The names of a backing file and of a data file, bitmaps and what else stands behind the fields"
    " of a header go with its cluster. Where the disk had a backing file, what it did not write"
    " itself reads as zeros now."
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a rescue was asked for: the image, and what whoever asked ``knows`` of it.

    ``is_written``: the image was written to meanwhile. ``state``: where it is kept how far it is.
    ``pending``: a repair of it that was interrupted.
    """

    filename: str
    knows: Known = field(default_factory=Known)
    undo_file: str | None = None
    is_written: bool = False
    free: bool = False
    state: str | None = None
    pending: Pending | None = None

    def command(self, how: str) -> str:
        """The command that does the same again, and with what it finds *how* says."""
        words = ["instarfs rescue", *([how] if how else []), *(["--free"] if self.free else [])]
        like = self.knows.like
        words += ["--header", shell_path(like)] if like is not None else []
        words += [f"--assume {shell_word(word)}" for word in self.knows.assumed]
        words += ["--state", shell_path(self.state)] if self.state is not None else []
        return " ".join([*words, "--", shell_path(self.filename)])

    @property
    def in_place(self) -> str:
        """What a command needs to write in the image itself, but for the plan."""
        place = f" --undo-file {shell_path(self.undo_file)}" if self.undo_file is not None else ""
        return f"--in-place{place}"


def rescue_txt(rescue: Rescue, asked: Asked, out: str | None) -> str:
    """The report: what was lost, why what was found is believed, and what to do."""
    name = shell_path(asked.filename)
    if rescue.plan.changes_nothing:
        return text_lines(_why_nothing(rescue, asked, out))
    parts: list[list[str]] = []
    best = rescue.headers.best
    if rescue.changes_header and best is not None:
        parts.append([*_of_header(rescue.headers, best, asked.filename), *_of_encryption(rescue)])
    if rescue.snapshots:
        parts.append(_of_snapshots(rescue, asked.filename))
    if rescue.placements:
        parts.append(_of_tables(rescue, asked.filename))
    if rescue.left_out:
        parts.append(_of_left_out(rescue, asked.filename))
    if rescue.refused is not None:
        parts.append([_refused(rescue, "the rebuilt image")])
    lines = [line for part in parts for line in ("", *part)][1:]
    if asked.is_written:
        lines += ["", "It was written to meanwhile: what was found is of no one moment."]
    if out is None:
        lines += ["", "Nothing has been written. To have the rebuilt image as a new file:"]
        lines.append(f"      {asked.command('-o RESCUED.qcow2')}")
        lines += _how_in_place(rescue, asked)
    else:
        lines += ["", f"{shell_path(out)} is the rebuilt image; {name} is as it was. Look at it:"]
        lines.append(f"      instarfs report -- {shell_path(out)}")
    return text_lines(lines)


def _how_in_place(rescue: Rescue, asked: Asked) -> list[str]:
    if asked.pending is not None:  # taken back first, it is not what this was found in
        return [f"In the image itself something else comes first: {asked.pending.sentence}"]
    return [
        "Or in the image itself, from which it can be taken back byte for byte:",
        f"      {asked.command(f'{asked.in_place} --plan {rescue.plan.id}')}",
    ]


def _why_nothing(rescue: Rescue, asked: Asked, out: str | None) -> list[str]:
    filename = asked.filename
    refused = [_refused(rescue, "it")] if rescue.refused is not None else []
    if rescue.placements:
        nothing = "Nothing comes back, and nothing is written."
        return [*_of_tables(rescue, filename), "", nothing, *refused]
    if rescue.before.verdict != "clean":
        wrong = f"what is wrong: instarfs report -- {shell_path(filename)}"
        lines = [f"{filename}: its header makes sense; {wrong}", *refused]
        # Which would be a copy with what is wrong in it.
        return lines if out is None else [*lines, f"{shell_path(out)} is not written."]
    lines = [f"{filename}: its header makes sense; a check finds nothing wrong"]
    if rescue.larger is not None:
        assumed = *asked.knows.assumed, f"size={rescue.larger.size}"
        known = replace(asked, knows=replace(asked.knows, assumed=assumed))
        size, larger = rescue.headers.now.size, rescue.larger
        said = (
            f"Its disk has {size} bytes, and more is mapped. If it had {larger.size}"
            f" ({larger.evidence}), this reads them:"
        )
        lines += ["", said, f"      {known.command('')}"]
    if not asked.free:
        lines += [
            "",
            "Where refcounts were made anew, tables may lie in free clusters. To look there:",
            f"      {replace(asked, free=True).command('')}",
        ]
    return lines


def _of_snapshots(rescue: Rescue, filename: str) -> list[str]:
    many = plural(len(rescue.snapshots), "snapshot")
    lines = [
        f"{filename}: its snapshot table had lost {many}, of which the L1 tables are there",
        "",
    ]
    lines += [
        f"  {snapshot_phrase(each)}: L1 table at {each.l1_table_offset}"
        for each in rescue.snapshots[:LISTED_SNAPSHOTS]
    ]
    if len(rescue.snapshots) > LISTED_SNAPSHOTS:
        lines.append("  ... all of them: --output json")
    if any(not each.date_sec for each in rescue.snapshots):
        lines += [
            "",
            f"What is called {MADE_NAME}-OFFSET had another name, and a date: those are gone.",
        ]
    return lines


def _of_left_out(rescue: Rescue, filename: str) -> list[str]:
    """What stopped QEMU, and goes."""
    lines = [f"{filename}: what QEMU does not load, and nothing brings back, is left out", ""]
    return [*lines, *(f"  {note}" for note in rescue.left_out)]


def _refused(rescue: Rescue, what: str) -> str:
    return f"QEMU does not open {what}: {rescue.refused}"


def _of_tables(rescue: Rescue, filename: str) -> list[str]:
    count, placed = len(rescue.placements), rescue.placed
    tables = plural(count, "L2 table")
    lines = [f"{filename}: nothing leads to {tables}; the place of {placed} is proven", ""]
    for cells in (COLUMNS, *map(_cells, islice(rescue.placements, LISTED_TABLES))):
        offset, index, evidence, *votes, is_placed, candidates = cells
        shown = f"{offset:>16} {index:>8}  {evidence:24} {votes[0]:>9} {votes[1]:>13}"
        shown += f"  {is_placed:6}  {candidates}"
        lines.append(f"  {shown}")
    if count > LISTED_TABLES:
        lines.append("  ... all of them: --output json")
    if rescue.note:
        lines += ["", f"Not all was read that may say where they belong: {rescue.note}."]
    if rescue.holes:
        open_ones = plural(count - placed, "table")
        said = (
            f"What is not proven is not guessed. {open_ones} may belong to"
            f" {plural(len(rescue.holes), 'L1 entry', 'L1 entries')}; what these map is not known"
            " to be zeros, and cannot be read in the rebuilt image."
        )
        lines += ["", said]
    return lines


LISTED_SNAPSHOTS = 20
"""Snapshots that a text names."""

ROWS_A_PART = 1000

LISTED_TABLES = 1000
"""L2 tables that a text names."""

COLUMNS = ("offset", "l1-index", "evidence", "votes-for", "votes-against", "placed", "candidates")


def placements_tsv(placements: Placements) -> Iterator[bytes]:
    """Every table that no entry leads to, one a line: where it belongs, and what says so."""
    yield ("#" + "\t".join(COLUMNS) + "\n").encode()
    rows = map(_cells, placements)
    while part := list(islice(rows, ROWS_A_PART)):
        # No cell holds anything but digits and words of ours.
        yield "".join(f"{line}\n" for line in map("\t".join, part)).encode()


def _cells(each: Placement) -> tuple[str, ...]:
    index = "-" if each.l1_index == NONE else str(each.l1_index)
    votes = str(each.votes_for), str(each.votes_against)
    evidence = ",".join(each.evidence) or "-"
    candidates = [str(index) for index in each.candidates]
    if each.candidate_count > len(each.candidates):
        candidates.append(f"and {each.candidate_count - len(each.candidates)} more")
    placed = "yes" if each.placed else "no"
    return str(each.offset), index, evidence, *votes, placed, ",".join(candidates) or "-"


def _of_header(found: Found, best: Hypothesis, filename: str) -> list[str]:
    is_gone = found.now.magic != MAGIC
    lines = [f"{filename}: {'its header is gone' if is_gone else 'its header makes no sense'}", ""]
    lines += [
        f"  {name}: {_shown(name, getattr(found.now, name))} -> {_shown(name, value)}"
        for name, value in _changes(found.now, best.header)
    ]
    if best.extensions_end is not None:
        lines.append(f"  extensions: what stands at {best.extensions_end} makes no sense -> none")
    lines += [
        "",
        "Why that is believed:",
        f"  under it the check finds {counters_phrase(best.counters)}",
    ]
    if found.rival is not None:
        leaves = counters_phrase(found.rival.counters)
        lines.append(f"  the next best leads to other tables, and leaves {leaves}")
    if found.with_snapshots is not None:
        mine, rival = found.with_snapshots.best, found.with_snapshots.rival
        lines.append(f"  with the snapshots that were lost listed again, {_left(mine)}")
        if rival is not None:
            lines.append(f"  under the best that leads to another disk, {_left(rival)}")
    if found.size is not None:
        more = "" if found.size.is_exact else "; the disk may have been larger"
        lines.append(f"  the disk has {found.size.size} bytes: {found.size.evidence}{more}")
    return [*lines, "", _NAMES] if is_gone else lines


def _of_encryption(rescue: Rescue) -> list[str]:
    """Of a disk whose header said that it is encrypted: what there is of its LUKS header."""
    best, now, layout = rescue.headers.best, rescue.headers.now, rescue.after.layout
    if best is None or layout is None or now.magic != MAGIC or now.crypt_method != CRYPT_LUKS:
        return []
    if layout.extensions.crypto is not None:
        is_new = "extensions" in best.changed
        found = f"  its LUKS header was found at {layout.extensions.crypto.offset}"
        return [found] if is_new else []
    return ["", _CIPHERTEXT]


_CIPHERTEXT = (
    "It was said to be encrypted, and no LUKS header was found: if it was, what is read of it is"
    " what it was encrypted to."
)


@dataclass(frozen=True, slots=True)
class Rescued:
    """What a preview of a rescue says of it: ``report``, as bytes, ``placements``, and the ``plan``
    in parts, each time that it is asked for.
    """

    report: bytes
    placements: Placements
    plan: Callable[[], Iterator[bytes]]

    @classmethod
    def of(cls, rescue: Rescue, asked: Asked) -> Rescued:
        """*asked*: with the path of the image, absolute."""
        # Not what it was found by, which is as large as the image's tables, many times.
        plan = partial(_parts, _value(rescue, asked, None), rescue.placements, rescue.snapshots)
        return cls(rescue_txt(rescue, asked, None).encode(), rescue.placements, plan)


def rescue_json(rescue: Rescue, asked: Asked, out: str | None) -> Iterator[bytes]:
    """The same as JSON, in parts."""
    return _parts(_value(rescue, asked, out), rescue.placements, rescue.snapshots)


def _parts(
    value: Mapping[str, object], placements: Placements, snapshots: Sequence[Snapshot]
) -> Iterator[bytes]:
    """*value* as JSON, with lists in it of which each may be very long."""
    lists = {"placements": map(_placement, placements), "snapshots": map(_snapshot, snapshots)}
    return json_parts({**value, **lists})


def _value(rescue: Rescue, asked: Asked, out: str | None) -> dict[str, object]:
    """What is told of it, but for the lists that `_parts` puts in their places."""
    found, plan = rescue.headers, rescue.plan
    header = rescue.after.layout.header if rescue.after.layout else found.now
    is_written = out is not None and not plan.changes_nothing
    unfinished = {"interrupted-repair": pending_value(asked.pending)} if asked.pending else {}
    return {
        "filename": asked.filename,
        "status": "nothing-to-do" if plan.changes_nothing else "planned",
        "plan-id": plan.id,
        "header": {
            name: getattr(header, name) for name in Header.__slots__ if name != "additional"
        },
        "changed": list(found.best.changed) if found.best is not None else [],
        "verdict": rescue.after.verdict,
        **_counters(rescue.after.counters),
        "next-best": _counters(found.rival.counters) if found.rival else None,
        "size-evidence": found.size.evidence if found.size else None,
        "size-is-exact": found.size.is_exact if found.size else True,
        "placements": [],
        "unreadable": list(rescue.holes),
        "note": rescue.note or None,
        "snapshots": [],
        "left-out": list(rescue.left_out),
        "refused": rescue.refused,
        "written-to": out if is_written else None,
        **unfinished,
    }


def _snapshot(each: Snapshot) -> dict[str, object]:
    return {
        "id": each.id_str.decode(errors="replace"),
        "name": each.name.decode(errors="replace"),
        "date-sec": each.date_sec,
        "l1-table-offset": each.l1_table_offset,
    }


def _placement(each: Placement) -> dict[str, object]:
    return {
        "offset": each.offset,
        "l1-index": None if each.l1_index == NONE else each.l1_index,
        "evidence": list(each.evidence),
        "votes-for": each.votes_for,
        "votes-against": each.votes_against,
        "placed": each.placed,
        "candidates": list(each.candidates),
        "candidate-count": each.candidate_count,
    }


def _changes(now: Header, header: Header) -> Iterator[tuple[str, object]]:
    for name in Header.__slots__:
        if getattr(now, name) != getattr(header, name):
            yield name, getattr(header, name)


def _shown(name: str, value: object) -> str:
    if isinstance(value, bytes):
        return value.hex() or "none"
    return f"{value:#x}" if name == "magic" or name.endswith("_features") else str(value)


def _left(left: Left) -> str:
    wrong = plural(left.contradictions, "contradiction")
    return f"{wrong} and {plural(left.leaks, 'leaked cluster')}"


def _counters(found: CheckCounters) -> dict[str, int]:
    return {
        "check-errors": found.check_errors,
        "corruptions": found.corruptions,
        "leaks": found.leaks,
    }
