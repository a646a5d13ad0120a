"""What cannot be mounted: one line, an exit code, and nothing left behind."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.mounts import instarfs, mounted_type

MAGIC = b"QFI\xfb"


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file; check the path"),
    "empty": (Path.touch, "not a qcow2 image: the file is empty"),
    "text": (lambda path: path.write_text("hello, world\n" * 100), "not a qcow2 image"),
    "four-bytes": (lambda path: path.write_bytes(MAGIC), "cut off"),
    "cut-off": (lambda path: path.write_bytes(MAGIC + b"\0\0\0\3" + bytes(60)), "cut off"),
    "directory": (Path.mkdir, "is a directory"),
    "fifo": (os.mkfifo, "is a FIFO"),
    "socket": (make_socket, "is a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a character device"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "no such file"),
}


def refused(*arguments: str | Path) -> str:
    """The one line of a mount that is refused, without the program's name."""
    done = instarfs("mount", *arguments)
    assert done.returncode not in (0, 2)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("instarfs: ")
    return lines[0].removeprefix("instarfs: ")


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_is_none(tmp_path: Path, name: str) -> None:
    make, expected = IMAGES[name]
    image, directory = tmp_path / "image", tmp_path / "mnt"
    make(image)
    directory.mkdir()
    line = refused(image, directory)
    assert line.startswith(f"{image}: ")
    assert expected in line
    assert mounted_type(directory) is None


def test_an_image_in_the_foreground_too(tmp_path: Path) -> None:
    assert "no such file" in refused("-f", tmp_path / "image", tmp_path)


def test_a_mountpoint_that_is_none(tmp_path: Path, image: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "no such directory; make it with: mkdir" in refused(image, tmp_path / "missing")
    assert "no such directory" in refused(image, file / "below")
    assert "not a directory" in refused(image, file)
    # That of the image itself, too: what is in it would be hidden.
    assert "not empty" in refused(image, image.parent)
    assert "something is mounted there already" in refused(image, "/proc")


def test_mounted_already(tmp_path: Path, image: Path) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    assert instarfs("mount", image, directory).returncode == 0
    try:
        assert "something is mounted there already" in refused(image, directory)
        assert (directory / "README.txt").is_file()
    finally:
        assert instarfs("umount", directory).returncode == 0


def test_an_option_that_nobody_knows(tmp_path: Path, image: Path) -> None:
    line = refused("-o", "ro,bogus", image, tmp_path / "mnt")
    assert line == "-o bogus: not an option of this mount; see: instarfs mount --help"


def test_a_name_that_a_terminal_would_obey(tmp_path: Path) -> None:
    line = refused(tmp_path / "\x1b[31mred\nline", tmp_path)
    assert "\\x1b[31mred\\nline" in line
