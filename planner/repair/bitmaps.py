"""Persistent bitmaps that stop QEMU, or a backup, are dropped; the others stay.

Those are what QEMU finds inconsistent, has a table that cannot be read or believed, or shares a
cluster with something else. Where the directory itself is broken, or they are void, all of them go,
and the header extension with them. The file does not grow: the directory is made shorter in its
place, while the autoclear bit says that there is none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import is_any_of
from planner.errors import ImageError
from planner.findings.kinds import NONE, FindingKind, Structure
from planner.findings.wording import plural
from planner.qcow2.bitmaps import IN_USE, Bitmap, encode_bitmap, list_bitmaps
from planner.qcow2.extensions import BITMAPS, EXTENSION_BYTES, Extension, encode_extensions
from planner.qcow2.header import AUTOCLEAR_AT, Autoclear
from planner.qcow2.names import quoted
from planner.repair.plan import StageKind
from planner.repair.scope import Scope

STRUCTURES = (Structure.BITMAP_DIRECTORY, Structure.BITMAP_TABLE, Structure.BITMAP_DATA)

NAMED = 20
"""Bitmaps that a plan names."""

_POINTER = struct.Struct(">IIQQ")
"""The data of the extension: how many, reserved, size and place of the directory."""

_KIND = FindingKind.BITMAP_ENTRY_INVALID


@dataclass(frozen=True, slots=True)
class _Judged:
    """The bitmaps of a directory that stay; those that go, and why, as far as each has a name.

    ``whole``: why all of them go, where it is the directory that is broken.
    """

    stay: tuple[Bitmap, ...]
    go: tuple[tuple[Bitmap, str], ...]
    whole: str = ""


def drop_bitmaps(scope: Scope) -> list[str]:
    """Draft the bitmaps away that stop QEMU or a backup: what goes, a sentence each; or nothing."""
    extensions = [each for each in scope.layout.extensions.all if each.magic == BITMAPS]
    if not extensions:
        return []
    judged = _judge(scope)
    if not judged.go and not judged.whole:
        return []
    if judged.stay:
        _shorten_directory(scope, extensions[-1], judged)
    else:
        _remove_extension(scope)
    return list(_sentences(judged))


def _judge(scope: Scope) -> _Judged:
    pointer = scope.layout.extensions.bitmaps
    if pointer is None:
        void = "the bitmaps are void: a program that does not know them has written to the image"
        return _Judged((), (), void)
    listed = list_bitmaps(scope.source, pointer, scope.geometry)
    whole = _why_all(scope, listed.error or listed.first_refusal())
    if whole:
        return _Judged((), (), whole)
    broken = _broken(scope)
    pairs = [
        (bitmap, broken.get(at, "QEMU finds it inconsistent" if bitmap.flags & IN_USE else ""))
        for at, bitmap in enumerate(listed.entries)
    ]
    return _Judged(
        tuple(bitmap for bitmap, reason in pairs if not reason),
        tuple((bitmap, reason) for bitmap, reason in pairs if reason),
    )


def _why_all(scope: Scope, error: ImageError | None) -> str:
    """Why no bitmap of the directory can be kept."""
    if error is not None:
        return f"the bitmap directory cannot be interpreted ({error})"
    if any(owner_index == NONE for owner_index in _contested(scope)):
        return "the bitmap directory has its cluster in common with something else"
    return ""


def _broken(scope: Scope) -> dict[int, str]:
    """What is wrong with each bitmap that a finding is about, by its number."""
    found = {
        number: "it has a cluster in common with something else"
        for number in _contested(scope)
        if number != NONE
    }
    for kind, what in (
        (FindingKind.CUT_OFF, "the end of the file cuts it"),
        (FindingKind.PAST_END, "it lies past the end of the file"),
        (FindingKind.CHECK_STOPPED, "its table cannot be read"),
        (FindingKind.BITMAP_ENTRY_INVALID, "its table has invalid entries"),
    ):
        rows = scope.report.findings.of(kind, *STRUCTURES)
        found |= dict.fromkeys(rows.index.tolist(), what)
    found.pop(NONE, None)
    return found


def _contested(scope: Scope) -> set[int]:
    """The numbers of bitmaps in clusters with two owners; `NONE`: their directory."""
    report, bits = scope.report, scope.geometry.cluster_bits
    contested = report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset >> bits
    owners = report.owners
    mine = np.isin(owners.structure, STRUCTURES) & is_any_of(owners.cluster, contested)
    return set(owners.index[mine].tolist())


def _sentences(judged: _Judged) -> Iterator[str]:
    if judged.whole:
        yield f"{judged.whole}: all bitmaps are dropped"
    for bitmap, reason in judged.go[:NAMED]:
        yield f"the bitmap {quoted(bitmap.name)} is dropped: {reason}"
    if len(judged.go) > NAMED:
        yield f"{len(judged.go) - NAMED} more bitmaps are dropped"
    if judged.stay:
        yield f"{plural(len(judged.stay), 'bitmap')} that can be used, and the bits of each, stay"
    yield "an incremental backup by a bitmap that is dropped has to begin anew, with a full one"


# ---- drafting ----


def _shorten_directory(scope: Scope, extension: Extension, judged: _Judged) -> None:
    """The directory lists those that stay; meanwhile the image says that it has no bitmaps."""
    stay = judged.stay
    _, _, length, start = _POINTER.unpack(extension.data)
    raw = b"".join(map(encode_bitmap, stay))
    _set_autoclear(scope, StageKind.PREPARE, vouched=False)
    scope.draft.write(
        StageKind.SWITCH, extension.offset, _POINTER.pack(len(stay), 0, len(raw), start)
    )
    _explain(scope, StageKind.SWITCH, Structure.HEADER, extension.offset, _POINTER.size)
    scope.draft.write(StageKind.REPOINT, start, raw.ljust(length, b"\0"))
    _explain(scope, StageKind.REPOINT, Structure.BITMAP_DIRECTORY, start, length)
    _set_autoclear(scope, StageKind.CORRECT, vouched=True)


def _remove_extension(scope: Scope) -> None:
    """Close the gap that the extension leaves; what comes after it is as it was."""
    _set_autoclear(scope, StageKind.PREPARE, vouched=False)
    extensions = scope.layout.extensions.all
    first = next(at for at, each in enumerate(extensions) if each.magic == BITMAPS)
    start = extensions[first].offset - EXTENSION_BYTES
    last = extensions[-1]
    end = last.offset + (len(last.data) + 7 & ~7)
    rest = [(each.magic, each.data) for each in extensions[first:] if each.magic != BITMAPS]
    raw = encode_extensions(rest).ljust(end - start, b"\0")[: end - start]
    scope.draft.write(StageKind.SWITCH, start, raw)
    _explain(scope, StageKind.SWITCH, Structure.HEADER, start, len(raw))


def _set_autoclear(scope: Scope, stage: StageKind, *, vouched: bool) -> None:
    """Whether the image says that its bitmaps are of the disk as it is."""
    # Those that are not known go before, and must not come back.
    known = scope.layout.header.known_autoclear
    bits = known & ~int(Autoclear.BITMAPS)
    bits |= int(Autoclear.BITMAPS) if vouched else 0
    if known == bits and not scope.draft.has(StageKind.PREPARE):
        return
    scope.draft.write(stage, AUTOCLEAR_AT, bits.to_bytes(8, "big"))
    _explain(scope, stage, Structure.HEADER, AUTOCLEAR_AT, 8)


def _explain(scope: Scope, stage: StageKind, structure: Structure, offset: int, size: int) -> None:
    scope.explain(stage, structure, _KIND, [(offset, size, 1)])
