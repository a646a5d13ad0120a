"""Where QEMU has no sensible answer, and ours: one test for every entry of `EXCEPTIONS`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from planner.qcow2.header import CRYPT_AES
from tests.images.matrix import Row, build, run
from tests.oracle import judge as judging
from tests.oracle.judge import EXCEPTIONS, Judgement, judge
from tests.oracle.scene import Scene, dissect

PLAIN = Row(cluster_bits=9)


def _create(directory: Path, options: str, *more: str) -> Path:
    image = directory / "image.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *more]
    run(*command, image, "64k", cwd=directory)
    return image


def _excused(judged: Judgement, name: str) -> None:
    assert judged.exception == name, judged
    assert judged.agreed, judged


def test_every_exception_is_here_and_reasoned() -> None:
    names = [one.name for one in EXCEPTIONS]
    assert len(set(names)) == len(names)
    for one in EXCEPTIONS:
        assert one.reason.endswith(".")
        assert f"test_{one.name.replace('-', '_')}" in globals(), one.name


def test_asserts(tmp_path: Path) -> None:
    """A snapshot's L1 table that ends at 2^64: `entries < (UINT64_C(1) << (64 - 9))' failed."""
    image = _create(tmp_path, "cluster_size=512")
    run("qemu-img", "snapshot", "-c", "snap", image)
    anatomy = dissect(image)
    with Scene(image, anatomy) as scene:
        scene.put(anatomy.snapshots[0].offset, (1 << 64) - 512)
    judged = judge(PLAIN, image)
    _excused(judged, "asserts")
    assert judged.ours.exit_code == 1
    assert "l1_table_offset of snapshot 0" in judged.ours.stderr


def test_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backing file is a FIFO: QEMU waits for a writer."""
    backing = tmp_path / "backing"
    run("qemu-img", "create", "-q", "-f", "raw", backing, "64k")
    image = _create(tmp_path, "cluster_size=512", "-b", "backing", "-F", "raw")
    backing.unlink()
    os.mkfifo(backing)
    monkeypatch.setattr(judging, "QEMU_SECONDS", 1)
    judged = judge(PLAIN, image)
    _excused(judged, "hangs")
    assert judged.ours.exit_code == 0


def test_too_many_clusters(tmp_path: Path) -> None:
    image = _create(tmp_path, "cluster_size=512")
    os.truncate(image, 512 << 31)
    judged = judge(PLAIN, image)
    _excused(judged, "too-many-clusters")
    assert judged.ours.exit_code == 0


@pytest.mark.parametrize("size", [4, 71])
def test_header_cut_off(tmp_path: Path, size: int) -> None:
    """QEMU takes 4 bytes for a raw image, and 71 of 72 for a whole header."""
    image = _create(tmp_path, "compat=0.10")
    os.truncate(image, size)
    judged = judge(Row(version=2), image)
    _excused(judged, "header-cut-off")
    assert judged.ours.exit_code == 1


def test_data_file_missing(tmp_path: Path) -> None:
    image = _create(tmp_path, "cluster_size=512,data_file=data.raw")
    (tmp_path / "data.raw").unlink()
    judged = judge(PLAIN, image)
    _excused(judged, "data-file-missing")
    assert judged.ours.exit_code == 0


def test_backing_file_missing(tmp_path: Path) -> None:
    image = _create(tmp_path, "cluster_size=512", "-b", "backing", "-F", "raw", "-u")
    judged = judge(PLAIN, image)
    _excused(judged, "backing-file-missing")
    assert judged.ours.exit_code == 0


def test_version_1(tmp_path: Path) -> None:
    image = _create(tmp_path, "cluster_size=512")
    with Scene(image, dissect(image)) as scene:
        scene.put(4, 1, 4)
    judged = judge(PLAIN, image)
    _excused(judged, "version-1")
    assert judged.ours.exit_code == 63


def test_format_given(tmp_path: Path) -> None:
    row = Row(cluster_bits=12, encryption="aes")
    image = build(row, tmp_path, "format given")
    with Scene(image, dissect(image)) as scene:
        scene.put(0, 0, 4)
    judged = judge(row, image)
    _excused(judged, "format-given")
    assert judged.ours.exit_code == 63


def test_secret_missing(tmp_path: Path) -> None:
    image = _create(tmp_path, "cluster_size=512")
    with Scene(image, dissect(image)) as scene:
        scene.put(32, CRYPT_AES, 4)
    judged = judge(PLAIN, image)
    _excused(judged, "secret-missing")
    assert judged.ours.exit_code == 0


def test_luks_header(tmp_path: Path) -> None:
    """QEMU opens the encryption header, which is not there any more; its clusters are."""
    row = Row(cluster_bits=12, encryption="luks")
    image = build(row, tmp_path, "luks header")
    anatomy = dissect(image)
    start = anatomy.crypto_extension
    assert start is not None
    with Scene(image, anatomy) as scene:
        scene.write(scene.get(start), bytes(512))
    judged = judge(row, image)
    _excused(judged, "luks-header")
    assert judged.ours.exit_code == 0
