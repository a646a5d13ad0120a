"""Bytes and names of an image as text that no terminal obeys and no JSON reader chokes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice

SHORT = 60
"""Characters of a name that stands in a sentence. In an image it may have 65535 bytes."""


def decode_name(raw: bytes) -> str:
    """A name from the image. Bytes that are not UTF-8 become lone surrogates: nothing is lost."""
    return raw.decode(errors="surrogateescape")


def printable(text: str) -> str:
    r"""*text* on one line for a terminal: what does not print becomes \n, \x1b, \u202e, \xff."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def short_name(raw: bytes) -> str:
    """A name from the image for a sentence: printable, and no longer than a line has room for."""
    text = decode_name(raw[: 4 * SHORT])
    is_whole = len(text) <= SHORT and len(raw) <= 4 * SHORT
    return printable(text if is_whole else f"{text[:SHORT]}...")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def json_bytes(value: Mapping[str, object]) -> bytes:
    """*value* as ASCII JSON, indented as by QEMU, one newline at the end."""
    return (json.dumps(value, indent=4) + "\n").encode("ascii")


OBJECTS_A_PART = 1000

# Encodes an object as a line each of its values, eight spaces from the edge. Indentation proper is
# done by json in Python, and takes ten times as long.
_ENCODE = json.JSONEncoder(separators=(",\n            ", ": ")).encode


def json_parts(value: Mapping[str, object]) -> Iterator[bytes]:
    """As `json_bytes`, in parts, of a *value* that is not empty.

    What is an iterator in it becomes a list of objects, of which there may be very many. They hold
    no other objects or lists.
    """
    opening = "{"
    for key, item in value.items():
        yield f"{opening}\n    {json.dumps(key)}: ".encode("ascii")
        if isinstance(item, Iterator):
            yield from _list_parts(item)
        else:
            yield json.dumps(item, indent=4).replace("\n", "\n    ").encode("ascii")
        opening = ","
    yield b"\n}\n"


def _list_parts(objects: Iterator[Mapping[str, object]]) -> Iterator[bytes]:
    opening = "["
    while part := list(islice(objects, OBJECTS_A_PART)):
        lines = [f"\n        {{\n            {_ENCODE(each)[1:-1]}\n        }}" for each in part]
        yield (opening + ",".join(lines)).encode("ascii")
        opening = ","
    yield b"[]" if opening == "[" else b"\n    ]"
