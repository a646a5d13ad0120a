r"""``check/files.tsv``: which files of the guest are hit, and the same in a sentence.

Names of files come from the guest and are hostile: what does not print is escaped, and so is the
backslash, so that a name can be had back. They are never used as a path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np

from instarfs.text import printable
from planner.findings.wording import plural
from planner.guestfs.files import NO_VOLUME, FilesUnknown, HitFiles, Row
from planner.guestfs.protocol import NO_INODE, What
from planner.guestfs.volumes.find import ENCRYPTED, Volume
from planner.triage.guest_damage import GuestHarm

HEADER = "#harm\tguest-offset\tlength\tvolume\tfilesystem\tinode\tpath\tfile-offset\twhat\n"

HARMS = {
    GuestHarm.LOST: "lost",
    GuestHarm.SUSPECT: "suspect",
    GuestHarm.AT_RISK: "at-risk",
    GuestHarm.MISSING: "missing",
}

WHATS = {what: what.name.lower().replace("_", "-") for what in What}

ROWS_A_PART = 2000

LISTED_FILES = 10
LISTED_NOTES = 10


def files_tsv(found: HitFiles | FilesUnknown) -> Iterator[bytes]:
    """A row a piece of a file, by guest offset; or why there is none, as a remark."""
    yield HEADER.encode()
    if isinstance(found, FilesUnknown):
        yield f"# {printable(found.reason)}\n".encode()
        return
    for note in found.notes:
        yield f"# {printable(note)}\n".encode()
    rows = found.rows()
    while part := list(islice(rows, ROWS_A_PART)):
        yield "".join(map(_line, part)).encode()
    if found.more:
        yield f"# more is hit than these {len(found.hits)} pieces\n".encode()


def _line(row: Row) -> str:
    volume = row.volume
    cells = (
        HARMS[GuestHarm(row.harm)],
        row.start,
        row.length,
        escaped(volume.name) if volume else "-",
        (volume.holds if volume else "") or "-",
        "-" if row.inode is None else row.inode,
        _path_cell(row),
        "-" if row.file_offset is None else row.file_offset,
        WHATS[row.what],
    )
    return "\t".join(map(str, cells)) + "\n"


def _path_cell(row: Row) -> str:
    """A path begins with ``/``, or with ``#`` where a directory above is not known."""
    if row.path is not None:
        return shown_path(row.path)
    return "-" if row.behind is None else plural(row.behind, "file")


def shown_path(path: bytes) -> str:
    """A path of the guest's on one line."""
    return escaped(path.decode("utf-8", "surrogateescape"))


def escaped(name: str) -> str:
    """A name that can be had back."""
    return printable(name.replace("\\", "\\\\"))


# ---- in sentences ----


def owner_lines(found: HitFiles | FilesUnknown | None) -> list[str]:
    """Whose one byte is, if anything was looked for."""
    if found is None:
        return []
    if isinstance(found, FilesUnknown):
        return ["", f"Whose it is on the guest's disk is not known: {found.reason}."]
    lines = ["", "On the guest's disk:"]
    lines += (f"  {_owner(row)}" for row in found.rows())
    return lines + [f"  ({note})" for note in found.notes[:LISTED_NOTES]]


def _owner(row: Row) -> str:
    if row.path is None:
        behind = "" if row.behind is None else f", with the records of {_path_cell(row)}"
        return _of_nobody(row.what, "it", row.volume, is_one=True) + behind
    place = "" if row.volume is None else f" ({_kind(row.volume)}, inode {row.inode})"
    what = WHATS[row.what] if row.file_offset is None else f"byte {row.file_offset}"
    return f"{what} of {shown_path(row.path)}{place}"


def files_lines(found: HitFiles | FilesUnknown | None, *, where: str) -> list[str]:
    """What a report says of them; nothing where nothing is damaged. *where*: what lists all."""
    if found is None:
        return []
    if isinstance(found, FilesUnknown):
        return ["Which files of the guest are hit is not known:", f"  {found.reason}"]
    if not len(found.hits):
        return []
    if _holds_nothing(found):
        return ["Which files are hit is not known: the disk holds no file system that is known."]
    lines = [headline(found), *_first_files(found, where), *_beside(found)]
    notes = [f"  {note}" for note in found.notes[:LISTED_NOTES]]
    if len(found.notes) > LISTED_NOTES:
        notes.append(f"  ... and more: {where}")
    return lines + notes


