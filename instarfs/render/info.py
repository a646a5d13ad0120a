"""`image/info.json`, `image/header.json` and `instarfs info`: what an image says of itself.

`info` gives the keys and values of `qemu-img info --output=json` (bdrv_query_image_info), and
`info_human` the text of `qemu-img info` (bdrv_image_info_dump). Where this and QEMU differ:

- names come whole: QEMU ends them at a NUL byte, cuts a snapshot's to 255 bytes and its id to 127,
  and replaces bytes that are not UTF-8;
- a part that cannot be read is an entry under ``errors``; QEMU then shows nothing at all;
- sizes are never negative, and the key slots of a LUKS header are added up in more than 32 bits;
- the files that the image names are not asked anything.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import IntFlag
from itertools import islice
from typing import TYPE_CHECKING

from instarfs.render.outcome import pending_value
from instarfs.text import json_bytes, json_parts, printable, text_lines
from planner.errors import ImageError
from planner.guest.chain import full_name
from planner.qcow2 import bitmaps, extensions
from planner.qcow2.contents import Contents
from planner.qcow2.geometry import SECTOR
from planner.qcow2.header import (
    COMPRESSION_NAMES,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NAMES,
    Autoclear,
    Compatible,
    Header,
    Incompatible,
)
from planner.qcow2.layout import Layout
from planner.qcow2.luks import SECTOR as LUKS_SECTOR
from planner.qcow2.luks import KeySlot, LuksHeader, cipher_of
from planner.qcow2.names import decode_name
from planner.qcow2.snapshots import Snapshot

if TYPE_CHECKING:  # a mount loads what a repair came to when it needs it
    from instarfs.repair.outcome import Pending

Json = dict[str, object]

NSEC = 10**9

LINES_A_PART = 1000

MAX_LISTED_ID, MAX_LISTED_NAME = 127, 255
"""Bytes. In an image each may have 65535, and a list of them a hundred megabytes."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the file system knows of an image: its name as the user gave it, and bytes."""

    filename: str
    file_size: int
    allocated_size: int


# ---- qemu-img info ----


def info(
    contents: Contents, facts: ImageFacts, unread: str = "", pending: Pending | None = None
) -> Json:
    """The value of `qemu-img info --output=json`, and ``errors`` where a part was not readable.

    Its snapshots and bitmaps are iterators: there may be 65,536 of each. *unread*: why nothing is
    shown of its backing file, where that was asked for. *pending*: a repair that was interrupted.
    """
    layout = contents.layout
    return {
        **_backing(layout, facts),
        **({"snapshots": map(_listed, contents.snapshots)} if contents.snapshots else {}),
        "virtual-size": _virtual_size(layout),
        "filename": facts.filename,
        "cluster-size": layout.geometry.cluster_size,
        "format": "qcow2",
        "actual-size": facts.allocated_size,
        "format-specific": {"type": "qcow2", "data": _specific(contents)},
        **({"encrypted": True} if layout.header.crypt_method else {}),
        "dirty-flag": layout.header.dirty,
        **({"backing-not-shown": unread} if unread else {}),
        **({"interrupted-repair": pending_value(pending)} if pending else {}),
        **_errors(contents),
    }


def _virtual_size(layout: Layout) -> int:
    """QEMU counts a disk in whole sectors."""
    return layout.header.size // SECTOR * SECTOR


def _errors(contents: Contents) -> Json:
    if not contents.errors:
        return {}
    return {"errors": {part: str(error) for part, error in contents.errors}}


def _backing(layout: Layout, facts: ImageFacts) -> Json:
    if not layout.backing_file or not decode_name(layout.backing_file):
        return {}
    full = full_name(os.fsencode(facts.filename), layout.backing_file)
    found: Json = {
        "backing-filename": decode_name(layout.backing_file),
        "full-backing-filename": decode_name(full),
    }
    if layout.extensions.backing_format:
        found["backing-filename-format"] = decode_name(layout.extensions.backing_format)
    return found


def _cut(snapshot: Snapshot) -> Snapshot:
    """With an ID and a name as long as QEMU has room for in a list (QEMUSnapshotInfo)."""
    identity, name = snapshot.id_str[:MAX_LISTED_ID], snapshot.name[:MAX_LISTED_NAME]
    return replace(snapshot, id_str=identity, name=name)


def _listed(snapshot: Snapshot) -> Json:
    return _snapshot(_cut(snapshot))


