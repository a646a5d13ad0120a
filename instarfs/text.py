r"""How text that is not ours leaves the program: one function for each way out, and no other.

What an image, an undo file, another file's name or another program says may hold any character. It
is kept as it is (`planner.qcow2.names` decodes it: bytes that are not UTF-8 are lone surrogates)
until it is written somewhere. What *prints* is what Python calls printable: letters, marks, digits,
signs and the blank; no control (C0, DEL, C1), no format character (U+202E, U+FEFF), no separator
but the blank (U+2028), nothing that is not assigned, no surrogate.

    to                              by             what prints   what does not      ends
    terminal, log, TSV, SVG, text   `printable`    as it is      \n \x1b \u202e    never a line
    a command for bash              `shell_path`   quoted        $'\x1b'            never a word
    JSON                            `json_text`    ASCII, \u    \u; U+FFFD for     never a string
                                                                 a broken byte
    SVG, after `printable`          `markup`       &lt; &quot;                     never a tag

`text_lines` is `printable` for all lines of a text.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice


def printable(text: str) -> str:
    r"""*text* on one line for a terminal: what does not print becomes \n, \x1b, \u202e, \xff.

    What has been through it comes back as it is.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def text_lines(lines: Iterable[str]) -> str:
    """A text of *lines*, each printable and ended."""
    return "".join(f"{printable(line)}\n" for line in lines)


_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})


def markup(text: str) -> str:
    """*text* between tags of XML, or between double quotes in one.

    Not by `xml.sax.saxutils`: with what it imports, a client of HTTP and what reads mail, a mount
    takes another MiB.
    """
    return text.translate(_MARKUP)


def shell_path(path: str) -> str:
    r"""*path* as one word of a command for bash, on one line, that no program takes for an option.

    What does not print, and what is not UTF-8, is written as in C: $'a\x0ab'.
    """
    return shell_word(f"./{path}" if path.startswith("-") else path)


def shell_word(text: str) -> str:
    """As `shell_path`, of what is no path: a program may take it for an option."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(_in_c(character) for character in text) + "'"


def _in_c(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    # History is expanded in some shells wherever a "!" stands.
    if character.isprintable() and character != "!":
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))


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

    Nothing in it but ASCII that prints, and the newlines of its *indent*. JSON is Unicode: where a
    name is not, U+FFFD stands, one for each broken character.
    """
    return _valid(json.dumps(value, indent=indent))


def _valid(text: str) -> str:
    # Of all that is not printable json leaves one as it is.
    text = text.replace("\x7f", r"\u007f")
    return _ESCAPE.sub(_unbroken, text) if "\\ud" in text else text


def _unbroken(escape: re.Match[str]) -> str:
    if escape["lone"]:
        return r"\ufffd"
    if not escape["bytes"]:
        return escape[0]
    raw = bytes.fromhex(escape[0].replace(r"\udc", ""))
    # Where the locale is ASCII, what Python takes for broken in a path is mostly UTF-8.
    return json.dumps(raw.decode(errors="replace"))[1:-1]


def json_bytes(value: Mapping[str, object]) -> bytes:
    """*value* as ASCII JSON, indented as by QEMU, one newline at the end."""
    if value and not any(isinstance(item, list | tuple | dict) for item in value.values()):
        return f"{{\n    {_valid(_ENCODE_LINES(value)[1:-1])}\n}}\n".encode("ascii")
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

# Encode an object as a line each of its values, four spaces from the edge, and eight from it.
# Indentation proper is done by json in Python, and takes ten times as long.
_ENCODE_LINES = json.JSONEncoder(separators=(",\n    ", ": ")).encode
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
    """What holds no list or object is encoded all at once, and lists of what is neither fast."""
    runs: list[str] = []
    plain: dict[str, object] = {}
    for key, item in value.items():
        if not item or not isinstance(item, list | dict):
            plain[key] = item
            continue
        if plain:
            runs.append(_ENCODE(plain)[1:-1])
            plain = {}
        runs.append(f"{_ENCODE(key)}: {_within_object(item)}")
    if plain:
        runs.append(_ENCODE(plain)[1:-1])
    text = ",\n            ".join(runs)
    return f"\n        {{\n            {_valid(text)}\n        }}"


def _within_object(value: list[object] | dict[str, object]) -> str:
    if isinstance(value, dict) or any(isinstance(item, list | dict) for item in value):
        return json.dumps(value, indent=4).replace("\n", "\n            ")
    items = ",\n                ".join(map(_ENCODE, value))
    return f"[\n                {items}\n            ]"


def _list_parts(objects: Iterator[Mapping[str, object]]) -> Iterator[bytes]:
    opening = "["
    while part := list(islice(objects, OBJECTS_A_PART)):
        yield (opening + ",".join(map(_object_of_list, part))).encode("ascii")
        opening = ","
    yield b"[]" if opening == "[" else b"\n    ]"
