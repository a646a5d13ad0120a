"""Copies of a disk: begun, stopped, gone on with, refused, and never written over anything else."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from instarfs.cli.main import main
from planner.guest.mapfile import BAD, READ, UNTRIED, Mapfile, parse_mapfile
from planner.qcow2 import entries
from planner.qcow2.header import CRYPT_AES
from tests.images.builder import MIB, Image, ImageBuilder
from tests.mount.small_disk import small_disk

CLUSTER = 1 << 16
DEADLINE = 60


class Said:
    """What the command printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Command = Callable[..., Said]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`instarfs export` in this process."""

    def run(*arguments: str | Path) -> Said:
        monkeypatch.setattr("sys.argv", ["instarfs", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        return Said(int(exited.value.code or 0), *capfd.readouterr())

    return run


def content(clusters: int) -> bytes:
    return random.Random(clusters).randbytes(clusters * CLUSTER)


def make(path: Path, clusters: int = 40, **options: object) -> Image:
    """An image with so many clusters of data, and as many holes behind them."""
    builder = ImageBuilder(size=2 * clusters * CLUSTER, **options)  # type: ignore[arg-type]
    builder.write(0, content(clusters))
    image = builder.build()
    path.write_bytes(image.data)
    return image


def listed(out: Path) -> Mapfile:
    return parse_mapfile(out.with_name(out.name + ".map").read_bytes())


def refused(said: Said, *words: str | Path) -> None:
    """One line, which names all of this."""
    assert said.code == 1
    assert said.out == ""
    assert said.err.count("\n") == 1
    for word in words:
        assert str(word) in said.err


def test_all_of_a_disk(export: Command, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    make(image)
    said = export(image, out)
    assert (said.code, said.err) == (0, "")
    assert said.out == f"{out}: all {80 * CLUSTER} bytes of the disk were read\n"
    assert out.read_bytes() == content(40) + bytes(40 * CLUSTER)
    assert out.stat().st_blocks * 512 < 42 * CLUSTER
    assert listed(out).blocks(READ) == [(0, 80 * CLUSTER)]
    assert out.stat().st_mode & 0o777 == 0o600
    before = out.stat().st_mtime_ns
    assert export("-q", image, out).out == ""
    assert out.stat().st_mtime_ns == before


def test_zeros_that_are_stored_are_holes(export: Command, tmp_path: Path) -> None:
    builder = ImageBuilder(size=8 * MIB)
    for cluster in range(100):
        builder.write(cluster, b"x".rjust(8192, b"\0") if cluster % 2 else bytes(CLUSTER))
    image, out = tmp_path / "image", tmp_path / "out"
    image.write_bytes(builder.build().data)
    assert export(image, out).code == 0
    expected = b"".join(
        b"x".rjust(8192, b"\0").ljust(CLUSTER, b"\0") * (at % 2) or bytes(CLUSTER)
        for at in range(100)
    )
    assert out.read_bytes() == expected.ljust(8 * MIB, b"\0")
    assert out.stat().st_blocks * 512 <= 50 * 4096


def test_a_huge_disk_costs_what_is_on_it(export: Command, tmp_path: Path) -> None:
    builder = ImageBuilder(size=1 << 42)
    builder.write((1 << 42) // CLUSTER - 1, b"the end".rjust(CLUSTER, b"\0"))
    image, out = tmp_path / "image", tmp_path / "out"
    image.write_bytes(builder.build().data)
    assert export(image, out).code == 0
    with out.open("rb") as file:
        file.seek(-7, os.SEEK_END)
        assert file.read() == b"the end"
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == (1 << 42) - 4096


@pytest.mark.parametrize("what", ["refcounts", "text"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_no_byte_of_a_table_that_was_overwritten_is_vouched_for(
    export: Command, tmp_path: Path, what: str, snapshot: bool
) -> None:
    """QEMU reads zeros there, or what the words happen to lead to, and says nothing."""
    path, out = tmp_path / "image", tmp_path / "out"
    builder = ImageBuilder(size=3 * CLUSTER * CLUSTER // 8)
    coverage = builder.geometry.l2_coverage
    for table in range(3):
        builder.write(table * coverage // CLUSTER, content(1))
    if snapshot:
        builder.take_snapshot("kept")
    image = builder.build()
    text = b"kernel: a line of a log\n" * 4096
    table = image.l2_table(1)
    image.data[table : table + CLUSTER] = {"refcounts": b"\0\1" * CLUSTER, "text": text}[what][
        :CLUSTER
    ]
    path.write_bytes(image.data)
    said = export(*(["--snapshot", "kept"] if snapshot else []), path, out)
    refused(said, f"{coverage} of {3 * coverage} bytes could not be read", f"{out}.map")
    assert listed(out).blocks(BAD) == [(coverage, 2 * coverage)]
    with out.open("rb") as file:
        for number, held in ((0, content(1)), (1, bytes(CLUSTER)), (2, content(1))):
            assert os.pread(file.fileno(), CLUSTER, number * coverage) == held
        file.seek(coverage)
        assert os.lseek(file.fileno(), coverage, os.SEEK_DATA) == 2 * coverage


@pytest.mark.parametrize("together", [1, 2, 1 << 14])
def test_what_cannot_be_read_is_a_hole_that_is_listed(
    together: int, export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken entries of all kinds, each beside a cluster that reads; of millions most are put away
    in columns.
    """
    monkeypatch.setattr("instarfs.guest.export.NOTED_TOGETHER", together)
    path, out = tmp_path / "image", tmp_path / "out"
    builder = ImageBuilder(size=80 * CLUSTER)
    builder.write(0, content(40))
    builder.write_compressed(44, b"x" * CLUSTER)
    builder.write_compressed(46, b"y" * CLUSTER)
    image = builder.build()
    packed = image.word(image.l2_at(44)) & ((1 << image.geometry.compressed_shift) - 1)
    image.data[packed : packed + 16] = b"\xff" * 16
    image.set_bits(image.l2_at(3), 512)
    image.set_word(image.l2_at(5), 1 << 40 | entries.COPIED)
    path.write_bytes(image.data)
    said = export(path, out)
    bad = [(3 * CLUSTER, 4 * CLUSTER), (5 * CLUSTER, 6 * CLUSTER), (44 * CLUSTER, 45 * CLUSTER)]
    refused(said, out, f"{3 * CLUSTER} of {80 * CLUSTER} bytes could not be read", f"{out}.map")
    assert listed(out).blocks(BAD) == bad
    assert not listed(out).blocks(UNTRIED)
    expected = bytearray(content(40).ljust(80 * CLUSTER, b"\0"))
    for start, end in bad:
        expected[start:end] = bytes(end - start)
    expected[46 * CLUSTER : 47 * CLUSTER] = b"y" * CLUSTER
    assert out.read_bytes() == expected


