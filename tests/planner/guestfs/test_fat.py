"""FAT as mkfs.fat makes and mtools fill it, against mdir and mshowfat; then with parts gone."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from planner.guestfs.fat.chains import Chains
from planner.guestfs.fat.filesystem import Fat, recognise
from planner.guestfs.fat.volume import FIRST
from planner.guestfs.protocol import What
from planner.guestfs.reading import Holes
from planner.source import Patched
from tests.images.guest_filled import FAT_VARIANTS, make_fat, plain_tree, run
from tests.oracle.scene import FileSource
from tests.planner.guestfs.fat_tools import clusters_of
from tests.planner.guestfs.judges import require_fat
from tests.planner.guestfs.walks import paths_of, require_sound

SEED = 7


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The image of a variant, made once."""
    root = tmp_path_factory.mktemp("fat")
    plain_tree(root / "tree", SEED)

    @cache
    def image(variant: str) -> Path:
        path: Path = root / f"{variant.replace(' ', '_')}.img"
        make_fat(path, root / "tree", variant)
        return path

    return image


@pytest.fixture
def opened(held):
    """Opens an image, with holes at (offset, length)."""

    def open_it(path: Path, *holes: tuple[int, int]) -> Fat:
        filesystem = recognise(held(path, *holes))
        assert filesystem is not None
        return filesystem

    return open_it


@pytest.mark.parametrize("variant", FAT_VARIANTS)
def test_all_is_as_mtools_say(images, opened, variant) -> None:
    image = images(variant)
    filesystem = opened(image)
    assert (filesystem.kind, filesystem.label) == ("vfat", "A LABEL")
    assert filesystem.uuid == run("blkid", "-o", "value", "-s", "UUID", image).strip()
    require_fat(image, filesystem)
    ours = clusters_of(filesystem)
    assert len(ours) > 300
    assert any(len(run_ends(clusters)) > 50 for clusters in ours.values())
    assert not filesystem.notes


def run_ends(clusters: list[tuple[int, int]]) -> list[int]:
    return [one for (_, one), (_, two) in itertools.pairwise(clusters) if two != one + 1]


def test_what_comes_before_the_clusters_is_its_own(images, opened) -> None:
    filesystem = opened(images("FAT16"))
    volume = filesystem._volume
    parts = sorted(
        (int(start), int(length), int(what))
        for extents in filesystem.extents()
        for start, length, what in zip(extents.start, extents.length, extents.what, strict=True)
        if start < volume.heap and length
    )
    assert [what for *_, what in parts] == [
        What.SUPERBLOCK, What.BITMAP, What.BITMAP, What.DIRECTORY
    ]  # fmt: skip
    ends = [start + length for start, length, _ in parts]
    assert [0, *ends] == [*(start for start, *_ in parts), volume.heap]


def test_boot_sector_and_first_fat_may_be_gone(images, opened) -> None:
    image = images("FAT32")
    whole = opened(image)
    volume = whole._volume
    damaged = opened(image, (0, 512), (volume.tables[0], volume.table_size))
    assert paths_of(damaged) == paths_of(whole)
    assert clusters_of(damaged) == clusters_of(whole)
    assert len(damaged.notes) == 2


