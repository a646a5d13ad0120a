"""`check/report.txt` in a mount: its advice can be followed, whatever is wrong with the image."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.advice import KINDS, damaged, follow_all
from tests.mount.mounts import INSTARFS, MakeMount, Mount, make_image, mounted, settle


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount of an image in whose place others are put: each takes less time than a mount."""
    folder = tmp_path_factory.mktemp("advised")
    image = make_image(folder / "image.qcow2")
    directory = folder.with_name(f"{folder.name} mnt")
    with mounted([*INSTARFS, "mount", "-f", image, directory], image, directory) as it:
        yield it


def put(shared: Mount, content: bytes) -> None:
    """Let *content* be the image, and nothing else in its folder."""
    folder = shared.image.parent
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != shared.image:
            path.unlink()
    new = folder / "new"
    new.write_bytes(content)
    settle(new)
    new.replace(shared.image)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_advised_works(kind: str, shared: Mount) -> None:
    put(shared, damaged(kind))
    follow_all(lambda: shared.read("check/report.txt"), shared.image)


@pytest.mark.parametrize("option", ["--no-undo", "--read-only"])
def test_what_is_advised_works_whatever_the_mount_allows(
    option: str, mount: MakeMount, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    image = folder / "image.qcow2"
    image.write_bytes(damaged("lost-l2-table"))
    settle(image)
    it = mount(image, option)
    text = it.read("check/report.txt")
    assert ("cannot be taken back" in text) == (option == "--no-undo")
    follow_all(lambda: it.read("check/report.txt"), image)
