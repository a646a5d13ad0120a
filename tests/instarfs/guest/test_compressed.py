"""Compressed clusters unpacked, all of them: which cannot be is found, and what that means."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instarfs.errors import ImageReadFailed
from instarfs.guest.compressed import look_at_packed
from instarfs.render.report import report_txt
from planner.check import compressed
from planner.check.check import check_image
from planner.check.compressed import MAX_OVER_BYTES, SPAN_BYTES, find_packed
from planner.check.ending import CutOff
from planner.check.report import Report
from planner.errors import Cancelled
from planner.findings.kinds import ACTIVE, FindingKind, Structure
from planner.progress import Meter, unless
from planner.qcow2 import entries
from planner.source import Source
from planner.triage.impact import Harm, guest_impact
from tests.images.builder import Image, ImageBuilder, zlib_compress
from tests.planner.sources import Sparse

KIND = FindingKind.COMPRESSED_UNREADABLE


def packed_image(*, clusters: int = 40, snapshot: bool = False, **options: object) -> Image:
    """Guest clusters 0, 2, 4 … compressed, their data one behind the other."""
    made = ImageBuilder(**{"cluster_bits": 12, "size": 1 << 22, **options})  # type: ignore[arg-type]
    rng = random.Random(3)
    for cluster in range(0, 2 * clusters, 2):
        made.write_compressed(cluster, bytes(rng.choices(b"abcd", k=900)))
    made.write(1, b"plain")
    if snapshot:
        made.take_snapshot("one")
        made.write_compressed(0, b"new")
    return made.build()


def stored_at(image: Image, cluster: int, snapshot: int | None = None) -> int:
    word = image.word(image.l2_at(cluster, snapshot))
    return word & entries.compressed_offset_mask(image.geometry)


def spoil(image: Image, cluster: int, snapshot: int | None = None) -> None:
    """Break what is stored of a guest cluster: no such block of deflate or frame of zstd is."""
    at = stored_at(image, cluster, snapshot)
    image.data[at : at + 4] = b"\xff\xff\xff\xff"


def looked_at(image: Image) -> Report:
    return look_at_packed(image.source, check_image(image.source))


def unreadable(report: Report) -> list[int]:
    """Guest offsets of what cannot be unpacked."""
    return [row.guest_offset for row in report.rows(KIND)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zstd": True},
        {"version": 2},
        {"cluster_bits": 14, "extended_l2": True},
        {"cluster_bits": 14, "extended_l2": True, "zstd": True},
        {"cluster_bits": 21, "size": 1 << 28},
    ],
)
def test_what_cannot_be_unpacked_is_found(options: dict[str, Any]) -> None:
    image = packed_image(**options)
    assert not unreadable(looked_at(image))
    for cluster in (2, 78):
        spoil(image, cluster)
    before, report = check_image(image.source), looked_at(image)
    size = image.cluster_size
    assert unreadable(report) == [2 * size, 78 * size]
    assert (before.verdict, report.verdict) == ("clean", "corrupt")
    assert report.counters == before.counters
    (row, _) = report.rows(KIND)
    assert (row.structure, row.found) == (Structure.COMPRESSED, stored_at(image, 2))
    assert (row.snapshot, row.host_offset) == (ACTIVE, image.l2_at(2))
    lost = guest_impact(report).ranges[Harm.LOST]
    assert list(lost.first(9)) == [(2 * size, size), (78 * size, size)]


def test_a_range_is_unpacked_once_however_many_tables_lead_to_it() -> None:
    image = packed_image(snapshot=True)
    packed = find_packed(image.source, check_image(image.source), Meter())
    assert len(packed) == 41
    spoil(image, 4)
    report = looked_at(image)
    snapshots = sorted(row.snapshot for row in report.rows(KIND))
    assert snapshots == [ACTIVE, 0]
    spoil(image, 0, snapshot=0)
    assert [row.snapshot for row in looked_at(image).rows(KIND) if row.l2_index == 0] == [0]


def test_what_the_guest_does_not_see_is_no_loss() -> None:
    image = packed_image()
    spoil(image, 78)
    image.change_header(size=70 * image.cluster_size)
    assert not unreadable(looked_at(image))


def test_a_cut_within_the_last_sector_shows_when_it_is_unpacked() -> None:
    image, stored = packed_image(), zlib_compress(random.Random(3).randbytes(800) + bytes(3296))
    base = len(image.data)
    assert 512 < 100 + len(stored) - 50 < 100 + len(stored) < 1024
    image.data += bytes(100) + stored
    image.set_refcount(base // image.cluster_size, 1)
    more = 1 << image.geometry.compressed_shift
    image.set_word(image.l2_at(78), entries.COMPRESSED | more | base + 100)
    assert looked_at(image).cut_off is None
    del image.data[-50:]
    assert check_image(image.source).cut_off is None
    report = looked_at(image)
    assert unreadable(report) == [78 * image.cluster_size]
    assert report.cut_off == CutOff(len(image.data), base + 1024)


def test_ranges_take_little_memory_however_many_entries_lead_to_them() -> None:
    made = ImageBuilder(cluster_bits=21, size=1 << 41)
    for l1_index in range(4):
        made.write_compressed(l1_index << 18, b"x")
    image = made.build()
    entry = entries.COMPRESSED | 1 << made.geometry.compressed_shift
    for l1_index in range(4):
        table = image.l2_table(l1_index)
        words = entry + (np.arange(1 << 18, dtype=np.uint64) << np.uint64(9))
        image.data[table : table + (1 << 21)] = words.astype(">u8").tobytes()
    source, report = image.source, check_image(image.source)
    tracemalloc.start()
    packed = find_packed(source, report, Meter())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(packed) == 1 << 18
    assert peak < 24 * (1 << 20) + (48 << 20)  # of a table at a time more is held


def full_of(words: np.ndarray, *, at: int, stored: bytes, **options: object) -> Image:
    """An image whose first L2 table begins with *words*, with *stored* at offset *at*."""
    made = ImageBuilder(**{"cluster_bits": 16, "size": 1 << 29, **options})  # type: ignore[arg-type]
    made.write_compressed(0, b"x")
    image = made.build()
    table = image.l2_table(0)
    image.data[table : table + 8 * len(words)] = words.astype(">u8").tobytes()
    end = at + len(stored)
    image.data.extend(bytes(max(0, end - len(image.data))))
    image.data[at:end] = stored
    return image


@pytest.mark.parametrize("options", [{}, {"zstd": True}, {"cluster_bits": 21, "size": 1 << 34}])
def test_of_ranges_that_lie_over_each_other_some_are_unpacked_and_the_rest_is_told(
    options: dict[str, object],
) -> None:
    rows, at = 8000, 64 << 20
    word = entries.COMPRESSED | 1 << ImageBuilder(**options).geometry.compressed_shift  # type: ignore[arg-type]
    words = (word | at) + np.arange(rows, dtype=np.uint64)
    image = full_of(words, at=at, stored=random.Random(1).randbytes(1 << 14), **options)
    before, report = check_image(image.source), looked_at(image)
    assert (before.counters.check_errors, report.counters.check_errors) == (0, 1)
    assert report.verdict == "incomplete"
    assert not report.compressed_looked_at
    assert report.hidden == before.hidden
    (row,) = report.rows(FindingKind.CHECK_STOPPED)
    size = image.cluster_size
    assert rows - MAX_OVER_BYTES // size <= row.found < rows
    assert len(unreadable(report)) == rows - row.found
    assert f"{row.found} more lie over others" in str(report.stopped[0])
    assert "not unpacked" in report_txt(report, "x").decode()


def test_what_begins_in_a_hole_is_unreadable_and_not_read() -> None:
    made = ImageBuilder(cluster_bits=21, size=1 << 30)
    made.write_compressed(0, b"x")
    image = made.build()
    table, shift = image.l2_table(0), image.geometry.compressed_shift
    longest = entries.COMPRESSED | ((1 << 62 - shift) - 1) << shift
    words = longest + (np.arange(1, 257, dtype=np.uint64) << np.uint64(32))
    image.data[table + 8 : table + 8 + 256 * 8] = words.astype(">u8").tobytes()
    source = Sparse.of(bytes(image.data), 1 << 42, 4096)
    report = check_image(source)
    before = source.bytes_read
    with_data = look_at_packed(source, report)
    assert len(unreadable(with_data)) == 256
    assert with_data.compressed_looked_at
    assert source.bytes_read - before < 16 << 20  # the table, and what is there


def test_no_sound_image_has_ranges_that_lie_over_each_other() -> None:
    """Small and large ones, one behind the other as closely as QEMU stores them."""
    shapes: tuple[dict[str, Any], ...] = (
        {},
        {"zstd": True},
        {"cluster_bits": 9, "size": 1 << 18},
        {"cluster_bits": 21},
    )
    for options in shapes:
        image = packed_image(**{"size": 1 << 28, **options})
        packed = find_packed(image.source, check_image(image.source), Meter())
        kind = int("zstd" in options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compressed, "MAX_OVER_BYTES", 0)
            chosen, nothing, left = packed.sorted_out(image.source, kind)
        assert (len(chosen), len(nothing), left) == (len(packed), 0, 0)


def test_spans_hold_every_range_once_and_no_more_than_a_reader_has_room_for() -> None:
    image = packed_image(clusters=400, size=1 << 25)
    packed = find_packed(image.source, check_image(image.source), Meter())
    parts = list(packed.spans())
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == len(packed)
    for part in parts:
        offset, length = packed.ranges(part)
        assert (offset + length).max() - offset[0] <= SPAN_BYTES + int(length.max())
    words = [image.word(image.l2_at(cluster)) for cluster in range(0, 800, 2)]
    ranges = entries.compressed_ranges(np.array(words, dtype=np.uint64), image.geometry)
    assert np.array_equal(np.sort(np.stack(ranges)), np.sort(np.stack(packed.ranges(slice(None)))))


@dataclass
class BadSectors:
    """A source that fails wherever a read touches one of some offsets."""

    source: Source
    bad: Sequence[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for at in self.bad:
            if offset <= at < offset + len(buffer):
                raise ImageReadFailed("image", at, "Input/output error")
        self.source.read_into(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self.source.data_extents(offset, length)


def test_what_cannot_be_read_is_told_from_its_neighbours() -> None:
    image = packed_image()
    report = check_image(image.source)
    source = BadSectors(image.source, [stored_at(image, 10) + 1])
    found = unreadable(look_at_packed(source, report))
    # The last sector of one is the first of the next: both need it.
    assert 10 * image.cluster_size in found
    assert len(found) <= 2


def test_of_an_image_that_cannot_be_read_nothing_more_is_known() -> None:
    image = packed_image()
    image.change_header(crypt_method=9)
    report = looked_at(image)
    assert report.verdict == "unreadable"
    assert not report.compressed_looked_at


def test_it_can_be_stopped_and_says_how_far_it_is() -> None:
    image = packed_image()
    report, told = check_image(image.source), []
    look_at_packed(image.source, report, progress=lambda *step: told.append(step))
    assert told[-1] == ("compressed clusters", 40, 40)
    with pytest.raises(Cancelled):
        look_at_packed(image.source, report, progress=unless(lambda: True))


def instarfs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "instarfs", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_command_says_whether_it_looked(tmp_path: Path) -> None:
    image, path = packed_image(), tmp_path / "image.qcow2"
    spoil(image, 6)
    path.write_bytes(image.data)
    without = instarfs("check", "--output", "json", path)
    value = json.loads(without.stdout)
    assert (without.returncode, value["compressed-looked-at"]) == (0, False)
    done = instarfs("check", "--data", "--output", "json", path)
    value = json.loads(done.stdout)
    assert (done.returncode, value["compressed-looked-at"]) == (2, True)
    assert value["counts"] == {"compressed-unreadable": 1}
    text = instarfs("check", "--data", path)
    assert f"guest offset {6 * image.cluster_size}" in text.stderr
    refused = instarfs("check", "--data", "-r", "all", path)
    assert refused.returncode == 1
    assert "--data is for a check alone" in refused.stderr


def test_a_report_says_that_nobody_looked() -> None:
    image, line = packed_image(), "compressed clusters were not unpacked"
    report = check_image(image.source)
    assert line in report_txt(report, "x").decode()
    assert line not in report_txt(look_at_packed(image.source, report), "x").decode()
    plain = ImageBuilder(cluster_bits=12, size=1 << 20)
    plain.write(0, b"plain")
    assert line not in report_txt(check_image(plain.build().source), "x").decode()


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_it_is_what_qemu_cannot_read(kind: str, tmp_path: Path) -> None:
    """Bytes flipped anywhere in what a real image stores: cluster by cluster as QEMU reads them."""
    rng, raw, image = random.Random(kind), tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(b"".join(bytes(rng.choices(b"abcdefgh", k=4096)) for _ in range(160)))
    options = f"cluster_size=4k,compression_type={kind}"
    command: list[str | Path] = [
        "qemu-img",
        "convert",
        "-c",
        "-O",
        "qcow2",
        "-o",
        options,
        raw,
        image,
    ]
    subprocess.run(command, check=True)
    data = bytearray(image.read_bytes())
    whole = Image(bytearray(data))
    first = min(stored_at(whole, cluster) for cluster in range(160))
    for _ in range(60):
        data[rng.randrange(first, len(data))] ^= 1 << rng.randrange(8)
    image.write_bytes(data)
    reads = [word for n in range(160) for word in ("-c", f"read -q {n * 4096} 4096")]
    done = subprocess.run(
        ["qemu-io", "-r", *reads, image], check=False, capture_output=True, text=True
    )
    spoiled = Image(data)
    report = looked_at(spoiled)
    assert 0 < len(unreadable(report)) < 60
    assert (done.stdout + done.stderr).count("read failed") == len(unreadable(report))
    for at in unreadable(report):
        alone: list[str | Path] = ["qemu-io", "-r", "-c", f"read -q {at} 4096", image]
        assert (
            "read failed"
            in subprocess.run(alone, check=False, capture_output=True, text=True).stdout
        )
