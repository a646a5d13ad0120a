"""What can be found in an image: the closed list of kinds, and findings in columns.

Nothing is decided here and nothing rendered. A finding is a row of numpy columns, never an object
of its own until somebody reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from planner.arrays import I32, I64, U8, U64, GuestOffset, HostOffset, Mask

NONE = -1
"""In a column: does not apply."""

ACTIVE = -2
"""In place of a snapshot's index: the active disk. Below all indices, so that it comes first."""

NOWHERE = -3
"""In place of a snapshot's index: no L1 table is involved."""

UNLISTED = -4
"""In place of a snapshot's index: a snapshot that the snapshot table does not list."""

OWNERS_LIMIT = 64
"""Owners that are told of a finding, at most."""

BATCH_ROWS = 1 << 12
"""Rows of findings that are looked at together where all of them would be too many."""


class Structure(IntEnum):
    """What a host cluster, or a word in it, is part of."""

    HEADER = 0
    L1_TABLE = 1
    L2_TABLE = 2
    DATA = 3
    COMPRESSED = 4
    SNAPSHOT_TABLE = 5
    REFTABLE = 6
    REFBLOCK = 7
    LUKS = 8
    BITMAP_DIRECTORY = 9
    BITMAP_TABLE = 10
    BITMAP_DATA = 11
    CLUSTER = 12

    @property
    def label(self) -> str:
        return _STRUCTURES[self]

    @property
    def is_guest(self) -> bool:
        """Holds bytes of a guest disk, rather than metadata."""
        return self in (Structure.DATA, Structure.COMPRESSED)


_STRUCTURES = {
    Structure.HEADER: "header",
    Structure.L1_TABLE: "L1 table",
    Structure.L2_TABLE: "L2 table",
    Structure.DATA: "data cluster",
    Structure.COMPRESSED: "compressed cluster",
    Structure.SNAPSHOT_TABLE: "snapshot table",
    Structure.REFTABLE: "refcount table",
    Structure.REFBLOCK: "refcount block",
    Structure.LUKS: "LUKS header",
    Structure.BITMAP_DIRECTORY: "bitmap directory",
    Structure.BITMAP_TABLE: "bitmap table",
    Structure.BITMAP_DATA: "bitmap data",
    Structure.CLUSTER: "host cluster",
}


class Severity(IntEnum):
    """What a finding counts as; a NOTICE is neither damage nor waste."""

    NOTICE = 0
    LEAK = 1
    CORRUPTION = 2
    CHECK_ERROR = 3

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


class FindingKind(IntEnum):
    """Every kind of thing that a check can find. Closed: each has a row in `KINDS`."""

    CHECK_STOPPED = 0
    REFCOUNT_UNREADABLE = 1
    MULTIPLE_OWNERS = 2
    PAST_END = 3
    REFCOUNT_OVERFLOW = 4
    L1_ENTRY_RESERVED = 5
    L2_TABLE_MISALIGNED = 6
    L2_ENTRY_RESERVED = 7
    DATA_MISALIGNED = 8
    ZERO_MISALIGNED = 9
    COMPRESSED_COPIED = 10
    COMPRESSED_WITH_DATA_FILE = 11
    COMPRESSED_SUBCLUSTERS = 12
    SUBCLUSTER_CONFLICT = 13
    UNALLOCATED_SUBCLUSTERS = 14
    SNAPSHOTS_WITH_DATA_FILE = 15
    SNAPSHOT_L1_MISALIGNED = 16
    SNAPSHOT_L1_TOO_LARGE = 17
    SNAPSHOT_EXTRA_DATA = 18
    BITMAP_DIRECTORY_INVALID = 19
    BITMAP_ENTRY_INVALID = 20
    REFTABLE_ENTRY_RESERVED = 21
    REFBLOCK_MISALIGNED = 22
    REFBLOCK_PAST_END = 23
    REFBLOCK_SHARED = 24
    REFCOUNT_MISSING = 25
    REFCOUNT_LOW = 26
    L1_COPIED = 27
    L2_COPIED = 28
    LEAK = 29
    CORRUPT_BIT = 30
    DIRTY_BIT = 31
    STALE_BITMAPS = 32
    LUKS_HEADER_INVALID = 33
    BEYOND_DISK_END = 34
    TABLE_OVERWRITTEN = 35
    CUT_OFF = 36
    LUKS_HEADER_LENGTH = 37
    UNKNOWN_AUTOCLEAR = 38
    COMPRESSED_UNREADABLE = 39
    ZERO_IN_VERSION_2 = 40
    LUKS_KEY_SLOT_GONE = 41
    LEAK_PAST_END = 42

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class KindInfo:
    """What there is to say of a kind of finding, once for all of them.

    ``found`` and ``expected`` say what those columns hold; ``expected`` is empty where nothing in
    the image determines it. ``tier`` is the repair tier that mends it; where none does, ``left``
    says why, and ``choice`` is the tier by which a person may decide it. ``counted``: whether it is
    in QEMU's counters.
    """

    severity: Severity
    meaning: str
    found: str
    expected: str = ""
    tier: str | None = None
    left: str = ""
    choice: str | None = None
    counted: bool = True