@pytest.mark.parametrize("lost", ["L1", "L2", "data"])
def test_what_the_end_of_the_file_took_is_listed(
    lost: str, export: Command, tmp_path: Path
) -> None:
    path, out = tmp_path / "image", tmp_path / "out"
    image = make(path)
    header = image.header
    first_lost = 0
    if lost == "L1":
        image.data += bytes(-len(image.data) % CLUSTER)
        image.change_header(l1_table_offset=len(image.data))
    elif lost == "L2":
        table = image.data[image.l2_table(0) : image.l2_table(0) + 80]
        image.data += bytes(-len(image.data) % CLUSTER)
        image.set_word(image.l1_at(0), len(image.data) | entries.COPIED)
        image.data += table
        first_lost = 10 * CLUSTER
    else:
        image.set_word(image.l2_at(7), len(image.data) // CLUSTER * CLUSTER | entries.COPIED)
        image.data = image.data[: len(image.data) // CLUSTER * CLUSTER] + b"z" * 1000
        first_lost = 7 * CLUSTER + 1000
    path.write_bytes(image.data)
    assert header.size == 80 * CLUSTER
    refused(export(path, out), f"{out}.map")
    last_lost = 8 * CLUSTER if lost == "data" else 80 * CLUSTER
    assert listed(out).blocks(BAD) == [(first_lost, last_lost)]
    assert (
        out.read_bytes()[:first_lost][: 7 * CLUSTER] == content(40)[: min(first_lost, 7 * CLUSTER)]
    )


def test_snapshots_by_number_and_by_name(export: Command, tmp_path: Path) -> None:
    builder = ImageBuilder(size=4 * MIB)
    builder.write(0, b"then" * 1000)
    builder.take_snapshot("before")
    builder.write(0, b"now" * 1000)
    builder.take_snapshot("twice")
    builder.take_snapshot("twice")
    image = tmp_path / "image"
    image.write_bytes(builder.build().data)
    for word, expected in ((None, b"now"), ("0", b"then"), ("before", b"then"), ("2", b"now")):
        out = tmp_path / f"out {word}"
        chosen = ["--snapshot", word] if word else []
        assert export(*chosen, image, out).code == 0
        assert out.read_bytes() == (expected * 1000).ljust(4 * MIB, b"\0")
    for word in ("3", "twice", "-1", "no such"):
        refused(export("--snapshot", word, image, tmp_path / "none"), image, word)
        assert not (tmp_path / "none").exists()
    said = export("--snapshot", "before", image, tmp_path / "out None")
    refused(said, "was begun from another disk, disk of", image)


def test_snapshots_beside_an_entry_that_is_garbage(export: Command, tmp_path: Path) -> None:
    builder = ImageBuilder(size=4 * MIB)
    for name in ("one", "two", "three"):
        builder.write(0, name.encode() * 1000)
        builder.take_snapshot(name)
    made = builder.build()
    at = made.snapshots[1].offset
    made.data[at : at + 40] = b"\xff" * 40
    image = tmp_path / "image"
    image.write_bytes(made.data)
    for word, expected in (("one", b"one"), ("three", b"three"), ("1", b"three")):
        out = tmp_path / f"out {word}"
        assert export("--snapshot", word, image, out).code == 0
        assert out.read_bytes() == (expected * 1000).ljust(4 * MIB, b"\0")
    refused(export("--snapshot", "two", image, tmp_path / "none"), image, "extra_data_size")


def test_what_is_in_a_backing_file_that_is_not_read(export: Command, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"base" * (MIB // 4))
    builder = ImageBuilder(size=4 * MIB, backing_file=b"base", backing_format=b"raw")
    builder.write(1, b"top" * 1000)
    builder.write_zeros(2)
    image, out = tmp_path / "image", tmp_path / "out"
    image.write_bytes(builder.build().data)
    said = export(image, out)
    refused(said, "all of them in files that are not read (no directory is followed; see --follow)")
    assert listed(out).blocks(READ) == [(CLUSTER, 3 * CLUSTER)]
    assert not any(out.read_bytes()[3 * CLUSTER :])
    # The same command with the way to it goes on, and has all.
    assert export("--follow", tmp_path, image, out).code == 0
    expected = bytearray((b"base" * (MIB // 4)).ljust(4 * MIB, b"\0"))
    expected[CLUSTER : 3 * CLUSTER] = (b"top" * 1000).ljust(2 * CLUSTER, b"\0")
    assert out.read_bytes() == expected
    (tmp_path / "base").write_bytes(b"other")
    refused(export("--follow", tmp_path, image, out), out, "has changed since")


def test_following_is_not_advised_where_it_does_not_help(export: Command, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"base" * (MIB // 4))
    image, out = tmp_path / "image", tmp_path / "out"
    builder = ImageBuilder(size=4 * MIB, backing_file=b"base", backing_format=b"vmdk")
    image.write_bytes(builder.build().data)
    why = "its format is neither raw nor qcow2"
    said = export("--follow", tmp_path, image, out)
    refused(said, f"all of them in files that are not read ({why}); they are holes")


def test_a_data_file_that_is_not_read(export: Command, tmp_path: Path) -> None:
    image, out, data = tmp_path / "image", tmp_path / "out", tmp_path / "data"
    builder = ImageBuilder(size=4 * MIB, data_file=b"data")
    builder.write(1, b"top" * 1000)
    made = builder.build()
    image.write_bytes(made.data)
    data.write_bytes(made.data_file)
    refused(
        export(image, out),
        "all of them in files that are not read (no directory is followed; see --follow)",
    )
    assert listed(out).blocks(BAD) == [(CLUSTER, 2 * CLUSTER)]
    assert export("--follow", tmp_path, image, out).code == 0
    assert out.read_bytes()[CLUSTER : CLUSTER + 3000] == b"top" * 1000


def test_an_encrypted_disk_is_not_its_ciphertext(export: Command, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    made = make(image)
    made.change_header(crypt_method=CRYPT_AES)
    image.write_bytes(made.data)
    refused(export(image, out), image, "encrypted (aes)", "copy the image as it is")
    assert not out.exists()


# ---- stopped, and gone on with ----

_SLOW = """\
import sys, time
from instarfs.guest import export, outfile
from instarfs.cli.main import main
export.PART_BYTES, export.SAVE_SECONDS = 1 << 16, 0.0
write = outfile.OutFile.write
def slowly(self, offset, content):
    time.sleep(0.007)
    write(self, offset, content)
outfile.OutFile.write = slowly
sys.argv[1:] = ["export", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_by_a_signal(number: signal.Signals, export: Command, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    make(image, 400)
    positions = [0]
    while True:
        with subprocess.Popen(
            [sys.executable, "-c", _SLOW, image, out], stderr=subprocess.PIPE, text=True
        ) as program:
            deadline = time.monotonic() + DEADLINE
            while program.poll() is None and time.monotonic() < deadline:
                if (tmp_path / "out.map").exists() and listed(out).position > positions[-1]:
                    program.send_signal(number)
                    break
                time.sleep(0.01)
            _, said = program.communicate(timeout=DEADLINE)
        if number != signal.SIGKILL and program.returncode:
            assert program.returncode == 1
            assert said.count("\n") == 1
            assert "start the same command again to go on" in said
        position = listed(out).position
        assert position >= positions[-1]
        read = listed(out).blocks(READ)
        assert (
            out.read_bytes()[: read[0][1]] == content(400).ljust(800 * CLUSTER, b"\0")[: read[0][1]]
        )
        positions.append(position)
        if len(positions) > 3 or position >= 400 * CLUSTER:
            break
    assert len(positions) > 2
    assert export(image, out).code == 0
    assert out.read_bytes() == content(400) + bytes(400 * CLUSTER)


def head_of(out: Path) -> dict[str, object]:
    (line,) = [each for each in listed(out).remarks if each.startswith("instarfs-export: ")]
    head: dict[str, object] = json.loads(line.partition(": ")[2])
    return head


def test_what_a_crash_may_have_lost_is_copied_again(export: Command, tmp_path: Path) -> None:
    """Written, but not flushed before the machine stopped."""
    image, out = tmp_path / "image", tmp_path / "out"
    make(image)
    assert export(image, out).code == 0
    flushed = 10 * CLUSTER
    lost = bytearray(out.read_bytes())
    lost[flushed:] = bytes(len(lost) - flushed)
    with out.open("r+b") as file:
        file.write(lost)
    assert export(image, out).code == 0
    assert out.read_bytes() == lost  # the machine goes on: what it holds is as it was written
    head = head_of(out)
    text = (tmp_path / "out.map").read_text()
    text = text.replace(json.dumps(head), json.dumps({**head, "boot": "old", "flushed": flushed}))
    (tmp_path / "out.map").write_text(text)
    assert export(image, out).code == 0
    assert out.read_bytes() == content(40) + bytes(40 * CLUSTER)


def test_a_copy_is_flushed_before_that_is_said(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instarfs.guest.export.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr("instarfs.guest.export.PART_BYTES", CLUSTER)
    events: list[str] = []
    sync, replace = os.fdatasync, Path.replace
    image, out = tmp_path / "image", tmp_path / "out"
    make(image, 200)

    def noting_sync(fd: int) -> None:
        sync(fd)
        events.append("flush")

    def noting_replace(self: Path, target: Path | str) -> Path:
        done = replace(self, target)
        events.append(f"said {head_of(out)['flushed']}")
        return done

    monkeypatch.setattr("os.fdatasync", noting_sync)
    monkeypatch.setattr("pathlib.Path.replace", noting_replace)
    assert export(image, out).code == 0
    assert events[0] == "said 0"
    grown = [at for at, each in enumerate(events) if each not in ("flush", "said 0")]
    assert grown
    assert "flush" in events[: grown[0]]


@pytest.mark.parametrize("call", ["close", "fdatasync"])
def test_what_a_server_did_not_keep_is_copied_again(
    call: str, export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a network what was written may be refused only when it is flushed, or closed."""
    monkeypatch.setattr("instarfs.guest.export.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr("instarfs.guest.export.PART_BYTES", CLUSTER)
    image, out = tmp_path / "image", tmp_path / "out"
    make(image, 200)
    real = getattr(os, call)

    def fail(fd: int) -> None:
        is_out = out.exists() and os.path.samestat(os.fstat(fd), out.stat())
        real(fd)
        if is_out:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        refused(export(image, out), out, "Disk quota exceeded", "make space")
    flushed = int(str(head_of(out)["flushed"]))
    with out.open("r+b") as file:
        file.seek(flushed)
        file.write(bytes(200 * CLUSTER - flushed))
    assert export(image, out).code == 0
    assert out.read_bytes() == content(200) + bytes(200 * CLUSTER)


# ---- refusals ----


def test_nothing_is_written_over(export: Command, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    make(image)
    before = image.read_bytes()
    for name in ("folder", "link", "fifo", "file"):
        victim = tmp_path / name
        match name:
            case "folder":
                victim.mkdir()
            case "link":
                victim.symlink_to("image")
            case "fifo":
                os.mkfifo(victim)
            case _:
                victim.write_bytes(b"precious")
        refused(export(image, victim), victim, "is there, and")
        assert not (tmp_path / f"{name}.map").exists()
    assert (tmp_path / "file").read_bytes() == b"precious"
    refused(export(image, image), image, "is there, and")
    (tmp_path / "out.map").write_bytes(before)
    refused(export(image, out), tmp_path / "out.map", "is no list of an export")
    assert not out.exists()
    assert image.read_bytes() == (tmp_path / "out.map").read_bytes() == before
    make(tmp_path / "x.map")
    refused(export(tmp_path / "x.map", tmp_path / "x"), "is no list of an export")


def test_a_list_is_of_one_copy_only(export: Command, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    make(image)
    assert export(image, out).code == 0
    make(tmp_path / "another")
    refused(export(tmp_path / "another", out), out, "is another file, or has changed since")
    out.rename(tmp_path / "gone")
    refused(export(image, out), out, "is not there", "out.map")
    out.write_bytes(bytes(80 * CLUSTER))
    refused(export(image, out), out, "is not the file that")
    assert not any(out.read_bytes())
    (tmp_path / "gone").rename(out)
    with image.open("r+b") as file:
        file.seek(image.stat().st_size)
        file.write(b"more")
    refused(export(image, out), out, "has changed since")
    image.rename(tmp_path / "moved")
    refused(export(image, out), image, "no such file")


def test_an_image_that_only_has_another_name_is_gone_on_with(
    export: Command, tmp_path: Path
) -> None:
    make(tmp_path / "image")
    assert export(tmp_path / "image", tmp_path / "out").code == 0
    (tmp_path / "image").rename(tmp_path / "moved")
    (tmp_path / "moved").chmod(0o600)
    assert export(tmp_path / "moved", tmp_path / "out").code == 0


def test_two_exports_do_not_share_a_copy(export: Command, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    make(image, 400)
    with subprocess.Popen([sys.executable, "-c", _SLOW, image, out]) as program:
        deadline = time.monotonic() + DEADLINE
        while not (tmp_path / "out.map").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        refused(export(image, out), out, "another export is writing to it")
        program.kill()
    assert export(image, out).code == 0


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_where_files_cannot_be_locked_nobody_is_kept_out(
    code: int, export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "image")

    def refuse(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert export(tmp_path / "image", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == content(40) + bytes(40 * CLUSTER)


def test_what_cannot_be_locked_is_not_said_to_be_in_use(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "image")

    def fail(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fail)
        refused(export(tmp_path / "image", tmp_path / "out"), "locking it failed", "output error")
    assert export(tmp_path / "image", tmp_path / "out").code == 0


def test_an_image_that_is_written_to_meanwhile(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    make(image)
    copied = []

    def write(self: object, part: object) -> object:
        copied.append(part)
        os.utime(image, ns=(0, len(copied)))
        return part

    monkeypatch.setattr("instarfs.guest.export._Reader.read", write)
    refused(export(image, out), image, "was written to during the export", "out.map")
    monkeypatch.undo()


def test_an_image_in_use(export: Command, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    make(image)
    with subprocess.Popen(
        ["qemu-io", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write("read 0 512\n")
        writer.stdin.flush()
        assert "read 512/512" in writer.stdout.readline()
        refused(export(image, out), image, "another process has the image open")
        assert not out.exists()
        assert export("-U", image, out).code == 0
        writer.stdin.close()


def test_no_room(tmp_path: Path) -> None:
    image, here = tmp_path / "image", tmp_path / "small"
    make(image, 100)
    with small_disk(here, 4 * MIB) as disk:
        said = disk.instarfs("export", image, here / "out")
        assert said.returncode == 1
        assert said.stderr.count("\n") == 1
        assert "No space left on device" in said.stderr
        assert "make space, and start the same command again" in said.stderr
        assert disk.names() == {"out", "out.map"}
        assert disk.run("mount", "-o", "remount,size=32M", here).returncode == 0
        said = disk.instarfs("export", image, here / "out")
        assert (said.returncode, said.stderr) == (0, "")
        assert (disk.outside / "out").read_bytes() == content(100) + bytes(100 * CLUSTER)


def test_a_copy_of_which_no_list_could_be_begun_can_be_begun_again(
    export: Command, tmp_path: Path
) -> None:
    image, out, taken = (tmp_path / name for name in ("image", "out", "out.map.instarfs-new"))
    make(image)
    taken.mkdir()
    refused(export(image, out), out, "Is a directory", "start the same command again")
    assert not out.exists()
    taken.rmdir()
    assert export(image, out).code == 0
    assert out.read_bytes() == content(40) + bytes(40 * CLUSTER)


def test_whichever_look_at_the_image_fails_the_same_command_goes_on(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out, real = tmp_path / "image", tmp_path / "out", os.fstat
    make(image)
    for number in itertools.count(1):
        calls: list[int] = []

        def fail(fd: int, number: int = number, calls: list[int] = calls) -> os.stat_result:
            status = real(fd)
            if os.path.samestat(status, image.stat()):
                calls.append(fd)
                if len(calls) == number:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return status

        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", fail)
            said = export(image, out)
        if len(calls) < number:
            break
        if said.code:
            refused(said, "Stale file handle")
        assert export(image, out).code == 0
        assert out.read_bytes() == content(40) + bytes(40 * CLUSTER)
        out.unlink()
        out.with_name("out.map").unlink()
    assert number > 3


def test_what_is_no_image(export: Command, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    said = export(tmp_path / "text", tmp_path / "out")
    assert said.code == 63
    assert "not a qcow2 image" in said.err
    refused(export(tmp_path / "none", tmp_path / "out"), "no such file")
    make(tmp_path / "image")
    refused(export(tmp_path / "image", tmp_path / "none/out"), "none/out", "No such file")
    assert not (tmp_path / "out").exists()


def test_what_is_lost_costs_nothing_however_much_it_is(export: Command, tmp_path: Path) -> None:
    """All L2 tables of a petabyte lie past the end of the file."""
    made = ImageBuilder(size=1 << 50, cluster_bits=21).build()
    for index in range((1 << 50) // made.geometry.l2_coverage):
        made.set_word(made.l1_at(index), (1 << 40) + (index << 21) | entries.COPIED)
    image, out = tmp_path / "image", tmp_path / "out"
    image.write_bytes(made.data)
    with small_disk(tmp_path / "room", 4 * MIB) as room:  # whose files may be as large
        said = room.instarfs("export", image, room.path / "out")
        assert f"{1 << 50} of {1 << 50} bytes could not be read" in said.stderr
        assert listed(room.outside / "out").blocks(BAD) == [(0, 1 << 50)]
    assert not out.exists()
