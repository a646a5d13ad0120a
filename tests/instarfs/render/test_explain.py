"""``explain/``: what a person reads of one offset, from the tables and from a check."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from instarfs.render.explain import guest_txt, host_txt
from planner.arrays import GuestOffset, HostOffset
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import ImageError
from planner.qcow2.entries import COPIED
from planner.views.explain import explain_guest, explain_host
from tests.cached import check_bytes
from tests.images.builder import Image
from tests.images.corpus import RULES
from tests.images.corpus.rule import COVERAGE, SIZE, builder, fill, plain, with_snapshot
from tests.images.damage import DAMAGES, TELLING
from tests.images.sample import sample


def host(image: Image, offset: int, report: Report | None = None) -> str:
    it = explain_host(image.source, HostOffset(offset))
    return host_txt(it, offset, report).decode()


def guest(image: Image, offset: int, report: Report | None = None) -> str:
    try:
        it = explain_guest(image.source, GuestOffset(offset))
    except ImageError as error:
        return guest_txt(error, offset, report).decode()
    return guest_txt(it, offset, report).decode()


def test_the_sample_images_contested_cluster() -> None:
    image, rng = sample().build(), random.Random(1)
    for name in TELLING:
        DAMAGES[name](image, rng)
    assert (
        host(image, 3014663)
        == """\
host offset 3014663 (0x2e0007)

It is byte 7 of host cluster 46, at 3014656.

Used 2 times:
  - guest offset 1376256: this byte is guest offset 1376263
  - guest offset 1572864: this byte is guest offset 1572871
Refcount: 1
  refcount table entry 0, at host offset 5177344: 0x0000000000500000
  refcount block at host offset 5242880; refcount 46 of it is at 5242972
WRONG: multiple-owners: the cluster is used twice for different things: at least one of them\
 reads wrong bytes
