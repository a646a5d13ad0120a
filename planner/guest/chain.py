"""The files that an image names, backing and data files: which there are, and what speaks against
opening one.

Judged by the name alone; nothing is looked up here. Source: docs/interop/qcow2.txt, "Backing file
name", "External data file name"; path_combine and path_has_protocol for what a name means to QEMU.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_DEPTH = 64
"""Members of a chain, the image itself not counted."""


class Role(StrEnum):
    """What an image needs another file for."""

    BACKING = "backing"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Named:
    """A file that an image names: its role, the name as stored, and its format as stored.

    The format of a data file is always ``raw``; None where the image does not say.
    """

    role: Role
    name: bytes
    format: bytes | None


@dataclass(frozen=True, slots=True)
class Member:
    """What became of a file that a member of the chain names.

    ``depth``: of the member that names it, 0 for the image. ``path``: what the name leads to,
    where it leads anywhere. ``refusal``: why it was not opened, or cannot be read; None where it
    is read.
    """

    depth: int
    named: Named
    path: str | None
    refusal: str | None


FORMATS = (b"raw", b"qcow2")
"""Formats of backing files that can be read."""


def has_protocol(name: bytes) -> bool:
    """Whether QEMU takes *name* for more than a path: ``nbd://…``, ``json:{…}``."""
    return b":" in name.partition(b"/")[0]


def refusal_of(named: Named) -> str | None:
    """Why a file is not opened, whatever is there; None where nothing is wrong with its name."""
    if not named.name:
        return "the image does not name it"
    if has_protocol(named.name):
        return "its name has a protocol; only plain paths are followed"
    if b"\0" in named.name:
        return "there is a zero byte in its name"
    if not named.format:
        return "the image does not say which format it has, and formats are not guessed"
    if named.format not in FORMATS:
        return "its format is neither raw nor qcow2"
    return None


def full_name(image: bytes, name: bytes) -> bytes:
    """The path that QEMU opens for *name* in *image*: beside it, unless it is absolute."""
    if has_protocol(name) or name.startswith(b"/"):
        return name
    return image[: image.rfind(b"/") + 1] + name
