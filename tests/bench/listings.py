"""A listing of very many snapshots, and all that is said of them, beside folders on a disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from planner.qcow2.header import MAGIC, V3_LENGTH, Header, encode_header
from planner.qcow2.snapshots import Snapshot, encode_snapshot
from tests.bench.checks import DISK, command, served
from tests.bench.disks import CLUSTER, CLUSTER_BITS
from tests.bench.race import Race, Row, Side, process_cpu
from tests.bench.samples import Samples

OURS, PEER = "ls -l snapshots", "ls -l of folders on a disk"
READ, READ_PEER = "read snapshots/*/info.json", "read as many files on a disk"

SNAPSHOTS = 65_536
"""As many as an image can have."""

DISK_BYTES = 64 << 20


def write_snapshots(path: Path) -> None:
    """An empty disk with all the snapshots there can be, which have one L1 table in common."""
    reftable, refblock, l1, shared, table = range(1, 6)
    entries = b"".join(map(_snapshot, range(SNAPSHOTS), [shared * CLUSTER] * SNAPSHOTS))
    end = table + -(-len(entries) // CLUSTER)
    refcounts = np.zeros(CLUSTER // 4, dtype=">u4")
    refcounts[:end] = 1
    refcounts[shared] = SNAPSHOTS
    header = Header(
        magic=MAGIC,
        version=3,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=CLUSTER_BITS,
        size=DISK_BYTES,
        crypt_method=0,
        l1_size=1,
        l1_table_offset=l1 * CLUSTER,
        refcount_table_offset=reftable * CLUSTER,
        refcount_table_clusters=1,
        nb_snapshots=SNAPSHOTS,
        snapshots_offset=table * CLUSTER,
        refcount_order=5,
        header_length=V3_LENGTH,
    )
    with path.open("wb") as file:
        file.truncate(end * CLUSTER)
        for cluster, content in (
            (0, encode_header(header)),
            (reftable, (refblock * CLUSTER).to_bytes(8, "big")),
            (refblock, refcounts.tobytes()),
            (table, entries),
        ):
            os.pwrite(file.fileno(), content, cluster * CLUSTER)


def _snapshot(number: int, l1_table: int) -> bytes:
    return encode_snapshot(
        Snapshot(
            offset=0,
            l1_table_offset=l1_table,
            l1_size=1,
            date_sec=1_700_000_000 + 60 * number,
            date_nsec=0,
            vm_clock_nsec=0,
            vm_state_size_32=0,
            extra_data=bytes(8) + DISK_BYTES.to_bytes(8, "big"),
            id_str=str(number + 1).encode(),
            name=f"minute {number}".encode(),
        )
    )


@contextmanager
def listed(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """Both, what belongs to whom and how large it is included."""
    image = samples.get("snapshots-65536", write_snapshots)
    with (
        served(image, samples) as mount,
        tempfile.TemporaryDirectory("-instarfs-folders", dir=DISK) as folder,
    ):
        for number in range(SNAPSHOTS):
            (Path(folder) / str(number)).mkdir()
        yield {
            OURS: Side(
                command("ls", "-l", mount / "snapshots"),
                daemon_cpu=partial(process_cpu, mount.process.pid),
            ),
            PEER: Side(command("ls", "-l", folder)),
        }


@contextmanager
def read_through(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """Both, each file in a folder of its own."""
    image = samples.get("snapshots-65536", write_snapshots)
    with (
        served(image, samples) as mount,
        tempfile.TemporaryDirectory("-instarfs-folders", dir=DISK) as name,
    ):
        folder, content = Path(name), (mount / "snapshots/0/info.json").read_bytes()
        for number in range(SNAPSHOTS):
            (folder / str(number)).mkdir()
            (folder / str(number) / "info.json").write_bytes(content)
        yield {
            READ: Side(
                partial(_read_each, mount / "snapshots"),
                daemon_cpu=partial(process_cpu, mount.process.pid),
            ),
            READ_PEER: Side(partial(_read_each, folder)),
        }


def _read_each(folder: Path) -> None:
    for number in range(SNAPSHOTS):
        (folder / str(number) / "info.json").read_bytes()


RACES = (
    Race("list-snapshots", listed, (Row("ls -l of 65,536 snapshots", OURS, PEER, more=3),)),
    Race(
        "read-snapshots",
        read_through,
        (Row("read info.json of 65,536 snapshots", READ, READ_PEER, more=10),),
    ),
)
