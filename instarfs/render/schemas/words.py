"""What schemas are made of: a function for each sort of value, which its argument explains."""

from __future__ import annotations

from collections.abc import Iterable

Schema = dict[str, object]


def text(meaning: str) -> Schema:
    """Any string."""
    return {"type": "string", "description": meaning}


def word(meaning: str, words: Iterable[str]) -> Schema:
    """One of a closed list."""
    return {"enum": list(words), "description": meaning}


def words(meaning: str, of: Iterable[str]) -> Schema:
    """Some of a closed list, each once."""
    return {"type": "array", "items": {"enum": list(of)}, "uniqueItems": True, **_said(meaning)}


def matching(meaning: str, pattern: str) -> Schema:
    """A string that is all as the pattern says."""
    return {"type": "string", "pattern": f"^(?:{pattern})$", **_said(meaning)}


def hexadecimal(meaning: str) -> Schema:
    """Bytes, two digits each."""
    return matching(meaning, "([0-9a-f]{2})*")


def moment(meaning: str) -> Schema:
    """A time in UTC, as RFC 3339 has it."""
    return matching(meaning, r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z")


def number(meaning: str, least: int = 0, most: int | None = None) -> Schema:
    """A whole number."""
    limit = {} if most is None else {"maximum": most}
    return {"type": "integer", "minimum": least, **limit, **_said(meaning)}


def fraction(meaning: str) -> Schema:
    """A number that need not be whole."""
    return {"type": "number", "minimum": 0, **_said(meaning)}


def flag(meaning: str) -> Schema:
    """True or false."""
    return {"type": "boolean", **_said(meaning)}


def array(meaning: str, items: Schema) -> Schema:
    """As many of *items* as there are."""
    return {"type": "array", "items": items, **_said(meaning)}


def either(meaning: str, *of: Schema) -> Schema:
    """Any of several shapes."""
    return {"anyOf": list(of), **_said(meaning)}


def maybe(schema: Schema) -> Schema:
    """As *schema*, or null."""
    meaning = schema.get("description", "")
    bare = {key: value for key, value in schema.items() if key != "description"}
    return {"anyOf": [bare, {"type": "null"}], "description": meaning}


def reference(name: str) -> Schema:
    """As the schema has it under ``$defs``."""
    return {"$ref": f"#/$defs/{name}"}


def record(
    meaning: str, always: dict[str, Schema], sometimes: dict[str, Schema] | None = None
) -> Schema:
    """An object of these keys and no others; those of *sometimes* may be left out."""
    return {
        "type": "object",
        **_said(meaning),
        "properties": always | (sometimes or {}),
        "required": list(always),
        "additionalProperties": False,
    }


def tally(meaning: str, of: Iterable[str] | None = None) -> Schema:
    """How many there are of each word: of a closed list, or of any."""
    names: Schema = {} if of is None else {"propertyNames": {"enum": list(of)}}
    least = {"type": "integer", "minimum": 1}
    return {"type": "object", **_said(meaning), **names, "additionalProperties": least}


def _said(meaning: str) -> Schema:
    return {"description": meaning}
