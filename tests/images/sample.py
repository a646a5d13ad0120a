"""The sample image: a guest's disk with a snapshot, writes after it, and a bitmap."""

from __future__ import annotations

import random

from tests.images.builder import GIB, MIB, ImageBuilder, feature_name_table


def _log(rng: random.Random, lines: int) -> bytes:
    """Text as a server's log has it."""
    words = ["accepted", "closed", "timeout", "retry", "started", "stopped", "cache miss", "ok"]
    rows = (
        f"2024-03-{1 + n * 28 // lines:02} host{rng.randrange(9)} app[{rng.randrange(9999)}]: "
        f"request {rng.getrandbits(32):08x} {rng.choice(words)}\n"
        for n in range(lines)
    )
    return "".join(rows).encode()


def _boot_sector(size: int) -> bytes:
    """A master boot record with one Linux partition from 1 MiB to the end."""
    first, sectors = MIB // 512, min((size - MIB) // 512, 0xFFFF_FFFF)
    entry = bytes([0x80, 0, 2, 0, 0x83, 0xFE, 0xFF, 0xFF])
    entry += first.to_bytes(4, "little") + sectors.to_bytes(4, "little")
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


def sample(seed: int = 1, size: int = 2 * GIB, cluster_bits: int = 16) -> ImageBuilder:
    """A guest's disk with a few MiB on it, a snapshot, writes after it, and a bitmap."""
    rng = random.Random(seed)
    builder = ImageBuilder(
        size=size, cluster_bits=cluster_bits, more_extensions=(feature_name_table(),)
    )
    if size < 2 * builder.geometry.l2_coverage:
        raise ValueError(f"the disk needs two L2 tables: {2 * builder.geometry.l2_coverage} bytes")
    per_table, one = builder.geometry.l2_entries, builder.geometry.cluster_size
    partition, log_at = max(1, MIB // one), per_table // 2
    upgraded = partition + max(1, MIB // 4 // one)
    builder.write(0, _boot_sector(size))
    builder.write(partition, rng.randbytes(max(2 * one, MIB)))
    builder.write(log_at, _log(rng, 24_576))
    for cluster in range(per_table - 8, per_table):
        builder.write_compressed(cluster, _log(rng, 819)[:one])
    builder.take_snapshot("before upgrade")
    builder.skip(3)
    builder.write(upgraded, rng.randbytes(max(one, MIB // 2)))
    builder.skip(1)
    builder.write(per_table, _log(rng, 12_288))
    builder.skip(5)
    builder.write_zeros(log_at + 2)
    builder.write_zeros(log_at + 3, allocated=True)
    changed = upgraded * one >> 16
    builder.add_bitmap("backup-monday", set(range(changed, changed + 8)))
    builder.skip(2)
    return builder
