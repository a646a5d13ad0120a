"""Named kinds of damage, for every structure that a check looks at.

A kind is a function of a scene and a seeded generator that changes some bytes and says what it did,
or gives None where the image has nothing of the sort. `KINDS` lists them all by name. Nothing here
knows what a check should make of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.qcow2.entries import (
    BITMAP_OFFSET,
    BITMAP_RESERVED,
    COMPRESSED,
    COPIED,
    L1_OFFSET,
    L1_RESERVED,
    L2_OFFSET,
    L2_RESERVED,
    REFTABLE_OFFSET,
    REFTABLE_RESERVED,
    ZERO,
    compressed_offset_mask,
    compressed_sectors_mask,
)
from tests.oracle.scene import Scene, Table

Damage = Callable[[Scene, random.Random], str | None]
WORD = (1 << 64) - 1
SIGN = 1 << 63


@dataclass(frozen=True, slots=True)
class Kind:
    """One named kind; a heavier one is chosen more often."""

    name: str
    weight: float
    inflict: Damage


KINDS: dict[str, Kind] = {}


def _add(name: str, weight: float, inflict: Damage) -> None:
    assert name not in KINDS
    KINDS[name] = Kind(name, weight, inflict)


def _kind(name: str, weight: float = 1.0) -> Callable[[Damage], Damage]:
    def register(inflict: Damage) -> Damage:
        _add(name, weight, inflict)
        return inflict

    return register


def inflict_some(scene: Scene, rng: random.Random) -> list[str]:
    """One to three kinds of damage; what was done, a line each."""
    names = list(KINDS)
    weights = [KINDS[name].weight for name in names]
    done: list[str] = []
    wanted = rng.choice((1, 1, 2, 2, 3))
    while len(done) < wanted:
        (name,) = rng.choices(names, weights)
        what = KINDS[name].inflict(scene, rng)
        if what is not None:
            done.append(f"{name}: {what}")
    return done


# --- table entries ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Words:
    """A sort of table: its masks, and where its entries are."""

    name: str
    offset_mask: int
    reserved_mask: int
    tables: Callable[[Scene], Sequence[Table]]

    def pick(self, scene: Scene, rng: random.Random) -> int | None:
        """File offset of an entry; mostly of one in use."""
        tables = [table for table in self.tables(scene) if table.count]
        if not tables:
            return None
        table = rng.choice(tables)
        width = table.width
        if rng.random() < 0.85:
            limit = min(table.count * width, scene.cluster)
            raw = scene.read(table.offset, limit)
            used = [at for at in range(0, limit, width) if any(raw[at : at + width])]
            if used:
                return table.offset + rng.choice(used)
        return table.offset + rng.randrange(table.count) * width


L1 = Words("l1", L1_OFFSET, L1_RESERVED, lambda scene: [scene.at.l1])
L2 = Words("l2", L2_OFFSET, L2_RESERVED, lambda scene: scene.at.l2)
SNAPSHOT_L1 = Words("snapshot-l1", L1_OFFSET, L1_RESERVED, lambda scene: scene.at.snapshot_l1)
SNAPSHOT_L2 = Words("snapshot-l2", L2_OFFSET, L2_RESERVED, lambda scene: scene.at.snapshot_l2)
REFTABLE = Words("reftable", REFTABLE_OFFSET, REFTABLE_RESERVED, lambda scene: [scene.at.reftable])
BITMAP_TABLE = Words(
    "bitmap-table", BITMAP_OFFSET, BITMAP_RESERVED, lambda scene: scene.at.bitmap_tables
)

Change = Callable[[Scene, random.Random, Words, int], int]


def _any_bit(rng: random.Random, mask: int) -> int:
    return rng.choice([1 << bit for bit in range(64) if mask >> bit & 1])


def _with_offset(words: Words, word: int, offset: int) -> int:
    return word & ~words.offset_mask | offset & words.offset_mask


def _reserved(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    return word | _any_bit(rng, words.reserved_mask)


def _misaligned(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    return word ^ rng.randrange(512, max(1024, scene.cluster), 512)


def _past_end(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    end = -(-scene.size // scene.cluster) * scene.cluster
    far = rng.choice((0, 1, 2, 100, 1 << 20)) * scene.cluster
    return _with_offset(words, word, end + far)


def _near_end(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    return _with_offset(words, word, max(0, scene.size - rng.randrange(2 * scene.cluster)))


def _huge(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    bit = rng.choice([1 << bit for bit in range(40, 64) if words.offset_mask >> bit & 1])
    near_top = (WORD - rng.randrange(1 << 31)) // scene.cluster * scene.cluster
    return _with_offset(words, word, rng.choice((bit, near_top, near_top & ~SIGN)))


def _twin(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    other = words.pick(scene, rng)
    assert other is not None
    return scene.get(other)


def _elsewhere(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    return _with_offset(words, word, _some_cluster(scene, rng))


def _some_cluster(scene: Scene, rng: random.Random) -> int:
    """A cluster of some structure, or any cluster of the file."""
    anywhere = rng.randrange(scene.size // scene.cluster + 1) * scene.cluster
    return rng.choice([*map(rng.choice, scene.at.owners.values()), anywhere])


CHANGES: dict[str, Change] = {
    "zeroed": lambda scene, rng, words, word: 0,
    "reserved-bit": _reserved,
    "misaligned": _misaligned,
    "past-end": _past_end,
    "near-end": _near_end,
    "huge": _huge,
    "twin": _twin,
    "elsewhere": _elsewhere,
    "flags-only": lambda scene, rng, words, word: rng.choice((COPIED, word & ~words.offset_mask)),
    "flipped-bit": lambda scene, rng, words, word: word ^ 1 << rng.randrange(64),
    "random": lambda scene, rng, words, word: rng.getrandbits(64),
}
GUEST_CHANGES: dict[str, Change] = {
    "copied-flipped": lambda scene, rng, words, word: word ^ COPIED,
}


def _change_entry(words: Words, change: Change) -> Damage:
    def inflict(scene: Scene, rng: random.Random) -> str | None:
        at = words.pick(scene, rng)
        if at is None:
            return None
        before = scene.get(at)
        after = change(scene, rng, words, before) & WORD
        scene.put(at, after)
        return f"at {at}: {before:#x} -> {after:#x}"

    return inflict


def _register_entries() -> None:
    weights = {
        L1: 1.0,
        L2: 1.0,
        SNAPSHOT_L1: 0.6,
        SNAPSHOT_L2: 0.6,
        REFTABLE: 0.7,
        BITMAP_TABLE: 0.4,
    }
    for words, weight in weights.items():
        changes = CHANGES | (GUEST_CHANGES if words.offset_mask == L1_OFFSET else {})
        for name, change in changes.items():
            _add(f"{words.name}-{name}", weight, _change_entry(words, change))


_register_entries()


# --- L2 entries of every type ----------------------------------------------------------------


def _descriptor(scene: Scene, rng: random.Random, offset: int) -> int:
    """A compressed cluster descriptor with a random number of sectors."""
    geometry = scene.at.geometry
    sectors = rng.choice((0, 1, WORD, rng.getrandbits(64)))
    sectors = sectors << geometry.compressed_shift & compressed_sectors_mask(geometry)
    return COMPRESSED | sectors | offset & compressed_offset_mask(geometry)


def _compressed(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    return _descriptor(scene, rng, rng.randrange(scene.size))


def _compressed_past_end(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    near = scene.size + rng.randrange(-scene.cluster, scene.cluster)
    return _descriptor(scene, rng, rng.choice((near, near, rng.getrandbits(62))))


def _zero_allocated(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    return word | ZERO


def _zero_misaligned(scene: Scene, rng: random.Random, words: Words, word: int) -> int:
    return _misaligned(scene, rng, words, word) & ~COMPRESSED | ZERO


TYPE_CHANGES: dict[str, Change] = {
    "compressed": _compressed,
    "compressed-copied": lambda *args: _compressed(*args) | COPIED,
    "compressed-past-end": _compressed_past_end,
    "compressed-flag": lambda scene, rng, words, word: word ^ COMPRESSED,
    "zero-flag": lambda scene, rng, words, word: word ^ ZERO,
    "zero-plain": lambda scene, rng, words, word: ZERO | rng.choice((0, COPIED)),
    "zero-allocated": _zero_allocated,
    "zero-allocated-misaligned": _zero_misaligned,
}
for _name, _change in TYPE_CHANGES.items():
    _add(f"l2-{_name}", 1.0, _change_entry(L2, _change))
    _add(f"snapshot-l2-{_name}", 0.3, _change_entry(SNAPSHOT_L2, _change))


def _change_subclusters(change: Callable[[random.Random, int], int]) -> Damage:
    def inflict(scene: Scene, rng: random.Random) -> str | None:
        at = L2.pick(scene, rng)
        if at is None or not scene.at.geometry.extended_l2:
            return None
        before = scene.get(at + 8)
        after = change(rng, before) & WORD
        scene.put(at + 8, after)
        return f"of the entry at {at}: {before:#x} -> {after:#x}"

    return inflict


SUBCLUSTER_CHANGES: dict[str, Callable[[random.Random, int], int]] = {
    "zeroed": lambda rng, bits: 0,
    "allocated": lambda rng, bits: bits | 1 << rng.randrange(32),
    "reads-zero": lambda rng, bits: bits | 1 << rng.randrange(32, 64),
    "both": lambda rng, bits: bits | 0x1_0000_0001 << rng.randrange(32),
    "random": lambda rng, bits: rng.getrandbits(64),
    "all-zero": lambda rng, bits: 0xFFFF_FFFF << 32,
    "all-set": lambda rng, bits: WORD,
}
for _name, _subclusters in SUBCLUSTER_CHANGES.items():
    _add(f"subclusters-{_name}", 2.0, _change_subclusters(_subclusters))


# --- stored refcounts ------------------------------------------------------------------------


def _change_refcount(change: Callable[[random.Random, int, int], int]) -> Damage:
    def inflict(scene: Scene, rng: random.Random) -> str | None:
        geometry = scene.at.geometry
        bits = geometry.refcount_bits
        index = rng.randrange(scene.size // scene.cluster + 1)
        slot, within = divmod(index, geometry.refblock_entries)
        block = scene.get(scene.at.reftable.offset + slot * 8) & REFTABLE_OFFSET
        if slot >= scene.at.reftable.count or not 0 < block < scene.size:
            return None
        width = max(1, bits // 8)
        at, shift = block + within * bits // 8, within * bits % 8
        mask = geometry.refcount_max << shift
        word = scene.get(at, width)
        before = (word & mask) >> shift
        after = change(rng, before, geometry.refcount_max) & geometry.refcount_max
        scene.put(at, word & ~mask | after << shift, width)
        return f"of cluster {index}: {before} -> {after}"

    return inflict


REFCOUNT_CHANGES: dict[str, Callable[[random.Random, int, int], int]] = {
    "raised": lambda rng, count, most: min(most, count + rng.choice((1, 1, 2))),
    "lowered": lambda rng, count, most: max(0, count - 1),
    "zeroed": lambda rng, count, most: 0,
    "highest": lambda rng, count, most: most,
    "random": lambda rng, count, most: rng.randint(0, most),
}
for _name, _refcount in REFCOUNT_CHANGES.items():
    _add(f"refcount-{_name}", 2.0, _change_refcount(_refcount))


@_kind("refblock-zeroed")
def _refblock_zeroed(scene: Scene, rng: random.Random) -> str | None:
    at = rng.choice(scene.at.refblocks)
    scene.write(at, bytes(scene.cluster))
    return f"at {at}"


@_kind("refblock-garbage", 0.5)
def _refblock_garbage(scene: Scene, rng: random.Random) -> str | None:
    at = rng.choice(scene.at.refblocks)
    scene.write(at, rng.randbytes(scene.cluster))
    return f"at {at}"


@_kind("refblock-stretch")
def _refblock_stretch(scene: Scene, rng: random.Random) -> str | None:
    at = rng.choice(scene.at.refblocks)
    start = rng.randrange(min(scene.cluster, 256))
    stretch = rng.choice((bytes, rng.randbytes))(rng.randrange(1, 32))
    scene.write(at + start, stretch[: scene.cluster - start])
    return f"{len(stretch)} bytes at {at + start}"


# --- the header ------------------------------------------------------------------------------

MAX_U32 = (1 << 32) - 1
HEADER_FIELDS = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
}

Value = Callable[[Scene, random.Random, int], int]


def _offsets(scene: Scene, rng: random.Random, value: int) -> int:
    """What a table offset in the header or an entry may be changed to."""
    cluster = scene.cluster
    end = -(-scene.size // cluster) * cluster
    around = (value + cluster, value - cluster, value ^ 512, value + 1, 0)
    beyond = (end, end + cluster, end - cluster, scene.size, 1 << 40, 1 << 56, 1 << 62)
    top = (SIGN - cluster, SIGN - (1 << 30), SIGN - (1 << 31), SIGN, WORD - cluster + 1, WORD)
    return rng.choice([*around, *beyond, *top, *(_some_cluster(scene, rng) for _ in range(12))])


def _counts(*more: int) -> Value:
    """What a small count or size may be changed to."""

    def value(scene: Scene, rng: random.Random, value: int) -> int:
        near = (value + 1, value - 1, value + rng.randrange(2, 20), value * 2, 0, 1)
        return max(0, rng.choice([*near, *near, *more]))

    return value


def _one_of(*values: int) -> Value:
    return lambda scene, rng, value: rng.choice(values)


def _virtual_size(scene: Scene, rng: random.Random, value: int) -> int:
    cluster = scene.cluster
    near = [value + delta for delta in (1, -1, 511, 512, -512, cluster, -cluster, 3 * cluster)]
    coverage = scene.at.geometry.l2_coverage
    edges = [scene.at.l1.count * coverage, scene.at.l1.count * coverage + 1, 0, 1, 511, 513]
    return max(0, rng.choice([*near, *edges, value // 2, 1 << 40, 1 << 56, 1 << 62, SIGN, WORD]))


def _flip(*bits: int) -> Value:
    return lambda scene, rng, value: value ^ 1 << rng.choice(bits)


HEADER_VALUES: dict[str, tuple[float, Value]] = {
    "magic": (0.1, _one_of(0, 0x514649FA, 0x514649FB00, 0x4D4D4D4D)),
    "version": (0.4, _one_of(0, 1, 2, 3, 4, MAX_U32)),
    "backing_file_offset": (0.4, _offsets),
    "backing_file_size": (0.3, _counts(1023, 1024, MAX_U32)),
    "cluster_bits": (0.5, _one_of(0, 8, 9, 10, 12, 14, 16, 20, 21, 22, 64, MAX_U32)),
    "size": (1.0, _virtual_size),
    "crypt_method": (0.2, _one_of(0, 1, 2, 3, MAX_U32)),
    "l1_size": (1.0, _counts(1 << 22, (1 << 22) + 1, 1 << 16, MAX_U32)),
    "l1_table_offset": (1.0, _offsets),
    "refcount_table_offset": (1.0, _offsets),
    "refcount_table_clusters": (0.8, _counts(1 << 14, 1 << 15, MAX_U32)),
    "nb_snapshots": (1.0, _counts(1000, 65536, 65537, MAX_U32)),
    "snapshots_offset": (0.8, _offsets),
    "incompatible_features": (0.5, _flip(0, 1, 2, 3, 4, 5, 63)),
    "dirty-and-corrupt": (1.0, lambda scene, rng, value: value | rng.choice((1, 2, 3))),
    "compatible_features": (0.2, _flip(0, 1, 2, 63)),
    "autoclear_features": (0.6, _flip(0, 0, 1, 2, 63)),
    "refcount_order": (0.7, _one_of(0, 1, 2, 3, 4, 5, 6, 7, 64, MAX_U32)),
    "header_length": (0.4, _one_of(0, 72, 103, 104, 105, 111, 112, 120, 512, 513, 1 << 21)),
    "compression_type": (0.3, _one_of(0, 1, 2, 255)),
}


def _change_header(field: str, value: Value) -> Damage:
    def inflict(scene: Scene, rng: random.Random) -> str | None:
        at, width = HEADER_FIELDS[field]
        if at >= 72 and scene.at.header.version < 3:
            return None
        before = scene.get(at, width)
        after = value(scene, rng, before) & ((1 << 8 * width) - 1)
        scene.put(at, after, width)
        return f"{before:#x} -> {after:#x}"

    return inflict


for _name, (_weight, _value) in HEADER_VALUES.items():
    _field = "incompatible_features" if _name == "dirty-and-corrupt" else _name
    _add(f"header-{_name}", _weight, _change_header(_field, _value))


# --- header extensions -----------------------------------------------------------------------


@_kind("extension-length", 0.5)
def _extension_length(scene: Scene, rng: random.Random) -> str | None:
    if not scene.at.extensions:
        return None
    at = rng.choice(scene.at.extensions).offset - 4
    before = scene.get(at, 4)
    after = rng.choice((0, 8, 16, 24, before + 1, before + 8, scene.cluster, MAX_U32))
    scene.put(at, after, 4)
    return f"at {at}: {before} -> {after}"


@_kind("extension-type", 0.5)
def _extension_type(scene: Scene, rng: random.Random) -> str | None:
    if not scene.at.extensions:
        return None
    at = rng.choice(scene.at.extensions).offset - 8
    known = (0, 0xE2792ACA, 0x6803F857, 0x0537BE77, 0x23852875, 0x44415441, 0x12345678)
    after = rng.choice(known)
    scene.put(at, after, 4)
    return f"at {at}: {after:#x}"


@_kind("extension-added", 0.4)
def _extension_added(scene: Scene, rng: random.Random) -> str | None:
    """In front of the others, which it swallows or pushes out of sight."""
    at = scene.at.extension_area
    length = rng.choice((0, 3, 16, 24, 48, scene.cluster - at - 8, scene.cluster - at - 7))
    kind = rng.choice((0, 0xE2792ACA, 0x0537BE77, 0x23852875, 0xDEADBEEF))
    scene.put(at, kind, 4)
    scene.put(at + 4, length, 4)
    return f"{kind:#x}, {length} bytes"


CRYPTO_VALUES: dict[str, tuple[int, Value]] = {
    # The region must still hold a LUKS header, or QEMU cannot open it: so only its end moves.
    "crypto-length": (8, lambda scene, rng, value: value + rng.choice((1, 512, 4096, 1 << 40))),
    "crypto-length-negative": (8, lambda scene, rng, value: value | SIGN),
    "crypto-offset": (0, lambda scene, rng, value: value + 512),
}


def _change_crypto(shift: int, value: Value) -> Damage:
    def inflict(scene: Scene, rng: random.Random) -> str | None:
        start = scene.at.crypto_extension
        if start is None:
            return None
        before = scene.get(start + shift)
        after = value(scene, rng, before)
        scene.put(start + shift, after)
        return f"{before:#x} -> {after:#x}"

    return inflict


for _name, (_shift, _value) in CRYPTO_VALUES.items():
    _add(_name, 1.0, _change_crypto(_shift, _value))


# --- records: snapshot table, bitmap directory, bitmaps extension -----------------------------


def _change_record(
    starts: Callable[[Scene], Sequence[int]], at: int, width: int, value: Value
) -> Damage:
    def inflict(scene: Scene, rng: random.Random) -> str | None:
        records = starts(scene)
        if not records:
            return None
        place = rng.choice(records) + at
        before = scene.get(place, width)
        after = value(scene, rng, before) & ((1 << 8 * width) - 1)
        scene.put(place, after, width)
        return f"at {place}: {before:#x} -> {after:#x}"

    return inflict


SNAPSHOT_VALUES: dict[str, tuple[int, int, Value]] = {
    "l1-offset": (0, 8, _offsets),
    "l1-size": (8, 4, _counts(1 << 22, (1 << 22) + 1, MAX_U32)),
    "id-size": (12, 2, _counts(0xFFFF)),
    "name-size": (14, 2, _counts(0xFFFF)),
    "vm-state-size": (32, 4, _counts(MAX_U32)),
    "extra-data-size": (36, 4, _one_of(0, 8, 15, 16, 17, 24, 25, 1024, 1025, MAX_U32)),
    "disk-size": (48, 8, _virtual_size),
}
for _name, (_shift, _width, _value) in SNAPSHOT_VALUES.items():
    _add(
        f"snapshot-{_name}",
        1.0,
        _change_record(
            lambda scene: [snap.offset for snap in scene.at.snapshots], _shift, _width, _value
        ),
    )

BITMAP_VALUES: dict[str, tuple[int, int, Value]] = {
    "table-offset": (0, 8, _offsets),
    "table-size": (8, 4, _counts(1 << 16, MAX_U32)),
    "flags": (12, 4, _flip(0, 0, 0, 1, 2, 3, 31)),
    "type": (16, 1, _one_of(0, 2, 255)),
    "granularity": (17, 1, _one_of(0, 8, 9, 10, 16, 31, 32, 255)),
    "name-size": (18, 2, _counts(1023, 1024, 0xFFFF)),
    "extra-data-size": (20, 4, _one_of(1, 4, 8, MAX_U32)),
}
for _name, (_shift, _width, _value) in BITMAP_VALUES.items():
    _add(
        f"bitmap-{_name}",
        0.5,
        _change_record(
            lambda scene: [bitmap.offset for bitmap in scene.at.bitmaps], _shift, _width, _value
        ),
    )


@_kind("bitmap-in-use", 1.5)
def _bitmap_in_use(scene: Scene, rng: random.Random) -> str | None:
    """QEMU loads a bitmap that is not in use before it checks; only the others reach the check."""
    if not scene.at.bitmaps:
        return None
    for bitmap in scene.at.bitmaps:
        scene.put(bitmap.offset + 12, scene.get(bitmap.offset + 12, 4) | 1, 4)
    words = _change_entry(BITMAP_TABLE, rng.choice([*CHANGES.values()]))
    return f"all, and {words(scene, rng)}"


BITMAPS_EXTENSION_VALUES: dict[str, tuple[int, int, Value]] = {
    "count": (0, 4, _counts(65535, 65536, MAX_U32)),
    "reserved": (4, 4, _one_of(1, MAX_U32)),
    "directory-size": (8, 8, _counts(8, 24, 65535 * 1024, 65535 * 1024 + 8, 64 << 20, SIGN)),
    "directory-offset": (16, 8, _offsets),
}
for _name, (_shift, _width, _value) in BITMAPS_EXTENSION_VALUES.items():
    _add(
        f"bitmaps-{_name}",
        0.5,
        _change_record(
            lambda scene: [at] if (at := scene.at.bitmaps_extension) else [], _shift, _width, _value
        ),
    )


# --- the file ---------------------------------------------------------------------------------


@_kind("cut-short", 2.0)
def _cut_short(scene: Scene, rng: random.Random) -> str | None:
    before = scene.size
    scene.resize(rng.randrange(before // 2, before))
    return f"{before} -> {scene.size}"


@_kind("cut-near-end", 2.0)
def _cut_near_end(scene: Scene, rng: random.Random) -> str | None:
    before = scene.size
    less = rng.choice((1, 511, 512, 513, scene.cluster - 1, scene.cluster, scene.cluster + 1))
    scene.resize(max(before // 2, before - less))
    return f"{before} -> {scene.size}"


@_kind("grown", 1.5)
def _grown(scene: Scene, rng: random.Random) -> str | None:
    before = scene.size
    scene.resize(before + rng.choice((1, 511, 512, scene.cluster, 5 * scene.cluster + 3)))
    return f"{before} -> {scene.size}"


@_kind("grown-far", 0.4)
def _grown_far(scene: Scene, rng: random.Random) -> str | None:
    """So large that one counter a cluster is dear, with entries that lead far into the hole."""
    if scene.cluster > 4096:
        return None
    clusters = (1 << 24) + rng.randrange(1 << 20)
    scene.resize(clusters * scene.cluster - rng.choice((0, 1, 512)))
    changed = []
    for words in rng.sample((L1, L2, SNAPSHOT_L1, SNAPSHOT_L2, REFTABLE, BITMAP_TABLE), 3):
        at = words.pick(scene, rng)
        if at is not None:
            offset = rng.randrange(clusters) * scene.cluster + rng.choice((0, 0, 0, 512))
            scene.put(at, _with_offset(words, scene.get(at), offset))
            changed.append(f"{words.name} at {at}")
    return f"to {scene.size}, {', '.join(changed)}"


@_kind("garbage-appended")
def _garbage_appended(scene: Scene, rng: random.Random) -> str | None:
    before = scene.size
    scene.write(before, rng.randbytes(rng.randrange(1, 3 * min(scene.cluster, 1 << 16))))
    return f"{before} -> {scene.size}"


# --- whole clusters of metadata ---------------------------------------------------------------


def _metadata_cluster(scene: Scene, rng: random.Random) -> tuple[str, int]:
    owner = rng.choice(list(scene.at.owners))
    return owner, rng.choice(scene.at.owners[owner])


@_kind("bits-flipped", 3.0)
def _bits_flipped(scene: Scene, rng: random.Random) -> str | None:
    owner, cluster = _metadata_cluster(scene, rng)
    flipped = []
    for _ in range(rng.randint(1, 4)):
        at = cluster + rng.randrange(min(scene.cluster, rng.choice((64, 256, 4096))))
        bit = rng.randrange(8)
        scene.put(at, scene.get(at, 1) ^ 1 << bit, 1)
        flipped.append(f"{at}.{bit}")
    return f"{owner}: {' '.join(flipped)}"


@_kind("sector-garbage", 0.5)
def _sector_garbage(scene: Scene, rng: random.Random) -> str | None:
    owner, cluster = _metadata_cluster(scene, rng)
    if owner == "header":
        return None
    at = cluster + rng.randrange(scene.cluster // 512) * 512
    scene.write(at, rng.randbytes(512))
    return f"{owner}: {at}"


@_kind("sector-zeroed", 0.5)
def _sector_zeroed(scene: Scene, rng: random.Random) -> str | None:
    owner, cluster = _metadata_cluster(scene, rng)
    if owner == "header":
        return None
    scene.write(cluster, bytes(512))
    return f"{owner}: {cluster}"


@_kind("cluster-overwritten", 0.7)
def _cluster_overwritten(scene: Scene, rng: random.Random) -> str | None:
    owner, target = _metadata_cluster(scene, rng)
    source = _some_cluster(scene, rng)
    if owner == "header":
        return None
    scene.write(target, scene.read(source, min(scene.cluster, 1 << 16)))
    return f"{owner} at {target} by what is at {source}"


@_kind("l2-garbage", 0.5)
def _l2_garbage(scene: Scene, rng: random.Random) -> str | None:
    if not scene.at.l2:
        return None
    at = rng.choice(scene.at.l2).offset
    scene.write(at, rng.randbytes(min(scene.cluster, 1 << 14)))
    return f"at {at}"


@_kind("l2-wiped", 1.0)
def _l2_wiped(scene: Scene, rng: random.Random) -> str | None:
    """A whole table, or several, of nothing but zeros."""
    if not scene.at.l2:
        return None
    wiped = sorted({rng.choice(scene.at.l2).offset for _ in range(rng.choice((1, 1, 2, 5)))})
    for at in wiped:
        scene.write(at, bytes(scene.cluster))
    return f"at {' '.join(map(str, wiped))}"


@_kind("l2-text", 0.5)
def _l2_text(scene: Scene, rng: random.Random) -> str | None:
    """Somebody's log over a table, or over a part of it."""
    if not scene.at.l2:
        return None
    at, length = rng.choice(scene.at.l2).offset, rng.choice((512, 4096, scene.cluster))
    line = b"2024-03-01 host5 app[4607]: request 0cce98ce timeout\n"
    scene.write(at, (line * (scene.cluster // len(line) + 1))[: min(length, scene.cluster)])
    return f"{length} bytes at {at}"


@_kind("l1-wiped", 0.5)
def _l1_wiped(scene: Scene, rng: random.Random) -> str | None:
    """The active L1 table is empty, or its first entries are."""
    table = scene.at.l1
    if not table.count:
        return None
    count = rng.choice((1, table.count))
    scene.write(table.offset, bytes(8 * count))
    return f"{count} entries at {table.offset}"
