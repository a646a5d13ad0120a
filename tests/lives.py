"""What the state machines share: the images whose lives they live, and how many lives there are."""

import contextlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from planner.errors import ImageError
from tests.cached import check_bytes
from tests.images.builder import Image as Made
from tests.images.builder import ImageBuilder
from tests.images.damage import DAMAGES, CannotDamageError

STEPS = 20
LARGEST = 4 << 20
"""Bytes of a disk that is still damaged on purpose, and of a file that is still read: changed words
may make either very large."""

SHAPES: tuple[Mapping[str, int], ...] = (
    {},
    {"version": 2},
    {"refcount_order": 3},
    {"cluster_bits": 12, "size": 3 << 20},
)


def made(shape: Mapping[str, int]) -> bytes:
    """Two L2 tables, a snapshot, compressed clusters, and free clusters between them."""
    rng = random.Random(1)
    options: dict[str, Any] = {"cluster_bits": 9, "size": 200 << 9, **shape}
    builder = ImageBuilder(**options)
    size = builder.geometry.cluster_size
    builder.write(0, rng.randbytes(6 * size))
    builder.write_compressed(9, b"x" * size)
    builder.take_snapshot("before")
    builder.skip(3)
    builder.write(2, rng.randbytes(3 * size))
    builder.write(builder.geometry.l2_entries, rng.randbytes(2 * size))
    builder.skip(4)
    return bytes(builder.build().data)


def damaged(content: bytes, name: str, seed: int) -> bytes:
    """The image with one damage more; as it was, where it is too damaged for this one."""
    image = Made(bytearray(content))
    if check_bytes(content).error is not None or image.header.size > LARGEST:
        return content  # what places the damage looks at every cluster of the disk
    try:
        DAMAGES[name](image, random.Random(seed))
    except (CannotDamageError, ImageError, LookupError, ValueError, ArithmeticError):
        return content
    return bytes(image.data)


def lives(count: int) -> settings:
    """*count* lives, at least a few."""
    return settings(
        max_examples=max(5, count),
        stateful_step_count=STEPS,
        suppress_health_check=list(HealthCheck),
    )


def open_below(directory: str) -> list[str]:
    """What this process has open in *directory*, itself included; a name for each descriptor."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            found.append(str(descriptor.readlink()))
    return sorted(name for name in found if name.startswith(directory))