def _holds_nothing(found: HitFiles) -> bool:
    """Whether there is nothing to be said of the disk: no partitions, and nothing in it."""
    volumes = found.layout.volumes
    return not found.layout.own and not any(each.holds for each in volumes)


def headline(found: HitFiles) -> str:
    """One sentence: how many files are hit, or that none is, as far as is known."""
    count = len(_files(found))
    if count:
        least = "at least " if found.more else ""
        verb = "is" if count == 1 else "are"
        return f"{least}{plural(count, 'file')} {verb} hit:".capitalize()
    hits = found.hits
    is_own = ~np.isin(hits.what, (What.FREE, What.UNKNOWN))
    if (hits.what == What.UNKNOWN).any():
        return "Which files are hit is not known, or not of all that is damaged:"
    if is_own.any():
        return "No file is hit: the damage lies in what the file system keeps for itself:"
    return "No file is hit: the damage lies in free space."


def _files(found: HitFiles) -> list[tuple[int, int, int]]:
    """(worst harm, volume, inode) of each file that is hit, the worst first."""
    hits = found.hits
    mine = np.flatnonzero(hits.inode != NO_INODE)
    order = mine[np.lexsort((hits.harm[mine], hits.inode[mine], hits.volume[mine]))]
    volume, inode, harm = hits.volume[order], hits.inode[order], hits.harm[order]
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = (volume[1:] != volume[:-1]) | (inode[1:] != inode[:-1])
    rows = zip(harm[first].tolist(), volume[first].tolist(), inode[first].tolist(), strict=True)
    return sorted(rows)


def _first_files(found: HitFiles, where: str) -> Iterator[str]:
    files = _files(found)
    for harm, volume, inode in files[:LISTED_FILES]:
        holder = found.layout.volumes[volume]
        path = shown_path(found.names(volume, inode)[0])
        yield f"  {HARMS[GuestHarm(harm)]}: {path} ({_kind(holder)})"
    if len(files) > LISTED_FILES:
        yield f"  ... and {len(files) - LISTED_FILES} more: {where}"


def _kind(volume: Volume) -> str:
    return f"{escaped(volume.name)}, {volume.holds}" if volume.holds else escaped(volume.name)


def _beside(found: HitFiles) -> Iterator[str]:
    """What is damaged and no file's."""
    hits = found.hits
    sums = Counter[tuple[int, int, bool]]()
    rest = hits.inode == NO_INODE
    missing = hits.harm[rest] == GuestHarm.MISSING
    columns = (hits.volume[rest], hits.what[rest], missing, hits.length[rest])
    for volume, what, may_miss, length in zip(*(c.tolist() for c in columns), strict=True):
        sums[volume, what, may_miss] += length
    for (number, what, may_miss), length in sorted(sums.items()):
        holder = found.layout.volumes[number] if number != NO_VOLUME else None
        end = ", from which something may be missing" if may_miss else ""
        yield f"  {_of_nobody(What(what), plural(length, 'byte'), holder)}{end}"


def _of_nobody(what: What, size: str, volume: Volume | None, *, is_one: bool = False) -> str:
    if volume is None:
        named = "the partition table" if what is What.SUPERBLOCK else "no partition"
        return f"{size} belong{'s' if is_one else ''} to {named}"
    if what is not What.UNKNOWN:
        named = "free space" if what is What.FREE else WHATS[what]
        return f"{size} {'is' if is_one else 'are'} {named} of {_kind(volume)}"
    return f"{size}{' is' if is_one else ''} of {_kind(volume)}{_why_unknown(volume)}"


def _why_unknown(volume: Volume) -> str:
    if volume.filesystem is not None:
        return ": what they held is not known"
    if volume.holds in ENCRYPTED:
        return ", which is encrypted: whose they are is not known"
    if volume.holds:
        return ", which is not looked into"
    return ", which holds no file system that is known"
