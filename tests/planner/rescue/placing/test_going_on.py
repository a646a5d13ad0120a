"""planner.rescue.placing.going_on: what a scan of the file has named is all there is to see."""

from __future__ import annotations

import functools
import random
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from planner.arrays import I64
from planner.check.check import check_image
from planner.errors import Cancelled
from planner.progress import Meter
from planner.rescue.placing.claims import Collector
from planner.rescue.placing.going_on import Pass
from planner.rescue.placing.solve import SPOTTERS
from planner.rescue.placing.tables import Finder
from planner.rescue.scan import find_tables
from planner.rescue.scanned import Scanned
from planner.source import Bytes
from tests.images.guest_files import make_ext, make_tree
from tests.planner.rescue.placing.test_place import MIB
from tests.planner.rescue.test_scanned import Watched, stop_after

SHAPES = {
    "512 bytes": "cluster_size=512",
    "4 KiB": "cluster_size=4k",
    "64 KiB": "cluster_size=64k",
    "2 MiB": "cluster_size=2M",
    "wide refcounts": "cluster_size=4k,refcount_bits=64",
    "extended": "cluster_size=16k,extended_l2=on",
}


@functools.cache
def image(options: str, *, packed: bool = False) -> bytes:
    rng = random.Random(options)
    with tempfile.TemporaryDirectory() as name:
        tree, part, out = (Path(name) / each for each in ("tree", "part", "out"))
        make_tree(tree, 1, files=60)
        (tree / "large").write_bytes(rng.randbytes(3 * MIB))
        (tree / "empty").write_bytes(bytes(MIB) + b"end")
        make_ext(part, tree, ["-t", "ext4", "-b", "1024"], 24 * MIB)
        more = ["-c"] if packed else []
        subprocess.run(
            ["qemu-img", "convert", *more, "-O", "qcow2", "-o", options, part, out], check=True
        )
        return out.read_bytes()


def seen(data: bytes, clusters: I64, scanned: Scanned) -> tuple[object, int]:
    """The tables, and the claims, that a pass over *clusters* comes to; how often it was told."""
    source, told = Bytes(data), 0

    def tell(_stage: str, _done: int, _total: int) -> None:
        nonlocal told
        told += 1

    report = check_image(source)
    assert report.layout is not None
    header = report.layout.header
    collector = Collector(SPOTTERS, header.cluster_bits)
    finder = Finder(source, report, report.layout)
    Pass(source, header, collector, finder).look(clusters, scanned, Meter(tell))
    claims = sorted(
        row
        for columns in collector._parts
        for row in zip(*(column.tolist() for column in columns), strict=True)
    )
    tables, has_l1 = finder.tables()
    return (tables.tolist(), has_l1, claims), told


def must_be_alike(data: bytes, clusters: I64, scanned: Scanned | None = None) -> None:
    scanned = scanned or Scanned()
    find_tables(Bytes(data), scanned=scanned)
    named, told = seen(data, clusters, scanned)
    looked_for, _ = seen(data, clusters, Scanned())
    assert named == looked_for
    assert told == 1  # it went through nothing but that


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_after_a_scan_of_the_file_a_pass_sees_what_it_sees_without(
    shape: str, *, packed: bool
) -> None:
    data = image(SHAPES[shape], packed=packed)
    report = check_image(Bytes(data))
    bits = report.geometry.cluster_bits
    must_be_alike(data, np.arange(len(data) >> bits))


@pytest.mark.parametrize("shape", ["512 bytes", "64 KiB", "2 MiB"])
def test_it_sees_no_more_than_it_was_asked_about(shape: str) -> None:
    data = image(SHAPES[shape])
    rng = np.random.default_rng(1)
    count = len(data) >> check_image(Bytes(data)).geometry.cluster_bits
    # Clusters in a row, of which some are left out.
    must_be_alike(data, np.flatnonzero(rng.random(count) < 0.9))


@pytest.mark.parametrize("shape", ["64 KiB", "2 MiB"])
def test_what_clusters_said_to_the_scan_is_not_read_again(shape: str) -> None:
    data = image(SHAPES[shape])
    source, scanned = Watched(data), Scanned()
    find_tables(source, scanned=scanned)
    at_once = source.read
    layout = check_image(Bytes(data)).layout
    assert layout is not None
    collector = Collector(SPOTTERS, layout.header.cluster_bits)
    clusters = np.arange(len(data) >> layout.header.cluster_bits)
    Pass(source, layout.header, collector).look(clusters, scanned, Meter())
    assert collector.others()
    assert source.read == at_once


@pytest.mark.parametrize("shape", ["4 KiB", "64 KiB", "2 MiB"])
def test_a_pass_after_a_scan_in_two_parts_sees_all_of_it(shape: str) -> None:
    data, begun = image(SHAPES[shape]), Scanned()
    with pytest.raises(Cancelled):
        find_tables(Bytes(data), Meter(stop_after(0), "scan", len(data)), begun)
    known = begun.gathered()
    assert 0 < min(each.done for each in known.values()) < len(data)
    size = check_image(Bytes(data)).geometry.cluster_size
    must_be_alike(data, np.arange(len(data) // size), Scanned(known))


@pytest.mark.parametrize("shape", ["4 KiB", "64 KiB", "2 MiB", "extended"])
def test_a_table_of_which_one_word_in_ten_was_overwritten_is_one_still(shape: str) -> None:
    data = bytearray(image(SHAPES[shape]))
    report = check_image(Bytes(bytes(data)))
    size, rng = report.geometry.cluster_size, random.Random(1)
    assert report.layout is not None
    entry = report.layout.header.l1_table_offset
    table = int.from_bytes(data[entry : entry + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    words = [at for at in range(table, table + size, 8) if any(data[at : at + 8])]
    for at in rng.sample(words, len(words) // 12):
        data[at : at + 8] = b"\xff" * 8
    must_be_alike(bytes(data), np.arange(len(data) // size))
