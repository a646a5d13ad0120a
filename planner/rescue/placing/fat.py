"""FAT: the first entry of a directory is itself, and says in which cluster it begins."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.guestfs.columns import little
from planner.guestfs.fat.filesystem import Fat
from planner.guestfs.fat.volume import FIRST
from planner.rescue.placing.claims import Claims, Piece, Sort, Spotted
from planner.rescue.placing.sites import Site
from planner.rescue.placing.votes import Evidence, Votes

ENTRY = 32
ITSELF, ABOVE = b".          \x10", b"..         \x10"
"""Names, padded, and the attribute of a directory."""


def spot(piece: Piece) -> Iterator[Spotted]:
    """The claims of first clusters of directories."""
    flat = piece.flat
    at = piece.marked(ITSELF, 0)
    if not len(at):
        return
    at = at[at + 2 * ENTRY <= len(flat)]
    above = np.frombuffer(ABOVE, dtype=np.uint8)
    at = at[(flat[at[:, None] + ENTRY + np.arange(len(above))] == above).all(axis=1)]
    if len(at):
        own, parent = (
            little(flat, at + place + 26, 2) | little(flat, at + place + 20, 2) << 16
            for place in (0, ENTRY)
        )
        yield Sort.FAT_DIRECTORY, at, own, parent


def weigh(site: Site, claims: Claims) -> Iterator[Votes]:
    """Votes by a FAT of which a boot sector is known."""
    filesystem = site.filesystem
    if not isinstance(filesystem, Fat):
        return
    volume = filesystem.volume
    claims = claims.of(Sort.FAT_DIRECTORY)
    number = claims.key if volume.bits == 32 else claims.key & 0xFFFF
    known = (number >= FIRST) & (number < FIRST + volume.clusters) & (not volume.is_exfat)
    offset = np.where(known, volume.heap + (number - FIRST) * volume.cluster_size, -1)
    yield site.votes(Evidence.SELF_ADDRESS, claims, np.arange(len(claims)), offset)
