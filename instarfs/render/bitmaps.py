"""``image/bitmaps.json``: the persistent bitmaps, each with what is dirty and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from instarfs.text import json_bytes, json_parts, printable
from planner.errors import ImageError
from planner.qcow2.bitmaps import AUTO, IN_USE
from planner.qcow2.names import decode_name
from planner.views.bitmap_state import BitmapState, BitmapStates

UNSAVED = "it was in use and never saved: QEMU takes it for inconsistent and does not use it"
STALE = "a program without support for bitmaps has written to the image: they are void"

_FLAGS = {IN_USE: "in-use", AUTO: "auto"}


def bitmaps_json(states: BitmapStates | ImageError, *, is_written: bool) -> Iterator[bytes]:
    """In parts: there may be 65,535 bitmaps.

    *is_written*: a program has the image open for writing; a bitmap in use is its own then.

    Without one, a bitmap that is marked as in use was never saved: it is inconsistent, too.
    """
    if isinstance(states, ImageError):
        return iter((json_bytes({"bitmaps": [], "errors": [_error(states)]}),))
    errors = [_error(states.error)] if states.error else []
    return json_parts(
        {
            "bitmaps": (_bitmap(state, is_written=is_written) for state in states.bitmaps),
            "stale": states.stale,
            "errors": [*errors, *([STALE] if states.stale else [])],
        }
    )


def _bitmap(state: BitmapState, *, is_written: bool) -> dict[str, object]:
    bitmap = state.bitmap
    marked = bool(bitmap.flags & IN_USE)
    errors = [UNSAVED] if marked and not is_written else []
    return {
        "name": decode_name(bitmap.name),
        "granularity": bitmap.granularity,
        "flags": [name for bit, name in _FLAGS.items() if bitmap.flags & bit],
        "in-use": marked,
        "inconsistent": marked and not is_written,
        "dirty-bytes": state.dirty,
        "data-clusters": state.data_clusters,
        "table-offset": bitmap.bitmap_table_offset,
        "table-entries": bitmap.bitmap_table_size,
        "errors": [*errors, *map(_error, state.errors)],
    }


def _error(error: ImageError) -> str:
    return printable(str(error))
