"""Structures of whole numbers only, of which an image can hold very many: parsed and built by
`struct`.

Declared as every other, with construct; this reads that declaration, and is twenty times as fast.
"""

from __future__ import annotations

import struct
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
from construct import Struct

from planner.arrays import I64


class Fixed:
    """Parses the fields of *declared*, a Struct of integers that are all named and big-endian."""

    def __init__(self, declared: Struct) -> None:
        fields = declared.subcons
        self._names = tuple(field.name for field in fields)
        self._layout = struct.Struct(">" + "".join(field.fmtstr[1] for field in fields))
        self.dtype = np.dtype([(field.name, f">u{field.sizeof()}") for field in fields])
        """As the fields of a structured array."""

    def parse(self, raw: bytes | bytearray, offset: int = 0) -> SimpleNamespace:
        """The fields of the structure at *offset* in *raw*, all of which must be there."""
        return SimpleNamespace(**dict(zip(self._names, self.values(raw, offset), strict=True)))

    def values(self, raw: bytes | bytearray, offset: int = 0) -> tuple[int, ...]:
        """The same, without their names, in the order in which they are declared."""
        return self._layout.unpack_from(raw, offset)

    def rows(self, raw: bytes | bytearray, start: I64) -> npt.NDArray[np.void]:
        """The structures at each *start* in *raw*: a structured array of `dtype`, a row each."""
        if not len(start):
            return np.zeros(0, dtype=self.dtype)
        at_each = np.lib.stride_tricks.sliding_window_view(
            np.frombuffer(raw, dtype=np.uint8), self.dtype.itemsize
        )
        return at_each[start].view(self.dtype).reshape(-1)

    def build(self, **fields: int) -> bytes:
        """The bytes of a structure of these *fields*: all that are declared, and no others."""
        if fields.keys() != set(self._names):
            raise TypeError(f"{sorted(fields)} are not {sorted(self._names)}")
        return self._layout.pack(*(fields[name] for name in self._names))
