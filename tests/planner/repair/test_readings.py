"""That entries are read where they are, and that nothing is read where none are."""

import numpy as np

from planner.qcow2.entries import COPIED, ZERO
from planner.qcow2.geometry import Geometry
from planner.repair.readings import PIECE_BYTES, _differences
from tests.planner.sources import Sparse

COUNT, SIZE, BLOCK = 100, 1 << 21, 4096


def of_large_tables(*, word: int) -> Sparse:
    """Tables of 2 MiB, one after the other, of each of which a page is there, in its middle."""
    page = (COPIED | word).to_bytes(8, "big").ljust(BLOCK, b"\0")
    middles = (table * SIZE + SIZE // 2 for table in range(COUNT))
    return Sparse({at // BLOCK: page for at in middles}, COUNT * SIZE, BLOCK)


def test_of_large_tables_no_more_is_compared_than_is_there() -> None:
    places = np.arange(COUNT, dtype=np.int64) * SIZE
    sources = of_large_tables(word=0), of_large_tables(word=0)
    assert not list(_differences(sources, np.stack((places, places)), Geometry(3, 21, 4, 0)))
    assert [source.bytes_read for source in sources] == [COUNT * PIECE_BYTES] * 2


def test_an_entry_that_is_only_on_one_side_is_a_difference() -> None:
    places = np.arange(COUNT, dtype=np.int64) * SIZE
    some, none = of_large_tables(word=ZERO), Sparse({}, COUNT * SIZE, BLOCK)
    for sources in ((some, none), (none, some)):
        found = list(_differences(sources, np.stack((places, places)), Geometry(3, 21, 4, 0)))
        assert found
        assert found[0] == "an entry of the L2 table at 0 or behind it"
