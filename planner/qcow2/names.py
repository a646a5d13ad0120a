"""Names that an image holds, as text. Nothing is escaped here: that is for whoever shows it.

A sentence of the planner may hold any character of such a name. It becomes harmless where it leaves
the program, by the rules of `instarfs.text`.
"""

from __future__ import annotations

SHORT = 60
"""Characters of a name that stands in a sentence. In an image it may have 65535 bytes."""


def decode_name(raw: bytes) -> str:
    """A name from the image: it ends at its first NUL, as it does for QEMU.

    Bytes that are not UTF-8 become lone surrogates, which tell them apart where somebody reads.
    """
    return raw.partition(b"\0")[0].decode(errors="surrogateescape")


def brief_name(raw: bytes) -> str:
    """The same, no longer than a sentence has room for."""
    name = raw.partition(b"\0")[0]
    text = decode_name(name[: 4 * SHORT])
    is_whole = len(text) <= SHORT and len(name) <= 4 * SHORT
    return text if is_whole else f"{text[:SHORT]}..."


def quoted(raw: bytes) -> str:
    """The same in quotes, as a value that is wrong."""
    return f"'{brief_name(raw)}'"
