"""What a reader of a check wants to know that the check did without: which part of the disk is not
in the image, and which bitmaps no backup can rely on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.guest.allocation import bytes_in_backing_file, bytes_in_data_file
from planner.guest.chain import Member
from planner.qcow2.bitmaps import Bitmap
from planner.qcow2.layout import Layout
from planner.source import Source
from planner.views.bitmap_state import unsaved_bitmaps


@dataclass(frozen=True, slots=True)
class Beside:
    """``members``: what became of the files that the image names, and those that they name.

    ``in_backing_file``: bytes of the active disk that are read from the one that it names, or past
    its end. ``in_data_file``: those that are read from the data file. ``unsaved``: bitmaps that are
    marked as in use.
    """

    members: tuple[Member, ...] = ()
    in_backing_file: int = 0
    in_data_file: int = 0
    unsaved: Sequence[Bitmap] = ()


def look_beside(source: Source, layout: Layout, members: tuple[Member, ...]) -> Beside:
    """Raises whatever *source* raises."""
    in_backing_file = bytes_in_backing_file(source, layout) or 0
    in_data_file = bytes_in_data_file(source, layout) or 0
    return Beside(members, in_backing_file, in_data_file, unsaved_bitmaps(source, layout))
