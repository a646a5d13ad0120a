"""NTFS as mkntfs makes and ntfs-3g fills it, against ntfscluster and a mount; then with holes."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from planner.guestfs.ntfs.attributes import IN_USE, NUMBER, NUMBER_BITS
from planner.guestfs.ntfs.filesystem import Ntfs, recognise
from planner.guestfs.protocol import NO_INODE, What
from planner.guestfs.reading import Holes
from planner.source import Bytes
from tests.block_devices import require_loop_devices
from tests.images.guest_files import make_tree
from tests.images.guest_filled import NTFS_VARIANTS, fill_ntfs, make_ntfs, mounted_ntfs, run
from tests.planner.guestfs.judges import ntfs_paths, plain, require_ntfs
from tests.planner.guestfs.walks import blocks_of, holed, paths_of, require_sound

SEED = 5


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The image of a variant, made once, and the paths that ntfs-3g has in it."""
    require_loop_devices()
    root = tmp_path_factory.mktemp("ntfs")
    make_tree(root / "tree", SEED, files=80)
    for path in (root / "tree" / "dir 1").iterdir():
        if "ostile" in path.name:
            path.rename(path.with_name("with $(a) \u20ac \U0001f600"))

    @cache
    def image(variant: str) -> tuple[Path, set[tuple[bytes, int]]]:
        path: Path = root / f"{variant.replace(' ', '_')}.img"
        make_ntfs(path, NTFS_VARIANTS[variant])
        with mounted_ntfs(path) as folder:
            fill_ntfs(folder, root / "tree", SEED)
        return path, ntfs_paths(path)

    return image


def opened(data: bytes, *holes: tuple[int, int]) -> Ntfs:
    filesystem = recognise(holed(Bytes(data), *holes))
    assert filesystem is not None
    return filesystem


@pytest.mark.parametrize("variant", NTFS_VARIANTS)
def test_all_is_as_ntfs_3g_says(images, variant) -> None:
    image, judged = images(variant)
    filesystem = opened(image.read_bytes())
    assert (filesystem.kind, filesystem.label) == ("ntfs", "a label")
    assert filesystem.uuid == run("blkid", "-o", "value", "-s", "UUID", image).strip()
    assert filesystem.size == 48 << 20
    require_ntfs(image, filesystem, judged)
    assert not filesystem.notes