def _snapshot(snapshot: Snapshot) -> Json:
    shown: Json = {} if snapshot.icount is None else {"icount": snapshot.icount}
    return shown | {
        "vm-clock-nsec": snapshot.vm_clock_nsec % NSEC,
        "name": decode_name(snapshot.name),
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // NSEC,
        "id": decode_name(snapshot.id_str),
        "vm-state-size": snapshot.vm_state_size,
    }


def _specific(contents: Contents) -> Json:
    """ImageInfoSpecificQCow2, in the order in which QEMU prints it."""
    layout = contents.layout
    header, geometry = layout.header, layout.geometry
    is_v3 = header.version >= 3
    data: Json = {
        "compat": "1.1" if is_v3 else "0.10",
        "compression-type": COMPRESSION_NAMES[header.compression_type],
    }
    if is_v3:
        data["lazy-refcounts"] = bool(header.compatible_features & Compatible.LAZY_REFCOUNTS)
    if contents.bitmaps:
        data["bitmaps"] = map(_bitmap, contents.bitmaps)
    data["refcount-bits"] = geometry.refcount_bits
    if is_v3 and layout.extensions.data_file is not None:
        data["data-file"] = decode_name(layout.extensions.data_file)
    if header.crypt_method:
        data["encrypt"] = _encrypt(header, contents.luks)
    if not is_v3:
        return data
    if header.external_data:
        data["data-file-raw"] = bool(header.autoclear_features & Autoclear.DATA_FILE_RAW)
    return data | {"corrupt": header.corrupt, "extended-l2": header.extended_l2}


def _bitmap(bitmap: bitmaps.Bitmap) -> Json:
    named = {bitmaps.IN_USE: "in-use", bitmaps.AUTO: "auto"}
    return {
        "flags": [name for bit, name in named.items() if bitmap.flags & bit],
        "name": decode_name(bitmap.name),
        "granularity": bitmap.granularity,
    }


def _encrypt(header: Header, luks: LuksHeader | None) -> Json:
    """QCryptoBlockInfo. Of a LUKS header that could not be read only the format is known."""
    if header.crypt_method == CRYPT_AES or luks is None:
        return {"format": CRYPT_NAMES[header.crypt_method]}
    cipher = cipher_of(luks)
    iv_hash: Json = {"ivgen-hash-alg": cipher.iv_hash} if cipher.iv_generator == "essiv" else {}
    return {
        "ivgen-alg": cipher.iv_generator,
        "hash-alg": luks.hash_name,
        "cipher-alg": f"{cipher.algorithm}-{cipher.key_bits}",
        "uuid": luks.uuid_text,
        **iv_hash,
        "format": CRYPT_NAMES[CRYPT_LUKS],
        "cipher-mode": cipher.mode,
        "slots": [_key_slot(slot) for slot in luks.key_slots],
        "payload-offset": luks.payload_offset * LUKS_SECTOR,
        "master-key-iters": luks.mk_digest_iter,
    }


def _key_slot(slot: KeySlot) -> Json:
    offset = slot.key_material_offset * LUKS_SECTOR
    if not slot.enabled:
        return {"active": False, "key-offset": offset}
    return {
        "active": True,
        "iters": slot.iterations,
        "key-offset": offset,
        "stripes": slot.stripes,
    }


def info_json(
    contents: Contents, facts: ImageFacts, unread: str = "", pending: Pending | None = None
) -> Iterator[bytes]:
    """`info` as JSON, in parts."""
    return json_parts(info(contents, facts, unread, pending))


def raw_json(facts: ImageFacts) -> bytes:
    """What `qemu-img info --output=json` says of a raw file."""
    return json_bytes(
        {
            "virtual-size": _sectors(facts.file_size),
            "filename": facts.filename,
            "format": "raw",
            "actual-size": facts.allocated_size,
            "dirty-flag": False,
        }
    )


def raw_human(facts: ImageFacts) -> bytes:
    """The text of `qemu-img info` about a raw file."""
    lines = _common_lines(facts, "raw", _sectors(facts.file_size))
    return ("\n".join(lines) + "\n").encode()


