"""LVM2: physical volumes by their label, and the logical volumes that lie on one of them.

By lvm2's `lib/format_text` (label.h, layout.h) and lvmraid(7): the metadata is a text that each
physical volume has a copy of, which is found without the label too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from planner.guestfs.reading import Holes
from planner.guestfs.volumes.space import Segment
from planner.guestfs.work import Work
from planner.source import SECTOR, read_bytes

LABEL, LABEL_TYPE = b"LABELONE", b"LVM2 001"
LABEL_SECTORS = 4
AREA_MAGIC = b" LVM2 x[5A%r0N*>"
TEXT_MARK = b'contents = "Text Format Volume Group"'

MAX_TEXT = 4 << 20
MAX_DEPTH = 8
MAX_SEGMENTS = 1 << 16
SEARCHED = 1 << 20
"""From the start of a physical volume: where its metadata lies, unless somebody chose."""

_TOKEN = re.compile(
    r"""\s*+(?:\#[^\n]*+\s*+)*+(?:
        (?P<text>"(?:[^"\\]|\\.)*")
      | (?P<number>-?\d+(?:\.\d+)?)
      | (?P<word>[A-Za-z0-9_+.][A-Za-z0-9_+.\-/]*)
      | (?P<mark>[={}\[\],]) )""",
    re.VERBOSE,
)

Value = str | int | list["Value"]
Section = dict[str, "Value | Section"]


@dataclass(frozen=True, slots=True)
class Logical:
    """A logical volume: ``name`` as people write it, ``vg/lv``, and its *segments*.

    ``notes``: what of it is not here, or not understood.
    """

    name: str
    segments: list[Segment]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Physical:
    """A physical volume: ``own``: (start, length) of what LVM itself has of it."""

    own: list[tuple[int, int]]
    volumes: list[Logical]
    notes: list[str] = field(default_factory=list)


def read_physical(source: Holes, base: int, work: Work) -> Physical | None:
    """The physical volume that *source* is, which begins at *base* of the disk; None: it is none.

    Segments are in bytes of the disk. Reading its metadata is taken from *work*.
    """
    label = _label(source)
    text = _text(source, label)
    if label is None and text is None:
        return None
    notes = [] if label else ["the label of the physical volume cannot be read"]
    if text is None:
        notes.append("its LVM metadata cannot be read: no logical volume is known")
        return Physical([(0, SEARCHED)], [], notes)
    work.text(len(text))
    groups = {name: it for name, it in parse(text).items() if isinstance(it, dict)}
    name, group = next(iter(groups.items()), ("", Section()))
    here, start = _physical_here(group, label, source.size)
    if here is None:
        notes.append("its LVM metadata does not name it: no logical volume is known")
        return Physical([(0, SEARCHED)], [], notes)
    volumes = list(_logical(name, group, here, base + start))
    return Physical([(0, start)], volumes, notes)


@dataclass(frozen=True, slots=True)
class _Label:
    """``uuid``: without its hyphens; ``areas``: (offset, size) of the metadata."""

    uuid: str
    areas: list[tuple[int, int]]


def _label(source: Holes) -> _Label | None:
    for sector in range(LABEL_SECTORS):
        raw = read_bytes(source, sector * SECTOR, SECTOR)
        if raw[:8] != LABEL or raw[24:32] != LABEL_TYPE:
            continue
        at = int.from_bytes(raw[20:24], "little")
        if at + 40 > SECTOR:
            continue
        uuid = raw[at : at + 32].decode("ascii", "replace")
        at += 40
        lists: list[list[tuple[int, int]]] = [[], []]
        for areas in lists:
            while at + 16 <= SECTOR:
                offset = int.from_bytes(raw[at : at + 8], "little")
                size = int.from_bytes(raw[at + 8 : at + 16], "little")
                at += 16
                if not offset:
                    break
                areas.append((offset, size))
        return _Label(uuid, lists[1])
    return None


def _text(source: Holes, label: _Label | None) -> str | None:
    """The metadata: what an area points to, or else the newest that lies about."""
    areas = label.areas if label else []
    found = [text for offset, size in areas for text in _current(source, offset, size)]
    return max(found or _lying_about(source, areas), key=_sequence, default=None)


def _lying_about(source: Holes, areas: list[tuple[int, int]]) -> Iterator[str]:
    yield from _old_texts(read_bytes(source, 0, min(SEARCHED, source.size)))
    for offset, size in areas:
        if 0 < offset < source.size:
            yield from _old_texts(read_bytes(source, offset, min(size, MAX_TEXT)))


def _current(source: Holes, offset: int, size: int) -> Iterator[str]:
    """The text that the header of an area points to; it may go on at the area's beginning."""
    if not 0 < offset < source.size:
        return
    raw = read_bytes(source, offset, SECTOR)
    if raw[4:20] != AREA_MAGIC:
        return
    at = int.from_bytes(raw[40:48], "little")
    length = int.from_bytes(raw[48:56], "little")
    if not SECTOR <= at < size or not 0 < length <= min(size, MAX_TEXT):
        return
    first = min(length, size - at)
    text = read_bytes(source, offset + at, first)
    text += read_bytes(source, offset + SECTOR, length - first)
    if TEXT_MARK in text:
        yield _decoded(text)


