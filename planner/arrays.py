"""Names for the array types that the planner passes around."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.unsignedinteger[Any]]


def expand_ranges(first: I64, last: I64) -> I64:
    """All numbers of the ranges first[i]..last[i], inclusive, in order."""
    lengths = last - first + 1
    if (lengths == 1).all():
        return first
    starts = np.repeat(first - np.cumsum(lengths) + lengths, lengths)
    return starts + np.arange(int(lengths.sum()))
