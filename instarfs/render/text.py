"""Bytes and names of an image as text that no terminal obeys and no JSON reader chokes on."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

SHORT = 60
"""Characters of a name that stands in a sentence. In an image it may have 65535 bytes."""


def decode_name(raw: bytes) -> str:
    """A name from the image: it ends at its first NUL, as it does for QEMU.

    Bytes that are not UTF-8 become lone surrogates, which tell them apart where somebody reads.
    """
    return raw.partition(b"\0")[0].decode(errors="surrogateescape")


def printable(text: str) -> str:
    r"""*text* on one line for a terminal: what does not print becomes \n, \x1b, \u202e, \xff."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def shell_path(path: str) -> str:
    r"""*path* as one word of a command for bash, on one line, that no program takes for an option.

    What does not print, and what is not UTF-8, is written as in C: $'a\x0ab'.
    """
    if path.startswith("-"):
        path = f"./{path}"
    if path.isprintable():
        return shlex.quote(path)
    return "$'" + "".join(_in_c(character) for character in path) + "'"


def _in_c(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    # History is expanded in some shells wherever a "!" stands.
    if character.isprintable() and character != "!":
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))


def short_name(raw: bytes) -> str:
    """A name from the image for a sentence: printable, and no longer than a line has room for."""
    name = raw.partition(b"\0")[0]
    text = decode_name(name[: 4 * SHORT])
    is_whole = len(text) <= SHORT and len(name) <= 4 * SHORT
    return printable(text if is_whole else f"{text[:SHORT]}...")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


# ---- JSON ----

# The escapes of a JSON text, as json writes them: what two surrogates make together, what
# `decode_name` made of bytes that are not UTF-8, surrogates of no use, and any other.
_ESCAPE = re.compile(
    r"\\(?:ud[89ab]..\\ud[c-f]..|(?P<bytes>udc[89a-f].(?:\\udc[89a-f].)*)|(?P<lone>ud[89a-f]..)|.)"
)


def json_text(value: object, *, indent: int | None = None) -> str:
    """*value* as ASCII JSON that every reader takes. All JSON of this program is made here.

    JSON is Unicode: where a name is not, U+FFFD stands, one for each broken character.
    """
    return _valid(json.dumps(value, indent=indent))


def _valid(text: str) -> str:
    return _ESCAPE.sub(_unbroken, text) if "\\ud" in text else text


def _unbroken(escape: re.Match[str]) -> str:
    if escape["lone"]:
        return r"\ufffd"
    if not escape["bytes"]:
        return escape[0]
    raw = bytes.fromhex(escape[0].replace(r"\udc", ""))
    return len(raw.decode(errors="replace")) * r"\ufffd"


def json_bytes(value: Mapping[str, object]) -> bytes:
    """*value* as ASCII JSON, indented as by QEMU, one newline at the end."""
    return (json_text(value, indent=4) + "\n").encode("ascii")


def json_array(documents: Iterable[bytes | Iterable[bytes]]) -> Iterator[bytes]:
    """Documents that end in a newline each, whole or in parts, as one JSON array, in parts."""
    opening = b"["
    for document in documents:
        yield opening + b"\n    "
        end = b""
        for part in (document,) if isinstance(document, bytes) else document:
            yield (end + part.removesuffix(b"\n")).replace(b"\n", b"\n    ")
            end = b"\n" if part.endswith(b"\n") else b""
        opening = b","
    yield b"[]\n" if opening == b"[" else b"\n]\n"


OBJECTS_A_PART = 1000

# Encodes an object as a line each of its values, eight spaces from the edge. Indentation proper is
# done by json in Python, and takes ten times as long.
_ENCODE = json.JSONEncoder(separators=(",\n            ", ": ")).encode


def json_parts(value: Mapping[str, object]) -> Iterator[bytes]:
    """As `json_bytes`, in parts, of a *value* that is not empty.

    What is an iterator in it, or in an object of it, becomes a list of objects that are not empty,
    of which there may be very many. Those that hold no lists or objects are encoded fast.
    """
    yield from _object_parts(value)
    yield b"\n"


def _object_parts(value: Mapping[str, object], edge: str = "\n") -> Iterator[bytes]:
    """Of an object that is not empty; *edge* begins the line that it ends on."""
    opening, inner = "{", edge + "    "
    for key, item in value.items():
        yield f"{opening}{inner}{json_text(key)}: ".encode("ascii")
        if isinstance(item, Iterator):
            for part in _list_parts(item):
                yield part.replace(b"\n    ", inner.encode("ascii"))
        elif isinstance(item, dict) and item:
            yield from _object_parts(item, inner)
        else:
            yield json_text(item, indent=4).replace("\n", inner).encode("ascii")
        opening = ","
    yield f"{edge}}}".encode("ascii")


def _object_of_list(value: Mapping[str, object]) -> str:
    if any(isinstance(item, list | dict) for item in value.values()):
        text = json_text(value, indent=4).replace("\n", "\n        ")
    else:
        text = f"{{\n            {_valid(_ENCODE(value))[1:-1]}\n        }}"
    return f"\n        {text}"


def _list_parts(objects: Iterator[Mapping[str, object]]) -> Iterator[bytes]:
    opening = "["
    while part := list(islice(objects, OBJECTS_A_PART)):
        yield (opening + ",".join(map(_object_of_list, part))).encode("ascii")
        opening = ","
    yield b"[]" if opening == "[" else b"\n    ]"
