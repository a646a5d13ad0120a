"""What is planted wherever a name can stand, and how much of it fits there.

`POISON` has all that a terminal obeys, that ends a line, a cell, a word of a shell or a string of
JSON, and bytes that are no text; `FORGED` stands behind each, and shows where one of them did what
it was meant to.
"""

from __future__ import annotations

from collections.abc import Iterator

MARK = "FORGED"
FORGED = MARK.encode()

SEEDS = (
    b"\x1b]0;" + FORGED + b"\x07",
    b"\n" + FORGED,
    b"\r" + FORGED,
    b"\t" + FORGED + b"\t",
    b'","FORGED":"',
    b"'; FORGED; '",
    b"`FORGED`$(FORGED)",
    b"<FORGED/>&\\",
    b"\x7f\x08\x0b\x0c\x85\x9b31m",
    "\x9b31m\x85\x80".encode(),
    "\u202e\u2066\u2028\u2029\ufeff\u00ad\u200b\U000e0001".encode(),
    b"\xc3(\xed\xa0\x80\xed\xb2\x80\xf5\xff\xfe",
    b"!* ~ -\xe6\x97\xa5\xc3\xa4",
)
POISON = b"".join(SEEDS)
AFTER_NUL = b"\0" + FORGED


def cut(length: int) -> Iterator[bytes]:
    """All of `POISON` in names of at most so many bytes."""
    name = b""
    for seed in SEEDS:
        if len(name) + len(seed) > length:
            yield name
            name = b""
        name += seed[:length]
    yield name
