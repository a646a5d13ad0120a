"""Mounts of sample images: one for all tests that only read, and makers for the others."""

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounts import INSTARFS, Gate, MakeMount, Mount, leak, make_image, mounted, until


@pytest.fixture(scope="session")
def leaky_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with three leaked clusters, for tests that do not change it."""
    image = make_image(tmp_path_factory.mktemp("leaky") / "leaky image.qcow2")
    leak(image, 3)
    return image


@pytest.fixture(scope="session")
def shared(leaky_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount of `leaky_image` for tests that leave it as it is."""
    directory = tmp_path_factory.mktemp("shared") / "mnt"
    with mounted([*INSTARFS, "mount", "-f", leaky_image, directory], leaky_image, directory) as it:
        yield it


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A clean image of the test's own."""
    return make_image(tmp_path / "image.qcow2")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MakeMount]:
    """Mounts an image in the foreground, with further arguments."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def make(image: Path, *arguments: str) -> Mount:
            directory = tmp_path / f"mnt{next(numbers)}"
            command: list[str | Path] = [*INSTARFS, "mount", "-f", *arguments, image, directory]
            return stack.enter_context(mounted(command, image, directory))

        yield make


@pytest.fixture
def gated(image: Path, tmp_path: Path) -> Iterator[Gate]:
    """A mount of `image` whose check waits at a gate."""
    with gate("gated.py", image, tmp_path) as it:
        yield it


@contextlib.contextmanager
def gate(program: str, image: Path, tmp_path: Path) -> Iterator[Gate]:
    """A mount of *image* by one of the programs beside this file, which wait at a gate."""
    folder = tmp_path / "gate"
    folder.mkdir()
    directory = tmp_path / "gated"
    command: list[str | Path] = [
        sys.executable,
        Path(__file__).with_name(program),
        image,
        directory,
        folder,
    ]
    with mounted(command, image, directory) as it:
        yield Gate(it, folder)


@pytest.fixture
def vm(image: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that has `image` open for writing, as a virtual machine has."""
    node = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}"
    socket = f"addr.type=unix,addr.path={image}.sock"
    export = f"type=vhost-user-blk,id=export,node-name=disk,writable=on,{socket}"
    program = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", node, "--export", export], text=True
    )
    is_open = image.with_name(f"{image.name}.sock").exists
    until(lambda: is_open() or program.poll() is not None, "the image was open")
    assert program.poll() is None
    yield program
    program.terminate()
    program.wait()
