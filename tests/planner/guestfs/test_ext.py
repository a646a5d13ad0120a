"""ext2, ext3 and ext4 as mke2fs makes them, against debugfs; then with parts of them gone."""

import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from planner.guestfs.ext.filesystem import Ext, recognise
from planner.guestfs.ext.superblock import OFFSET
from planner.guestfs.protocol import NO_INODE, What
from planner.guestfs.reading import Holes
from planner.source import Bytes
from tests.images.guest_files import EXT_VARIANTS, make_ext, make_tree
from tests.planner.guestfs import debugfs
from tests.planner.guestfs.judges import require_ext
from tests.planner.guestfs.walks import (
    blocks_of,
    free_blocks_of,
    holed,
    owned_blocks,
    paths_of,
    require_sound,
)

SEED = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The image of a variant, made once."""
    root = tmp_path_factory.mktemp("ext")
    make_tree(root / "tree", SEED)

    @cache
    def image(variant: str) -> Path:
        path: Path = root / f"{variant}.img"
        make_ext(path, root / "tree", EXT_VARIANTS[variant])
        return path

    return image


def opened(data: bytes, *holes: tuple[int, int]) -> Ext:
    filesystem = recognise(holed(Bytes(data), *holes))
    assert filesystem is not None
    return filesystem


@pytest.mark.parametrize("variant", EXT_VARIANTS)
def test_all_is_as_debugfs_says(images, variant) -> None:
    image = images(variant)
    filesystem = opened(image.read_bytes())
    assert filesystem.kind == variant.split()[0]
    assert filesystem.label == "a label"
    assert filesystem.size == 64 << 20
    assert not filesystem.notes
    require_ext(image, filesystem)
    ours = blocks_of(filesystem)
    owned, free = owned_blocks(ours), free_blocks_of(filesystem, owned_blocks(ours))
    if "bigalloc" not in EXT_VARIANTS[variant]:
        assert len(free | owned) == filesystem.size // filesystem.block_size
    assert not filesystem.notes


# With groups of 8 MiB there are backups; groups of a chosen size are not looked for.
SMALL = [
    name
    for name, options in EXT_VARIANTS.items()
    if "1024" in options and not {"-g", "bigalloc"} & set(options)
]


@pytest.mark.parametrize("variant", SMALL)
def test_superblock_and_descriptors_may_be_gone(images, variant) -> None:
    data = images(variant).read_bytes()
    whole, damaged = opened(data), opened(bytes(3 * 1024) + data[3 * 1024 :])
    assert "the copy at" in damaged.notes[0]
    assert paths_of(damaged) == paths_of(whole)
    ours, theirs = blocks_of(damaged), blocks_of(whole)
    del ours[NO_INODE], theirs[NO_INODE]  # reserved blocks hang on what was lost
    assert ours == theirs


def test_a_lost_inode_table_loses_its_own_and_its_files_are_named(images) -> None:
    data = images("ext4").read_bytes()
    whole = opened(data)
    table = int(whole._groups.inode_table[0]) * 4096
    lost = opened(data, (table + 2 * 4096, 4096))
    gone = set(range(33, 49))
    assert set(blocks_of(whole)) - set(blocks_of(lost)) <= gone
    records = lost.records(np.array([table + 2 * 4096]), np.array([4096]))
    assert set(records.inode.tolist()) == gone
    assert set(records.what.tolist()) == {What.INODE_TABLE}
    named = {inode for _, inode in paths_of(lost)}
    assert gone <= named | {inode for _, inode in paths_of(whole)}


def test_records_are_those_that_a_range_touches(images) -> None:
    filesystem = opened(images("ext4").read_bytes())
    table = int(filesystem._groups.inode_table[0]) * 4096
    records = filesystem.records(
        np.array([0, table + 11 * 256 + 255, table + 14 * 256]), np.array([10, 2, 1])
    )
    assert records.inode.tolist() == [12, 13, 15]
    assert (records.start - table).tolist() == [11 * 256, 12 * 256, 14 * 256]


def test_records_whose_use_nobody_knows_are_said_to_be(images) -> None:
    data = images("ext4").read_bytes()
    bitmap = int(opened(data)._groups.inode_bitmap[0]) * 4096
    filesystem = opened(data, (bitmap, 1))
    table = int(filesystem._groups.inode_table[0]) * 4096
    records = filesystem.records(np.array([table + 4096]), np.array([1]))
    assert records.what.tolist() == [What.UNKNOWN]


def change(image: Path, *commands: str) -> None:
    """Have debugfs write to *image*."""
    script = "".join(f"{command}\n" for command in commands)
    subprocess.run(
        ["debugfs", "-w", "-f", "-", image],
        input=script,
        text=True,
        check=True,
        capture_output=True,
    )


def some_file(image: Path) -> tuple[bytes, int]:
    """The path of a file with a plain name, and its inode."""
    return min((path, inode) for path, inode in debugfs.paths_in(image) if b"file " in path)


def test_a_file_that_is_deleted_and_still_open_is_told_of(images, tmp_path) -> None:
    image = tmp_path / "image"
    image.write_bytes(images("ext4").read_bytes())
    path, inode = some_file(image)
    change(image, f'unlink "{path.decode()}"', f"sif <{inode}> links_count 0")
    filesystem = opened(image.read_bytes())
    assert inode in blocks_of(filesystem)
    assert path not in {known for known, _ in paths_of(filesystem)}
    some = np.array([NO_INODE, 2, inode, 1 << 40])
    assert filesystem.unlinked(some).tolist() == [False, False, True, False]


def test_a_deleted_file_is_not_told_of(images, tmp_path) -> None:
    image = tmp_path / "image"
    image.write_bytes(images("ext2").read_bytes())
    path, inode = some_file(image)
    change(image, f'rm "{path.decode()}"')
    filesystem = opened(image.read_bytes())
    assert inode not in blocks_of(filesystem)


def test_a_tree_that_bites_its_tail_ends(images) -> None:
    data = bytearray(images("ext4").read_bytes())
    whole = opened(bytes(data))
    # Every extent becomes one of depth 5, whose nodes are its own inode table.
    table = int(whole._groups.inode_table[0]) * 4096
    for at in range(table, table + 64 * 4096, 256):
        if data[at + 40 : at + 42] == b"\x0a\xf3":
            data[at + 46] = 1
    filesystem = opened(bytes(data))
    sum(len(extents) for extents in filesystem.extents())
    assert any("make no sense" in note for note in filesystem.notes)


@pytest.mark.parametrize("size", [0, 1, 1024, OFFSET + 1024, 5000])
def test_a_short_source_is_no_file_system_or_one_cut_off(images, size) -> None:
    found = recognise(Holes(Bytes(images("ext4").read_bytes()[:size])))
    assert (found is None) == (size < OFFSET + 1024)
    if found is not None:
        require_sound(found)
        assert not paths_of(found)
        assert found.notes


def test_garbage_in_place_of_structures_raises_nothing(images) -> None:
    rng = np.random.default_rng(SEED)
    original = np.frombuffer(images("ext4 with inline data").read_bytes(), dtype=np.uint8)
    whole = opened(original.tobytes())
    places = np.concatenate([extents.start for extents in whole.extents()])
    for _ in range(6):
        data = original.copy()
        for start in rng.choice(places, 40).tolist():
            at = start + int(rng.integers(0, 4000))
            data[at : at + 64] = rng.integers(0, 256, 64)
        found = recognise(Holes(Bytes(data.tobytes())))
        assert found is not None
        require_sound(found)
        paths_of(found)


def test_one_that_ends_before_its_first_group_has_nothing(images) -> None:
    data = bytearray(images("ext4 with a backup a group").read_bytes())
    data[OFFSET + 4 : OFFSET + 8] = (1).to_bytes(4, "little")  # blocks, of which one is before it
    filesystem = opened(bytes(data))
    assert not len(filesystem._groups)
    assert not any(len(each) for each in filesystem.extents())
    assert not any(len(each) for each in filesystem.free())
