"""A rule of the check: a damaged image, the findings that it gives, and QEMU's counters for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from planner.findings.kinds import ACTIVE, FindingKind
from planner.qcow2 import entries
from tests.images.builder import Image, ImageBuilder

CLUSTER_BITS = 12
SIZE = 1 << CLUSTER_BITS
WIDTH = SIZE // 8
"""Guest clusters that an L2 table of these images maps."""

COVERAGE = WIDTH * SIZE
COPIED = 1 << 63
COMPRESSED = 1 << 62


@dataclass(frozen=True)
class Expected:
    """One finding: its kind, and the columns that are worth stating."""

    kind: FindingKind
    columns: dict[str, int]


def finding(kind: FindingKind, **columns: int) -> Expected:
    return Expected(kind, columns)


@dataclass(frozen=True)
class Rule:
    """*image* must give exactly *findings*; the counters are those of ``qemu-img check``."""

    image: Image
    findings: list[Expected]
    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    needs_rebuild: bool = False
    complete: bool = True
    counters: dict[str, int] = field(default_factory=dict)


RULES: dict[str, Callable[[], Rule]] = {}


def rule(function: Callable[[], Rule]) -> Callable[[], Rule]:
    """Register a rule under its function's name; the docstring is the rule."""
    RULES[function.__name__] = function
    return function


def builder(**options: object) -> ImageBuilder:
    """4 KiB clusters, and a disk that needs two L2 tables."""
    return ImageBuilder(**{"cluster_bits": CLUSTER_BITS, "size": 2 * COVERAGE, **options})  # type: ignore[arg-type]


def extended(**options: object) -> ImageBuilder:
    """16 KiB clusters with extended L2 entries, and a disk that needs two L2 tables."""
    return builder(cluster_bits=14, extended_l2=True, size=1 << 25, **options)


def fill(made: ImageBuilder) -> ImageBuilder:
    """Guest clusters 0, 1, 2 and 5, one in the second L2 table, and a free host cluster.

    Host clusters: 0 header, 1 guest 0, 2 L2 table 0, 3 to 5 guest 1, 2 and 5, 6 and 7 the second L2
    table's data and the table, 8 free.
    """
    for cluster in (0, 1, 2, 5, made.geometry.l2_entries):
        made.write(cluster, bytes([cluster % 251 + 1]) * made.geometry.cluster_size)
    made.skip()
    return made


def plain(**options: object) -> Image:
    return fill(builder(**options)).build()


def with_snapshot(**options: object) -> Image:
    """A snapshot of `fill`, and guest cluster 5 written again after it."""
    made = fill(builder(**options))
    made.take_snapshot("before")
    made.write(5, b"d" * SIZE)
    return made.build()


def move_to_end(image: Image, word_at: int) -> int:
    """Move the one cluster that the word at *word_at* leads to behind all others; returns where."""
    size, end = image.cluster_size, len(image.data)
    word = image.word(word_at)
    old = word & entries.L2_OFFSET & ~(size - 1)
    image.data += image.data[old : old + size]
    image.set_word(word_at, word & ~entries.L2_OFFSET | end)
    image.set_refcount(old // size, 0)
    image.set_refcount(end // size, 1)
    return end


def free_cluster(image: Image) -> int:
    return image.refcounts().index(0)


def in_guest(cluster: int, image: Image) -> dict[str, int]:
    """The columns of a finding about the L2 entry of a guest cluster of the active disk."""
    l1_index, l2_index = divmod(cluster, image.geometry.l2_entries)
    return {
        "snapshot": ACTIVE,
        "l1_index": l1_index,
        "l2_index": l2_index,
        "host_offset": image.l2_at(cluster),
        "length": image.geometry.l2_entry_size,
        "guest_offset": cluster * image.cluster_size,
        "guest_length": image.cluster_size,
    }


def of_l1(l1_index: int, image: Image) -> dict[str, int]:
    """The columns of a finding about an L1 entry of the active disk."""
    return {
        "snapshot": ACTIVE,
        "l1_index": l1_index,
        "host_offset": image.l1_at(l1_index),
        "length": 8,
        "guest_offset": l1_index * image.geometry.l2_coverage,
        "guest_length": image.geometry.l2_coverage,
    }


def at_cluster(cluster: int, count: int = 1) -> dict[str, int]:
    """The columns of a finding about a run of host clusters."""
    return {"host_offset": cluster * SIZE, "length": count * SIZE, "count": count}


def leak(cluster: int, count: int = 1, *, found: int = 1, expected: int = 0) -> Expected:
    """A run of host clusters with a refcount above the number of references."""
    return finding(FindingKind.LEAK, **at_cluster(cluster, count), found=found, expected=expected)


def low(cluster: int, count: int = 1, *, found: int = 1, expected: int = 2) -> Expected:
    """A run of host clusters with a refcount below the number of references, but not 0."""
    columns = at_cluster(cluster, count)
    return finding(FindingKind.REFCOUNT_LOW, **columns, found=found, expected=expected)


def missing(cluster: int, count: int = 1, *, expected: int = 1) -> Expected:
    """A run of host clusters that are used and have refcount 0."""
    columns = at_cluster(cluster, count)
    return finding(FindingKind.REFCOUNT_MISSING, **columns, found=0, expected=expected)


def contested(cluster: int, **columns: int) -> Expected:
    """A host cluster with two owners."""
    return finding(
        FindingKind.MULTIPLE_OWNERS,
        host_offset=cluster * SIZE,
        length=SIZE,
        **columns,
        found=2,
        expected=1,
    )
