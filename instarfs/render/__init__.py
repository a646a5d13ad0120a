"""Values to JSON, text and TSV. Nothing here opens, computes or waits.

Its modules are attributes of it, each loaded when it is first asked for: a mount answers before.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instarfs.render import (
        aftermath,
        bitmaps,
        check,
        clusters,
        explain,
        files,
        findings,
        guest_map,
        info,
        map,  # noqa: A004
        repair,
        report,
        tables,
        triage,
    )

__all__ = [
    "aftermath",
    "bitmaps",
    "check",
    "clusters",
    "explain",
    "files",
    "findings",
    "guest_map",
    "info",
    "map",
    "repair",
    "report",
    "tables",
    "triage",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
