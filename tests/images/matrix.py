"""Real images, made by the installed qemu-img and qemu-io from a seed.

What an image of a row contains is decided here and only here. A row names its features; `build`
makes one base image of it, small and sparse, which every case of the row then copies and damages.
Nothing here damages an image or judges one.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

KEY = "id=s0,data=sesame"
"""How the QEMU tools are given the passphrase of encrypted images."""
BUSY = "Unable to get accurate CPU usage"
LUKS_ATTEMPTS = 50
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """One combination of features. `settled` gives the nearest that QEMU can make."""

    name: str = "plain"
    version: int = 3
    cluster_bits: int = 16
    refcount_bits: int = 16
    extended_l2: bool = False
    compression: str = ""  # "zlib", "zstd": some clusters are compressed
    encryption: str = ""  # "aes", "luks"
    data_file: str = ""  # "data", "raw"
    backing: str = ""  # "raw", "qcow2"
    preallocation: str = "off"  # "metadata", "falloc", "full"
    lazy: bool = False
    snapshots: int = 0
    bitmaps: int = 0
    origin: str = "create"  # "convert": written by qemu-img convert
    killed: bool = False  # the last writer died: dirty bit, bitmaps in use
    resized: bool = False
    amended: bool = False
    empty: bool = False

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    def settled(self) -> Row:
        """Without what contradicts the rest."""
        row = self
        for applies, instead in _CONTRADICTIONS:
            if applies(row):
                row = replace(row, **instead)
        # Compressed clusters share host clusters, and each snapshot is one more reference to all.
        highest = 1 if row.compression and row.refcount_bits < 8 else 1 << row.refcount_bits
        return replace(row, snapshots=max(0, min(row.snapshots, highest - 2)))


_CONTRADICTIONS: tuple[tuple[Callable[[Row], bool], dict[str, Any]], ...] = (
    (
        lambda row: row.version == 2,
        {"refcount_bits": 16, "extended_l2": False, "lazy": False, "data_file": "", "bitmaps": 0},
    ),
    (lambda row: row.version == 2 and row.compression == "zstd", {"compression": "zlib"}),
    (lambda row: row.version == 2 and row.snapshots > 0, {"resized": False}),
    (lambda row: row.extended_l2 and row.cluster_bits < 14, {"cluster_bits": 14}),
    (
        lambda row: bool(row.encryption),
        {"compression": "", "origin": "create", "data_file": "", "backing": ""},
    ),
    (
        lambda row: bool(row.data_file),
        {"compression": "", "snapshots": 0, "origin": "create", "amended": False},
    ),
    (lambda row: row.data_file == "raw", {"backing": "", "preallocation": "metadata"}),
    (lambda row: bool(row.backing) and not row.extended_l2, {"preallocation": "off"}),
    (lambda row: row.origin == "convert", {"backing": "", "preallocation": "off"}),
    (lambda row: row.preallocation != "off", {"compression": ""}),
    (lambda row: row.empty, {"origin": "create", "resized": False, "killed": False}),
    # QEMU amends every refcount that fits the blocks: minutes for large clusters.
    (lambda row: row.cluster_bits > 14, {"amended": False}),
)


def _matrix() -> Iterator[Row]:
    for bits in range(9, 22):
        yield Row(f"cluster-{1 << bits}", cluster_bits=bits, snapshots=bits % 3)
    for order in range(7):
        width = 1 << order
        yield Row(f"refcount-{width}", refcount_bits=width, cluster_bits=9 + order, snapshots=2)
    for bits in (9, 12, 16, 21):
        yield Row(f"v2-{1 << bits}", version=2, cluster_bits=bits, snapshots=bits % 4)
    yield Row("v2-compressed", version=2, cluster_bits=12, compression="zlib", snapshots=1)
    yield Row("v2-aes", version=2, cluster_bits=12, encryption="aes", snapshots=1)
    yield Row("v2-luks", version=2, cluster_bits=14, encryption="luks")
    yield Row("v2-backing", version=2, cluster_bits=12, backing="raw", snapshots=1)
    yield Row("v2-amended", version=2, cluster_bits=12, amended=True, snapshots=1)
    for bits in (14, 16, 21):
        yield Row(f"extended-{1 << bits}", cluster_bits=bits, extended_l2=True, snapshots=bits % 3)
    yield Row("extended-zlib", cluster_bits=14, extended_l2=True, compression="zlib", snapshots=1)
    yield Row("extended-backing", cluster_bits=14, extended_l2=True, backing="qcow2", snapshots=1)
    yield Row("extended-data", cluster_bits=14, extended_l2=True, data_file="data")
    yield Row("zlib", cluster_bits=12, compression="zlib", snapshots=1)
    yield Row("zstd", cluster_bits=16, compression="zstd", snapshots=1)
    yield Row("zstd-512", cluster_bits=9, compression="zstd")
    yield Row("zlib-2m", cluster_bits=21, compression="zlib")
    yield Row("convert-zlib", cluster_bits=12, compression="zlib", origin="convert")
    yield Row("convert-zstd", cluster_bits=14, compression="zstd", origin="convert", snapshots=2)
    yield Row("snapshots", cluster_bits=12, snapshots=5)
    yield Row("snapshots-512", cluster_bits=9, snapshots=4)
    yield Row("bitmaps", cluster_bits=12, bitmaps=3)
    yield Row("bitmaps-512", cluster_bits=9, bitmaps=2, snapshots=1)
    yield Row("bitmaps-in-use", cluster_bits=12, bitmaps=2, killed=True)
    yield Row("data-file", cluster_bits=12, data_file="data")
    yield Row("data-file-raw", cluster_bits=14, data_file="raw", bitmaps=1)
    yield Row("luks", cluster_bits=9, encryption="luks", refcount_bits=8, snapshots=1)
    yield Row("aes", cluster_bits=12, encryption="aes", snapshots=1)
    yield Row("backing", cluster_bits=12, backing="qcow2", snapshots=1, bitmaps=1)
    yield Row("lazy-dirty", cluster_bits=12, lazy=True, killed=True, snapshots=1)
    yield Row("metadata", cluster_bits=12, preallocation="metadata", snapshots=1)
    yield Row("falloc", cluster_bits=14, preallocation="falloc")
    yield Row("full", cluster_bits=12, preallocation="full", lazy=True)
    yield Row("resized", cluster_bits=10, resized=True, snapshots=2)
    yield Row("amended", cluster_bits=12, amended=True, refcount_bits=8, snapshots=1)
    yield Row("empty", empty=True, cluster_bits=12, snapshots=1)


MATRIX = tuple(row.settled() for row in _matrix())


def random_row(rng: random.Random) -> Row:
    """Any combination; small clusters are likelier, their metadata is denser."""

    def maybe(value: object, chance: float) -> object:
        return value if rng.random() < chance else type(value)()

    chosen: dict[str, Any] = {
        "name": "mixed",
        "version": rng.choice((2, 3, 3, 3, 3)),
        "cluster_bits": rng.choice((9, 9, 10, 11, 12, 12, 13, 14, 14, 15, 16, 17, 18, 19, 20, 21)),
        "refcount_bits": 1 << rng.randrange(7),
        "extended_l2": rng.random() < 0.25,
        "compression": maybe(rng.choice(("zlib", "zstd")), 0.4),
        "encryption": maybe(rng.choice(("aes", "aes", "luks")), 0.12),
        "data_file": maybe(rng.choice(("data", "raw")), 0.12),
        "backing": maybe(rng.choice(("raw", "qcow2")), 0.15),
        "preallocation": rng.choice(("off", "off", "off", "metadata", "falloc")),
        "lazy": rng.random() < 0.2,
        "snapshots": rng.choice((0, 0, 1, 1, 2, 3)),
        "bitmaps": rng.choice((0, 0, 0, 1, 2)),
        "origin": rng.choice(("create", "create", "create", "convert")),
        "killed": rng.random() < 0.15,
        "resized": rng.random() < 0.15,
        "amended": rng.random() < 0.1,
    }
    assert chosen.keys() <= {field.name for field in fields(Row)}
    return Row(**chosen).settled()


def describe(row: Row) -> str:
    """The features of a row that differ from a plain image, for a failure message."""
    plain = Row()
    named = [
        f"{field.name}={getattr(row, field.name)}"
        for field in fields(Row)
        if getattr(row, field.name) != getattr(plain, field.name)
    ]
    return " ".join(named)


def check_command(row: Row, path: Path) -> list[str]:
    """The `qemu-img check` command for an image of this row, to be run where the image is."""
    command = ["qemu-img", "check", "--output=json"]
    # The format of the file is QEMU's to find out, as it is ours; only a secret has to name it.
    return [*command, *(_options(row, path) if row.encryption else [str(path)])]


def repair_command(row: Row, path: Path, tier: str) -> list[str]:
    """The `qemu-img check -r` command for an image of this row, to be run where the image is."""
    return [*check_command(row, path)[:3], "-r", tier, *check_command(row, path)[3:]]


def convert_command(row: Row, path: Path, snapshot: str | None, raw: Path) -> list[str]:
    """The command that copies a disk, or a snapshot by its id, out to *raw*.

    What cannot be read is left out, and told on stderr.
    """
    chosen = ["-l", f"snapshot.id={snapshot}"] if snapshot else []
    named = _options(row, path) if row.encryption else [str(path)]
    return ["qemu-img", "convert", "--salvage", "-O", "raw", *chosen, *named, str(raw)]


BASE_NAME = "base.qcow2"
"""What a base image is called in its directory."""


def build(row: Row, directory: Path, seed: str) -> Path:
    """Make the base image of *row* in *directory*; what it holds follows from *seed*."""
    builder = _Builder(row, directory, random.Random(seed))
    builder.build()
    return builder.image


def run(*command: str | Path, cwd: Path | None = None, may_die: bool = False) -> None:
    """Run a QEMU tool; its complaint becomes the error."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=cwd, timeout=60)
    if done.returncode and not may_die:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")


