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
from tests.images.guest_filled import EXFAT_VARIANTS, make_exfat, mounted_exfat, plain_tree, run
from tests.planner.guestfs.walks import paths_of

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
        with mounted_exfat(path) as folder:
            files = {
                b"/" + bytes(each.relative_to(folder)): each.read_bytes()
                if each.is_file()
                else None
                for each in folder.rglob("*")
            }
        return path, files

    return image


def opened(data: bytes, *holes: tuple[int, int]) -> Fat:
    start = np.array([at for at, _ in holes], dtype=np.int64)
    length = np.array([count for _, count in holes], dtype=np.int64)
    filesystem = recognise_exfat(Holes(Bytes(data), start, start + length))
    assert filesystem is not None
    return filesystem


def contents_of(filesystem: Fat, data: bytes) -> dict[int, bytes]:
    """The bytes of each file's clusters, those of directories left out."""
    pieces: dict[int, dict[int, bytes]] = {}
    for extents in filesystem.extents():
        kept = extents.select((extents.what == What.DATA) & (extents.inode != NO_INODE))
        for row in range(len(kept)):
            start, length = int(kept.start[row]), int(kept.length[row])
            file = pieces.setdefault(int(kept.inode[row]), {})
            file[int(kept.file_offset[row])] = data[start : start + length]
    found = {}
    for inode, file in pieces.items():
        at = 0
        for offset in sorted(file):
            assert offset == at
            at += len(file[offset])
        found[inode] = b"".join(file[offset] for offset in sorted(file))
    return found


@pytest.mark.parametrize("variant", EXFAT_VARIANTS)
def test_all_is_as_the_driver_reads_it(images, variant) -> None:
    image, files = images(variant)
    data = image.read_bytes()
    filesystem = opened(data)
    assert (filesystem.kind, filesystem.label) == ("exfat", "a label")
    assert filesystem.uuid == run("blkid", "-o", "value", "-s", "UUID", image).strip()
    paths = paths_of(filesystem)
    assert {path for path, _ in paths} == set(files)
    contents = contents_of(filesystem, data)
    size = filesystem.block_size
    for path, inode in paths:
        judged = files[path]
        if judged is not None:
            ours = contents.get(inode, b"")
            assert ours[: len(judged)] == judged, path
            assert len(ours) == -(-len(judged) // size) * size
    rows = [extents for extents in filesystem.extents() if (extents.inode != NO_INODE).any()]
    assert (
        max(np.bincount(np.unique(each.inode, return_inverse=True)[1]).max() for each in rows) > 1
    )
    heap, count = filesystem._volume.heap, filesystem._volume.clusters
    used, free = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    for extents in filesystem.extents():
        for start, length in zip(extents.start.tolist(), extents.length.tolist(), strict=True):
            if start >= heap:
                used[(start - heap) // size : (start + length - heap) // size] = True
    for spans in filesystem.free():
        for start, length in zip(spans.start.tolist(), spans.length.tolist(), strict=True):
            free[(start - heap) // size : (start + length - heap) // size] = True
    assert (used ^ free).all()
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
        for extents in found.extents():
            assert (extents.start >= 0).all()
            assert (extents.start + extents.length <= found.size).all()
        paths_of(found)
        list(found.free())
