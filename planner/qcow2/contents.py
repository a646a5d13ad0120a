"""All that an image says of itself without its tables: layout, snapshots, bitmaps, LUKS header.

For showing, not for counting: beyond the layout each part is read on its own, and what stops one
of them is kept beside the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from planner.errors import ImageError, as_value
from planner.qcow2.bitmaps import Bitmap, BitmapEntries, read_bitmaps
from planner.qcow2.layout import Layout
from planner.qcow2.luks import LuksHeader, read_luks
from planner.qcow2.snapshots import Snapshots, read_reachable_snapshots
from planner.source import Source

_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True)
class Contents:
    """The layout and the parts that could be read; ``errors``: why not, for each of the others.

    Of a snapshot table that cannot be read, its first entries are there too.
    """

    layout: Layout
    snapshots: Snapshots = field(default_factory=Snapshots)
    bitmaps: Sequence[Bitmap] = ()
    luks: LuksHeader | None = None
    errors: tuple[tuple[str, ImageError], ...] = ()

    @classmethod
    def read(cls, source: Source) -> Contents:
        """Raises `ImageError` where there is no layout; any other part ends up in ``errors``."""
        layout = Layout.read(source)
        errors: list[tuple[str, ImageError]] = []

        def attempt(part: str, read: Callable[[], _Part]) -> _Part | None:
            try:
                return read()
            except ImageError as error:
                errors.append((part, as_value(error)))
                return None

        header, geometry = layout.header, layout.geometry
        table, error = read_reachable_snapshots(source, header, geometry)
        if error is not None:
            errors.append(("snapshots", error))
        bitmaps: BitmapEntries | None = None
        if pointer := layout.extensions.bitmaps:
            bitmaps = attempt("bitmaps", lambda: read_bitmaps(source, pointer, geometry))
        luks: LuksHeader | None = None
        if crypto := layout.extensions.crypto:
            luks = attempt("encrypt", lambda: read_luks(source, crypto))
        return cls(layout, table.snapshots, bitmaps or (), luks, tuple(errors))
