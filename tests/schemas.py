"""Holds JSON that tests come by against the schemas that the program has of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

import jsonschema
from jsonschema.exceptions import best_match
from jsonschema.protocols import Validator

from instarfs.render.schemas import schema

_LARGE = 1 << 20
"""Of longer texts nothing is looked at: a validator in Python takes a minute for a million rows."""

_LINES = frozenset({"finding", "scan"})
_PRINTED = {"check": "check", "info": "info", "map": "map", "plan": "plan", "rescue": "rescue"}


@cache
def validator(name: str) -> Validator:
    return jsonschema.Draft202012Validator(schema(name))


def name_for(path: str) -> str | None:
    """The name of the schema of a file of the tree; None where it is no JSON."""
    if not path.endswith((".json", ".jsonl")):
        return None
    folder, _, file = path.rpartition("/")
    if folder.startswith("snapshots/"):
        return "snapshot"
    if folder == "repair/plan":
        return "plan"
    return {
        "check/result.json": "check",
        "check/findings.jsonl": "finding",
        "repair/result.json": "repair",
        "rescue/plan.json": "rescue",
    }.get(path, file.partition(".")[0])


def require_valid(name: str, text: str) -> None:
    """*text* is what the schema *name* says: a value, or lines of them."""
    if len(text) > _LARGE:
        return
    for value in map(json.loads, text.splitlines() if name in _LINES else [text]):
        error = best_match(validator(name).iter_errors(value))
        assert error is None, f"{name}: {error}"


def require_valid_file(path: str, text: str) -> None:
    """What a file of the mounted tree says."""
    name = name_for(path.removeprefix("/"))
    if name is not None:
        require_valid(name, text)


def require_valid_output(words: Sequence[object], out: str) -> None:
    """What a command of these *words* has printed; where it has failed, that may be nothing."""
    said = [str(word) for word in words]
    if out and _asks_for(said, "json") and (name := _first(_PRINTED, said)):
        require_valid("repair" if "--in-place" in said else _PRINTED[name], out)
    if out and _asks_for(said, "jsonl"):
        require_valid("scan", out)


def _asks_for(words: Sequence[str], output: str) -> bool:
    return f"--output={output}" in words or ("--output", output) in pairwise(words)


def _first(names: Iterable[str], words: Sequence[str]) -> str | None:
    return next((word for word in words if word in names), None)
