"""`image/map.json` and `instarfs map`: where the guest's bytes are, in the words of `qemu-img map`.

The keys are those of `qemu-img map --output=json`, ``compressed`` included, which QEMU has since
8.2. Where QEMU gives up, the map goes on: a row whose bytes cannot be read has ``damaged`` and a
sentence, one in a file that is not read has ``unknown`` and a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from instarfs.text import json_bytes, json_text, printable
from planner.arrays import I32, I64
from planner.findings.wording import plural
from planner.guest.chain import Member, Role
from planner.guest.extents import UNKNOWN, Extents
from planner.guest.mapping import FLAW_SENTENCES, Flaw
from planner.qcow2.entries import NO_HOST
from planner.qcow2.names import decode_name

_BOOLEANS = ("false", "true")

ROWS_A_PART = 1 << 14

_ROW = (
    '{{ "start": {}, "length": {}, "depth": {}, "present": {}, "zero": {}, "data": {},'
    ' "compressed": {}{}{}}}'
)
_OFFSET = ', "offset": {}'


_NOTHING = (
    '{{ "start": {}, "length": 0, "depth": 0, "present": false, "zero": false, "data": false,'
    ' "compressed": false}}'
)


class MapIncomplete(Exception):
    """The text has no line for some of the guest's data; the message says which."""


def map_json(
    batches: Iterable[Extents], members: tuple[Member, ...], start: int = 0
) -> Iterator[bytes]:
    """The map from guest offset *start* on as JSON, in parts, an object a line."""
    reasons = _reasons(members)
    opening = "["
    for rows in batches:
        for first in range(0, len(rows), ROWS_A_PART):
            lines = _objects(rows.select(slice(first, first + ROWS_A_PART)), reasons)
            yield (opening + ",\n".join(lines)).encode()
            opening = ",\n"
    # Where there is nothing QEMU has one row too.
    yield (opening + _NOTHING.format(start) + "]\n" if opening == "[" else "]\n").encode()


def map_json_length(batches: Iterable[Extents], members: tuple[Member, ...]) -> int:
    """How many bytes `map_json` gives from the beginning on, in a tenth of the time."""
    reasons = _reasons(members)
    lengths = np.zeros(max(reasons) + 1, dtype=np.int64)
    lengths[list(reasons)] = [len(text.encode()) for text in reasons.values()]
    fixed = len(_ROW.format(*[""] * 7, "", "")) + len(",\n")
    total = count = 0
    for rows in batches:
        count += len(rows)
        total += fixed * len(rows) + int(lengths[rows.flaw].sum())
        total += sum(_digits(column) for column in (rows.start, rows.length, rows.depth))
        for column in (rows.present, rows.zero, rows.data, rows.compressed):
            total += len("false") * len(rows) - int(np.count_nonzero(column))
        placed = rows.offset[rows.offset != NO_HOST]
        total += len(_OFFSET.format("")) * len(placed) + _digits(placed)
    # One row has the bracket in place of a comma and a line break, and the end has two more bytes.
    return total - 1 + len("]\n") if count else len("[" + _NOTHING.format(0) + "]\n")


def _digits(numbers: I64 | I32) -> int:
    """How many decimal digits all of *numbers*, none below 0, have together."""
    if not len(numbers):
        return 0
    # Those of a batch are of much the same size: few powers of ten lie between them.
    least, most = (len(str(number)) for number in (numbers.min(), numbers.max()))
    more = (int(np.count_nonzero(numbers >= 10**digits)) for digits in range(least, most))
    return least * len(numbers) + sum(more)


def _objects(rows: Extents, reasons: dict[int, str]) -> Iterator[str]:
    columns = (
        rows.start, rows.length, rows.depth, rows.present, rows.zero, rows.data, rows.compressed,
        rows.offset, rows.flaw,
    )  # fmt: skip
    for start, length, depth, present, zero, data, compressed, offset, flaw in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        at = "" if offset == NO_HOST else _OFFSET.format(offset)
        yield _ROW.format(
            start,
            length,
            depth,
            _BOOLEANS[present],
            _BOOLEANS[zero],
            _BOOLEANS[data],
            _BOOLEANS[compressed],
            at,
            reasons[flaw],
        )


