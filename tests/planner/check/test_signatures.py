"""What content begins with: each magic number is known, and nothing is seen in noise."""

import gzip
import io
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from planner.check.signatures import NAMES, SIGNATURES, TEXT, Signature, recognise

CLUSTER = 1 << 17


def name_of(content: bytes, size: int = CLUSTER) -> str:
    row = np.frombuffer(content[:size].ljust(size, b"\0"), dtype=np.uint8)
    return NAMES[int(recognise(row[None])[0])]


def noise(size: int = CLUSTER) -> bytearray:
    return bytearray(np.random.default_rng(1).integers(128, 256, size, dtype=np.uint8).tobytes())


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda it: f"{it.name} at {it.offset}")
def test_every_signature_is_seen_where_it_stands(signature: Signature) -> None:
    content = noise()
    content[signature.offset : signature.offset + len(signature.magic)] = signature.magic
    assert name_of(bytes(content)) == signature.name


def test_noise_and_zeros_begin_with_nothing() -> None:
    rows = np.random.default_rng(2).integers(0, 256, (4096, 512), dtype=np.uint8)
    assert np.count_nonzero(recognise(rows)) <= 2
    assert name_of(b"") == ""


def test_what_python_writes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"content")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a"), io.BytesIO())
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("create table a (b)")
    database.close()
    names = {name: name_of((tmp_path / name).read_bytes()) for name in ("a.zip", "a.tar", "a.db")}
    names["a.gz"] = name_of(gzip.compress(b"content"))
    assert names == {
        "a.zip": "zip archive",
        "a.tar": "tar archive",
        "a.db": "SQLite database",
        "a.gz": "gzip data",
    }


def ext_superblock(log_block_size: int) -> bytes:
    content = noise()
    content[1024 + 0x18 : 1024 + 0x1C] = log_block_size.to_bytes(4, "little")
    content[1024 + 0x38 : 1024 + 0x3A] = b"\x53\xef"
    return bytes(content)


def test_an_ext_superblock_needs_a_block_size() -> None:
    assert name_of(ext_superblock(2)) == "ext2/3/4 superblock"
    assert name_of(ext_superblock(7)) == ""


def test_a_partition_table_needs_partitions() -> None:
    sector = bytearray(512)
    sector[510:] = b"\x55\xaa"
    assert name_of(bytes(sector), 512) == ""
    sector[446 + 4] = 0x83
    assert name_of(bytes(sector), 512) == "MBR partition table"
    sector[446] = 0x12
    assert name_of(bytes(sector), 512) == ""


def test_text_may_end_in_zeros_and_nothing_else() -> None:
    line = "2024-03-01 host7 started, größer als nötig\n".encode()
    assert name_of(line) == name_of(line * 100) == TEXT
    assert name_of(line + bytes(8) + line) == ""
    assert name_of(b"short") == ""
    assert name_of(b"\x01" + line) == ""


def test_a_cluster_may_be_shorter_than_a_signature_is_deep() -> None:
    assert name_of(b"\x7fELF", 512) == "ELF program"