def _sectors(size: int) -> int:
    """QEMU takes what the file has of its last sector for all of it."""
    return -(-size // SECTOR) * SECTOR


def mounted_info_json(contents: Contents, facts: ImageFacts) -> Iterator[bytes]:
    """`info` as JSON in a mount: where disk.raw cannot be read, it says so under that name."""
    method = contents.layout.header.crypt_method
    if not method:
        return info_json(contents, facts)
    sentence = f"encrypted ({CRYPT_NAMES[method]}): no key is asked for, and reads are refused"
    return json_parts({**info(contents, facts), "disk.raw": sentence})


def info_error_json(error: ImageError, facts: ImageFacts) -> bytes:
    """In place of `info_json` where the layout cannot be read: the reason, and what is known."""
    return json_bytes(
        {
            "filename": facts.filename,
            "format": "qcow2",
            "actual-size": facts.allocated_size,
            "file-size": facts.file_size,
            **_error(error),
        }
    )


def error_json(error: ImageError) -> bytes:
    """In place of a file about the image where its layout cannot be read: the reason."""
    return json_bytes(_error(error))


def snapshot_json(contents: Contents | ImageError, index: int) -> bytes:
    """`snapshots/N/info.json`: its entry in `info`, and where it is in the image.

    Sizes in bytes; the size of the disk is null where the snapshot does not say.
    """
    if isinstance(contents, ImageError):
        return error_json(contents)
    if index >= len(contents.snapshots):
        return json_bytes({"error": f"there is no snapshot {index} any more"})
    snapshot = contents.snapshots[index]
    return json_bytes(
        {
            **_snapshot(snapshot),
            "disk-size": snapshot.disk_size,
            "l1-table-offset": snapshot.l1_table_offset,
            "l1-size": snapshot.l1_size,
            "table-entry-offset": snapshot.offset,
        }
    )


def _error(error: ImageError) -> Json:
    return {"error": str(error), "field": error.field, "value": error.value}


# ---- qemu-img info, for a reader ----


def info_human(contents: Contents, facts: ImageFacts, unread: str = "") -> Iterator[bytes]:
    """The text of `qemu-img info`, in parts; what could not be read is listed at its end."""
    lines = _human_lines(contents, facts, unread)
    while part := list(islice(lines, LINES_A_PART)):
        yield text_lines(part).encode()


def _common_lines(facts: ImageFacts, image_format: str, size: int) -> Iterator[str]:
    """What there is to say of an image of any format."""
    yield f"image: {facts.filename}"
    yield f"file format: {image_format}"
    yield f"virtual size: {size_text(size)} ({size} bytes)"
    yield f"disk size: {size_text(facts.allocated_size)}"


def _human_lines(contents: Contents, facts: ImageFacts, unread: str) -> Iterator[str]:
    layout = contents.layout
    header = layout.header
    yield from _common_lines(facts, "qcow2", _virtual_size(layout))
    if header.crypt_method:
        yield "encrypted: yes"
    yield f"cluster_size: {layout.geometry.cluster_size}"
    if header.dirty:
        yield "cleanly shut down: no"
    yield from _backing_lines(layout, facts)
    if contents.snapshots:
        yield "Snapshot list:"
        yield "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"
        yield from (_snapshot_line(_cut(snapshot)) for snapshot in contents.snapshots)
    yield "Format specific information:"
    yield from _dump(_specific(contents), 1)
    if unread:
        yield f"backing file not shown: {unread}"
    if contents.errors:
        yield "Not readable:"
        yield from (f"    {part}: {e}" for part, e in contents.errors)


def _backing_lines(layout: Layout, facts: ImageFacts) -> Iterator[str]:
    backing = _backing(layout, facts)
    if not backing:
        return
    name, full = str(backing["backing-filename"]), str(backing["full-backing-filename"])
    actual = f" (actual path: {full})" if full != name else ""
    yield f"backing file: {name}{actual}"
    if "backing-filename-format" in backing:
        yield f"backing file format: {backing['backing-filename-format']}"


def _snapshot_line(snapshot: Snapshot) -> str:
    """One line of bdrv_snapshot_dump; the date in local time."""
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_sec))
    seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, NSEC)
    minutes = seconds // 60
    clock = f"{minutes // 60:02}:{minutes % 60:02}:{seconds % 60:02}.{nanoseconds // 10**6:03}"
    icount = "" if snapshot.icount is None else str(snapshot.icount)
    # Before they are made as wide as their columns.
    identity, name = printable(decode_name(snapshot.id_str)), printable(decode_name(snapshot.name))
    state = size_text(snapshot.vm_state_size)
    return f"{identity:<9} {name:<16} {state:>8}{date:>20}{clock:>13}{icount:>11}"


