"""``image/bitmaps.json``: what a program reads of a bitmap."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from typing import Any

from instarfs.render.bitmaps import STALE, UNSAVED, bitmaps_json
from planner.errors import ImageError
from planner.qcow2.bitmaps import AUTO, IN_USE, Refusal
from planner.views.bitmap_state import BitmapStates, read_bitmap_states
from tests.images.corpus.rule import builder, fill


def made(flags: int = 0, name: str = "backup") -> BitmapStates:
    image = fill(builder())
    image.add_bitmap(name, {1, 2}, granularity_bits=16)
    found = read_bitmap_states(image.build().source)
    (state,) = found.bitmaps
    return replace(found, bitmaps=(replace(state, bitmap=replace(state.bitmap, flags=flags)),))


def shown(states: BitmapStates | ImageError, *, is_written: bool = False) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(b"".join(bitmaps_json(states, is_written=is_written)))
    return value


def test_all_that_is_known_of_a_bitmap() -> None:
    states = made(AUTO)
    bitmap = states.bitmaps[0].bitmap
    assert shown(states) == {
        "bitmaps": [
            {
                "name": "backup",
                "granularity": 65536,
                "flags": ["auto"],
                "in-use": False,
                "inconsistent": False,
                "dirty-bytes": 131072,
                "data-clusters": 1,
                "table-offset": bitmap.bitmap_table_offset,
                "table-entries": bitmap.bitmap_table_size,
                "errors": [],
            }
        ],
        "stale": False,
        "errors": [],
    }


def test_a_bitmap_in_use_is_inconsistent_once_nobody_uses_it() -> None:
    for is_written in (False, True):
        (bitmap,) = shown(made(IN_USE), is_written=is_written)["bitmaps"]
        assert (bitmap["flags"], bitmap["in-use"]) == (["in-use"], True)
        assert bitmap["inconsistent"] is not is_written
        assert bitmap["errors"] == ([] if is_written else [UNSAVED])


def test_errors_stand_where_they_belong() -> None:
    error = ImageError("granularity_bits", 99, "must be 9 to 31")
    states = made()
    broken = replace(states.bitmaps[0], dirty=None, problems=(error,))
    value = shown(replace(states, bitmaps=(broken, states.bitmaps[0]), error=error))
    assert [bitmap["errors"] for bitmap in value["bitmaps"]] == [[str(error)], []]
    assert [bitmap["dirty-bytes"] for bitmap in value["bitmaps"]] == [None, 131072]
    assert value["errors"] == [str(error)]
    assert shown(error) == {"bitmaps": [], "errors": [str(error)]}


def test_stale_bitmaps_are_called_so() -> None:
    assert shown(BitmapStates(stale=True)) == {"bitmaps": [], "stale": True, "errors": [STALE]}


def test_names_stay_inside_the_json() -> None:
    (bitmap,) = shown(made(name='a"\n\x1b'))["bitmaps"]
    assert bitmap["name"] == 'a"\n\x1b'


def test_tens_of_thousands_are_rendered_in_bounded_memory() -> None:
    states = made()
    broken = replace(states.bitmaps[0], problems=(Refusal("flags", 7, "reserved bits are set"),))
    many = replace(states, bitmaps=(broken,) * 30_000)
    tracemalloc.start()
    try:
        length = sum(map(len, bitmaps_json(many, is_written=False)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert length > 10_000_000
    assert peak < 4 << 20