def run_until_calm(*command: str | Path, cwd: Path | None = None) -> None:
    """The same of one that makes a LUKS header, for as long as the machine is busy.

    QEMU measures it to choose the iterations, and fails where it is.
    """
    for _ in range(LUKS_ATTEMPTS):
        try:
            return run(*command, cwd=cwd)
        except RuntimeError as error:
            if BUSY not in str(error):
                raise
        time.sleep(0.1)
    raise RuntimeError(f"{' '.join(map(str, command))}: {BUSY}, {LUKS_ATTEMPTS} times")


def _options(row: Row, path: Path) -> list[str]:
    """How to name the image to a QEMU tool, its secret included."""
    options = f"driver=qcow2,file.driver=file,file.filename={path}"
    if not row.encryption:
        return ["--image-opts", options]
    return ["--object", f"secret,{KEY}", "--image-opts", f"{options},encrypt.key-secret=s0"]


class _Builder:
    def __init__(self, row: Row, directory: Path, rng: random.Random) -> None:
        self.row = row
        self.rng = rng
        self.directory = directory
        self.image = directory / BASE_NAME
        self.size = self._choose_size()
        self.touched: set[int] = set()

    def _choose_size(self) -> int:
        """Some L2 tables' worth, ending within a cluster; small where metadata is preallocated."""
        row, rng = self.row, self.rng
        if row.empty:
            return 0
        cluster = row.cluster_size
        coverage = cluster // (16 if row.extended_l2 else 8) * cluster
        size = rng.randrange(coverage // 2, 3 * coverage)
        limit = 24 * cluster if row.preallocation != "off" else size
        if row.origin == "convert":
            limit = min(limit, max(64 * cluster, 4 * MIB))
        if row.bitmaps:
            limit = min(limit, 4 * GIB)
        return max(1, min(size, limit) // 512) * 512

    def build(self) -> None:
        row = self.row
        self._create()
        if not row.empty:
            self._write(4)
        for number in range(row.bitmaps):
            granularity = self.rng.choice(("512", "64k", "1M")) if self.size < 64 * MIB else "64k"
            self._tool("bitmap", ["--add", "-g", granularity], f"bitmap{number}")
            if number == 1:
                self._tool("bitmap", ["--disable"], "bitmap1")
        self._take_snapshots()
        if row.resized:
            self._resize()
        if row.amended:
            self._amend()
        if row.bitmaps and not row.empty:
            self._write(2)
        if row.killed and not row.empty:
            self._write(2, end="sigraise 9")

    def _tool(self, verb: str, flags: list[str], *arguments: str) -> None:
        """qemu-img VERB FLAGS IMAGE ARGUMENTS."""
        options = _options(self.row, self.image)
        run("qemu-img", verb, *flags, *options, *arguments, cwd=self.directory)

    def _create(self) -> None:
        row = self.row
        options = ",".join(self._create_options())
        if row.origin == "convert":
            self._convert(options)
            return
        backing = self._make_backing() if row.backing else []
        secret = ["--object", f"secret,{KEY}"] if row.encryption else []
        command = ["qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options, *backing]
        run_until_calm(*command, self.image, str(self.size), cwd=self.directory)

    def _create_options(self) -> list[str]:
        row = self.row
        level = "0.10" if row.version == 2 else "1.1"
        options = [f"cluster_size={row.cluster_size}", f"compat={level}"]
        if row.version == 3:
            options += [f"refcount_bits={row.refcount_bits}"]
            options += [f"extended_l2={'on' if row.extended_l2 else 'off'}"]
            options += [f"lazy_refcounts={'on' if row.lazy else 'off'}"]
        if row.compression == "zstd":
            options.append("compression_type=zstd")
        if row.encryption:
            options += [f"encrypt.format={row.encryption}", "encrypt.key-secret=s0"]
        if row.encryption == "luks":
            options.append("encrypt.iter-time=10")
        if row.data_file:
            raw = "on" if row.data_file == "raw" else "off"
            options += ["data_file=data.raw", f"data_file_raw={raw}"]
        if row.preallocation != "off":
            options.append(f"preallocation={row.preallocation}")
        return options

    def _make_backing(self) -> list[str]:
        form = self.row.backing
        size = max(512, self.size // self.rng.choice((1, 2)) // 512 * 512)
        run("qemu-img", "create", "-q", "-f", form, self.directory / "backing", str(size))
        return ["-b", "backing", "-F", form]

    def _convert(self, options: str) -> None:
        source = self.directory / "source.raw"
        with source.open("wb") as file:
            file.truncate(self.size)
            for _ in range(12):
                file.seek(self.rng.randrange(self.size))
                room = self.size - file.tell()
                file.write(self.rng.randbytes(min(room, self.rng.choice((512, 5000, 40000)))))
                self.touched.update(range(file.tell() // self.row.cluster_size + 1))
        packed = ["-c"] if self.row.compression else []
        command = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", *packed, "-o", options]
        run(*command, source, self.image)
        source.unlink()

    def _take_snapshots(self) -> None:
        names = []
        for number in range(self.row.snapshots):
            names.append("snap" + "x" * self.rng.choice((0, 1, 5, 60)) + str(number))
            self._tool("snapshot", ["-c", names[-1]])
            if not self.row.empty:
                self._write(2)
        if len(names) >= 2 and self.rng.random() < 0.5:
            self._tool("snapshot", ["-d", names.pop(self.rng.randrange(len(names)))])
        # Going back to a snapshot is refused while a bitmap records, and is one more reference.
        refused = self.row.bitmaps or self.row.refcount_bits < 8
        if names and not refused and self.rng.random() < 0.25:
            self._tool("snapshot", ["-a", self.rng.choice(names)])

    def _resize(self) -> None:
        cluster = self.row.cluster_size
        larger = self.size + self.rng.randrange(1, 80) * cluster * cluster // 16 // 512 * 512
        larger = min(larger, self.size + GIB)
        if self.row.preallocation == "off" and not self.row.data_file:
            self._tool("resize", ["-q"], str(larger))
            self.size = larger
        if not self.row.snapshots and not self.row.bitmaps and self.rng.random() < 0.5:
            self.size = max(512, self.size // 2 // 512 * 512)
            self._tool("resize", ["-q", "--shrink"], str(self.size))

    def _amend(self) -> None:
        if self.row.version == 2:
            self._tool("amend", ["-q", "-o", "compat=1.1"])
        width = self.rng.choice((16, 32, 64))
        self._tool("amend", ["-q", "-o", f"refcount_bits={width}"])

    def _write(self, count: int, end: str = "") -> None:
        """One qemu-io run of *count* rounds of writes, spread over the L2 tables."""
        commands = [command for _ in range(count) for command in self._round()]
        if end:
            commands.append(end)
        flags = [word for command in commands for word in ("-c", command)]
        options = _options(self.row, self.image)
        # Compressing small clusters QEMU may fail: zstd with EIO at 512 bytes, and at 1024 it has
        # been seen to mark its own image as corrupt. What was written by then is an image, too.
        may_fail = bool(self.row.compression) and self.row.cluster_bits < 12
        command = ["qemu-io", "-d", "unmap", *flags, *options]
        run(*command, cwd=self.directory, may_die=bool(end) or may_fail)

    def _round(self) -> Iterator[str]:
        cluster = self.row.cluster_size
        first = self.rng.randrange(-(-self.size // cluster)) * cluster
        if self.row.compression:
            yield from self._compressed()
        yield self._command("write -q -P 1", first, min(cluster * self.rng.randint(1, 6), MIB))
        at = self.rng.randrange(-(-self.size // cluster)) * cluster
        some = cluster * self.rng.randint(1, 4)
        match self.rng.randrange(7):
            case 0:
                yield self._command("write -q -z", at, some)
            case 1:
                yield self._command("write -q -z -u", first, some)
            case 2:
                yield self._command("discard -q", first, some)
            case 3:
                at = self.rng.randrange(self.size // 512) * 512
                yield self._command("write -q -P 7", at, 512 * self.rng.randint(1, 9))
            case 4 if not self.row.data_file and self.row.preallocation == "off":
                # Saved machine state lies behind the disk's end, in L1 entries of its own.
                yield f"write -q -b 0 {min(some, MIB)}"

    def _compressed(self) -> Iterator[str]:
        """Writes to clusters that were never written: QEMU compresses no others."""
        cluster = self.row.cluster_size
        first = self.rng.randrange(-(-self.size // cluster))
        for index in range(first, min(first + self.rng.randint(1, 5), self.size // cluster)):
            if index not in self.touched:
                yield self._command(f"write -q -c -P {index % 256}", index * cluster, cluster)

    def _command(self, verb: str, offset: int, length: int) -> str:
        cluster = self.row.cluster_size
        length = min(length, self.size - offset)
        self.touched.update(range(offset // cluster, -(-(offset + length) // cluster)))
        return f"{verb} {offset} {length}"


def copy(base: Path, target: Path) -> None:
    """Copy an image, holes and all."""
    with base.open("rb") as source, target.open("wb") as sink:
        size = os.fstat(source.fileno()).st_size
        for start, end in data_extents(source.fileno(), 0, size):
            os.pwrite(sink.fileno(), os.pread(source.fileno(), end - start, start), start)
        sink.truncate(size)


def data_extents(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) of a file that are not holes."""
    while start < end:
        try:
            first = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError:
            return
        if first >= end:
            return
        start = min(end, os.lseek(descriptor, first, os.SEEK_HOLE))
        yield first, start