def _old_texts(raw: bytes) -> Iterator[str]:
    """Every text that lies in *raw*: each change leaves the ones before where they are."""
    # The mark stands near the end of a text that begins with the name of the group, behind a zero.
    # Most of what is searched is zeros mostly: to look for the mark costs less than to split that.
    at = raw.find(TEXT_MARK)
    while at >= 0:
        end = raw.find(b"\0", at)
        end = len(raw) if end < 0 else end
        yield _decoded(raw[raw.rfind(b"\0", 0, at) + 1 : end])
        at = raw.find(TEXT_MARK, end)


def _decoded(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "replace")


def _sequence(text: str) -> int:
    match = re.search(r"\bseqno\s*=\s*(\d{1,18})", text)
    return int(match[1]) if match else -1


def parse(text: str) -> Section:
    """The sections and values of a metadata text, as far as it makes sense."""
    root: Section = {}
    stack, name = [root], ""
    tokens = _tokens(text)
    for kind, token in tokens:
        match kind, token:
            case "word", _:
                name = token
            case _, "{" if len(stack) < MAX_DEPTH:
                below: Section = {}
                stack[-1][name] = below
                stack.append(below)
            case _, "}" if len(stack) > 1:
                stack.pop()
            case _, "=":
                stack[-1][name] = _value(tokens)
            case _:
                break
    return root


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while match := _TOKEN.match(text, at):
        at = match.end()
        yield str(match.lastgroup), match[str(match.lastgroup)]


def _value(tokens: Iterator[tuple[str, str]]) -> Value:
    kind, token = next(tokens, ("mark", ""))
    if kind == "number":
        return int(token.split(".")[0][:20])
    if (kind, token) != ("mark", "["):
        return re.sub(r"\\(.)", r"\1", token[1:-1]) if kind == "text" else token
    values: list[Value] = []
    for kind, token in tokens:
        if (kind, token) == ("mark", "]"):
            break
        if kind == "number":
            values.append(int(token.split(".")[0][:20]))
        elif kind == "text":
            values.append(re.sub(r"\\(.)", r"\1", token[1:-1]))
    return values


def _section(of: Section, name: str) -> Section:
    found = of.get(name)
    return found if isinstance(found, dict) else {}


def _number(of: Section, name: str, otherwise: int = 0) -> int:
    found = of.get(name)
    return found if isinstance(found, int) else otherwise


def _physical_here(group: Section, label: _Label | None, size: int) -> tuple[str | None, int]:
    """Which of the group's physical volumes this is, and where its extents begin."""
    known = {
        name: each for name, each in _section(group, "physical_volumes").items()
        if isinstance(each, dict)
    }  # fmt: skip
    of_uuid = [
        name for name, each in known.items()
        if label and str(each.get("id", "")).replace("-", "") == label.uuid
    ]  # fmt: skip
    of_size = [name for name, each in known.items() if _number(each, "dev_size") * SECTOR == size]
    for names in (of_uuid, list(known) if len(known) == 1 else [], of_size):
        if len(names) == 1:
            return names[0], _number(known[names[0]], "pe_start") * SECTOR
    return None, 0


def _logical(name: str, group: Section, here: str, start: int) -> Iterator[Logical]:
    extent = _number(group, "extent_size") * SECTOR
    if extent <= 0:
        return
    for own_name, volume in _section(group, "logical_volumes").items():
        if not isinstance(volume, dict):
            continue
        known = Logical(f"{name}/{own_name}", [])
        for each in _segments(volume):
            _add_segment(each, extent, here, start, known)
        _put_in_order(known)
        if known.segments or known.notes:
            yield known


def _put_in_order(volume: Logical) -> None:
    """Segments ascending; one that begins in another makes no sense."""
    ascending: list[Segment] = []
    end = 0
    for each in sorted(volume.segments, key=lambda segment: segment.start):
        if each.start >= end:
            ascending.append(each)
            end = each.start + each.length
    if len(ascending) < len(volume.segments):
        volume.notes.append("segments of it overlap")
    volume.segments[:] = ascending


def _segments(volume: Section) -> list[Section]:
    return [
        each
        for name, each in volume.items()
        if isinstance(each, dict) and re.fullmatch(r"segment\d{1,9}", name)
    ][:MAX_SEGMENTS]


def _add_segment(each: Section, extent: int, here: str, start: int, volume: Logical) -> None:
    kind = str(each.get("type", ""))
    first, count = _number(each, "start_extent"), _number(each, "extent_count")
    stripes = each.get("stripes")
    if kind not in ("striped", "linear") or not isinstance(stripes, list):
        note = f"it is of type {kind!r}, which is not read"
        volume.notes.extend([] if note in volume.notes else [note])
        return
    places = list(zip(stripes[::2], stripes[1::2], strict=False))
    legs = [
        start + number * extent if name == here and isinstance(number, int) else -1
        for name, number in places
    ]
    if not legs or first < 0 or count <= 0 or count % len(legs):
        volume.notes.append("a segment of it makes no sense")
        return
    if -1 in legs:
        note = "a part of it is on another disk"
        volume.notes.extend([] if note in volume.notes else [note])
    length = count * extent
    stripe = _number(each, "stripe_size") * SECTOR if len(legs) > 1 else length
    if stripe <= 0 or (length // len(legs)) % stripe:
        volume.notes.append("a segment of it makes no sense")
        return
    volume.segments.append(Segment(first * extent, length, tuple(legs), stripe))