_S = Severity
KINDS: dict[FindingKind, KindInfo] = {
    FindingKind.CHECK_STOPPED: KindInfo(
        _S.CHECK_ERROR,
        "a table cannot be read, so what it refers to is not known",
        "value",
        left="what the table listed is not known",
    ),
    FindingKind.REFCOUNT_UNREADABLE: KindInfo(
        _S.CHECK_ERROR,
        "the refcount cannot be looked up: its refcount block is not where one can be",
        "refcount table entry",
        tier="all",
    ),
    FindingKind.MULTIPLE_OWNERS: KindInfo(
        _S.CORRUPTION,
        "the cluster is used twice for different things: at least one of them reads wrong bytes",
        "owners",
        "1",
        left="the image does not say which owner is right",
        choice="split",
        counted=False,
    ),
    FindingKind.PAST_END: KindInfo(
        _S.CORRUPTION,
        "it lies past the end of the file: its content is lost and reads as zeros",
        "offset",
        left="what was there is not in the file",
    ),
    FindingKind.CUT_OFF: KindInfo(
        _S.CORRUPTION,
        "the end of the file cuts it: what lay past it is lost and reads as zeros",
        "bytes past the end",
        left="what was there is not in the file",
        counted=False,
    ),
    FindingKind.REFCOUNT_OVERFLOW: KindInfo(
        _S.CORRUPTION,
        "more references than the refcount width can hold",
        "references",
        "maximum",
        left="wider refcounts need a new image: export the disk",
    ),
    FindingKind.L1_ENTRY_RESERVED: KindInfo(
        _S.CORRUPTION, "reserved bits are set in an L1 entry", "entry", "entry", tier="all"
    ),
    FindingKind.L2_TABLE_MISALIGNED: KindInfo(
        _S.CORRUPTION,
        "an L1 entry points at an offset that is not cluster aligned: what it maps is unreadable",
        "offset",
        left="the image does not say where the L2 table is",
    ),
    FindingKind.L2_ENTRY_RESERVED: KindInfo(
        _S.CORRUPTION, "reserved bits are set in an L2 entry", "entry", "entry", tier="all"
    ),
    FindingKind.DATA_MISALIGNED: KindInfo(
        _S.CORRUPTION,
        "a data cluster is not cluster aligned: the guest cannot read it",
        "offset",
        left="the image does not say where the data is",
    ),
    FindingKind.ZERO_MISALIGNED: KindInfo(
        _S.CORRUPTION,
        "a preallocated cluster that reads as zeros is not cluster aligned",
        "offset",
        tier="all",
    ),
    FindingKind.COMPRESSED_COPIED: KindInfo(
        _S.CORRUPTION,
        "a compressed cluster has the COPIED flag, which it must not",
        "entry",
        "entry",
        tier="all",
    ),
    FindingKind.COMPRESSED_WITH_DATA_FILE: KindInfo(
        _S.CORRUPTION,
        "a compressed cluster in an image with an external data file",
        "entry",
        left="compressed data cannot be in a data file",
    ),
    FindingKind.COMPRESSED_SUBCLUSTERS: KindInfo(
        _S.CORRUPTION,
        "a compressed cluster has a subcluster bitmap",
        "subcluster bitmap",
        left="either the entry or its bitmap is wrong",
    ),
    FindingKind.COMPRESSED_UNREADABLE: KindInfo(
        _S.CORRUPTION,
        "what is stored of a compressed cluster cannot be read or unpacked",
        "offset",
        left="what was there is not in the file",
        counted=False,
    ),
    FindingKind.SUBCLUSTER_CONFLICT: KindInfo(
        _S.CORRUPTION,
        "a subcluster is marked both as allocated and as zeros",
        "subcluster bitmap",
        left="the image does not say which of the two is right",
    ),
    FindingKind.UNALLOCATED_SUBCLUSTERS: KindInfo(
        _S.CORRUPTION,
        "an unallocated cluster has allocated subclusters",
        "subcluster bitmap",
        left="the image does not say where the subclusters are",
    ),
    FindingKind.SNAPSHOTS_WITH_DATA_FILE: KindInfo(
        _S.CORRUPTION,
        "internal snapshots in an image with an external data file",
        "snapshots",
        "0",
        left="the data file keeps no old clusters",
    ),
    FindingKind.SNAPSHOT_L1_MISALIGNED: KindInfo(
        _S.CORRUPTION,
        "a snapshot's L1 table is not cluster aligned: the snapshot is unreadable",
        "offset",
        left="the image does not say where the L1 table is",
    ),
    FindingKind.SNAPSHOT_L1_TOO_LARGE: KindInfo(
        _S.CORRUPTION,
        "a snapshot's L1 table is larger than any may be: the snapshot is unreadable",
        "entries",
        "at most",
        left="the image does not say how large the L1 table is",
    ),
    FindingKind.SNAPSHOT_EXTRA_DATA: KindInfo(
        _S.CORRUPTION,
        "a snapshot table entry lacks the extra data that version 3 requires",
        "bytes",
        "bytes",
        tier="all",
    ),
    FindingKind.BITMAP_DIRECTORY_INVALID: KindInfo(
        _S.CORRUPTION,
        "the bitmap directory cannot be interpreted, so the clusters of the bitmaps are not known",
        "value",
        left="what the directory listed is not known",
        choice="bitmaps",
    ),
    FindingKind.BITMAP_ENTRY_INVALID: KindInfo(
        _S.CORRUPTION,
        "a bitmap table entry is invalid",
        "entry",
        left="the image does not say where this part of the bitmap is",
        choice="bitmaps",
    ),
    FindingKind.LUKS_HEADER_INVALID: KindInfo(
        _S.CORRUPTION,
        "with this LUKS header no password opens the disk",
        "length",
        left="without its LUKS header the disk cannot be decrypted; keep what is there of it",
        counted=False,
    ),
    FindingKind.LUKS_HEADER_LENGTH: KindInfo(
        _S.CORRUPTION,
        "the LUKS header is longer than the image says: parts of it may look leaked",
        "bytes",
        "at least",
        left="the image does not say which of the two is right",
        counted=False,
    ),
    FindingKind.LUKS_KEY_SLOT_GONE: KindInfo(
        _S.CORRUPTION,
        "the password of this key slot opens the disk no more: its key material was overwritten",
        "sector",
        left="who has another password can set this one anew, with `qemu-img amend`",
        counted=False,
    ),
    FindingKind.REFTABLE_ENTRY_RESERVED: KindInfo(
        _S.CORRUPTION,
        "reserved bits are set in a refcount table entry",
        "entry",
        "entry",
        tier="all",
    ),
    FindingKind.REFBLOCK_MISALIGNED: KindInfo(
        _S.CORRUPTION, "a refcount block is not cluster aligned", "offset", tier="all"
    ),
    FindingKind.REFBLOCK_PAST_END: KindInfo(
        _S.CORRUPTION, "a refcount block lies past the end of the file", "offset", tier="all"
    ),
    FindingKind.REFBLOCK_SHARED: KindInfo(
        _S.CORRUPTION,
        "a refcount block's cluster is used for something else too",
        "references",
        "1",
        tier="all",
    ),
    FindingKind.REFCOUNT_MISSING: KindInfo(
        _S.CORRUPTION,
        "used clusters are counted as free: the next write may overwrite them",
        "refcount",
        "references",
        tier="all",
    ),
    FindingKind.REFCOUNT_LOW: KindInfo(
        _S.CORRUPTION,
        "clusters have more users than their refcount says: they may be freed too early",
        "refcount",
        "references",
        tier="all",
    ),
    FindingKind.L1_COPIED: KindInfo(
        _S.CORRUPTION,
        "the COPIED flag of an L1 entry contradicts the refcount of its L2 table",
        "flag",
        "flag",
        tier="all",
    ),
    FindingKind.L2_COPIED: KindInfo(
        _S.CORRUPTION,
        "the COPIED flag of L2 entries contradicts the refcount of their clusters",
        "flag",
        "flag",
        tier="all",
    ),
    FindingKind.LEAK: KindInfo(
        _S.LEAK,
        "clusters are counted as used and nothing refers to them: wasted space, or something lost",
        "refcount",
        "references",
        tier="leaks",
    ),
    FindingKind.LEAK_PAST_END: KindInfo(
        _S.LEAK,
        "clusters behind the end of the file are counted as used, and a table has no entry that may"
        " have led to them: the file was cut off, or a program ended while it grew",
        "counted clusters",
        left="what was there is not in the file",
        counted=False,
    ),
    FindingKind.CORRUPT_BIT: KindInfo(
        _S.NOTICE,
        "the image is marked corrupt: QEMU opens it read-only",
        "bit",
        "0",
        tier="all",
        counted=False,
    ),
    FindingKind.DIRTY_BIT: KindInfo(
        _S.NOTICE,
        "the image was not closed properly: its refcounts may be out of date",
        "bit",
        "0",
        tier="all",
        counted=False,
    ),
    FindingKind.STALE_BITMAPS: KindInfo(
        _S.NOTICE,
        "a program without support for bitmaps has written to the image: they are void now",
        "bitmaps",
        left="the bitmaps no longer describe the disk",
        choice="bitmaps",
        counted=False,
    ),
    FindingKind.ZERO_IN_VERSION_2: KindInfo(
        _S.CORRUPTION,
        "an entry has the zero flag, which version 2 does not know: the guest cannot read it",
        "entry",
        left="either the flag or the version is wrong",
        counted=False,
    ),
    FindingKind.TABLE_OVERWRITTEN: KindInfo(
        _S.CORRUPTION,
        "something else was written over a table: what it mapped is lost, whatever reads there",
        "content",
        left="what the table held is not in the image any more",
        counted=False,
    ),
    FindingKind.BEYOND_DISK_END: KindInfo(
        _S.NOTICE,
        "guest bytes are mapped beyond the end of the disk, where nobody reads them: it may have"
        " been larger, or a snapshot's machine state was here",
        "bytes",
        left="the image does not say whether its disk was larger",
        counted=False,
    ),
    FindingKind.UNKNOWN_AUTOCLEAR: KindInfo(
        _S.NOTICE,
        "autoclear bits of an unknown meaning are set: a program that does not know them, this one"
        " too, clears them with whatever else it writes",
        "bits",
        left="nothing else is written",
        counted=False,
    ),
}

