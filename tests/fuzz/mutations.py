"""Mutations of tables: words as an image could have them, at places where they matter."""

from __future__ import annotations

import random

# What the words of qcow2's tables are made of: flags, offsets of clusters, counts at their limits.
_FLAGS = (0, 1, 1 << 63, 1 << 62, 3 << 62, 1 << 56, 0x1FE)
_EXTREMES = (0, 1, 0xFF, 0xFFFF, 0xFFFF_FFFF, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
_UNITS = (512, 512, 4096, 65536, 1)

HEADER = 112
SHORTEST = 16


def mutate_words(data: bytes, rng: random.Random) -> bytes:
    """*data* with one to four words changed; fewer than 16 bytes stay as they are."""
    changed = bytearray(data)
    if len(data) < SHORTEST:
        return data
    for _ in range(rng.choice((1, 1, 2, 4))):
        width = rng.choice((8, 8, 8, 4, 2))
        end = min(HEADER, len(changed)) if rng.random() < 0.3 else len(changed)
        at = rng.randrange(end // width) * width
        changed[at : at + width] = _word(rng, changed, width)
    return bytes(changed)


def _word(rng: random.Random, data: bytearray, width: int) -> bytes:
    """A word to put in: one from elsewhere, a limit, a bit, a cluster's offset with flags."""
    match rng.randrange(5):
        case 0:
            at = rng.randrange(len(data) // width) * width
            return bytes(data[at : at + width])
        case 1:
            value = rng.choice(_EXTREMES) + rng.choice((-1, 0, 0, 1))
        case 2:
            value = 1 << rng.randrange(8 * width)
        case _:
            unit = rng.choice(_UNITS)
            value = rng.choice(_FLAGS) | rng.randrange(len(data) // unit + 2) * unit
    return (value & ((1 << 8 * width) - 1)).to_bytes(width, "big")
