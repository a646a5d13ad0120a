"""Named ways to break an image that `tests.images.builder` built: `DAMAGES`."""

from __future__ import annotations

import random
from collections.abc import Callable

from planner.qcow2 import entries
from planner.qcow2.header import (
    Autoclear,
    Incompatible,
)
from tests.images.builder import Image


class CannotDamageError(Exception):
    """The image has nothing that this damage could befall."""


Damage = Callable[[Image, random.Random], str]
"""Breaks an image in one way and says in a few words what it did."""

DAMAGES: dict[str, Damage] = {}


def damage(function: Damage) -> Damage:
    """Register a damage under its name, with dashes; its docstring says what it is."""
    DAMAGES[function.__name__.replace("_", "-")] = function
    return function


def _pick(image: Image, rng: random.Random, *, shared: bool = False, least: int = 1) -> int:
    """A guest cluster of the active disk whose host cluster a snapshot shares, or nobody does.

    Of *least* such clusters.
    """
    found = []
    for l1_index in range(image.header.l1_size):
        for cluster in image.mapped(l1_index):
            at = image.l2_at(cluster)
            if bool(image.word(at) & entries.COPIED) is not shared:
                found.append(cluster)
    if len(found) < least:
        raise CannotDamageError("no guest cluster is left for it")
    return rng.choice(found)


def _last_l1_index(image: Image) -> int:
    for l1_index in reversed(range(image.header.l1_size)):
        if image.mapped(l1_index):
            return l1_index
    raise CannotDamageError("no L2 table is left for it")


def _guest(image: Image, cluster: int) -> str:
    return f"guest offset {cluster * image.cluster_size}"


@damage
def leaked_clusters(image: Image, _rng: random.Random) -> str:
    """free clusters are counted as used, in several runs"""
    free = [cluster for cluster, count in enumerate(image.refcounts()) if not count]
    if not free:
        raise CannotDamageError("the file has no free cluster")
    for cluster in free:
        image.set_refcount(cluster, 1)
    return f"{len(free)} clusters that nothing refers to"


@damage
def lost_l2_table(image: Image, _rng: random.Random) -> str:
    """an L1 entry is zeroed: its L2 table and all that it maps are leaked"""
    l1_index = _last_l1_index(image)
    image.set_word(image.l1_at(l1_index), 0)
    return f"L1 entry {l1_index}"


