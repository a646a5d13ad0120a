"""The keys of a JSON Schema as a man page lists them: ``members[].role``, in their order."""

from __future__ import annotations

from typing import Any


def keys_of(schema: dict[str, Any]) -> dict[str, str]:
    """The path of every key, and what it means."""
    found: dict[str, str] = {}
    _collect(schema, schema.get("$defs", {}), "", found)
    return found


def _collect(
    schema: dict[str, Any], shared: dict[str, Any], path: str, found: dict[str, str]
) -> None:
    if "$ref" in schema:
        schema = shared[schema["$ref"].removeprefix("#/$defs/")]
    for each in schema.get("anyOf", ()):
        _collect(each, shared, path, found)
    if "items" in schema:
        _collect(schema["items"], shared, f"{path}[]" if path else path, found)
    for key, value in schema.get("properties", {}).items():
        below = f"{path}.{key}" if path else key
        found.setdefault(below, value["description"])
        _collect(value, shared, below, found)
