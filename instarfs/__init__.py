"""The half of instarfs that touches the world: files, locks, threads, the mount, the command line.

What decides anything about an image lives in `planner`; this package opens, locks, schedules,
writes and shows. Arrows point one way: cli, daemon, mount, inspect (and render), repair,
guest, image.

`check`, `plan`, `repair`, `undo` and `trim` are the commands of these names for other programs
(`instarfs.repair.library`). They are loaded when they are asked for: importing this package alone
loads nothing.
"""

from __future__ import annotations

# Nothing is imported here: `python -m instarfs` runs this while Python still looks into the
# current folder for whatever is imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from instarfs.errors import InstarfsError
    from instarfs.repair.library import check, plan, repair, trim, undo
    from instarfs.repair.outcome import RepairOutcome

__all__ = ["InstarfsError", "RepairOutcome", "check", "plan", "repair", "trim", "undo"]

_HOMES = {"InstarfsError": "errors", "RepairOutcome": "repair.outcome"}
_LIBRARY = "repair.library"


def require_own_planner() -> None:
    """Raise ImportError unless `planner` is the package beside this one.

    Another distribution has a package of that name, too. What is found is not run.
    """
    from importlib.util import find_spec  # noqa: PLC0415
    from os import path  # noqa: PLC0415

    found, ours = find_spec("planner"), path.dirname(path.dirname(__file__))  # noqa: PTH120
    place = found.origin if found else None
    if place is None:
        raise ImportError(
            f"the package planner, which belongs into {ours}, is missing: install anew"
        )
    if path.dirname(path.dirname(place)) != ours:  # noqa: PTH120
        raise ImportError(
            f"{place} is found in place of the planner in {ours}: another program's; install"
            " instarfs into an environment of its own, and unset PYTHONPATH"
        )


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # noqa: PLC0415

    require_own_planner()
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, _LIBRARY)}")
    found: object = getattr(home, name)
    # The room `repair`, which is loaded now, has that name already: it is called as the function.
    return globals().setdefault(name, found)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