WRONG: refcount-low: clusters have more users than their refcount says: they may be freed too early
"""
    )


def test_the_way_to_a_guest_byte_with_what_a_check_says() -> None:
    image = with_snapshot()
    image.set_bits(image.l2_at(1), COPIED)
    told = guest(image, SIZE + 1, check_image(image.source))
    at, table = image.l2_at(1), image.l2_table(0)
    assert f"L1 entry 0, at host offset {image.l1_at(0)}: {table | COPIED:#018x}\n" in told
    assert f"L2 entry 1, at host offset {at}: {image.word(at):#018x}\n" in told
    assert "  WRONG: l2-copied: " in told
    assert f"The guest reads the byte at offset {image.host_offset(1) + 1} of this file." in told
    assert f"    - guest offset {SIZE} in snapshot 0 (before)\n" in told
    assert "The check says of these words and clusters:\n  - L2 entry 1 of L1 entry 0" in told
    assert "The check says" not in guest(image, SIZE + 1)


@pytest.mark.parametrize("name", RULES)
def test_any_offset_of_any_image_can_be_explained(name: str) -> None:
    image = RULES[name]().image
    report = check_bytes(bytes(image.data))
    if report.layout is None:
        return
    size = report.geometry.cluster_size
    end = report.layout.host_clusters
    for cluster in {*range(0, min(end, 16), 3), end - 1, end, end + 1}:
        told = host(image, cluster * size + 5, report)
        assert f"host cluster {cluster}, at {cluster * size}" in told
    for cluster in (0, 5, 20, report.geometry.l2_entries):
        assert "guest" in guest(image, cluster * size, report)


def test_zeros_of_an_overwritten_table_are_not_said_to_be_the_guests() -> None:
    image = plain()
    at = image.l2_table(0)
    image.data[at : at + SIZE] = b"\0\1" * (SIZE // 2)
    told = guest(image, 0)
    assert "That is not what the guest wrote: the L2 table was overwritten there" in told
    assert "overwritten" not in guest(image, COVERAGE)


def test_how_metadata_is_located() -> None:
    image = plain()
    told = host(image, image.l2_at(5))
    assert f"  - L2 table of L1 entry 0: entry 5, for guest offset {5 * SIZE} on\n" in told
    told = host(image, image.l1_at(1))
    assert f"  - active L1 table: entry 1, for guest offset {COVERAGE} on\n" in told
    told = host(image, image.refblock(0) + 7)
    assert "  - refcount block 0: refcount 3, of host cluster 3\n" in told
    told = host(image, image.reftable_at(1))
    per_block = image.geometry.refblock_entries
    assert f"  - refcount table: entry 1, for host cluster {per_block} on\n" in told


def test_the_kinds_of_ends() -> None:
    image = plain()
    image.set_bits(image.l1_at(1), 512)
    image.set_word(image.l2_at(0), (image.host_clusters + 5) * SIZE | COPIED)
    assert "The guest cannot read it: its L1 entry leads to an" in guest(image, COVERAGE)
    assert "of this file; that is past its end: zeros." in guest(image, 0)
    assert "The guest reads zeros: nothing is allocated there." in guest(image, 3 * SIZE)
    assert "There is no way to it: offset is " in guest(image, 1 << 50)
    image.set_word(image.l1_at(1), (image.host_clusters + 9) * SIZE)
    assert "zeros: the L2 table is not in the file." in guest(image, COVERAGE)
    told = host(image, len(image.data) + 3)
    assert f"It is past the end of the file, which has {len(image.data)} bytes" in told
    assert "Refcount: 0, as the refcount table has no entry " in host(image, 1 << 62)


def test_a_backing_file_and_a_data_file_are_named_as_such() -> None:
    overlay = fill(builder(backing_file=b"base.qcow2")).build()
    assert "what the backing file has there" in guest(overlay, 3 * SIZE)
    apart = fill(builder(data_file=b"data.raw")).build()
    told = guest(apart, SIZE + 9)
    assert f"the byte at offset {SIZE + 9} of the external data file." in told
    assert ": the data\n" not in told


def test_a_leak_a_free_cluster_and_a_refcount_that_cannot_be_looked_up() -> None:
    image = plain()
    free = image.refcounts().index(0)
    assert "it is free." in host(image, free * SIZE)
    image.set_refcount(free, 1)
    assert "it is leaked." in host(image, free * SIZE)
    image.set_refcount(0, 3)
    assert "WRONG: the refcount is 2 too high: a leak" in host(image, 0)
    image.set_bits(image.reftable_at(0), 1 << 9)
    told = host(image, 0)
    assert "Refcount: cannot be looked up\n" in told
    assert "  the way ends here: no refcount block can be at " in told


def test_tables_that_cannot_be_read_are_named() -> None:
    image = with_snapshot()
    image.change_header(nb_snapshots=70000)
    told = host(image, SIZE)
    assert "Not every table could be read" in told
    assert "nb_snapshots is 70000" in told


def test_a_torn_check_is_called_so() -> None:
    image = plain()
    torn = replace(check_image(image.source), changed=True)
    assert "That check was torn" in host(image, 0, torn)


def test_names_from_the_image_obey_nobody() -> None:
    made = fill(builder())
    made.take_snapshot("a\x1b[31m\nb")
    told = host(made.build(), SIZE)
    assert "snapshot 0 (a\\x1b[31m\\nb)" in told


def test_what_the_end_of_the_file_takes_of_a_cluster_is_not_said_to_be_there() -> None:
    image = RULES["data_cut_by_the_end"]().image
    end, size = 6 * SIZE - 100, len(image.data)
    assert f"reads the byte at offset {size - 1} of this file." in guest(image, end - 1)
    assert f"at offset {size} of this file; that is past its end: zeros." in guest(image, end)
    told = {
        "cut_by": " cannot read it, unless what is left of the compressed cluster unpacks:",
        "up_to": " reads it out of the compressed cluster.",
    }
    for name, words in told.items():
        image = RULES[f"compressed_{name}_the_end"]().image
        assert f"The guest{words}" in guest(image, 9 * SIZE)
