"""Paths out of names in any order, with directories that are missing, and with hostile ones."""

import numpy as np

from planner.guestfs.paths import MAX_DEPTH, MAX_LENGTH, Paths
from planner.guestfs.protocol import Names

Entry = tuple[int, int, bytes, bool]


def names(*entries: Entry, encoding: str = "utf-8") -> Names:
    """(parent, child, name, whether it is a directory) of each."""
    raw = b"".join(name for _, _, name, _ in entries)
    length = np.array([len(name) for _, _, name, _ in entries], dtype=np.int64)
    return Names(
        np.array([parent for parent, *_ in entries], dtype=np.int64),
        np.array([child for _, child, *_ in entries], dtype=np.int64),
        np.array([is_directory for *_, is_directory in entries], dtype=np.bool_),
        np.frombuffer(raw, dtype=np.uint8),
        np.cumsum(length) - length,
        length,
        encoding,
    )


def paths(batches: list[Names], *wanted: int) -> Paths:
    return Paths(batches, np.array(sorted(wanted), dtype=np.int64), root=2)


def test_a_path_is_made_of_names_from_all_batches() -> None:
    made = paths(
        [names((7, 9, b"file", False), (7, 8, b"unasked", False)), names((5, 7, b"b", True)),
         names((2, 5, b"a", True))],
        9,
    )  # fmt: skip
    assert made.of(9) == [b"/a/b/file"]
    assert made.of(8) == []
    assert made.of(2) == [b"/"]
    assert made.of(7) == [b"/a/b"]
    assert made.have(np.array([2, 7, 8, 9])).tolist() == [True, True, False, True]


def test_a_file_has_a_path_for_each_of_its_names() -> None:
    made = paths([names((2, 9, b"one", False), (2, 5, b"d", True), (5, 9, b"two", False))], 9)
    assert made.of(9) == [b"/one", b"/d/two"]


def test_where_a_directory_is_unknown_a_path_begins_with_its_number() -> None:
    made = paths([names((6, 9, b"file", False), (5, 6, b"d", True))], 9)
    assert made.of(9) == [b"#5/d/file"]


def test_directories_in_each_other_end() -> None:
    made = paths([names((6, 5, b"x", True), (5, 6, b"y", True), (6, 9, b"file", False))], 9)
    (path,) = made.of(9)
    assert path.startswith(b"#")
    assert path.endswith(b"/file")


def test_a_path_without_end_is_cut_off() -> None:
    depth = 3 * MAX_DEPTH
    chain = [(n - 1, n, b"n" * 255, True) for n in range(3, depth)]
    made = paths([names(*chain)], depth - 1)
    for inode in (depth - 1, 10, depth // 2, 70, 1000):
        (path,) = made.of(inode)
        assert len(path) <= MAX_LENGTH + 2 * 256
    assert made.of(10)[0] == b"/" + b"/".join([b"n" * 255] * 8)


def test_names_of_other_encodings_come_as_utf_8() -> None:
    made = paths([names((2, 9, "ä\ud800".encode("utf-16-le", "surrogatepass"), False),
                        encoding="utf-16-le")], 9)  # fmt: skip
    assert made.of(9) == [b"/\xc3\xa4\xed\xa0\x80"]


def test_no_names_are_no_paths() -> None:
    assert paths([], 9).of(9) == []
    assert paths([names()]).of(9) == []
