"""Small damaged images whose repair writes something: every planner, every stage, every shape.

Those of the check's rules that a tier repairs, and wider ones whose repairs take many sectors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from planner.errors import RepairError
from planner.qcow2 import entries
from planner.qcow2.refcounts import pack_refcounts
from planner.repair.choices import choices_for
from planner.repair.plan import DETERMINED, RepairTier
from planner.repair.tiers import Proposal
from tests.cached import check_bytes, propose_bytes
from tests.images.builder import Image, ImageBuilder
from tests.images.corpus import RULES
from tests.images.damage import DAMAGES, CannotDamageError


@dataclass(frozen=True, slots=True)
class Case:
    """A damaged image and the tier that repairs it."""

    name: str
    content: bytes
    tier: RepairTier

    @property
    def proposal(self) -> Proposal:
        return propose_bytes(self.content, self.tier)


def _wide(**options: object) -> Image:
    """Small clusters, many tables: a repair has something to write in many sectors."""
    shape = {"cluster_bits": 9, "size": 4 << 20} | options
    builder, rng = ImageBuilder(**shape), random.Random(1)  # type: ignore[arg-type]
    size, per_table = builder.geometry.cluster_size, builder.geometry.l2_entries
    has_snapshots = not builder.geometry.external_data and builder.geometry.refcount_max > 1
    tables = 10 if size < 4096 else 6
    for table in range(tables):
        builder.write(table * per_table, rng.randbytes(10 * size))
        builder.write_zeros(table * per_table + 11)
        builder.write_zeros(table * per_table + 12, allocated=True)
        builder.skip(12)
    if has_snapshots:
        builder.take_snapshot("one", extra_data=b"" if options.get("version") == 2 else None)
        for table in range(0, tables, 2):
            builder.write(table * per_table + 2, rng.randbytes(3 * size))
    builder.skip(20)
    return builder.build()


SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "version 2": {"version": 2},
    "refcounts of 1 bit": {"refcount_order": 0},
    "refcounts of 2 bits": {"refcount_order": 1},
    "refcounts of 8 bits": {"refcount_order": 3},
    "refcounts of 64 bits": {"refcount_order": 6},
    "extended L2": {"cluster_bits": 14, "extended_l2": True, "size": 128 << 20},
    "data file": {"data_file": b"data.raw"},
}


def _l1_flags(image: Image) -> list[tuple[int, int]]:
    """(place, host offset) of the active L1 entries, whose flag may be set."""
    header = image.header
    places = [header.l1_table_offset + 8 * index for index in range(header.l1_size)]
    return [(at, image.word(at) & entries.L1_OFFSET) for at in places if image.word(at)]


def _l2_flags(image: Image) -> list[tuple[int, int]]:
    """(place, host offset) of the active L2 entries, whose flag may be set."""
    size, wide = image.cluster_size, image.geometry.l2_entry_size
    places = [at for _, table in _l1_flags(image) for at in range(table, table + size, wide)]
    words = [(at, image.word(at)) for at in places]
    return [
        (at, word & entries.L2_OFFSET)
        for at, word in words
        if word & entries.L2_OFFSET and not word & entries.COMPRESSED
    ]


def _set_refcounts(image: Image, refcounts: list[int]) -> None:
    geometry = image.geometry
    for first in range(0, len(refcounts), geometry.refblock_entries):
        part = np.zeros(geometry.refblock_entries, dtype=np.uint64)
        block = refcounts[first : first + len(part)]
        part[: len(block)] = block
        at = image.refblock(first // len(part))
        packed = pack_refcounts(part, geometry.refcount_order).tobytes()
        image.data[at : at + len(packed)] = packed


def leaks_everywhere(image: Image) -> None:
    """Every free cluster leaks, and where the width allows it many others, COPIED gone with it."""
    most, refcounts = image.geometry.refcount_max, image.refcounts()
    for cluster, count in enumerate(refcounts):
        if cluster and count < most and (count == 0 or cluster % 3 == 0):
            refcounts[cluster] = count + 1
    _set_refcounts(image, refcounts)
    inside = [] if image.geometry.external_data else _l2_flags(image)
    for place, host in [*_l1_flags(image), *inside]:
        if refcounts[host // image.cluster_size] != 1:
            image.clear_bits(place, entries.COPIED)


def refcounts_everywhere(image: Image) -> None:
    """Refcounts are too low, too high and missing."""
    most, refcounts = image.geometry.refcount_max, image.refcounts()
    for cluster in range(5, len(refcounts), 5):
        refcounts[cluster] = 0 if refcounts[cluster] else min(2, most)
    _set_refcounts(image, refcounts)


def copied_everywhere(image: Image) -> None:
    """COPIED is wrong in every L1 and L2 entry."""
    for place, _ in [*_l1_flags(image), *_l2_flags(image)]:
        image.set_word(place, image.word(place) ^ entries.COPIED)


def no_refcounts(image: Image) -> None:
    """The refcount table is empty: all must be made anew."""
    start = image.header.refcount_table_offset
    length = image.header.refcount_table_clusters * image.cluster_size
    image.data[start : start + length] = bytes(length)


def leaks_and_autoclear(image: Image) -> None:
    """Leaks, and bits in the header that no repair may leave."""
    leaks_everywhere(image)
    image.change_header(autoclear_features=image.header.autoclear_features | 1 << 63)


def everything(image: Image) -> None:
    """Wrong refcounts, wrong flags, and a refcount block that is gone."""
    refcounts_everywhere(image)
    copied_everywhere(image)
    image.set_word(image.reftable_at(0), 0)


def astray(image: Image) -> None:
    """The refcount table leads to no block, the file must not grow, and refcounts are wrong."""
    image.set_refcount(image.l2_table(1) // image.cluster_size, 0)
    image.set_refcount(image.host_clusters - 2, min(2, image.geometry.refcount_max))
    past = (image.host_clusters + 9) * image.cluster_size
    image.set_word(image.l2_at(20), past | entries.COPIED)
    image.set_word(image.reftable_at(0), 1 << 63)


DAMAGE_TO_MANY: dict[str, Callable[[Image], None]] = {
    "leaks": leaks_everywhere,
    "leaks and autoclear": leaks_and_autoclear,
    "refcounts": refcounts_everywhere,
    "copied": copied_everywhere,
    "rebuild": no_refcounts,
    "everything": everything,
    "refcount table astray": astray,
}


GROUPS = ("rules", "damages", *SHAPES)


@cache
def cases(group: str) -> tuple[Case, ...]:
    """The cases of a group, one of `GROUPS`; each has a plan that changes something."""
    makers = {"rules": _rules, "damages": _damages}
    made = makers[group]() if group in makers else _shaped(group)
    return tuple(case for case in made if _writes_something(case))


def _rules() -> Iterator[Case]:
    for name, make in RULES.items():
        content = bytes(make().image.data)
        yield Case(name, content, RepairTier.ALL)
        for tier in choices_for(check_bytes(content)):
            yield Case(f"{name}, {tier}", content, tier)


def _shaped(shape: str) -> Iterator[Case]:
    whole = _wide(**SHAPES[shape])
    for name, wound in DAMAGE_TO_MANY.items():
        image = Image(bytearray(whole.data))
        if name == "leaks and autoclear" and image.header.version < 3:
            continue
        wound(image)
        for tier in DETERMINED if name.startswith("leaks") else (RepairTier.ALL,):
            yield Case(f"{shape}, {name}, {tier}", bytes(image.data), tier)


def _damages() -> Iterator[Case]:
    small = _small()
    for name, function in DAMAGES.items():
        image = Image(bytearray(small.data))
        try:
            function(image, random.Random(1))
        except CannotDamageError:
            continue
        for tier in RepairTier:
            yield Case(f"{name}, {tier}", bytes(image.data), tier)


def _small() -> Image:
    """A snapshot, writes after it, and a bitmap."""
    builder, rng = ImageBuilder(cluster_bits=12, size=3 << 20), random.Random(1)
    builder.write(0, rng.randbytes(8 << 12))
    builder.write_compressed(9, b"x" * 4096)
    builder.take_snapshot("before")
    builder.skip(3)
    builder.write(2, rng.randbytes(4 << 12))
    builder.write(builder.geometry.l2_entries, rng.randbytes(3 << 12))
    builder.add_bitmap("monday", {3, 4})
    builder.skip(4)
    return builder.build()


def _writes_something(case: Case) -> bool:
    try:
        return not case.proposal.plan.changes_nothing
    except RepairError:
        return False
