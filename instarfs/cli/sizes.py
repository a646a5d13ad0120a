"""Numbers of bytes as they are written on a command line: qemu_strtosz's grammar."""

from __future__ import annotations

import re
from fractions import Fraction

import click

LARGEST = (1 << 63) - 1

_DECIMAL = re.compile(r"\s*\+?(\d+(?:\.\d+)?)([bkmgtpe]?)", re.IGNORECASE | re.ASCII)
_HEXADECIMAL = re.compile(r"\s*\+?0x([0-9a-f]+)", re.IGNORECASE | re.ASCII)


class Size(click.ParamType[int]):
    """Bytes; or with a suffix, of which each step is 1024: ``1536``, ``1.5k``, ``0x600``."""

    name = "SIZE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        size = parse_size(str(value))
        if size is None:
            self.fail(
                f"'{value}' is not a number of bytes; k, M, G, T, P or E may follow it", param, ctx
            )
        if size > LARGEST:
            self.fail(f"{value} is not between 0 and {LARGEST}", param, ctx)
        return size


def parse_size(text: str) -> int | None:
    """The number of bytes that *text* stands for; None if it does not."""
    if match := _HEXADECIMAL.fullmatch(text):
        return int(match[1], 16)
    match = _DECIMAL.fullmatch(text)
    if match is None or ("." in match[1] and match[2] in "bB"):
        return None  # there is no part of a byte
    return int(Fraction(match[1]) * 1024 ** "bkmgtpe".index(match[2].lower() or "b"))
