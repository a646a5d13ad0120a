"""planner.rescue.disk_size: what a disk says of its size, and how much is done to hear it."""

from __future__ import annotations

from planner.guestfs.work import Work
from planner.rescue.disk_size import disk_size
from planner.rescue.headers import mapping_all
from planner.source import Bytes
from tests.planner.rescue.placing.test_place import header_of, image


def test_a_disk_that_takes_too_much_work_to_read_is_as_large_as_what_is_mapped() -> None:
    data = image("xfs", "none")
    header = mapping_all(header_of(data))
    told = disk_size(Bytes(data), header, Work(len(data)))
    assert (told.evidence, told.is_exact) == ("the xfs on it has that", True)
    work = Work(0, 100.0)
    mapped = disk_size(Bytes(data), header, work)
    assert (mapped.evidence, mapped.is_exact) == ("nothing is mapped behind it", False)
    assert mapped.size <= told.size
