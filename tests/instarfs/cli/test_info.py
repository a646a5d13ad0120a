"""`instarfs info`: how it ends, and that it leaves the image alone."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from instarfs.cli.main import main
from tests.images.builder import ImageBuilder


class Ended:
    """The exit code and both outputs of one run."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out.decode(), err.decode()


@pytest.fixture
def info(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]):
    def run(*arguments: str) -> Ended:
        monkeypatch.setattr("sys.argv", ["instarfs", "info", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        return Ended(int(exited.value.code or 0), *capfdbinary.readouterr())

    return run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "some.qcow2"
    path.write_bytes(ImageBuilder().build().data)
    return path


def test_both_outputs(info, image: Path) -> None:
    ended = info(str(image))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"image: {image}\nfile format: qcow2\nvirtual size: 64 MiB (6710")
    assert info("--output=human", str(image)).out == ended.out
    value = json.loads(info("--output", "json", str(image)).out)
    assert value["virtual-size"] == 64 << 20
    assert value["actual-size"] == image.stat().st_blocks * 512


def test_it_changes_nothing(info, image: Path) -> None:
    before = image.read_bytes(), image.stat()
    image.chmod(0o444)
    assert info(str(image)).code == 0
    after = image.stat()
    assert image.read_bytes() == before[0]
    assert (after.st_size, after.st_mtime_ns) == (before[1].st_size, before[1].st_mtime_ns)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"QFI",
        b"not an image at all" * 9,
        b"QFI\xfb\0\0\0\3" + bytes(64),
        b"QFI\xfb" + b"\xff" * 200,
    ],
    ids=["empty", "short", "other", "cut-off", "ones"],
)
def test_no_image(info, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    ended = info(str(path))
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert ended.err.startswith(f"instarfs: {path}: ")


def test_other_kinds_of_files(info, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "none", Path("/dev/null")):
        ended = info(str(path))
        assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize(
    "arguments", [(), ("--output", "xml", "x"), ("--no-such", "x"), ("a", "b")], ids=str
)
def test_usage(info, arguments: tuple[str, ...]) -> None:
    ended = info(*arguments)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)


def test_a_path_that_no_terminal_should_obey(info, tmp_path: Path) -> None:
    path = tmp_path / "esc\x1b[2J\n"
    path.write_bytes(ImageBuilder().build().data)
    assert info(str(path)).out.splitlines()[0] == f"image: {tmp_path}/esc\\x1b[2J\\n"
    named = json.loads(info("--output", "json", str(path)).out)["filename"]
    assert named == str(path)


def test_a_path_that_is_not_utf8(info, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    Path(path).write_bytes(ImageBuilder().build().data)
    assert info(path).out.splitlines()[0] == rf"image: {tmp_path}/\xff\xfe"
    shown = json.loads(info("--output", "json", path).out)["filename"]
    assert shown == f"{tmp_path}/\ufffd\ufffd"


def test_a_list_of_names_is_bounded_whatever_their_length(info, tmp_path: Path) -> None:
    """65,536 snapshots may have 128 KiB of names each: as many as 240 made 189 MB of JSON."""
    builder = ImageBuilder()
    builder.take_snapshot("s")
    snapshot, l1 = builder.snapshots[0]
    named = dataclasses.replace(snapshot, name=b"\xff" * 65535, id_str=b"\xff" * 65535)
    builder.snapshots = [(named, l1)] * 20
    path = tmp_path / "x.qcow2"
    path.write_bytes(builder.build().data)
    for output in ("human", "json"):
        ended = info("--output", output, str(path))
        assert (ended.code, ended.out.count("date-sec")) == (0, 20 if output == "json" else 0)
        assert len(ended.out) < 20 * 3000
