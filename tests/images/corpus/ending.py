"""Rules about the end of the file: what it takes of a cluster or a table."""

from __future__ import annotations

from planner.findings.kinds import ACTIVE, Structure
from planner.findings.kinds import FindingKind as Kind
from planner.qcow2 import entries
from tests.images.builder import Image
from tests.images.corpus.rule import (
    COMPRESSED,
    COVERAGE,
    SIZE,
    WIDTH,
    Rule,
    builder,
    extended,
    fill,
    finding,
    in_guest,
    leak,
    move_to_end,
    plain,
    rule,
)


@rule
def data_cut_by_the_end() -> Rule:
    """A data cluster that the file ends in: no corruption to QEMU, and its last bytes are lost."""
    image = plain()
    move_to_end(image, image.l2_at(5))
    del image.data[-100:]
    lost = in_guest(5, image) | {"guest_offset": 6 * SIZE - 100, "guest_length": 100}
    return Rule(image, [finding(Kind.CUT_OFF, structure=Structure.DATA, **lost, found=100)])


@rule
def zeros_cut_by_the_end() -> Rule:
    """A cluster that reads as zeros needs nothing of the file."""
    made = fill(builder())
    made.write_zeros(9, allocated=True)
    image = made.build()
    move_to_end(image, image.l2_at(9))
    del image.data[-100:]
    return Rule(image, [])


@rule
def data_cut_behind_the_end_of_the_disk() -> Rule:
    """Of the last cluster of a disk the guest sees no more than the disk has."""
    made = builder(size=2 * COVERAGE - SIZE + 512)
    made.write(2 * WIDTH - 1, b"last")
    image = made.build()
    move_to_end(image, image.l2_at(2 * WIDTH - 1))
    del image.data[-100:]
    return Rule(image, [])


@rule
def subclusters_cut_by_the_end() -> Rule:
    """Of a cluster with subclusters QEMU writes those in use: what is behind is no loss."""
    made = fill(extended())
    made.write_subclusters(9, b"s" * made.geometry.cluster_size, 0x3, 0)
    image = made.build()
    size = image.cluster_size
    move_to_end(image, image.l2_at(9))
    del image.data[-size + 2 * size // 32 - 100 :]
    lost = in_guest(9, image)
    lost |= {"guest_offset": 9 * size + size // 16 - 100, "guest_length": 100}
    return Rule(image, [finding(Kind.CUT_OFF, structure=Structure.DATA, **lost, found=100)])


@rule
def subclusters_up_to_the_end() -> Rule:
    """The file may end where the subclusters do that are in use."""
    made = fill(extended())
    made.write_subclusters(9, b"s" * made.geometry.cluster_size, 0x3, 0)
    image = made.build()
    size = image.cluster_size
    move_to_end(image, image.l2_at(9))
    del image.data[-size + 2 * size // 32 :]
    return Rule(image, [])


def ends_with_compressed() -> Image:
    """A compressed cluster of three sectors at the very end, which begins off a sector."""
    made = fill(builder())
    made.write_compressed(9, b"x")
    image = made.build()
    at, end = image.l2_at(9), len(image.data)
    old = image.word(at) & entries.compressed_offset_mask(made.geometry)
    image.data += image.data[old : old + SIZE]
    more = 2 << made.geometry.compressed_shift
    image.set_word(at, COMPRESSED | more | end + 10)
    image.set_refcount(old // SIZE, 0)
    image.set_refcount(end // SIZE, 1)
    return image


@rule
def compressed_up_to_the_end() -> Rule:
    """Its data ends somewhere in the last sector that it claims, and with it QEMU's files."""
    image = ends_with_compressed()
    del image.data[-SIZE + 2 * 512 + 1 :]
    return Rule(image, [])


@rule
def compressed_cut_by_the_end() -> Rule:
    """Without the last sector it cannot be whole."""
    image = ends_with_compressed()
    del image.data[-SIZE + 2 * 512 :]
    lost = in_guest(9, image)
    return Rule(image, [finding(Kind.CUT_OFF, structure=Structure.COMPRESSED, **lost, found=512)])


@rule
def l2_table_cut_by_the_end() -> Rule:
    """What the entries past the end mapped is lost; they read as zeros."""
    image = plain()
    table = move_to_end(image, image.l1_at(1))
    del image.data[-12:]
    return Rule(
        image,
        [
            finding(
                Kind.CUT_OFF,
                structure=Structure.L2_TABLE,
                host_offset=table,
                length=SIZE,
                l1_index=1,
                snapshot=ACTIVE,
                guest_offset=2 * COVERAGE - 2 * SIZE,
                guest_length=2 * SIZE,
                found=12,
            )
        ],
        complete=False,
    )


@rule
def l1_table_cut_by_the_end() -> Rule:
    """The L2 tables that its lost entries led to look leaked, and all that these map."""
    image = plain()
    old, end = image.header.l1_table_offset, len(image.data)
    first = min(image.l2_table(1), image.host_offset(WIDTH)) // SIZE
    image.data += image.data[old : old + 8]
    image.set_refcount(old // SIZE, 0)
    image.set_refcount(end // SIZE, 1)
    image.change_header(l1_table_offset=end)
    lost = {"host_offset": end, "guest_offset": COVERAGE, "guest_length": COVERAGE}
    cut = finding(Kind.CUT_OFF, structure=Structure.L1_TABLE, **lost, snapshot=ACTIVE, found=8)
    return Rule(image, [cut, leak(first, 2)], leaks=2, complete=False)