def test_where_both_fats_are_gone_it_is_told(images, opened) -> None:
    image = images("FAT32")
    whole = opened(image)
    volume = whole._volume
    at = 4 * 3000 // 512 * 512
    damaged = opened(image, *((table + at, 512) for table in volume.tables))
    ours, theirs = clusters_of(damaged), clusters_of(whole)
    assert all(set(pairs) <= set(theirs[inode]) for inode, pairs in ours.items())
    assert ours != theirs
    assert any("chains of clusters end" in note for note in damaged.notes)
    lost = set(range(at // 4, at // 4 + 128))
    for spans in damaged.free():
        first = (spans.start - volume.heap) // volume.cluster_size + FIRST
        for start, count in zip(first, spans.length // volume.cluster_size, strict=True):
            assert not lost & set(range(int(start), int(start + count)))


@pytest.mark.parametrize("variant", ["FAT16", "FAT32"])
def test_below_a_lost_directory_files_are_found(images, opened, variant) -> None:
    image = images(variant)
    whole = opened(image)
    inode_of = dict(paths_of(whole))
    folder = inode_of[b"/dir 2"]
    [(_, cluster)] = clusters_of(whole)[folder]
    size, heap = whole.block_size, whole._volume.heap
    damaged = opened(image, (heap + (cluster - FIRST) * size, size))
    ours = clusters_of(damaged)
    below = [inode for path, inode in inode_of.items() if path.startswith(b"/dir 2/below/below/")]
    assert {inode: ours.get(inode) for inode in below} == {
        inode: clusters_of(whole).get(inode) for inode in below
    }
    assert any("1 directories are in no other" in note for note in damaged.notes)
    named = {int(child) for names in damaged.names() for child in names.child}
    assert named >= set(below)


def test_a_hole_in_a_directory_does_not_end_it(images, opened) -> None:
    image = images("FAT32")
    whole = opened(image)
    paths = paths_of(whole)
    clusters = clusters_of(whole)[dict(paths)[b"/Many"]]
    at = whole._volume.heap + (clusters[1][1] - FIRST) * 512
    left = {path for path, _ in paths_of(opened(image, (at, 512)))}
    gone = {path for path, _ in paths} - left
    assert 1 < len(gone) < 20
    assert all(path.startswith(b"/Many/") for path in gone)


# ---- hostile ones ----


def patched(filesystem: Fat, *patches: tuple[int, bytes]) -> Fat:
    source = filesystem._source._source
    for at, raw in patches:
        source = Patched(source, at, raw)
    found = recognise(Holes(source))
    assert found is not None
    return found


def test_a_chain_that_bites_its_tail_ends(images, opened) -> None:
    whole = opened(images("FAT32"))
    inode = dict(paths_of(whole))[b"/more 0/in pieces"]
    clusters = [cluster for _, cluster in clusters_of(whole)[inode]]
    tables, back = whole._volume.tables, clusters[3].to_bytes(4, "little")
    for bitten in (clusters[-1], clusters[900]):
        knotted = patched(whole, *((table + 4 * bitten, back) for table in tables))
        ours = clusters_of(knotted)
        assert [cluster for _, cluster in ours[inode]][:900] == clusters[:900]
        assert len(ours[inode]) < 3 * whole._volume.clusters
        assert knotted.notes


def test_a_file_in_very_many_pieces_is_followed(images, opened, monkeypatch) -> None:
    whole = opened(images("FAT12"))
    expected = clusters_of(whole)
    monkeypatch.setattr("planner.guestfs.fat.chains.STEPS_TOGETHER", 2)
    assert clusters_of(whole) == expected
    assert not whole.notes


def test_a_directory_in_itself_ends(images, opened) -> None:
    whole = opened(images("FAT16"))
    inode_of = dict(paths_of(whole))
    [(_, cluster)] = clusters_of(whole)[inode_of[b"/dir 1"]]
    below = inode_of[b"/dir 1/below"]
    knotted = patched(whole, (below + 26, cluster.to_bytes(2, "little")))
    names = [names.name(row) for names in knotted.names() for row in range(len(names))]
    assert len(names) <= len(inode_of) + 1


@pytest.mark.parametrize("size", [0, 1, 512, 5000, 1 << 20])
def test_a_short_source_is_no_file_system_or_one_cut_off(images, size, tmp_path, opened) -> None:
    with images("FAT16").open("rb") as file:
        (tmp_path / "short").write_bytes(file.read(size))
    with (tmp_path / "short").open("rb") as file:
        found = recognise(Holes(FileSource(file.fileno())))
        assert (found is None) == (size < 65536)
        if found is not None:
            require_sound(found)
            paths_of(found)
            assert found.notes


@pytest.mark.parametrize("variant", FAT_VARIANTS)
def test_garbage_in_place_of_structures_raises_nothing(images, opened, variant) -> None:
    rng = np.random.default_rng(SEED)
    whole = opened(images(variant))
    places = np.concatenate(
        [
            extents.start[(extents.what != What.DATA) & (extents.start > 0)]
            for extents in whole.extents()
        ]
    )
    for _ in range(3):
        patches = [
            (int(start) + int(rng.integers(0, 2000)), rng.integers(0, 256, 64, np.uint8).tobytes())
            for start in rng.choice(places, 30)
        ]
        found = patched(whole, *patches)
        require_sound(found)
        paths_of(found)


def test_the_fat_in_memory_is_what_the_disk_has(images, opened) -> None:
    filesystem = opened(images("FAT12"))
    chains = Chains(filesystem._source, filesystem._volume)
    assert chains.next[0] == 0xFF8
    assert not filesystem.unlinked(np.array([5])).any()
    assert not len(filesystem.records(np.array([0]), np.array([1 << 20])))
