"""The files that one image is read from: itself, and what it names as far as that is followed.

Which of them are opened, and what is made of them, is decided here; whether a path may be opened
is `instarfs.guest.follow`'s business, and how bytes are read that of `instarfs.guest.disk`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instarfs.guest.disk import Beneath, HostFile, Missing, Qcow2Layer, RawLayer
from instarfs.guest.follow import Follow, NotOpened, beside
from instarfs.image.file import Image
from planner.errors import ImageError
from planner.guest.chain import MAX_DEPTH, Member, Named, Role, refusal_of
from planner.qcow2.geometry import SECTOR
from planner.qcow2.header import CRYPT_NAMES, CRYPT_NONE
from planner.qcow2.layout import Layout


@dataclass(frozen=True, slots=True)
class Chain:
    """The image's disk, what became of the files that it needs, and those that are open."""

    disk: Qcow2Layer
    members: tuple[Member, ...]
    images: tuple[Image, ...]


def open_chain(image: Image, layout: Layout, follow: Follow, *, strict: bool = False) -> Chain:
    """Open what *image* needs, as far as that is to be followed. Never fails: see `Member`.

    *strict*: what is past the end of a file, or in a table that cannot be read, is damaged.
    """
    opener = _Opener(image, follow, strict=strict)
    disk = opener.layer(image, opener.path, layout, 0)
    return Chain(disk, tuple(opener.members), tuple(opener.images))


def backing_files(
    image: Image, layout: Layout, follow: Follow
) -> Iterator[tuple[Named, Image | Missing]]:
    """The backing files below *image*, the nearest first, up to one that is not opened, or raw.

    What is in them is not judged: where one cannot be read, neither is what it names.
    """
    opener = _Opener(image, follow)
    holder = opener.path
    for depth in range(MAX_DEPTH + 1):
        named = named_backing(layout)
        if named is None:
            return
        opened = opener.open(named, holder, depth)
        yield named, opened
        if isinstance(opened, Missing) or named.format == b"raw":
            return
        try:
            layout, holder = Layout.read(opened.source()), opened.path
        except ImageError:
            return


def named_backing(layout: Layout) -> Named | None:
    """The backing file that an image names."""
    if not layout.backing_file:
        return None
    return Named(Role.BACKING, layout.backing_file, layout.extensions.backing_format)


def named_data_file(layout: Layout) -> Named | None:
    """The data file that an image names."""
    if not layout.geometry.external_data:
        return None
    return Named(Role.DATA, layout.extensions.data_file or b"", b"raw")


class _Opener:
    """Walks down a chain."""

    def __init__(self, image: Image, follow: Follow, *, strict: bool = False) -> None:
        self._follow, self._strict = follow, strict
        self.path = str(_real_directory(image) / image.name)
        self.members: list[Member] = []
        self.images: list[Image] = []
        self._seen = {_identity(image)}

    def layer(self, image: Image, path: str, layout: Layout, depth: int) -> Qcow2Layer:
        """The disk of the member *image*, which stands at *path*, no link in its directory."""
        file = HostFile(image)
        data: HostFile | Missing = file
        named = named_data_file(layout)
        if named is not None:
            opened = self.open(named, path, depth)
            data = HostFile(opened) if isinstance(opened, Image) else opened
            self._note(named, depth, opened)
        header = layout.header
        backing = self._backing(layout, path, depth)
        beneath = Beneath(file, data, backing, layout, strict=self._strict)
        mapping = beneath.mapping(header.l1_table_offset, header.l1_size)
        return Qcow2Layer(beneath, mapping, header.size // SECTOR * SECTOR)

    def _backing(
        self, layout: Layout, path: str, depth: int
    ) -> RawLayer | Qcow2Layer | Missing | None:
        named = named_backing(layout)
        if named is None:
            return None
        opened = self.open(named, path, depth)
        if not isinstance(opened, Image) or named.format == b"raw":
            self._note(named, depth, opened)
            return RawLayer(HostFile(opened)) if isinstance(opened, Image) else opened
        try:
            beneath = Layout.read(opened.source())
            _require_plain(beneath)
        except ImageError as error:
            missing = Missing(_shown(named), str(error))
            self._note(named, depth, missing)
            return missing
        self._note(named, depth, opened)
        return self.layer(opened, opened.path, beneath, depth + 1)

    def open(self, named: Named, holder: str, depth: int) -> Image | Missing:
        """What *named* leads to from the member at *holder*."""
        refusal = refusal_of(named)
        if depth >= MAX_DEPTH:
            refusal = f"the chain is more than {MAX_DEPTH} members deep"
        if refusal is None:
            try:
                image = self._follow.open(beside(holder, os.fsdecode(named.name)))
            except NotOpened as error:
                refusal = str(error)
            else:
                if _identity(image) not in self._seen:
                    self._seen.add(_identity(image))
                    return image
                refusal = "it is in the chain already"
        return Missing(_shown(named), refusal)

    def _note(self, named: Named, depth: int, opened: Image | Missing) -> None:
        if isinstance(opened, Image):
            self.images.append(opened)
            self.members.append(Member(depth, named, opened.path, None))
        else:
            self.members.append(Member(depth, named, None, opened.refusal))


def _real_directory(image: Image) -> Path:
    """Where its directory really is: a ``..`` in a name counts from there."""
    try:
        return Path(f"/proc/self/fd/{image.directory}").readlink()
    except FileNotFoundError:  # no /proc: what its path says now
        return Path(image.path).parent.resolve()


def _require_plain(layout: Layout) -> None:
    method = layout.header.crypt_method
    if method != CRYPT_NONE:
        raise ImageError("crypt_method", method, f"it is encrypted ({CRYPT_NAMES[method]})")


def _shown(named: Named) -> str:
    return os.fsdecode(named.name)


def _identity(image: Image) -> tuple[int, int]:
    status = image.status()
    return status.st_dev, status.st_ino