def _reasons(members: tuple[Member, ...]) -> dict[int, str]:
    """What a row ends with, by its flaw."""
    found = {int(flaw): f', "damaged": "{text}"' for flaw, text in FLAW_SENTENCES.items()}
    found[UNKNOWN] = f', "unknown": {json_text(_unread(members))}'
    return found | {int(Flaw.NONE): ""}


def _unread(members: tuple[Member, ...]) -> str:
    """Why it is not known what is in a backing file."""
    missing = [m for m in members if m.named.role is Role.BACKING and m.refusal is not None]
    return f"in a backing file that is not read: {missing[-1].refusal if missing else None}"


def map_human(
    batches: Iterable[Extents], files: list[str], members: tuple[Member, ...]
) -> Iterator[bytes]:
    """The text of `qemu-img map`: a line for each run of data that lies in a file as it is; and, in
    place of an offset and a file, what is wrong with each that is damaged.

    *files*: the file of the data at each depth. *members*: those of its chain. Raises
    `MapIncomplete` at the first run that can have no such line, as QEMU does; and at the end where
    some were damaged, or are not known.
    """
    yield b"Offset          Length          Mapped to       File\n"
    damaged, bytes_damaged = 0, 0
    unknown: int | None = None
    for rows in batches:
        # QEMU joins what it does not tell apart.
        is_flawed = (rows.flaw != Flaw.NONE) & (rows.flaw != UNKNOWN)
        held = rows.select((rows.data & ~rows.zero) | is_flawed)
        nowhere = np.flatnonzero((held.offset == NO_HOST) & (held.flaw == Flaw.NONE))
        shown = held.select(slice(0, nowhere[0] if len(nowhere) else None))
        yield "".join(_lines(shown, files)).encode()
        if len(nowhere):
            raise MapIncomplete(
                "File contains external, encrypted or compressed clusters, the first"
                f" at {held.start[nowhere[0]]}; see --output json"
            )
        damaged += int(np.count_nonzero(is_flawed))
        bytes_damaged += int(rows.length[is_flawed].sum())
        if unknown is None and (rows.flaw == UNKNOWN).any():
            unknown = int(rows.start[rows.flaw == UNKNOWN][0])
    problems = []
    if damaged:
        what = "part is" if damaged == 1 else "parts are"
        problems.append(f"{damaged} {what} damaged ({plural(bytes_damaged, 'byte')})")
    if unknown is not None:
        problems.append(f"what is at {unknown} is {printable(_unread(members))}")
    if problems:
        raise MapIncomplete("; ".join(problems))


def _lines(rows: Extents, files: list[str]) -> Iterator[str]:
    columns = (rows.start, rows.length, rows.depth, rows.offset, rows.flaw)
    for start, length, depth, offset, flaw in zip(*(c.tolist() for c in columns), strict=True):
        where, file = _hex(offset), printable(files[depth])
        if flaw != Flaw.NONE:
            where, file = "damaged", FLAW_SENTENCES[Flaw(flaw)]
        yield f"{_hex(start):<16}{_hex(length):<16}{where:<16}{file}\n"


def _hex(number: int) -> str:
    """As C prints %#x."""
    return f"{number:#x}" if number else "0"


def chain_json(members: Iterable[Member]) -> bytes:
    """`image/chain.json`: each file that a member of the chain names, and what became of it."""
    return json_bytes({"members": [_member(member) for member in members]})


def _member(member: Member) -> dict[str, object]:
    named = member.named
    return {
        "depth": member.depth,
        "role": str(named.role),
        "name": decode_name(named.name),
        "format": None if named.format is None else decode_name(named.format),
        "path": member.path,
        "opened": member.refusal is None,
        **({} if member.refusal is None else {"reason": member.refusal}),
    }
