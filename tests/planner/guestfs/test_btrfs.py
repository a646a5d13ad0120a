"""btrfs as mkfs.btrfs makes and the kernel ages it, against both; then with parts of it gone."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from planner.guestfs.btrfs.filesystem import Btrfs, recognise
from planner.guestfs.btrfs.superblock import PLACES, SIZE
from planner.guestfs.btrfs.trees import ANYWAY, MAX_SHARED, Places, root_places
from planner.guestfs.protocol import NO_INODE, What
from planner.guestfs.reading import Holes
from planner.guestfs.volumes.find import find_volumes
from planner.source import Patched
from tests.block_devices import require_loop_devices
from tests.images.guest_files import make_tree
from tests.images.guest_filled import BTRFS_VARIANTS, age_btrfs, make_btrfs, mounted, run
from tests.oracle.scene import FileSource
from tests.planner.guestfs import btrfs_tools
from tests.planner.guestfs.judges import require_btrfs
from tests.planner.guestfs.walks import blocks_of, paths_of, require_sound

SEED = 13
ONCE = "btrfs with all once and small nodes"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The image of a variant, made once; and one that was aged."""
    root = tmp_path_factory.mktemp("btrfs")
    make_tree(root / "tree", SEED)

    @cache
    def image(variant: str) -> Path:
        path: Path = root / f"{variant.replace(' ', '_')}.img"
        make_btrfs(path, root / "tree", BTRFS_VARIANTS[variant])
        return path

    @cache
    def aged(variant: str) -> Path:
        path: Path = root / f"aged_{variant.replace(' ', '_')}.img"
        run("cp", "--sparse=always", image(variant), path)
        with mounted(path, "compress=zlib") as folder:
            age_btrfs(folder, SEED)
        return path

    return {"new": image, "aged": aged, "tree": root / "tree"}


@pytest.fixture
def opened(held):
    """Opens an image, with holes at (offset, length)."""

    def open_it(path: Path, *holes: tuple[int, int]) -> Btrfs:
        filesystem = recognise(held(path, *holes))
        assert filesystem is not None
        return filesystem

    return open_it


@pytest.mark.parametrize("variant", BTRFS_VARIANTS)
def test_a_new_one_is_as_the_tree_that_it_was_made_of(images, opened, variant) -> None:
    image, tree = images["new"](variant), images["tree"]
    filesystem = opened(image)
    assert (filesystem.kind, filesystem.label) == ("btrfs", "a label")
    assert filesystem.uuid == run("blkid", "-o", "value", "-s", "UUID", image).strip()
    inode_of = dict(paths_of(filesystem))
    files = {
        (path, inode_of[path]): content for (path, _), content in btrfs_tools.files_in(tree).items()
    }
    btrfs_tools.require_files(filesystem, files, filesystem._source)
    btrfs_tools.require_space(filesystem, image)
    assert not filesystem.notes


@pytest.mark.parametrize("variant", ["btrfs", ONCE])
def test_an_aged_one_is_as_the_kernel_reads_it(images, opened, variant) -> None:
    require_loop_devices()
    image = images["aged"](variant)
    filesystem = opened(image)
    require_btrfs(image, filesystem, filesystem._source)
    assert not filesystem.notes
    paths = {path for path, _ in paths_of(filesystem)}
    assert {b"/a subvolume/one in it/one", b"/a snapshot/woven 1"} <= paths
    inodes = [inode for path, inode in paths_of(filesystem) if path.endswith(b"/woven 1")]
    assert len(set(inodes)) == 2


def test_the_copy_of_the_superblock_does(images, opened) -> None:
    image = images["new"]("btrfs")
    whole, damaged = opened(image), opened(image, (PLACES[0], SIZE))
    assert "the copy at 67108864 was used" in damaged.notes[0]
    assert paths_of(damaged) == paths_of(whole)
    assert blocks_of(damaged) == blocks_of(whole)


