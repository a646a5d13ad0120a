"""`instarfs map` and `qemu-img map` on chains with data in every member, in both outputs."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from instarfs.cli.main import main
from planner.qcow2.entries import L2_OFFSET
from planner.qcow2.extensions import FEATURE_NAMES
from tests.images.builder import ImageBuilder
from tests.images.matrix import run
from tests.schemas import require_valid_output

CLUSTER = 1 << 16
MIB = 1 << 20


class Said:
    """What a program printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


class Instarfs:
    """`instarfs map` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: str | Path) -> Said:
        self.monkeypatch.setattr("sys.argv", ["instarfs", "map", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        said = Said(int(exited.value.code or 0), *self.capfd.readouterr())
        require_valid_output(("map", *arguments), said.out)
        return said


@pytest.fixture
def instarfs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Instarfs:
    return Instarfs(monkeypatch, capfd)


def qemu(*arguments: str | Path) -> Said:
    command = ["qemu-img", "map", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


def rows_of(text: str) -> list[dict[str, object]]:
    """The rows of a map, without the key that QEMU has only since 8.2."""
    rows = json.loads(text)
    for row in rows:
        row.pop("compressed", None)
    assert isinstance(rows, list)
    return rows


def write_some(image: Path, rng: random.Random, size: int, *, packed: bool) -> None:
    """Data, zeros and holes at random, in pieces that begin and end within clusters."""
    commands = []
    for _ in range(12):
        at = rng.randrange(size // 512) * 512
        length = min(size - at, rng.choice((512, 5120, CLUSTER, 3 * CLUSTER)))
        verb = rng.choice(("write -P 1", "write -P 2", "write -z", "write -z -u", "discard"))
        commands.append(f"{verb} {at} {length}")
    if packed:
        commands.insert(0, f"write -c {rng.randrange(size // CLUSTER) * CLUSTER} {CLUSTER}")
    flags = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-d", "unmap", *flags, image)


def make_chain(folder: Path, rng: random.Random, *, packed: bool) -> Path:
    """A raw file, an overlay on it, and one on that, of different sizes."""
    (folder / "base").mkdir()
    sizes = [rng.randrange(MIB // 2, 4 * MIB) // 512 * 512 for _ in range(3)]
    with (folder / "base/raw").open("wb") as file:
        file.truncate(sizes[0] - rng.choice((0, 0, 100)))
        for _ in range(4):
            file.seek(rng.randrange(sizes[0] // 4096) * 4096)
            file.write(b"x" * min(sizes[0] - 512 - file.tell(), rng.choice((1, 4096, 70_000))))
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    for name, below, form, size in (
        ("base/middle", "raw", "raw", sizes[1]),
        ("top", "base/middle", "qcow2", sizes[2]),
    ):
        options = rng.choice(("cluster_size=4096", "cluster_size=64k", "extended_l2=on"))
        image = folder / name
        run(*create, "-o", options, "-b", below, "-F", form, image, str(size))
        write_some(image, rng, size, packed=packed and name == "top" and "64k" in options)
    return folder / "top"


@pytest.mark.parametrize("seed", range(6))
def test_chains(
    seed: int, instarfs: Instarfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"chain {seed}")
    top = make_chain(tmp_path, rng, packed=seed % 3 == 0)
    ours, theirs = (
        instarfs("--output", "json", "--follow", tmp_path, top),
        qemu("--output=json", top),
    )
    assert (ours.code, ours.err) == (theirs.code, theirs.err) == (0, "")
    assert rows_of(ours.out) == rows_of(theirs.out)
    for first, most in ((512, "64k"), ("100", "1.5M"), ("0x10000", "1T"), ("1M", 7), ("1P", 9)):
        part = ("--output=json", "--start-offset", str(first), "--max-length", str(most), top)
        ours, theirs = instarfs("--follow", tmp_path, *part), qemu(*part)
        assert rows_of(ours.out) == rows_of(theirs.out)
        assert (
            instarfs("-s", str(first), "--follow", tmp_path, top).out == qemu(*part[1:3], top).out
        )
    monkeypatch.chdir(tmp_path)
    for name in ("top", "./top", str(top)):
        ours, theirs = instarfs("--follow", ".", name), qemu(name)
        assert (ours.code, ours.out) == (theirs.code, theirs.out)


def test_a_compressed_cluster_ends_the_text(instarfs: Instarfs, tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    run("qemu-io", "-c", "write 0 64k", "-c", "write -c 128k 64k", "-c", "write 256k 64k", image)
    ours, theirs = instarfs(image), qemu(image)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)
    assert ours.code == 1
    assert "encrypted or compressed clusters, the first at 131072; see --output json" in ours.err
    packed = [
        row["start"]
        for row in json.loads(instarfs("--output", "json", image).out)
        if row["compressed"]
    ]
    assert packed == [131072]


def test_what_cannot_be_known_is_said(instarfs: Instarfs, tmp_path: Path) -> None:
    builder = ImageBuilder(size=MIB, backing_file=b"base", backing_format=b"raw")
    for cluster in range(4):
        builder.write(cluster, b"data")
    made = builder.build()
    made.set_bits(made.l2_at(2), 512)
    image = tmp_path / "image"
    image.write_bytes(made.data)
    text = instarfs("--output", "json", image).out
    rows = [
        (row["start"], row["length"], row["depth"], "damaged" in row, "unknown" in row)
        for row in json.loads(text)
    ]
    assert [row for row in rows if row[3]] == [(2 * CLUSTER, CLUSTER, 0, True, False)]
    assert [row for row in rows if row[4]] == [(4 * CLUSTER, 12 * CLUSTER, 1, False, True)]
    assert made.word(made.l2_at(2)) & L2_OFFSET
    said = instarfs(image)
    assert said.code == 1
    lines = [line.split()[:3] for line in said.out.splitlines()[1:]]
    assert [int(start, 16) for start, _, _ in lines] == [0, CLUSTER, 2 * CLUSTER, 3 * CLUSTER]
    assert lines[2] == [hex(2 * CLUSTER), hex(CLUSTER), "damaged"]
    assert lines[3][2] == hex(made.word(made.l2_at(3)) & L2_OFFSET)
    assert "not cluster aligned\n" in said.out
    assert said.err == (
        f"instarfs: {image}: 1 part is damaged ({CLUSTER} bytes); what is at {4 * CLUSTER} is in a"
        " backing file that is not read: no directory is followed; see --follow\n"
    )


def test_following_is_not_advised_where_it_does_not_help(
    instarfs: Instarfs, tmp_path: Path
) -> None:
    (tmp_path / "base").write_bytes(b"base")
    image = tmp_path / "image"
    builder = ImageBuilder(size=MIB, backing_file=b"base", backing_format=b"vmdk")
    image.write_bytes(builder.build().data)
    said = instarfs("--follow", tmp_path, image)
    assert said.code == 1
    assert said.err == (
        f"instarfs: {image}: what is at 0 is in a backing file that is not read: its format is"
        " neither raw nor qcow2\n"
    )


def test_an_image_in_use_needs_force(instarfs: Instarfs, tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    with subprocess.Popen(
        ["qemu-io", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write("length\n")
        writer.stdin.flush()
        writer.stdout.readline()  # it is open
        said = instarfs("--output", "json", image)
        assert (said.code, said.out) == (1, "")
        assert "lock" in said.err
        assert instarfs("--output", "json", "-U", image).code == 0
        writer.stdin.close()


def test_what_is_no_qcow2_image(instarfs: Instarfs, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not an image" * 100)
    said = instarfs(tmp_path / "text")
    assert said.code != 0
    assert "not a qcow2 image" in said.err


def test_why_a_backing_file_is_not_read_is_a_string_of_json(
    instarfs: Instarfs, tmp_path: Path
) -> None:
    """The reason may quote the file: here the name of a feature that is not known."""
    table = b"\0\x3f" + b'"quoted", \\ \x1b \xff'
    base = ImageBuilder(more_extensions=((FEATURE_NAMES, table),)).build()
    base.change_header(incompatible_features=1 << 63)
    (tmp_path / "base").write_bytes(base.data)
    top = ImageBuilder(backing_file=b"base", backing_format=b"qcow2").build()
    (tmp_path / "top.qcow2").write_bytes(top.data)
    said = instarfs("--output=json", "--follow", tmp_path, tmp_path / "top.qcow2")
    assert '"quoted"' in json.loads(said.out)[0]["unknown"]


@pytest.mark.parametrize("seed", range(6))
def test_holes_in_the_files_of_a_chain(seed: int, instarfs: Instarfs, tmp_path: Path) -> None:
    """Where metadata was preallocated, or zeros were made holes, data clusters have holes too."""
    rng = random.Random(f"holes {seed}")
    top = make_chain(tmp_path, rng, packed=seed % 3 == 0)
    for image in (top, tmp_path / "base/middle"):
        run("cp", "--sparse=always", image, tmp_path / "thin")
        (tmp_path / "thin").rename(image)
    ours, theirs = (
        instarfs("--output", "json", "--follow", tmp_path, top),
        qemu("--output=json", top),
    )
    assert rows_of(ours.out) == rows_of(theirs.out)
    alone = rows_of(instarfs("--output", "json", top).out)
    own = [row for row in rows_of(theirs.out) if row["depth"] == 0 and row["present"]]
    assert [row for row in alone if row["present"]] == own


@pytest.mark.parametrize("size", ["", "-1", "1X", "1e3", "0.5", "1.5b", "0x1k", "1 k", "9E"])
def test_what_is_no_size(size: str, instarfs: Instarfs, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "image", "1M")
    said = instarfs("--max-length", size, tmp_path / "image")
    assert (said.code, said.out, said.err.count("\n")) == (1, "", 1)
    assert "'--max-length'" in said.err
    if size != "0x1k":  # which QEMU takes, and says that it will not for long
        assert qemu("--max-length", size, tmp_path / "image").code == 1


def test_tables_that_stand_everywhere_are_told_up_to_a_bound(
    instarfs: Instarfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instarfs.guest.guest.ROWS_OF_ANY", 1 << 10)
    image = ImageBuilder(size=16 << 30, cluster_bits=12)
    for cluster in range(0, 64, 2):
        image.write(cluster, b"data")
    made = image.build()
    for index in range(8192):
        made.set_word(made.l1_at(index), made.word(made.l1_at(0)))
    (tmp_path / "image").write_bytes(made.data)
    said = instarfs("--output=json", tmp_path / "image")
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "it leads to the same L2 tables again and again" in said.err
    assert 1 << 18 < said.out.count("\n") < 65 * 8192
    assert instarfs("--max-length", "1G", tmp_path / "image").code == 0