@damage
def low_refcount(image: Image, rng: random.Random) -> str:
    """a cluster that a snapshot shares is counted as used once"""
    cluster = _pick(image, rng, shared=True)
    image.set_refcount(image.host_offset(cluster) // image.cluster_size, 1)
    return _guest(image, cluster)


@damage
def missing_refcount(image: Image, rng: random.Random) -> str:
    """a used cluster is counted as free"""
    cluster = _pick(image, rng)
    image.set_refcount(image.host_offset(cluster) // image.cluster_size, 0)
    return _guest(image, cluster)


@damage
def wrong_copied(image: Image, rng: random.Random) -> str:
    """an L2 entry claims that a cluster is not shared although a snapshot shares it"""
    cluster = _pick(image, rng, shared=True)
    image.set_bits(image.l2_at(cluster), entries.COPIED)
    return _guest(image, cluster)


@damage
def shared_cluster(image: Image, rng: random.Random) -> str:
    """two guest clusters are mapped to one host cluster"""
    kept, lost = _pick(image, rng, least=2), _pick(image, rng)
    while kept == lost:
        lost = _pick(image, rng)
    image.set_word(image.l2_at(lost), image.word(image.l2_at(kept)))
    return f"{_guest(image, lost)} and {_guest(image, kept)}"


@damage
def guest_on_metadata(image: Image, rng: random.Random) -> str:
    """a guest cluster is mapped to a live L2 table"""
    cluster = _pick(image, rng)
    table = image.l2_table(cluster // image.geometry.l2_entries)
    image.set_word(image.l2_at(cluster), table | entries.COPIED)
    return _guest(image, cluster)


@damage
def data_past_end(image: Image, rng: random.Random) -> str:
    """a guest cluster is mapped past the end of the file"""
    cluster = _pick(image, rng)
    past = (image.host_clusters + 16) * image.cluster_size
    image.set_word(image.l2_at(cluster), past | entries.COPIED)
    return _guest(image, cluster)


@damage
def data_misaligned(image: Image, rng: random.Random) -> str:
    """a guest cluster is mapped to an offset that is not cluster aligned"""
    cluster = _pick(image, rng)
    if image.cluster_size == 512:
        raise CannotDamageError("512-byte clusters are always aligned")
    image.set_bits(image.l2_at(cluster), 512)
    return _guest(image, cluster)


@damage
def reserved_l1_bits(image: Image, _rng: random.Random) -> str:
    """reserved bits are set in an L1 entry"""
    l1_index = _last_l1_index(image)
    image.set_bits(image.l1_at(l1_index), 1 << 60 | 1)
    return f"L1 entry {l1_index}"


@damage
def reserved_l2_bits(image: Image, rng: random.Random) -> str:
    """a reserved bit is set in an L2 entry"""
    cluster = _pick(image, rng)
    image.set_bits(image.l2_at(cluster), 1 << 61)
    return _guest(image, cluster)


@damage
def lost_snapshot(image: Image, _rng: random.Random) -> str:
    """the header counts one snapshot fewer: what only the last one holds is leaked"""
    if not image.header.nb_snapshots:
        raise CannotDamageError("the image has no snapshot")
    image.change_header(nb_snapshots=image.header.nb_snapshots - 1)
    return f"{image.header.nb_snapshots} snapshots are left"


@damage
def snapshot_l1_misaligned(image: Image, _rng: random.Random) -> str:
    """the offset of a snapshot's L1 table is not cluster aligned"""
    if not image.header.nb_snapshots:
        raise CannotDamageError("the image has no snapshot")
    image.set_bits(image.snapshots[0].offset, 8)
    return "snapshot 0"


@damage
def bad_bitmap_entry(image: Image, _rng: random.Random) -> str:
    """reserved bits are set in an entry of a bitmap table"""
    if not image.bitmaps:
        raise CannotDamageError("the image has no bitmap")
    image.set_bits(image.bitmaps[0].bitmap_table_offset, 1 << 60)
    return "bitmap 0, entry 0"


@damage
def stale_bitmaps(image: Image, _rng: random.Random) -> str:
    """a program without support for bitmaps has written to the image"""
    features = image.header.autoclear_features & ~Autoclear.BITMAPS
    image.change_header(autoclear_features=features)
    return "the autoclear bit is off"


@damage
def lost_refblock(image: Image, _rng: random.Random) -> str:
    """a refcount table entry is zeroed: its clusters count as free"""
    image.set_word(image.reftable_at(0), 0)
    return "refcount table entry 0"


@damage
def corrupt_bit(image: Image, _rng: random.Random) -> str:
    """the image is marked corrupt"""
    features = image.header.incompatible_features | Incompatible.CORRUPT
    image.change_header(incompatible_features=features)
    return "the incompatible bit is on"


@damage
def dirty_bit(image: Image, _rng: random.Random) -> str:
    """the image was not closed properly"""
    features = image.header.incompatible_features | Incompatible.DIRTY
    image.change_header(incompatible_features=features)
    return "the incompatible bit is on"


@damage
def cut_short(image: Image, _rng: random.Random) -> str:
    """the last eighth of the file is missing"""
    del image.data[len(image.data) * 7 // 8 // 512 * 512 :]
    return f"{len(image.data)} bytes are left"


TELLING = ["leaked-clusters", "lost-l2-table", "low-refcount", "wrong-copied", "shared-cluster"]
"""The damages of the sample image: what a crash, a bad write and a bug leave behind."""
