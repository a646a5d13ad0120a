"""XFS as mkfs.xfs makes and the kernel ages it, against xfs_db; then with parts of it gone."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from planner.guestfs.known import behind_beginning
from planner.guestfs.protocol import NO_INODE, What
from planner.guestfs.reading import Holes, Window
from planner.guestfs.xfs.filesystem import Xfs, recognise
from planner.source import Bytes, Patched
from tests.block_devices import require_loop_devices
from tests.images.guest_files import make_tree
from tests.images.guest_filled import XFS_VARIANTS, age, make_xfs, mounted, run
from tests.oracle.scene import FileSource
from tests.planner.guestfs.judges import require_xfs
from tests.planner.guestfs.walks import blocks_of, paths_of, require_sound

SEED = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The image of a variant, made once."""
    root = tmp_path_factory.mktemp("xfs")
    make_tree(root / "tree", SEED)

    @cache
    def image(variant: str) -> Path:
        path: Path = root / f"{variant.replace(' ', '_').replace(',', '')}.img"
        make_xfs(path, root / "tree", XFS_VARIANTS[variant])
        return path

    @cache
    def aged(variant: str) -> Path:
        path: Path = root / f"aged_{variant.replace(' ', '_')}.img"
        run("cp", "--sparse=always", image(variant), path)
        with mounted(path) as folder:
            shutil.copytree(root / "tree", folder / "tree", symlinks=True)
            age(folder / "tree" / "dir 0", SEED)
            run("cp", "--reflink=auto", folder / "tree/dir 0/woven 1", folder / "shared")
        return path

    return {"new": image, "aged": aged}


@pytest.fixture
def opened(held):
    """Opens an image, with holes at (offset, length)."""

    def open_it(path: Path, *holes: tuple[int, int]) -> Xfs:
        filesystem = recognise(held(path, *holes))
        assert filesystem is not None
        return filesystem

    return open_it


def head(image: Path, size: int) -> bytes:
    with image.open("rb") as file:
        return file.read(size)


@pytest.mark.parametrize("variant", XFS_VARIANTS)
def test_all_is_as_xfs_db_says(images, opened, variant) -> None:
    image = images["new"](variant)
    filesystem = opened(image)
    assert (filesystem.kind, filesystem.label) == ("xfs", "a label")
    assert filesystem.uuid == run("blkid", "-o", "value", "-s", "UUID", image).strip()
    require_xfs(image, filesystem)
    assert not filesystem.notes
    assert len(paths_of(filesystem)) > 450


@pytest.mark.parametrize("variant", ["xfs with 1 KiB blocks", "xfs with reverse maps"])
def test_an_aged_one_is_as_xfs_db_says(images, opened, variant) -> None:
    require_loop_devices()
    image = images["aged"](variant)
    require_xfs(image, opened(image))
    maps = [extents for extents in opened(image).extents() if (extents.inode != NO_INODE).any()]
    assert any((extents.what == What.INODE_TABLE).any() for extents in maps)


# ---- parts of it are gone ----


def group_bytes(filesystem: Xfs) -> int:
    superblock = filesystem._superblock
    return superblock.ag_blocks * superblock.block_size


@pytest.mark.parametrize("variant", ["xfs", "xfs of version 4 without types"])
def test_a_superblock_in_another_group_does(images, opened, variant) -> None:
    image = images["new"](variant)
    whole, damaged = opened(image), opened(image, (0, 512))
    assert "the copy at" in damaged.notes[0]
    assert damaged.root == whole.root
    assert paths_of(damaged) == paths_of(whole)
    assert blocks_of(damaged) == blocks_of(whole)
    everything = np.array([0]), np.array([whole.size])
    ours, theirs = damaged.records(*everything), whole.records(*everything)
    assert ours.inode.tolist() == theirs.inode.tolist()


def test_a_copy_is_no_beginning(images, opened) -> None:
    image = images["new"]("xfs")
    size = group_bytes(opened(image))
    with image.open("rb") as file:
        source = FileSource(file.fileno())
        for group in (0, 1, 3):
            at = Holes(Window(source, group * size, source.size - group * size))
            assert behind_beginning(at) == group * size
            assert (recognise(at) is None) == (group > 0)


def test_a_copy_that_does_not_know_the_root_does(images, opened) -> None:
    image = images["new"]("xfs")
    whole, damaged = opened(image), opened(image, (0, 512))
    damaged._superblock.root = 0
    assert damaged.root == whole.root