COLUMNS: dict[str, tuple[type[np.generic], int]] = {
    "kind": (np.uint8, 0),
    "structure": (np.uint8, Structure.CLUSTER),
    "count": (np.int64, 1),
    "host_offset": (np.int64, 0),
    "length": (np.int64, 8),
    "snapshot": (np.int32, NOWHERE),
    "l1_index": (np.int32, NONE),
    "l2_index": (np.int32, NONE),
    "index": (np.int64, NONE),
    "guest_offset": (np.int64, NONE),
    "guest_length": (np.int64, 0),
    "found": (np.uint64, 0),
    "expected": (np.uint64, 0),
}
"""Of `Findings`: the type of each column, and what it holds where nothing is said."""

Numbers = npt.NDArray[Any] | np.integer[Any] | int


class Where(TypedDict, total=False):
    """The place of findings that are added, in columns of `Findings`."""

    structure: Structure
    host_offset: Numbers
    length: Numbers
    snapshot: Numbers
    l1_index: Numbers
    l2_index: Numbers
    index: Numbers


class Columns(Where, total=False):
    """What can be said of findings that are added: the columns of `Findings` other than ``kind``.

    Scalars or arrays that broadcast. What is left out is as `COLUMNS` says.
    """

    count: Numbers
    guest_offset: Numbers
    guest_length: Numbers
    found: Numbers
    expected: Numbers


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of `Findings`, for reading. See there for the units."""

    kind: FindingKind
    structure: Structure
    count: int
    host_offset: HostOffset
    length: int
    snapshot: int
    l1_index: int
    l2_index: int
    index: int
    guest_offset: GuestOffset
    guest_length: int
    found: int
    expected: int

    @property
    def info(self) -> KindInfo:
        return KINDS[self.kind]


@dataclass(frozen=True, slots=True)
class Findings:
    """Findings in columns of equal length.

    ``kind``, ``structure``: uint8, `FindingKind` and `Structure`. ``count``: how often it counts in
    QEMU's counters: the clusters of a run, or how many L1 entries lead to the table it is in.
    ``host_offset``, ``length``: the damaged word or the run of clusters, bytes. ``snapshot``,
    ``l1_index``, ``l2_index``: where the word is; `ACTIVE`, `NOWHERE`, `NONE`. ``index``: of a
    refcount table entry, a snapshot or a bitmap. ``guest_offset``, ``guest_length``: the guest
    bytes it touches; `NONE`. ``found``, ``expected``: as `KINDS` says.
    """

    kind: U8
    structure: U8
    count: I64
    host_offset: I64
    length: I64
    snapshot: I64
    l1_index: I64
    l2_index: I64
    index: I64
    guest_offset: I64
    guest_length: I64
    found: U64
    expected: U64

    def __len__(self) -> int:
        return len(self.kind)

    def select(self, mask: Mask | I64 | slice) -> Findings:
        """The rows where *mask* (bool, one a row) is true, or at these positions."""
        return Findings(*(getattr(self, name)[mask] for name in COLUMNS))

    def rows(self) -> Iterator[Finding]:
        """One object a row; converts a bounded part of the columns at a time."""
        for batch in self.batches():
            part = [getattr(batch, name).tolist() for name in COLUMNS]
            for kind, structure, *rest in zip(*part, strict=True):
                yield Finding(FindingKind(kind), Structure(structure), *rest)

    def batches(self) -> Iterator[Findings]:
        """The rows in their order, at most `BATCH_ROWS` at a time."""
        for start in range(0, len(self), BATCH_ROWS):
            yield self.select(slice(start, start + BATCH_ROWS))


def join_findings(*parts: Findings) -> Findings:
    """All rows of *parts*, in that order; what one of them has alone is not copied."""
    held = [part for part in parts if len(part)]
    if len(held) < 2:
        return (held or parts)[0]
    return Findings(*(np.concatenate([getattr(p, name) for p in held]) for name in COLUMNS))


def make_findings(kind: FindingKind | U8, **columns: Unpack[Columns]) -> Findings:
    """Rows in the order in which they are given. Raises TypeError for a column that is none."""
    refuse_unknown(columns)
    return fill_columns({"kind": kind, **columns})


def refuse_unknown(columns: Mapping[str, object]) -> None:
    """Raise TypeError for a column that is none: what it says would be lost without a word."""
    if not columns.keys() <= COLUMNS.keys():
        unknown = ", ".join(sorted(columns.keys() - COLUMNS.keys()))
        raise TypeError(f"findings have no column {unknown}")


def fill_columns(columns: Mapping[str, object]) -> Findings:
    """Whole columns of those of `COLUMNS` that are given, and the defaults of the others."""
    given = {name: np.asarray(value) for name, value in columns.items()}
    shape = np.broadcast_shapes((1,), *(value.shape for value in given.values()))
    whole = {}
    for name, (dtype, default) in COLUMNS.items():
        value = given.get(name, np.array(default)).astype(dtype, copy=False)
        whole[name] = value if value.shape == shape else np.broadcast_to(value, shape)
    return Findings(**whole)


@cache
def no_findings() -> Findings:
    """Columns without rows."""
    return make_findings(np.zeros(0, dtype=np.uint8))


@dataclass(frozen=True, slots=True)
class Owner:
    """One user of a cluster. ``snapshot``, indices: as in `Findings`."""

    structure: Structure
    snapshot: int
    l1_index: int
    l2_index: int
    index: int


OWNER_DTYPES = (np.int64, np.uint8, np.int32, np.int64, np.int32, np.int32)
"""Of the columns of `Owners`: of a quarter of a million rows there may be several copies."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Who uses the clusters that findings are about; columns, sorted by ``cluster``."""

    cluster: I64
    structure: U8
    snapshot: I32
    l1_index: I64
    l2_index: I32
    index: I32
    truncated: bool = False

    def of(self, first: int, count: int = 1, limit: int = OWNERS_LIMIT) -> list[Owner]:
        """Owners of *count* clusters from *first* on, at most *limit*."""
        low, high = np.searchsorted(self.cluster, [first, first + count])
        high = min(int(high), int(low) + limit)
        columns = (self.structure, self.snapshot, self.l1_index, self.l2_index, self.index)
        rows = zip(*(column[low:high].tolist() for column in columns), strict=True)
        return [Owner(Structure(structure), *rest) for structure, *rest in rows]

    def select(self, which: I64) -> Owners:
        """The rows at these positions."""
        return Owners(
            self.cluster[which],
            self.structure[which],
            self.snapshot[which],
            self.l1_index[which],
            self.l2_index[which],
            self.index[which],
            self.truncated,
        )

    def of_tables_alike(self) -> I64:
        """The clusters all of whose owners are L1 tables, or all L2 tables."""
        if self.truncated or not len(self.cluster):
            return np.zeros(0, dtype=np.int64)
        start = np.flatnonzero(np.append(True, self.cluster[1:] != self.cluster[:-1]))
        lowest = np.minimum.reduceat(self.structure, start)
        alike = lowest == np.maximum.reduceat(self.structure, start)
        alike &= (lowest == Structure.L1_TABLE) | (lowest == Structure.L2_TABLE)
        found: I64 = self.cluster[start[alike]]
        return found


def no_owners() -> Owners:
    """Columns without rows."""
    some, few = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    return Owners(some, few.astype(np.uint8), few, some, few, few)
