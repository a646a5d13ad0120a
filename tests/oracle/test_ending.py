"""Where real images end: no healthy one is called cut off, and of one that is, what is lost.

The truth about a cut image is the map of the whole one: what lay past the cut is gone.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from planner.check.check import check_image
from planner.check.ending import CutOff
from planner.check.report import Report
from planner.findings.kinds import FindingKind
from planner.triage.impact import Harm, guest_impact
from tests.images.matrix import MIB, run
from tests.oracle.scene import FileSource

WRITES = {
    "nothing": [],
    "a sector": ["write -q 1M 512"],
    "the end of a cluster": ["write -q 1110016 4k"],
    "the end of the disk": ["write -q 10485248 512"],
    "zeros": ["write -q 1M 4k", "write -q -z 1M 2M"],
    "compressed": ["write -q -c -P 7 2M 2M"],
    "compressed, then a sector": ["write -q -c -P 7 2M 2M", "write -q 512 512"],
    "discarded": ["write -q 1M 64k", "discard -q 1M 64k"],
}
OPTIONS = {
    "plain": "cluster_size=64k",
    "v2": "compat=0.10",
    "512": "cluster_size=512",
    "2M": "cluster_size=2M",
    "zstd": "cluster_size=64k,compression_type=zstd",
    "extended": "cluster_size=64k,extended_l2=on",
    "extended-2M": "cluster_size=2M,extended_l2=on",
    "metadata": "preallocation=metadata",
    "metadata-4k": "preallocation=metadata,cluster_size=4k",
    "falloc": "preallocation=falloc,cluster_size=4k",
    "full": "preallocation=full",
    "one-bit": "refcount_bits=1,cluster_size=2M",
    "lazy": "lazy_refcounts=on",
}


def checked(image: Path) -> Report:
    with image.open("rb") as file:
        return check_image(FileSource(file.fileno()))


def made(image: Path, options: str, writes: list[str]) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "10M")
    if writes:
        run("qemu-io", *(word for each in writes for word in ("-c", each)), image)
    return image


@pytest.mark.parametrize("options", OPTIONS)
def test_a_healthy_image_is_not_cut_off(options: str, tmp_path: Path) -> None:
    for name, writes in WRITES.items():
        if "compressed" in name and "preallocation" in OPTIONS[options]:
            continue  # QEMU compresses only what is not allocated
        report = checked(made(tmp_path / "image", OPTIONS[options], writes))
        assert (name, report.verdict, report.cut_off) == (name, "clean", None)
        (tmp_path / "image").unlink()


def test_nor_is_one_that_was_converted_resized_or_has_snapshots_and_bitmaps(tmp_path: Path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(random.Random(1).randbytes(100_000) + bytes(2 * MIB) + b"end" * 999)
    for options in ([], ["-c"], ["-c", "-o", "compression_type=zstd"], ["-o", "extended_l2=on"]):
        run("qemu-img", "convert", "-O", "qcow2", *options, raw, image)
        assert checked(image).cut_off is None
    steps: list[list[str | Path]] = [
        ["qemu-img", "snapshot", "-c", "one", image],
        ["qemu-img", "bitmap", "--add", "-g", "512", image, "bits"],
        ["qemu-io", "-c", "write -q 1M 512", image],
        ["qemu-img", "resize", "-q", "--preallocation=falloc", image, "5M"],
        ["qemu-img", "snapshot", "-c", "two", image],
        ["qemu-img", "bitmap", "--remove", image, "bits"],
        ["qemu-img", "resize", "-q", "--shrink", image, "1M"],
    ]
    for step in steps:
        run(*step)
        assert checked(image).cut_off is None, step


def data_rows(image: Path) -> list[tuple[int, int, int]]:
    """Guest offset, length and host offset of what lies in the image as it is."""
    rows = json.loads(subprocess.check_output(["qemu-img", "map", "--output=json", image]))
    return [(r["start"], r["length"], r["offset"]) for r in rows if r["data"] and "offset" in r]


@pytest.mark.parametrize("options", ["plain", "v2", "512", "metadata-4k", "lazy"])
def test_what_lay_past_the_cut_is_lost_and_no_more(options: str, tmp_path: Path) -> None:
    """Cuts behind the last table: before it, nobody knows what else there was."""
    image = made(tmp_path / "image", OPTIONS[options], ["write -q 0 8k"])
    run("qemu-io", "-c", "write -q 3M 333k", "-c", "write -q 1M 70k", image)
    rows, size = data_rows(image), image.stat().st_size
    report = checked(image)
    tables = int((report.regions.offset + report.regions.size).max())
    rng = random.Random(options)
    cuts = [rng.randrange(tables, size) for _ in range(12)]
    for cut in sorted([size - 1, *cuts], reverse=True):
        os.truncate(image, cut)
        lost = [
            (start + max(0, cut - host), length - max(0, cut - host))
            for start, length, host in rows
            if host + length > cut
        ]
        report = checked(image)
        assert merged(list(guest_impact(report).ranges[Harm.LOST].first(1000))) == merged(lost)
        if lost:
            assert report.cut_off == CutOff(cut, max(host + length for _, length, host in rows))
            assert report.verdict == "corrupt"


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that touch as one."""
    joined: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined


def test_where_tables_are_lost_too_the_refcounts_say_how_long_the_file_was(tmp_path: Path) -> None:
    image = made(tmp_path / "image", "cluster_size=4k", ["write -q 0 5M"])
    size = image.stat().st_size
    os.truncate(image, 9 * 4096)
    report = checked(image)
    assert report.cut_off == CutOff(9 * 4096, size)
    assert FindingKind.PAST_END in report.counts()


@pytest.mark.parametrize("cut_to", ["half", "the last sector but one"])
def test_a_compressed_image_that_ends_early(cut_to: str, tmp_path: Path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image"
    rng = random.Random(4)
    raw.write_bytes(b"".join(rng.randbytes(1000) + bytes(3096) for _ in range(1024)))
    run("qemu-img", "convert", "-c", "-O", "qcow2", raw, image)
    size = image.stat().st_size
    os.truncate(image, size // 2 + 77 if cut_to == "half" else size - 512)
    report = checked(image)
    assert report.cut_off == CutOff(image.stat().st_size, size)
    assert report.verdict == "corrupt"


def test_an_entry_that_is_garbage_does_not_make_the_file_too_short(tmp_path: Path) -> None:
    image = made(tmp_path / "image", "cluster_size=4k", ["write -q 0 1M"])
    with image.open("r+b") as file:
        data = file.read()
        l1 = int.from_bytes(data[40:48], "big")
        l2 = int.from_bytes(data[l1 : l1 + 8], "big") & (1 << 56) - 1
        file.seek(l2)
        file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))
    report = checked(image)
    assert FindingKind.PAST_END in report.counts()
    assert report.cut_off is None


@pytest.mark.parametrize("options", ["plain", "v2", "512", "extended"])
@pytest.mark.parametrize("place", ["nowhere", "the header", "the L1 table"])
def test_a_refcount_table_that_the_header_misplaces_does_not_either(
    place: str, options: str, tmp_path: Path
) -> None:
    image = made(tmp_path / "image", OPTIONS[options], ["write -q 0 1M"])
    with image.open("r+b") as file:
        header = file.read(72)
        offset = {"nowhere": (1 << 40).to_bytes(8, "big"), "the header": bytes(8)}
        file.seek(48)
        file.write(offset.get(place, header[40:48]))
    report = checked(image)
    assert report.verdict in ("corrupt", "incomplete")
    assert report.cut_off is None
