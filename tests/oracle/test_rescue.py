"""Headers that are gone, found again: every byte of the disk is what `qemu-img` read before.

Of a disk that has lost its header only its own partitions and file system tell where it ended: what
a table maps behind that, a machine's state, may count to it. Up to there all is compared.
"""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path

import pytest

from planner.qcow2.header import Header, decode_header
from planner.rescue.headers import find_headers
from planner.rescue.hypotheses import Hypothesis
from planner.source import Bytes
from tests.images.matrix import MATRIX, Row, build, copy, random_row
from tests.mount.mounts import instarfs
from tests.oracle.scene import FileSource

# What lies in other files goes by the names that a header has; where refcounts are out of date, and
# the disk lies elsewhere, nothing agrees enough to be believed.
FOUND = [row for row in MATRIX if not (row.data_file or row.lazy) and row.cluster_bits <= 16]
NOT_FOUND = [row for row in MATRIX if row.data_file]


def without_header(image: Path) -> tuple[Path, Header]:
    lost = image.with_name("lost")
    copy(image, lost)
    with lost.open("r+b") as file:
        header = decode_header(file.read(104))
        file.seek(0)
        file.write(bytes(1 << header.cluster_bits))
    return lost, header


def best_of(lost: Path) -> Hypothesis | None:
    with lost.open("rb") as file:
        return find_headers(FileSource(file.fileno())).best


def difference(one: Path, other: Path) -> int | None:
    """Where the disks begin to differ, as `qemu-img` reads them."""
    done = subprocess.run(
        ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", one, other],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    return int(re.findall(r"offset (\d+)", done.stdout)[0])


def must_come_back(row: Row, folder: Path, seed: str) -> None:
    image = build(row, folder, seed)
    lost, header = without_header(image)
    best = best_of(lost)
    assert best is not None
    with lost.open("r+b") as file:
        file.write(best.content)
    assert best.header.crypt_method in (header.crypt_method, 0)
    if row.encryption or row.backing:
        return  # QEMU wants a password, or a file whose name is gone
    at = difference(image, lost)
    assert at is None or at >= header.size


@pytest.mark.parametrize("row", random.Random(1).sample(FOUND, 14), ids=lambda row: row.name)
def test_a_disk_comes_back_byte_for_byte(row: Row, tmp_path: Path) -> None:
    must_come_back(row, tmp_path, row.name)


@pytest.mark.parametrize("row", NOT_FOUND, ids=lambda row: row.name)
def test_what_lies_in_another_file_is_not_guessed(row: Row, tmp_path: Path) -> None:
    lost, _ = without_header(build(row, tmp_path, row.name))
    assert best_of(lost) is None


def test_any_combination_comes_back(seed: int, cases: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    for case in range(max(3, cases // 100)):
        row = random_row(rng)
        if row.data_file or row.lazy or row.killed or row.cluster_bits > 16:
            continue
        folder = tmp_path / str(case)
        folder.mkdir()
        must_come_back(row, folder, str(case))


# ---- the command ----


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(Row(cluster_bits=12, snapshots=1), tmp_path, "command")


def test_rescue_writes_a_new_file_and_leaves_the_image_as_it_is(image: Path) -> None:
    lost, _ = without_header(image)
    before, status = lost.read_bytes(), lost.stat()
    out = image.with_name("out.qcow2")
    told = instarfs("rescue", lost)
    assert told.returncode == 0
    assert "instarfs rescue -o RESCUED.qcow2" in told.stdout
    done = instarfs("rescue", "-o", out, lost)
    assert (done.returncode, done.stderr) == (0, "")
    assert lost.read_bytes() == before
    assert lost.stat().st_mtime_ns == status.st_mtime_ns
    subprocess.run(["qemu-img", "check", "-q", out], check=True)
    assert out.stat().st_mode & 0o777 == 0o600
    again = instarfs("rescue", "-o", out, lost)
    assert again.returncode == 1
    assert "nothing is written over it" in again.stderr


def test_rescue_of_a_sound_image_has_nothing_to_do(image: Path) -> None:
    before = image.read_bytes()
    done = instarfs("rescue", image)
    assert (done.returncode, done.stderr) == (0, "")
    assert "makes sense; a check finds nothing wrong" in done.stdout
    # It was not looked everywhere: that is said, with how to.
    assert f"instarfs rescue --free -- {image}" in done.stdout
    everywhere = instarfs("rescue", "--free", image)
    assert everywhere.returncode == 0
    assert "--free" not in everywhere.stdout
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--assume", "bogus=1"), "fields are"),
        (("--assume", "size"), "is a number"),
        (("--header", "/nowhere"), "/nowhere"),
    ],
)
def test_what_is_not_understood_is_one_line(
    image: Path, arguments: tuple[str, ...], says: str
) -> None:
    refused = instarfs("rescue", *arguments, image)
    assert refused.returncode == 1
    assert says in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_of_garbage_nothing_is_believed_and_nothing_written(tmp_path: Path) -> None:
    garbage, out = tmp_path / "garbage", tmp_path / "out"
    garbage.write_bytes(random.Random(1).randbytes(1 << 20))
    refused = instarfs("rescue", "-o", out, garbage)
    assert refused.returncode == 1
    assert "nothing was written" in refused.stderr
    assert not out.exists()


def test_assumed_fields_and_like_headers_are_taken(image: Path) -> None:
    lost, header = without_header(image)
    for arguments in (["--assume", f"size={header.size:#x}"], ["--header", str(image)]):
        out = image.with_name("out.qcow2")
        assert instarfs("rescue", "-o", out, *arguments, lost).returncode == 0
        assert decode_header(out.read_bytes()[:104]).size == header.size
        out.unlink()


def test_bytes_in_memory_are_a_source_too(image: Path) -> None:
    lost, _ = without_header(image)
    assert find_headers(Bytes(lost.read_bytes())).best is not None
