"""Inodes as file systems of Unix have them: numbers, records in columns, types by modes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U8, Mask

TYPE_MASK = 0xF000
REGULAR, DIRECTORY, SYMLINK = 0x8000, 0x4000, 0xA000
TYPES = (0x1000, 0x2000, DIRECTORY, 0x6000, REGULAR, SYMLINK, 0xC000)
"""All that there are."""


@dataclass(frozen=True, slots=True)
class Inodes:
    """Some inodes: their numbers, int64, and their records, a structured array and as bytes."""

    number: I64
    field: npt.NDArray[np.void]
    raw: U8

    def __len__(self) -> int:
        return len(self.number)

    def select(self, which: Mask) -> Self:
        """Some of them."""
        return replace(
            self, number=self.number[which], field=self.field[which], raw=self.raw[which]
        )

    @property
    def type(self) -> I64:
        """`REGULAR`, `DIRECTORY`, `SYMLINK` or another of `TYPES`."""
        return self.field["mode"].astype(np.int64) & TYPE_MASK
