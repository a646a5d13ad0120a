"""`check/report.txt` in a mount: its advice can be followed, whatever is wrong with the image."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.advice import KINDS, damaged, follow_all
from tests.mount.mounts import INSTARFS, Mount, make_image, mounted, settle


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount of an image in whose place others are put: each takes less time than a mount."""
    folder = tmp_path_factory.mktemp("advised")
    image = make_image(folder / "image.qcow2")
    directory = folder.with_name(f"{folder.name} mnt")
    with mounted([*INSTARFS, "mount", "-f", image, directory], image, directory) as it:
        yield it


def put(mount: Mount, content: bytes) -> None:
    """Let *content* be the image, and nothing else in its folder."""
    folder = mount.image.parent
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != mount.image:
            path.unlink()
    new = folder / "new"
    new.write_bytes(content)
    settle(new)
    new.replace(mount.image)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_advised_works(kind: str, mount: Mount) -> None:
    put(mount, damaged(kind))
    follow_all(lambda: mount.read("check/report.txt"), mount.image)