def test_without_any_table_it_is_found(images, tmp_path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(200 << 20)
    run(
        "dd", f"if={images['new']('btrfs')}", f"of={disk}", "bs=1M", "seek=3", "conv=notrunc,sparse"
    )
    with disk.open("rb") as file:
        [volume] = find_volumes(FileSource(file.fileno())).volumes
    assert (volume.name, volume.holds) == ("at offset 3145728 (a label)", "btrfs")


def nodes_of(filesystem: Btrfs, level: int | None = None) -> tuple[Places, np.ndarray]:
    """Nodes of the trees with files, and where they are."""
    walk = filesystem._forest.trees.walk(filesystem._subvolumes)
    places = Places.joined([step.place for step in walk])
    if level is not None:
        places = places.select(places.level == level)
    return places, filesystem._forest.trees.copies(places.logical)


def test_one_copy_of_every_node_may_be_gone(images, opened) -> None:
    image = images["new"]("btrfs")
    whole = opened(image)
    size = whole._superblock.node_size
    _, copies = nodes_of(whole)
    for copy in (0, 1):
        holes = [(int(at), size) for at in copies[:, copy]]
        damaged = opened(image, *holes)
        assert paths_of(damaged) == paths_of(whole)
        assert blocks_of(damaged) == blocks_of(whole)
        assert not damaged.notes
        start, length = np.sort(copies[:, copy]), np.full(len(copies), size)
        assert not len(damaged.records(start, length))


def entries_of(filesystem: Btrfs) -> set[tuple[int, int, bytes]]:
    """Directory, inode and name of each entry."""
    return {
        (int(names.parent[row]), int(names.child[row]), names.name(row))
        for names in filesystem.names()
        for row in range(len(names))
    }


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_leaf_is_told_of_with_all_files_in_it(images, opened, is_lost) -> None:
    image = images["new"](ONCE)
    whole = opened(image)
    paths, size = paths_of(whole), whole._superblock.node_size
    places, copies = nodes_of(whole, 0)
    for row in range(2, len(places), 9):
        at = int(copies[row, 0])
        told = whole.records(np.array([at]), np.array([1]))
        assert set(told.start.tolist()) == {at}
        assert set(told.what.tolist()) == {What.INODE_TABLE}
        expected = set(told.inode.tolist()) & {inode for _, inode in paths}
        assert expected
        if not is_lost:
            continue
        damaged = opened(image, (at, size))
        names, blocks = entries_of(damaged), blocks_of(damaged)
        assert names <= entries_of(whole)
        # Names stand with the directory and with the file, seldom both in one leaf.
        assert len(entries_of(whole) - names) < 20
        records = damaged.records(np.array([at]), np.array([size]))
        assert set(records.inode.tolist()) >= expected & {child for _, child, _ in names}
        gone = {inode for inode, own in blocks_of(whole).items() if blocks.get(inode) != own}
        assert gone - {NO_INODE} <= expected


def test_names_with_files_stand_in_for_those_of_a_lost_directory(images, opened) -> None:
    image = images["new"](ONCE)
    whole = opened(image)
    folder = next(inode for path, inode in paths_of(whole) if path == b"/many")
    places, copies = nodes_of(whole, 0)
    holes = [
        (int(copies[row, 0]), whole._superblock.node_size)
        for row in range(len(places))
        if places.low[row] >> 8 == folder == places.high[row] >> 8
    ]
    assert len(holes) > 2
    damaged = opened(image, *holes)
    assert paths_of(damaged) == paths_of(whole)
    list(damaged.extents())
    assert any("blocks of its trees" in note for note in damaged.notes)


def test_an_older_root_does_where_the_newest_is_gone(images, opened) -> None:
    require_loop_devices()
    image = images["aged"](ONCE)
    whole = opened(image)
    root = whole._forest.trees.copies(np.array([whole._superblock.roots[0].logical]))
    damaged = opened(image, (int(root[0, 0]), 4096))
    # What was written over since is lost, and what is left is true.
    both = paths_of(damaged) & paths_of(whole)
    assert any("an older one was used" in note for note in damaged.notes)
    assert {path for path, _ in both} > {b"/dir 0", b"/many"}


def test_the_chunks_are_known_from_an_older_tree_of_them(images, opened) -> None:
    image = images["new"]("btrfs")
    whole = opened(image)
    at = whole._forest.trees.copies(whole._forest.chunk.logical)
    damaged = opened(image, *((int(place), 16384) for place in at.reshape(-1) if place >= 0))
    assert paths_of(damaged) == paths_of(whole)
    assert any("an older one was used" in note for note in damaged.notes)


def test_snapshots_without_number_share_no_more_than_is_bounded(images, opened) -> None:
    whole = opened(images["new"](ONCE))
    trees, subvolumes = whole._forest.trees, whole._subvolumes
    nodes = sum(len(step.place) for step in trees.walk(subvolumes))
    assert not trees.left_out
    many = np.arange(256, 256 + 1000)
    same = (np.repeat(each, len(many)) for each in
            (subvolumes.logical, subvolumes.level, subvolumes.generation))  # fmt: skip
    seen = sum(len(step.place) for step in trees.walk(root_places(many, *same)))
    assert seen <= MAX_SHARED * nodes + ANYWAY
    assert trees.left_out
    assert "snapshots share more" in whole.notes[-1]


@pytest.mark.parametrize("size", [0, 65535, 65536 + 4096, 1 << 20, 40 << 20])
def test_a_short_source_is_no_file_system_or_one_cut_off(images, size, tmp_path) -> None:
    run("cp", "--sparse=always", images["new"]("btrfs"), tmp_path / "short")
    os.truncate(tmp_path / "short", size)
    with (tmp_path / "short").open("rb") as file:
        found = recognise(Holes(FileSource(file.fileno())))
        assert (found is None) == (size < 65536 + 4096)
        if found is not None:
            assert any("are not there" in note for note in found.notes)
            require_sound(found)
            paths_of(found)


def test_garbage_in_place_of_structures_raises_nothing(images, opened) -> None:
    rng = np.random.default_rng(SEED)
    whole = opened(images["new"]("btrfs with other checksums"))
    forest = whole._forest
    places = [forest.chunk, forest.root, *(step.place for step in forest.trees.walk(forest.others))]
    starts = forest.trees.copies(Places.joined(places).logical)[:, :2]
    for _ in range(4):
        source = whole._source._source
        for both in starts[rng.random(len(starts)) < 0.5]:
            at, raw = int(rng.integers(64, 3000)), rng.integers(0, 256, 40, np.uint8).tobytes()
            for start in both.tolist():
                source = Patched(source, start + at, raw)
        found = recognise(Holes(source))
        assert found is not None
        require_sound(found)
        paths_of(found)
        found.records(np.array([0]), np.array([found.size]))
