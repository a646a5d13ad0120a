"""What the check did without: bitmaps that were never saved, and what is in the backing file."""

from __future__ import annotations

from planner.qcow2.bitmaps import AUTO, IN_USE
from planner.qcow2.layout import Layout
from planner.triage.beside import Beside, look_beside
from tests.images.corpus.rule import SIZE, builder, fill


def test_an_image_with_nothing_beside_it() -> None:
    image = fill(builder()).build()
    assert look_beside(image.source, Layout.read(image.source), ()) == Beside()


def test_bitmaps_that_are_in_use() -> None:
    made = fill(builder())
    for name in ("first", "second", "third"):
        made.add_bitmap(name, {1}, granularity_bits=16)
    image = made.build()
    offsets = [bitmap.offset for bitmap in image.bitmaps]
    for offset, flags in zip(offsets, (IN_USE, AUTO, IN_USE | AUTO), strict=True):
        image.data[offset + 12 : offset + 16] = flags.to_bytes(4, "big")
    layout = Layout.read(image.source)
    unsaved = look_beside(image.source, layout, ()).unsaved
    assert [bitmap.name for bitmap in unsaved] == [b"first", b"third"]
    # Garbage in the directory does not hide those before it.
    image.data[offsets[2] : offsets[2] + 24] = b"\xff" * 24
    assert [each.name for each in look_beside(image.source, layout, ()).unsaved] == [b"first"]


def test_what_is_in_the_data_file() -> None:
    image = fill(builder(data_file=b"data.raw")).build()
    found = look_beside(image.source, Layout.read(image.source), ())
    assert (found.in_backing_file, found.in_data_file) == (0, 5 * SIZE)


def test_what_is_in_the_backing_file() -> None:
    image = fill(builder(backing_file=b"base", backing_format=b"raw")).build()
    found = look_beside(image.source, Layout.read(image.source), ())
    assert (found.in_backing_file, found.in_data_file) == (image.header.size - 5 * SIZE, 0)
