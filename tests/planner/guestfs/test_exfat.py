"""exFAT as mkfs.exfat makes and a FUSE driver fills it, against what that driver reads of it."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from planner.guestfs.fat.filesystem import Fat, recognise_exfat
from planner.guestfs.protocol import NO_INODE, What
from planner.guestfs.reading import Holes
from planner.source import Bytes
from tests.block_devices import require_loop_devices
from tests.images.guest_filled import EXFAT_VARIANTS, make_exfat, plain_tree, run
from tests.planner.guestfs.judges import exfat_files, require_exfat
from tests.planner.guestfs.walks import holed, paths_of, require_sound

SEED = 11


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The bytes of a variant, made once, and the files that the driver reads in it."""
    require_loop_devices()
    root = tmp_path_factory.mktemp("exfat")
    plain_tree(root / "tree", SEED)

    @cache
    def image(variant: str) -> tuple[Path, dict[bytes, bytes | None]]:
        path: Path = root / f"{variant.replace(' ', '_')}.img"
        make_exfat(path, root / "tree", EXFAT_VARIANTS[variant])
        return path, exfat_files(path)

    return image


def opened(data: bytes, *holes: tuple[int, int]) -> Fat:
    filesystem = recognise_exfat(holed(Bytes(data), *holes))
    assert filesystem is not None
    return filesystem


@pytest.mark.parametrize("variant", EXFAT_VARIANTS)
def test_all_is_as_the_driver_reads_it(images, variant) -> None:
    image, files = images(variant)
    data = image.read_bytes()
    filesystem = opened(data)
    assert (filesystem.kind, filesystem.label) == ("exfat", "a label")
    assert filesystem.uuid == run("blkid", "-o", "value", "-s", "UUID", image).strip()
    require_exfat(filesystem, files, Bytes(data))
    rows = [extents for extents in filesystem.extents() if (extents.inode != NO_INODE).any()]
    assert (
        max(np.bincount(np.unique(each.inode, return_inverse=True)[1]).max() for each in rows) > 1
    )
    assert not filesystem.notes


def test_the_boot_sector_may_be_gone(images) -> None:
    image, files = images("exFAT")
    damaged = opened(image.read_bytes(), (0, 512))
    assert "the copy at 6144" in damaged.notes[0]
    assert {path for path, _ in paths_of(damaged)} == set(files)


def test_a_directory_in_itself_ends(images) -> None:
    image, files = images("exFAT")
    data = bytearray(image.read_bytes())
    inode_of = dict(paths_of(opened(bytes(data))))
    above, below = inode_of[b"/tree/dir 1"], inode_of[b"/tree/dir 1/below"]
    data[below + 32 + 20 : below + 32 + 24] = data[above + 32 + 20 : above + 32 + 24]
    names = [names.name(row) for names in opened(bytes(data)).names() for row in range(len(names))]
    assert len(names) <= len(files)


def test_garbage_in_place_of_structures_raises_nothing(images) -> None:
    rng = np.random.default_rng(SEED)
    image, _ = images("exFAT with small clusters")
    original = np.frombuffer(image.read_bytes(), dtype=np.uint8)
    whole = opened(original.tobytes())
    places = np.concatenate(
        [
            extents.start[(extents.what != What.DATA) & (extents.start > 0)]
            for extents in whole.extents()
        ]
    )
    for _ in range(5):
        data = original.copy()
        for start in rng.choice(places, 60).tolist():
            at = start + int(rng.integers(0, 2000))
            data[at : at + 16] = rng.integers(0, 256, 16)
        found = recognise_exfat(Holes(Bytes(data.tobytes())))
        assert found is not None
        require_sound(found)
        paths_of(found)
