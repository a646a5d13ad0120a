"""`instarfs info` and `qemu-img info` say the same, value for value and line for line.

What is listed under "Where we differ" is meant, and held to what `instarfs.render.info` says of it.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest

from instarfs.cli.main import main
from instarfs.image import locks
from planner.qcow2.extensions import FEATURE_NAMES
from planner.qcow2.header import CRYPT_AES, CRYPT_LUKS, Autoclear, Incompatible
from planner.qcow2.luks import LuksHeader, encode_luks
from tests.images import matrix
from tests.images.builder import ImageBuilder
from tests.images.luks_headers import ACCEPTED, REFUSED, SLOT_SECTORS, with_slot
from tests.schemas import require_valid_output


class Said:
    """What a program printed, and how it ended."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out, err


def qemu(*arguments: str) -> Said:
    done = subprocess.run(["qemu-img", "info", *arguments], capture_output=True, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


class Instarfs:
    """`instarfs info` in this process."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        self.monkeypatch, self.capfdbinary = monkeypatch, capfdbinary

    def __call__(self, *arguments: str) -> Said:
        self.monkeypatch.setattr("sys.argv", ["instarfs", "info", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        said = Said(int(exited.value.code or 0), *self.capfdbinary.readouterr())
        require_valid_output(("info", *arguments), said.out.decode())
        return said

    def must_agree(self, image: str) -> None:
        """Both outputs of both programs, compared."""
        ours, theirs = self("--output", "json", image), qemu("--output=json", image)
        assert (ours.code, ours.err) == (theirs.code, theirs.err) == (0, b"")
        assert json.loads(ours.out) == json.loads(theirs.out)
        ours, theirs = self(image), qemu(image)
        assert ours.out.decode() == theirs.out.decode()


@pytest.fixture
def instarfs(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Instarfs:
    return Instarfs(monkeypatch, capfdbinary)


def write(path: Path, builder: ImageBuilder) -> str:
    path.write_bytes(builder.build().data)
    return str(path)


# ---- images that QEMU made ----


def _sparing(row: matrix.Row) -> matrix.Row:
    """The row without guest data, where nothing in it needs some: info does not read any."""
    return row if row.bitmaps or row.killed else replace(row, empty=True).settled()


@pytest.mark.parametrize("row", matrix.MATRIX, ids=lambda row: row.name)
def test_matrix(row: matrix.Row, instarfs: Instarfs, tmp_path: Path) -> None:
    instarfs.must_agree(str(matrix.build(_sparing(row), tmp_path, row.name)))


def test_file_names_are_relative_to_the_image(
    instarfs: Instarfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    names = [b"base", b"../base", b"/abs/base", b"./a:b", b"nbd://host/disk", "bäck".encode()]
    for name in names:
        builder = ImageBuilder(backing_file=name, backing_format=b"raw")
        write(tmp_path / "sub" / "x.qcow2", builder)
        write(tmp_path / "x.qcow2", ImageBuilder(backing_file=name))
        for image in ("sub/x.qcow2", "./sub/x.qcow2", str(tmp_path / "sub/x.qcow2"), "x.qcow2"):
            instarfs.must_agree(image)


# ---- backing chains ----


def _chain(folder: Path, base: str) -> None:
    """top.qcow2 on sub/middle.qcow2 on sub/base, which is raw or qcow2."""
    make = ["qemu-img", "create", "-q", "-f"]
    (folder / "sub").mkdir()
    size = "100000" if base == "raw" else "64M"
    subprocess.run([*make, base, "sub/base", size], check=True)
    subprocess.run([*make, "qcow2", "-b", "base", "-F", base, "sub/middle.qcow2"], check=True)
    subprocess.run(
        [*make, "qcow2", "-b", "sub/middle.qcow2", "-F", "qcow2", "top.qcow2"], check=True
    )


@pytest.mark.parametrize("base", ["raw", "qcow2"])
def test_a_backing_chain(
    base: str, instarfs: Instarfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _chain(tmp_path, base)
    for image in ("top.qcow2", "./top.qcow2", "sub/middle.qcow2", str(tmp_path / "top.qcow2")):
        ours = instarfs("--backing-chain", "--follow", ".", "--output=json", image)
        theirs = qemu("--backing-chain", "--output=json", image)
        assert (ours.code, theirs.code) == (0, 0)
        assert json.loads(ours.out) == json.loads(theirs.out)
        ours = instarfs("--backing-chain", "--follow", str(tmp_path), image)
        assert ours.out.decode() == qemu("--backing-chain", image).out.decode()


def test_a_chain_of_one_is_a_list_too(instarfs: Instarfs, tmp_path: Path) -> None:
    image = write(tmp_path / "x.qcow2", ImageBuilder())
    ours = instarfs("--backing-chain", "--output=json", image)
    assert (ours.code, ours.err) == (0, b"")
    assert json.loads(ours.out) == json.loads(qemu("--backing-chain", "--output=json", image).out)


def test_where_we_open_no_backing_file_the_chain_says_so(
    instarfs: Instarfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _chain(tmp_path, "raw")
    for follow, shown, reason in (
        ((), 1, "no directory is followed; see --follow"),
        (("--follow", "sub"), 3, ""),
    ):
        ours = instarfs("--backing-chain", *follow, "--output=json", "top.qcow2")
        value = json.loads(ours.out)
        assert (len(value), ours.code) == (shown, 1 if reason else 0)
        assert value[-1].get("backing-not-shown", "").endswith(reason)
        assert ours.err.decode().endswith(f"{reason}\n" if reason else "")
        assert reason.encode() in instarfs("--backing-chain", *follow, "top.qcow2").out
    (tmp_path / "sub" / "base").unlink()
    ours = instarfs("--backing-chain", "--follow", ".", "--output=json", "top.qcow2")
    theirs = qemu("--backing-chain", "--output=json", "top.qcow2")
    assert (ours.code, theirs.code, theirs.out) == (1, 1, b"")
    assert [each["filename"] for each in json.loads(ours.out)] == ["top.qcow2", "sub/middle.qcow2"]


def test_a_chain_ends_where_a_member_makes_no_sense(
    instarfs: Instarfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _chain(tmp_path, "qcow2")
    Path("sub/base").write_bytes(b"QFI\xfb" + b"\xff" * 200)
    ours = instarfs("--backing-chain", "--follow", ".", "--output=json", "top.qcow2")
    assert (ours.code, len(json.loads(ours.out)), ours.err.count(b"\n")) == (1, 2, 1)
    assert ours.err.startswith(b"instarfs: sub/base: ")


def test_a_chain_that_bites_its_tail_ends(
    instarfs: Instarfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.qcow2", ImageBuilder(backing_file=b"x.qcow2", backing_format=b"qcow2"))
    ours = instarfs("--backing-chain", "--follow", ".", "--output=json", "x.qcow2")
    assert (ours.code, len(json.loads(ours.out))) == (1, 1)
    assert b"it is in the chain already" in ours.err
    assert qemu("--backing-chain", "x.qcow2").code == 1


# ---- images that we made, with what QEMU does not make by itself ----


def _random_builder(rng: random.Random) -> ImageBuilder:
    version = rng.choice((2, 3, 3))
    extended = version == 3 and rng.random() < 0.3
    crypt = rng.choice((0, 0, CRYPT_AES, CRYPT_LUKS))
    data_file = rng.choice((None, None, b"data", b"")) if version == 3 else None
    builder = ImageBuilder(
        version=version,
        cluster_bits=rng.randrange(14 if extended else 9, 22),
        refcount_order=rng.randrange(7) if version == 3 else 4,
        size=rng.choice((0, 1, 511, 512, 1000, 999 << 10, 1 << 20, (1 << 30) + 513)),
        extended_l2=extended,
        lazy_refcounts=version == 3 and rng.random() < 0.5,
        zstd=version == 3 and rng.random() < 0.5,
        data_file=data_file,
        data_file_raw=data_file is not None and rng.random() < 0.5,
        backing_file=rng.choice((b"", b"", b"base", b"/b/ase")),
        backing_format=rng.choice((None, b"", b"raw", b"fifteen bytes..")),
        crypt_method=crypt,
        luks_header=encode_luks(rng.choice([*ACCEPTED.values()])) if crypt == CRYPT_LUKS else b"",
        more_extensions=rng.choice(((), ((0xABCD, b"?"),))),
    )
    for number in range(rng.choice((0, 0, 1, 3)) if data_file is None else 0):
        _take_snapshot(builder, number, rng)
    return builder


def _take_snapshot(builder: ImageBuilder, number: int, rng: random.Random) -> None:
    """A snapshot as a running machine leaves it, with or without the newer fields."""
    state = rng.choice((0, 1000, 123_456_789, 5 << 40))
    disk = builder.geometry.virtual_size.to_bytes(8, "big")
    icount = rng.choice(((1 << 64) - 1, 0, 77, 1 << 62)).to_bytes(8, "big")
    extra = state.to_bytes(8, "big") + disk + rng.choice((b"", icount, icount + b"more"))
    if builder.geometry.version == 2:
        extra = rng.choice((b"", extra[:8], extra))
    builder.take_snapshot(f"snap{'x' * rng.choice((0, 20, 200))}{number}", extra_data=extra)
    snapshot, l1 = builder.snapshots[-1]
    snapshot = replace(
        snapshot,
        date_sec=rng.choice((0, 1 << 31, (1 << 32) - 1, 1_700_000_000)),
        date_nsec=rng.randrange(10**9),
        vm_clock_nsec=rng.choice((0, 999_999, 3_599_999_999_999, 400 * 3600 * 10**9, 1 << 63)),
        vm_state_size_32=rng.choice((0, 4321)),
    )
    builder.snapshots[-1] = (snapshot, l1)


def test_crafted(cases: int, seed: int, instarfs: Instarfs, tmp_path: Path) -> None:
    for number in range(seed, seed + cases // 8):
        builder = _random_builder(random.Random(number))
        instarfs.must_agree(write(tmp_path / f"{number}.qcow2", builder))  # named in a failure


@pytest.mark.parametrize("bit", [Incompatible.DIRTY, Incompatible.CORRUPT])
def test_dirty_and_corrupt(bit: Incompatible, instarfs: Instarfs, tmp_path: Path) -> None:
    builder = ImageBuilder()
    builder.incompatible |= bit
    instarfs.must_agree(write(tmp_path / "x.qcow2", builder))


def test_bitmaps_with_flags(instarfs: Instarfs, tmp_path: Path) -> None:
    builder = ImageBuilder()
    for flags in range(4):
        builder.add_bitmap(f"bitmap {flags}", {1}, granularity_bits=9 + flags)
        bitmap, table = builder.bitmaps[-1]
        builder.bitmaps[-1] = (replace(bitmap, flags=flags), table)
    instarfs.must_agree(write(tmp_path / "x.qcow2", builder))


def test_bitmaps_that_their_bit_does_not_vouch_for(instarfs: Instarfs, tmp_path: Path) -> None:
    builder = ImageBuilder()
    builder.add_bitmap("stale", {1})
    image = builder.build()
    image.change_header(autoclear_features=image.header.autoclear_features & ~Autoclear.BITMAPS)
    path = tmp_path / "x.qcow2"
    path.write_bytes(image.data)
    ours, theirs = instarfs("--output", "json", str(path)), qemu("--output=json", str(path))
    assert b"lost persistent bitmaps" not in theirs.out  # a warning on stderr, at most
    assert json.loads(ours.out) == json.loads(theirs.out)


def test_a_data_file_name_without_its_feature_bit(instarfs: Instarfs, tmp_path: Path) -> None:
    image = ImageBuilder(data_file=b"data").build()
    image.change_header(incompatible_features=0)
    path = tmp_path / "x.qcow2"
    path.write_bytes(image.data)
    instarfs.must_agree(str(path))


def _named(name: bytes) -> ImageBuilder:
    """An image that has this name wherever it can have one."""
    builder = ImageBuilder(backing_file=name, backing_format=name[:15])
    builder.take_snapshot("s")
    snapshot, l1 = builder.snapshots[0]
    builder.snapshots = [(replace(snapshot, name=name, id_str=name), l1)]
    builder.add_bitmap("b", set())
    bitmap, table = builder.bitmaps[0]
    builder.bitmaps = [(replace(bitmap, name=name), table)]
    return builder


@pytest.mark.parametrize(
    "name",
    [
        b"one\0two",
        b"\0",
        b"not\xffutf8",
        b"caf\xe9 au",
        b"\xff\xfe\0\xfd",
        "bäck 日本 😀".encode(),
        b"y" * 300,
        "日".encode() * 100,
    ],
    ids=["nul", "empty", "not-utf8", "latin-1", "both", "utf8", "long", "cut"],
)
def test_names_of_every_kind(name: bytes, instarfs: Instarfs, tmp_path: Path) -> None:
    image = write(tmp_path / "x.qcow2", _named(name))
    ours, theirs = instarfs("--output", "json", image), qemu("--output=json", image)
    assert json.loads(ours.out.decode("ascii")) == json.loads(theirs.out)


# ---- the LUKS header ----


def _encrypted(path: Path, luks: LuksHeader) -> str:
    builder = ImageBuilder(crypt_method=CRYPT_LUKS, luks_header=encode_luks(luks))
    return write(path, builder)


@pytest.mark.parametrize("name", ACCEPTED)
def test_luks(name: str, instarfs: Instarfs, tmp_path: Path) -> None:
    instarfs.must_agree(_encrypted(tmp_path / "x.qcow2", ACCEPTED[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_luks_refused(name: str, instarfs: Instarfs, tmp_path: Path) -> None:
    image = _encrypted(tmp_path / "x.qcow2", REFUSED[name])
    ours, theirs = instarfs("--output", "json", image), qemu("--output=json", image)
    assert (ours.code, theirs.code) == (1, 1), theirs.err
    assert len(ours.err.splitlines()) == 1
    # Where we differ: the rest is shown all the same.
    assert json.loads(ours.out)["errors"].keys() == {"encrypt"}


# ---- in use ----


@contextmanager
def written_by_qemu(image: str) -> Iterator[None]:
    """QEMU has the image open for writing."""
    with subprocess.Popen(
        ["qemu-io", image], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as q:
        try:
            deadline = monotonic() + 30
            with Path(image).open("rb") as file:
                while not locks.is_written(file.fileno(), image):
                    assert monotonic() < deadline, "qemu-io did not open the image"
                    sleep(0.01)
            yield
        finally:
            q.communicate(b"quit\n")


def test_in_use(instarfs: Instarfs, tmp_path: Path) -> None:
    image = write(tmp_path / "x.qcow2", ImageBuilder())
    with written_by_qemu(image):
        ours, theirs = instarfs(image), qemu(image)
        assert (ours.code, ours.out) == (theirs.code, theirs.out) == (1, b"")
        assert b'Failed to get shared "write" lock' in theirs.err
        assert b'Failed to get shared "write" lock' in ours.err
        for option in ("-U", "--force-share"):
            assert instarfs(option, image).out == qemu(option, image).out
    instarfs.must_agree(image)


# ---- what neither can open ----


@pytest.mark.parametrize(
    "fields",
    [
        {"cluster_bits": 8},
        {"version": 4},
        {"l1_size": 0},
        {"refcount_order": 7},
        {"incompatible_features": 1 << 60},
        {"crypt_method": 3},
        {"header_length": 103},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_unreadable(fields: dict[str, int], instarfs: Instarfs, tmp_path: Path) -> None:
    image = ImageBuilder().build()
    image.change_header(**fields)
    path = tmp_path / "x.qcow2"
    path.write_bytes(image.data)
    ours, theirs = instarfs(str(path)), qemu(str(path))
    assert (ours.code, ours.out) == (theirs.code, theirs.out) == (1, b"")
    assert len(ours.err.splitlines()) == 1


@pytest.mark.parametrize(
    "table",
    [
        b"\0\x3f" + b"test3\0".ljust(46, b" "),
        b"\0\x3fTest feature",
        b"\0\x3f" + b"y" * 46 + b"\0\x3eanother",
        b"\0\x3f" + b"one".ljust(46, b"\0") + bytes(48) + b"\0\x3ebehind the end",
        b"\0\x3f" + b"one".ljust(46, b"\0") + b"\0\x3ftwo",
    ],
    ids=["nul", "short", "no-nul", "empty", "twice"],
)
def test_names_of_features(table: bytes, instarfs: Instarfs, tmp_path: Path) -> None:
    image = ImageBuilder(more_extensions=((FEATURE_NAMES, table),)).build()
    image.change_header(incompatible_features=1 << 63)
    path = tmp_path / "x.qcow2"
    path.write_bytes(image.data)
    ours, theirs = instarfs(str(path)), qemu(str(path))
    assert (ours.code, theirs.code) == (1, 1)
    assert ours.err.rpartition(b"unknown: ")[2] == theirs.err.rpartition(b"feature(s): ")[2]


def test_missing(instarfs: Instarfs, tmp_path: Path) -> None:
    ours, theirs = instarfs(str(tmp_path / "none")), qemu(str(tmp_path / "none"))
    assert (ours.code, ours.out) == (theirs.code, theirs.out) == (1, b"")


# ---- where we differ ----


def test_we_obey_no_name(instarfs: Instarfs, tmp_path: Path) -> None:
    image = write(tmp_path / "x.qcow2", _named(b"\x1b]0;title\x07"))
    assert b"\x1b" in qemu(image).out
    assert rb"\x1b]0;title\x07" in instarfs(image).out


def test_we_add_up_key_slots_without_overflow(instarfs: Instarfs, tmp_path: Path) -> None:
    """2^32 - 504 sectors and 504 more are 0 in 32 bits: QEMU lets that slot pass."""
    header = with_slot(5, key_material_offset=(1 << 32) - SLOT_SECTORS)
    image = _encrypted(tmp_path / "x.qcow2", header)
    assert (instarfs(image).code, qemu(image).code) == (1, 0)


def test_we_show_the_rest_of_an_image_with_a_broken_bitmap_directory(
    instarfs: Instarfs, tmp_path: Path
) -> None:
    builder = ImageBuilder()
    builder.take_snapshot("kept")
    builder.add_bitmap("b", {1})
    image = builder.build()
    image.data[image.bitmaps[0].offset + 16] = 9  # its type
    path = tmp_path / "x.qcow2"
    path.write_bytes(image.data)
    ours, theirs = instarfs("--output", "json", str(path)), qemu("--output=json", str(path))
    assert (ours.code, theirs.code, theirs.out) == (1, 1, b"")
    info = json.loads(ours.out)
    assert (info["snapshots"][0]["name"], list(info["errors"])) == ("kept", ["bitmaps"])


def test_we_never_look_at_what_the_image_names(instarfs: Instarfs, tmp_path: Path) -> None:
    for name in ("base", "data"):
        subprocess.run(["mkfifo", str(tmp_path / name)], check=True)
    builder = ImageBuilder(backing_file=b"base", backing_format=b"raw", data_file=b"data")
    instarfs.must_agree(write(tmp_path / "x.qcow2", builder))