def test_streams_have_names_of_their_own(images) -> None:
    image, _ = images("ntfs")
    filesystem = opened(image.read_bytes())
    paths = paths_of(filesystem)
    for number in (1, 4):
        path = f"/tree/with streams {number}"
        [inode] = [inode for each, inode in paths if each == path.encode()]
        [stream] = [inode for each, inode in paths if each == f"{path}:other".encode()]
        assert stream & NUMBER == inode
        assert len(blocks_of(filesystem)[stream]) == -(-(9000 * number + 10) // 4096)
    of_links = [path for path, inode in paths if inode == stream]
    assert len(of_links) == 1 + 40


def test_files_whose_attributes_fill_several_records_are_whole(images) -> None:
    image, _ = images("ntfs with small clusters")
    filesystem = opened(image.read_bytes())
    # The judges agree on them above; here only that there are some.
    assert any(records.base[records.base > 0].size for records in filesystem._table.walk())


def test_boot_sector_and_first_record_may_be_gone(images) -> None:
    image, _ = images("ntfs")
    data = image.read_bytes()
    whole = opened(data)
    mft = whole._boot.mft * whole._boot.cluster_size
    damaged = opened(data, (0, 512), (mft, 1024))
    assert len(damaged.notes) == 2
    assert damaged.label == whole.label
    assert paths_of(damaged) == paths_of(whole)
    assert {**blocks_of(damaged), NO_INODE: 0} == {**blocks_of(whole), NO_INODE: 0}
    lost = opened(data, (mft, 1024), (whole._boot.mirror * whole._boot.cluster_size, 1024))
    assert any("nor its copy" in note for note in lost.notes)
    assert paths_of(lost) <= paths_of(whole)
    assert paths_of(lost)


def record_at(filesystem: Ntfs, inode: int) -> int:
    """Where the record of *inode* is."""
    return int(filesystem._table.pieces.places(np.array([inode * 1024]))[0])


def index_blocks(filesystem: Ntfs, inode: int) -> list[tuple[int, int]]:
    """(offset, length) of what a directory has outside of its record."""
    return [
        (int(start), int(length))
        for extents in filesystem.extents()
        for start, length in zip(
            extents.start[extents.inode == inode],
            extents.length[extents.inode == inode],
            strict=True,
        )
    ]


def test_a_lost_record_is_told_and_named_by_its_directory(images) -> None:
    image, judged = images("ntfs")
    data = image.read_bytes()
    whole = opened(data)
    inode = min(inode for path, inode in judged if b"/file " in path)
    place = record_at(whole, inode)
    damaged = opened(data, (place, 1024))
    assert plain(paths_of(damaged)) == judged
    records = damaged.records(np.array([place + 1]), np.array([5]))
    assert records.inode.tolist() == [inode]
    assert records.what.tolist() == [What.INODE_TABLE]
    bitmap = int(damaged._table._bitmap.disk[0]) if len(damaged._table._bitmap.disk) else 0
    if bitmap:
        unknown = opened(data, (place, 1024), (bitmap, 4096))
        records = unknown.records(np.array([place + 1]), np.array([5]))
        assert records.what.tolist() == [What.UNKNOWN]


@pytest.mark.parametrize("variant", ["ntfs", "ntfs with small clusters"])
def test_all_records_of_a_crowd_may_be_lost(images, variant) -> None:
    image, judged = images(variant)
    data = image.read_bytes()
    whole = opened(data)
    crowd = sorted(inode for path, inode in judged if path.startswith(b"/tree/crowd/"))
    damaged = opened(data, *((record_at(whole, inode), 1024) for inode in crowd))
    # Names of files that were deleted are in blocks of the index that are not in use.
    assert plain(paths_of(damaged)) == judged
    records = damaged.records(np.array([0]), np.array([damaged.size]))
    assert set(crowd) <= set(records.inode.tolist())
    assert len(records) == len(whole.records(np.array([0]), np.array([whole.size])))


def test_where_record_and_directory_are_lost_there_is_a_number(images) -> None:
    image, judged = images("ntfs")
    data = image.read_bytes()
    whole = opened(data)
    inode, crowd = (
        next(inode for path, inode in judged if path.startswith(prefix))
        for prefix in (b"/tree/crowd/", b"/tree/crowd")
    )
    crowd = next(inode for path, inode in judged if path == b"/tree/crowd")
    place = record_at(whole, inode)
    damaged = opened(data, (place, 1024), *index_blocks(whole, crowd))
    assert {pair[1] for pair in judged - plain(paths_of(damaged))} == {inode}
    records = damaged.records(np.array([place]), np.array([1]))
    assert records.inode.tolist() == [inode]


@pytest.mark.parametrize("variant", ["ntfs with small clusters", "ntfs with large clusters"])
def test_names_and_runs_in_a_lost_record_that_goes_on_another(images, variant) -> None:
    image, judged = images(variant)
    data = image.read_bytes()
    whole = opened(data)
    with_links = next(inode for path, inode in judged if path == b"/tree/with streams 4")
    goes_on = {
        int(number): int(base)
        for part in whole._table.walk()
        for number, base in zip(part.number, part.base, strict=True)
        if base and whole._table.read(np.array([base]))[0].flags[0] == IN_USE
    }
    assert with_links in goes_on.values()
    holes = [(record_at(whole, number), 1024) for number in goes_on]
    damaged = opened(data, *holes)
    assert plain(paths_of(damaged)) == judged
    for number, base in goes_on.items():
        records = damaged.records(np.array([record_at(whole, number)]), np.array([1024]))
        assert records.inode.tolist() == [base]
        assert records.what.tolist() == [What.INODE_TABLE]
    # With what they go on lost as well, what is in use and in no directory is no file.
    holes += [(record_at(whole, base), 1024) for base in set(goes_on.values())]
    damaged = opened(data, *holes)
    assert plain(paths_of(damaged)) == judged
    for number in goes_on:
        records = damaged.records(np.array([record_at(whole, number)]), np.array([1024]))
        assert records.what.tolist() == [What.UNKNOWN]


def test_names_for_dos_stand_in_for_those_that_are_lost_only(images) -> None:
    """ntfs-3g makes none: some names are said to be for DOS here."""
    image, judged = images("ntfs")
    data = bytearray(image.read_bytes())
    whole = opened(bytes(data))
    inode = next(inode for path, inode in judged if path == b"/tree/with streams 2")
    links = {path for path, each in judged if each == inode}
    folder = next(inode for path, inode in judged if path == b"/tree")
    for_dos = set()
    for start, length in index_blocks(whole, folder):
        for path in sorted(links)[2:]:
            name = path.split(b"/")[-1].decode().encode("utf-16-le")
            at = data.find(name, start, start + length)
            if at >= 0 and data[at - 2] == len(name) // 2:
                data[at - 1] = 2
                for_dos.add(path)
    assert len(for_dos) > 5
    place = record_at(whole, inode)
    extended = [
        (record_at(whole, int(number)), 1024)
        for part in whole._table.walk()
        for number in part.number[part.base == inode]
    ]
    named = {path for path, each in plain(paths_of(opened(bytes(data), (place, 1024), *extended)))
             if each == inode}  # fmt: skip
    assert named == links - for_dos


def test_records_that_are_not_in_use_are_not_told_of(images) -> None:
    image, judged = images("ntfs")
    filesystem = opened(image.read_bytes())
    table = filesystem._table.pieces
    records = filesystem.records(table.disk, table.length)
    known = {inode for _, inode in judged}
    extensions = {
        int(number)
        for part in filesystem._table.walk()
        for number in part.base[(part.base > 0) & (part.flags & 1 != 0)]
    }
    assert set(records.inode.tolist()) >= known
    assert set(records.inode.tolist()) - known - extensions <= {5, *range(11, 24)}


def test_a_file_without_links_is_told_of(images) -> None:
    image, judged = images("ntfs")
    data = bytearray(image.read_bytes())
    inode = min(inode for path, inode in judged if b"/file " in path)
    place = record_at(opened(bytes(data)), inode)
    data[place + 18 : place + 20] = b"\0\0"
    some = np.array([NO_INODE, 5, inode, inode | 7 << NUMBER_BITS, 1 << 40])
    assert opened(bytes(data)).unlinked(some).tolist() == [False, False, True, True, False]


def test_names_whose_directory_was_used_anew_are_left_out(images) -> None:
    image, judged = images("ntfs")
    data = bytearray(image.read_bytes())
    inode = next(inode for path, inode in judged if path == b"/tree/many")
    place = record_at(opened(bytes(data)), inode)
    data[place + 16] ^= 1
    paths = plain(paths_of(opened(bytes(data))))
    assert {path for path, _ in judged - paths} == {
        path for path, _ in judged if path.startswith(b"/tree/many/")
    }


@pytest.mark.parametrize("size", [0, 1, 512, 5000, 1 << 20])
def test_a_short_source_is_no_file_system_or_one_cut_off(images, size) -> None:
    image, _ = images("ntfs")
    found = recognise(Holes(Bytes(image.read_bytes()[:size])))
    assert (found is None) == (size < 512)
    if found is not None:
        require_sound(found)
        paths_of(found)
        assert found.notes


def test_garbage_in_place_of_structures_raises_nothing(images) -> None:
    rng = np.random.default_rng(SEED)
    image, _ = images("ntfs")
    original = np.frombuffer(image.read_bytes(), dtype=np.uint8)
    whole = opened(original.tobytes())
    for turn in range(6):
        data = original.copy()
        for start, length in zip(
            whole._table.pieces.disk.tolist(), whole._table.pieces.length.tolist(), strict=True
        ):
            for at in rng.integers(start, start + min(length, 900 << 10), 200).tolist():
                if (at - start) % 512 < 500 and (turn % 2 or (at - start) % 1024 > 48):
                    data[at : at + 4] = rng.integers(0, 256, 4)
        found = recognise(Holes(Bytes(data.tobytes())))
        assert found is not None
        require_sound(found)
        paths_of(found)
