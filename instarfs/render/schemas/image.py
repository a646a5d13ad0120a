"""The schemas of what an image says of itself: `instarfs.render.info`, `.guest_map`, `.bitmaps`."""

from __future__ import annotations

from instarfs.render.schemas.check import FILENAME, image_error, interrupted_repair
from instarfs.render.schemas.words import (
    Schema,
    array,
    either,
    flag,
    hexadecimal,
    matching,
    maybe,
    number,
    record,
    reference,
    text,
    word,
    words,
)
from planner.guest.chain import Role
from planner.qcow2.header import COMPRESSION_NAMES, CRYPT_NAMES

_COMPRESSION = word("how clusters are compressed", COMPRESSION_NAMES.values())
_BITMAP_FLAGS = ["in-use", "auto"]


def _unreadable() -> Schema:
    """In place of a file, where the image cannot be read so far."""
    return record(
        "why it cannot be told",
        {"error": text("a sentence"), **image_error()},
    )


# ---- snapshots ----


def snapshot_of_list() -> dict[str, Schema]:
    """QEMU's keys of a snapshot."""
    return {
        "id": text("its ID"),
        "name": text("its name"),
        "date-sec": number("when it was taken, seconds since 1970"),
        "date-nsec": number("and nanoseconds"),
        "vm-clock-sec": number("how long its machine had run, seconds"),
        "vm-clock-nsec": number("and nanoseconds"),
        "vm-state-size": number("the state of its machine, bytes"),
    }


_ICOUNT = {"icount": number("instructions that its machine had executed")}


def snapshot() -> Schema:
    """A snapshot, and where it is."""
    one = record(
        "what the snapshot table says of it",
        {
            **snapshot_of_list(),
            "disk-size": maybe(number("of its disk, bytes; null: it does not say")),
            "l1-table-offset": number("of its L1 table, in the image file, bytes"),
            "l1-size": number("entries of its L1 table"),
            "table-entry-offset": number("of its entry in the snapshot table, bytes"),
        },
        _ICOUNT,
    )
    gone = record("it is there no more", {"error": text("a sentence")})
    return either("an internal snapshot", one, _unreadable(), gone)


# ---- info ----


def info() -> Schema:
    """The keys of `qemu-img info`; a chain, a list."""
    one = reference("image")
    listed = array("of a backing chain", either("an image of it", one, _raw()))
    return {
        **either("what an image says of itself", one, listed, _without_layout()),
        "$defs": {"image": _info()},
    }


def _info() -> Schema:
    return record(
        "what it says of itself",
        {
            "virtual-size": number("of the guest's disk, bytes"),
            "filename": FILENAME,
            "cluster-size": number("bytes"),
            "format": word("always the same", ["qcow2"]),
            "actual-size": number("what the file takes on its disk, bytes"),
            "format-specific": record(
                "of this format", {"type": word("which", ["qcow2"]), "data": _specific()}
            ),
            "dirty-flag": flag("it was not closed properly"),
        },
        {
            "backing-filename": text("the backing file, as the image names it"),
            "full-backing-filename": text("and from where the image is"),
            "backing-filename-format": text("its format, as the image names it"),
            "snapshots": array("internal ones", record("one of them", snapshot_of_list(), _ICOUNT)),
            "encrypted": flag("whether its data is"),
            "backing-not-shown": text("why its backing file is not in the list"),
            "interrupted-repair": interrupted_repair(),
            "errors": {
                "type": "object",
                "description": "parts that could not be read, and why",
                "additionalProperties": text("a sentence"),
            },
            "disk.raw": text("in a mount: why that file cannot be read"),
        },
    )


def _raw() -> Schema:
    return record(
        "a raw file of the chain",
        {
            "virtual-size": number("bytes"),
            "filename": FILENAME,
            "format": word("always the same", ["raw"]),
            "actual-size": number("what the file takes on its disk, bytes"),
            "dirty-flag": flag("always false"),
        },
    )


def _without_layout() -> Schema:
    return record(
        "in a mount: an image of which not more can be read",
        {
            "filename": FILENAME,
            "format": word("always the same", ["qcow2"]),
            "actual-size": number("what the file takes on its disk, bytes"),
            "file-size": number("bytes"),
            "error": text("why"),
            **image_error(),
        },
    )


def _specific() -> Schema:
    bitmap = record(
        "one of them",
        {
            "flags": words("what is set", _BITMAP_FLAGS),
            "name": text("its name"),
            "granularity": number("bytes of the disk for a bit"),
        },
    )
    return record(
        "what qcow2 alone has",
        {
            "compat": word("0.10 is version 2, 1.1 is version 3", ["0.10", "1.1"]),
            "compression-type": _COMPRESSION,
            "refcount-bits": number("width of a refcount"),
        },
        {
            "lazy-refcounts": flag("refcounts are written last"),
            "bitmaps": array("persistent ones", bitmap),
            "data-file": text("the external data file, as the image names it"),
            "data-file-raw": flag("whether that is a raw image of the disk"),
            "encrypt": _encrypt(),
            "corrupt": flag("QEMU has marked it"),
            "extended-l2": flag("L2 entries have subclusters"),
        },
    )