def _dump(values: Mapping[str, object], depth: int) -> Iterator[str]:
    """dump_qdict and dump_qlist of QEMU: nested values, four spaces a level."""
    for key, value in values.items():
        label = "    " * depth + key.replace("-", " ")
        if isinstance(value, dict):
            yield f"{label}:"
            yield from _dump(value, depth + 1)
        elif isinstance(value, list | Iterator):
            yield f"{label}:"
            for index, item in enumerate(value):
                yield from _dump({f"[{index}]": item}, depth + 1)
        else:
            text = str(value).lower() if isinstance(value, bool) else value
            yield f"{label}: {text}"


def size_text(size: int) -> str:
    """*size* bytes as QEMU writes it: three digits and a binary unit, size_to_str."""
    exponent = (math.frexp(size / (1000.0 / 1024.0))[1] - 1) // 10 if size else 0
    unit = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")[exponent]
    return f"{size / (1 << exponent * 10):.3g} {unit}B"


# ---- header.json ----


def _named(bits: type[IntFlag]) -> dict[int, str]:
    return {bit.value.bit_length() - 1: str(bit.name).lower().replace("_", "-") for bit in bits}


# The number is the type that the feature name table gives each.
_FEATURES = {
    "incompatible": (0, _named(Incompatible)),
    "compatible": (1, _named(Compatible)),
    "autoclear": (2, _named(Autoclear)),
}


def header_json(layout: Layout) -> bytes:
    """Every field of the header and every extension, decoded; what is unknown, as hex."""
    names = layout.extensions.names_of_features()
    backing = layout.backing_file
    return json_bytes(
        {
            "header": _fields(layout.header),
            "features": _features(layout.header, names),
            "extensions": [_extension(e, layout) for e in layout.extensions.all],
            "backing_file": None if backing is None else decode_name(backing),
        }
    )


def header_error_json(error: ImageError, header: Header | None) -> bytes:
    """In place of `header_json` where the layout cannot be read: the reason, and the bare fields.

    *header* is the header as it decodes, sensible or not; None where there is none.
    """
    if header is None:
        return json_bytes(_error(error))
    return json_bytes(
        {**_error(error), "header": _fields(header), "features": _features(header, {})}
    )


def _fields(header: Header) -> Json:
    """The header's fields by name; numbers as they are, bit fields and unknown bytes as hex."""
    shown: Json = {}
    for field in fields(Header):
        value = getattr(header, field.name)
        if field.name == "magic" or field.name.endswith("_features"):
            value = f"{value:#x}"
        shown[field.name] = value.hex() if isinstance(value, bytes) else value
    shown["crypt_method_name"] = CRYPT_NAMES.get(header.crypt_method, "unknown")
    shown["compression_type"] = header.compression_type
    shown["compression_type_name"] = COMPRESSION_NAMES.get(header.compression_type, "unknown")
    return shown


def _features(header: Header, names: dict[tuple[int, int], str]) -> Json:
    """The bits that are set: number, whether this program knows it, name."""
    shown: Json = {}
    for kind, (number, known) in _FEATURES.items():
        word: int = getattr(header, f"{kind}_features")
        bits = [bit for bit in range(64) if word >> bit & 1]
        shown[kind] = [
            {"bit": bit, "known": bit in known, "name": known.get(bit) or names.get((number, bit))}
            for bit in bits
        ]
    return shown


def _extension(extension: extensions.Extension, layout: Layout) -> Json:
    return {
        "type": f"{extension.magic:#010x}",
        "name": extensions.EXTENSION_NAMES.get(extension.magic, "unknown"),
        "offset": extension.offset,
        "length": len(extension.data),
        **_extension_value(extension, layout),
    }


def _extension_value(extension: extensions.Extension, layout: Layout) -> Json:
    """What an extension says. The layout has judged it: the known ones decode."""
    match extension.magic:
        case extensions.BACKING_FORMAT | extensions.DATA_FILE:
            return {"value": decode_name(extension.data)}
        case extensions.FEATURE_NAMES:
            return {"value": [_feature(*row) for row in layout.extensions.feature_names]}
        case extensions.CRYPTO_HEADER:
            return {"value": asdict(extensions.decode_crypto(extension.data, layout.header))}
        case extensions.BITMAPS:
            return {"value": asdict(extensions.decode_bitmaps(extension.data, layout.header))}
        case _:
            return {"data": extension.data.hex()}


def _feature(kind: int, bit: int, name: bytes) -> Json:
    return {"type": kind, "bit": bit, "name": decode_name(name)}