@pytest.mark.parametrize("header", [1, 2])
@pytest.mark.parametrize("variant", ["xfs", "xfs with 1 KiB blocks", "xfs of version 4"])
def test_headers_of_all_groups_may_be_gone(images, opened, variant, header) -> None:
    image = images["new"](variant)
    whole = opened(image)
    size, count = group_bytes(whole), whole._superblock.ag_count
    damaged = opened(image, *((at * size + header * 512, 512) for at in range(count)))
    assert paths_of(damaged) == paths_of(whole)
    ours, theirs = blocks_of(damaged), blocks_of(whole)
    del ours[NO_INODE], theirs[NO_INODE]
    assert ours == theirs
    list(damaged.free())
    assert any(f"{count} " in note for note in damaged.notes)


def test_a_lost_chunk_loses_its_own_and_is_told(images, opened) -> None:
    image = images["new"]("xfs")
    whole = opened(image)
    paths = paths_of(whole)
    inode = max(number for _, number in paths)
    offset = int(whole._superblock.inode_offset(np.array([inode]))[0]) // 4096 * 4096
    damaged = opened(image, (offset, 4096))
    gone = set(damaged.records(np.array([offset]), np.array([4096])).inode.tolist())
    assert inode in gone
    assert len(gone) <= 8
    assert set(blocks_of(whole)) - set(blocks_of(damaged)) <= gone
    assert gone & {number for _, number in paths_of(damaged)}


@pytest.mark.parametrize("is_told", [True, False])
def test_records_are_those_that_a_range_touches(images, opened, is_told) -> None:
    image = images["new"]("xfs of version 4")
    holes = () if is_told else ((2 * 512, 512),)
    filesystem = opened(image, *holes)
    first = int(filesystem._superblock.inode_offset(np.array([filesystem.root]))[0])
    size = filesystem._superblock.inode_size
    records = filesystem.records(
        np.array([0, first + 3 * size - 1, first + 6 * size]), np.array([10, 2, 1])
    )
    # The one before is the file system's own.
    assert (records.start - first).tolist() == [3 * size, 6 * size]
    assert set(records.what.tolist()) == {What.INODE_TABLE}


def test_a_file_that_is_deleted_and_still_open_is_told_of(images, opened, tmp_path) -> None:
    image = tmp_path / "image"
    run("cp", "--sparse=always", images["new"]("xfs"), image)
    inode = next(inode for path, inode in paths_of(opened(image)) if b"file_" in path)
    run("xfs_db", "-x", "-c", f"inode {inode}", "-c", "write core.nlinkv2 0", image)
    filesystem = opened(image)
    some = np.array([NO_INODE, filesystem.root, inode, 1 << 40, 1 << 62])
    assert filesystem.unlinked(some).tolist() == [False, False, True, False, False]


# ---- hostile ones ----


def test_trees_that_bite_their_tails_end(images, opened) -> None:
    image = images["new"]("xfs")
    for sector, root, level in ((1, 16, 28), (2, 20, 24)):
        filesystem, data = opened(image), head(image, 64 << 10)
        block = int.from_bytes(data[sector * 512 + root :][:4], "big") * 4096
        # Of a root two levels high all pointers lead to itself.
        patch = data[block : block + 4] + b"\0\1\0\x40" + data[block + 8 : block + 56]
        patch += (block // 4096).to_bytes(4, "big") * 1010
        source = Patched(filesystem._source._source, block, patch)
        source = Patched(source, sector * 512 + level, (2).to_bytes(4, "big"))
        knotted = recognise(Holes(source))
        assert knotted is not None
        assert len(paths_of(knotted)) > 450
        sum(len(spans) for spans in knotted.free())
        assert knotted.notes


@pytest.mark.parametrize("size", [0, 1, 512, 5000, 70_000])
def test_a_short_source_is_no_file_system_or_one_cut_off(images, size) -> None:
    found = recognise(Holes(Bytes(head(images["new"]("xfs"), size))))
    assert (found is None) == (size < 512)
    if found is not None:
        require_sound(found)
        assert not list(found.free()) or found.notes
        paths_of(found)


def test_garbage_in_place_of_structures_raises_nothing(images, opened) -> None:
    rng = np.random.default_rng(SEED)
    for variant in ("xfs", "xfs of version 4"):
        image = images["new"](variant)
        whole = opened(image)
        places = np.concatenate([extents.start for extents in whole.extents()])
        for _ in range(4):
            source = whole._source._source
            for start in rng.choice(places, 40).tolist():
                at = start + int(rng.integers(0, 4000))
                source = Patched(source, at, rng.integers(0, 256, 64, np.uint8).tobytes())
            found = recognise(Holes(source))
            assert found is not None
            require_sound(found)
            paths_of(found)