def _encrypt() -> Schema:
    slot = record(
        "a key slot",
        {"active": flag("whether it holds a key"), "key-offset": number("bytes")},
        {"iters": number("iterations"), "stripes": number("stripes")},
    )
    return record(
        "how its data is encrypted",
        {"format": word("by what", [name for name in CRYPT_NAMES.values() if name != "none"])},
        {
            "ivgen-alg": text("how initialization vectors are made"),
            "ivgen-hash-alg": text("the hash for that"),
            "hash-alg": text("the hash of keys"),
            "cipher-alg": text("the cipher"),
            "cipher-mode": text("its mode"),
            "uuid": text("of the LUKS header"),
            "slots": array("key slots", slot),
            "payload-offset": number("bytes"),
            "master-key-iters": number("iterations"),
        },
    )


# ---- header ----


def header() -> Schema:
    """Every field and extension."""
    feature = record(
        "a bit that is set",
        {
            "bit": number("which", most=63),
            "known": flag("whether it has a meaning here"),
            "name": maybe(text("its name, if there is one")),
        },
    )
    kinds = ("incompatible", "compatible", "autoclear")
    features = record("by kind", {kind: array("bits", feature) for kind in kinds})
    fields = {"header": _fields(), "features": features}
    whole = record(
        "the header",
        {
            **fields,
            "extensions": array("those that follow it", _extension()),
            "backing_file": maybe(text("the backing file, as the image names it")),
        },
    )
    bare = record(
        "a header that makes no sense",
        {"error": text("why"), **image_error(), **fields},
    )
    return either("the header, decoded", whole, bare, _unreadable())


_NUMBERS = (
    "version",
    "backing_file_offset",
    "backing_file_size",
    "cluster_bits",
    "size",
    "crypt_method",
    "l1_size",
    "l1_table_offset",
    "refcount_table_offset",
    "refcount_table_clusters",
    "nb_snapshots",
    "snapshots_offset",
    "refcount_order",
    "header_length",
)
_WORDS = ("incompatible_features", "compatible_features", "autoclear_features")


def header_numbers() -> dict[str, Schema]:
    """Fields of the header that are numbers, by QEMU's names."""
    return {name: number("as the specification says") for name in _NUMBERS}


def _fields() -> Schema:
    bits = {name: matching("bits that are set", "0x[0-9a-f]+") for name in ("magic", *_WORDS)}
    return record(
        "its fields, by the names of the specification",
        {
            **header_numbers(),
            **bits,
            "additional": hexadecimal("what follows byte 104"),
            "crypt_method_name": text("what the number stands for"),
            "compression_type": number("as the specification says"),
            "compression_type_name": text("what the number stands for"),
        },
    )


def _extension() -> Schema:
    feature = record(
        "a name", {"type": number("0, 1 or 2"), "bit": number("which"), "name": text("its name")}
    )
    crypto = {"offset": number("bytes"), "length": number("bytes")}
    bitmaps_pointer = {
        "nb_bitmaps": number("bitmaps"),
        "bitmap_directory_size": number("bytes"),
        "bitmap_directory_offset": number("bytes"),
    }
    value = either(
        "what a known one says",
        {"type": "string"},
        array("names of features", feature),
        record("where the encryption header is", crypto),
        record("where bitmaps are", bitmaps_pointer),
    )
    return record(
        "a header extension",
        {
            "type": matching("its number", "0x[0-9a-f]{8}"),
            "name": text("what the number stands for"),
            "offset": number("in the image file, bytes"),
            "length": number("bytes"),
        },
        {"value": value, "data": hexadecimal("what an unknown one holds")},
    )


# ---- map, chain, bitmaps ----


def guest_map() -> Schema:
    """The keys of `qemu-img map`."""
    row = record(
        "neighbouring bytes of the disk that are read alike",
        {
            "start": number("on the guest's disk, bytes"),
            "length": number("bytes"),
            "depth": number("which file of the chain; 0: the image"),
            "present": flag("whether any file has them"),
            "zero": flag("whether they read as zeros"),
            "data": flag("whether they are data in a file"),
            "compressed": flag("whether they are compressed"),
        },
        {
            "offset": number("in that file, bytes"),
            "damaged": text("why they cannot be read"),
            "unknown": text("why it is not known where they are"),
        },
    )
    return either("where the disk is read from", array("in order", row), _unreadable())


def chain() -> Schema:
    """Files that the image names."""
    member = record(
        "one of them",
        {
            "depth": number("0: the image names it"),
            "role": word("what for", list(Role)),
            "name": text("as it is named"),
            "format": maybe(text("as it is named")),
            "path": maybe(text("where it would be, or is")),
            "opened": flag("whether it is read"),
        },
        {"reason": text("why it is not")},
    )
    files = record("what became of each", {"members": array("from the image on", member)})
    return either("files that the image names", files, _unreadable())


def bitmaps() -> Schema:
    """Persistent bitmaps."""
    bitmap = record(
        "one of them",
        {
            "name": text("its name"),
            "granularity": number("bytes of the disk for a bit"),
            "flags": words("what is set", _BITMAP_FLAGS),
            "in-use": flag("marked as being changed"),
            "inconsistent": flag("it was never saved: QEMU does not use it"),
            "dirty-bytes": maybe(number("what it says was written, bytes")),
            "data-clusters": number("clusters of its bits"),
            "table-offset": number("in the image file, bytes"),
            "table-entries": number("entries"),
            "errors": array("what is wrong with it", text("a sentence")),
        },
    )
    return record(
        "persistent bitmaps",
        {
            "bitmaps": array("each of them", bitmap),
            "errors": array("what is wrong with all", text("a sentence")),
        },
        {"stale": flag("a program that does not know them has written: they are void")},
    )
