"""Sizes and shifts that follow from the header. What does arithmetic takes this, not a header."""

from __future__ import annotations

from dataclasses import dataclass

SECTOR = 512
SUBCLUSTERS_PER_CLUSTER = 32


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of an image. All sizes in bytes."""

    version: int
    cluster_bits: int
    refcount_order: int
    virtual_size: int
    extended_l2: bool = False
    external_data: bool = False

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l2_entry_size(self) -> int:
        """8, or 16 with extended L2 entries."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table, which is one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def l2_coverage(self) -> int:
        """Guest bytes that one L2 table maps."""
        return self.l2_entries << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def refcount_max(self) -> int:
        return (1 << self.refcount_bits) - 1

    @property
    def refblock_entries(self) -> int:
        """Refcounts in one refcount block, which is one cluster."""
        return self.cluster_size * 8 >> self.refcount_order

    @property
    def l1_entries_needed(self) -> int:
        return -(-self.virtual_size // self.l2_coverage)

    @property
    def guest_clusters(self) -> int:
        """Guest clusters of the virtual size, which QEMU rounds down to whole sectors."""
        return -(-(self.virtual_size // SECTOR * SECTOR) // self.cluster_size)

    @property
    def compressed_shift(self) -> int:
        """Bits of a compressed cluster descriptor that hold its host offset (spec: x)."""
        return 62 - (self.cluster_bits - 8)
