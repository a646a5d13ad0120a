"""What is around an image: which names are free there, and where nothing can be kept."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.image.surroundings import COPY, LONGEST_NAME, LOST, Room, Surroundings
from instarfs.repair.looking import look_around


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "an image"
    path.write_bytes(bytes(4096))
    return path


def around(path: Path) -> Surroundings:
    with Image.open(str(path)) as image:
        return look_around(image)


def test_names_are_chosen_that_nothing_has(image: Path) -> None:
    assert replace(around(image), can_mount=True) == Surroundings()
    assert around(image).path(str(image), COPY) == f"{image}.copy"
    image.with_name("an image.copy").touch()
    image.with_name("an image.copy-2").symlink_to("nowhere")
    image.with_name("an image.lost").mkdir()
    found = around(image)
    assert found.path(str(image), COPY) == f"{image}.copy-3"
    assert found.path(str(image), LOST) == f"{image}.lost-2"
    assert found.is_taken(str(image), COPY)
    assert not around(image.with_name("an image.copy")).taken


@pytest.mark.parametrize(
    ("free", "room", "keeps_undo"),
    [
        ((1 << 20, 1000, 500), Room.BESIDE, True),
        ((1 << 20, 0, 0), Room.BESIDE, True),  # none are counted
        ((1 << 20, 1000, 3), Room.FULL, True),
        ((1 << 20, 1000, 0), Room.FULL, False),
        ((300, 1000, 500), Room.FULL, True),
        ((4, 1000, 500), Room.FULL, False),
    ],
)
def test_what_can_be_made_beside_it(
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: tuple[int, int, int],
    room: Room,
    keeps_undo: bool,
) -> None:
    """*free*: KiB, files that there can be, and those of them that there are not yet."""
    image.write_bytes(b"x" * (1 << 20))
    kib, files, left = free
    there = os.statvfs_result((1024, 1024, kib, kib, kib, files, left, left, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstatvfs", lambda _: there)
        found = around(image)
        assert (found.room, found.keeps_undo) == (room, keeps_undo)
        # What is there already needs no more.
        Path(f"{image}{SUFFIX}").touch()
        assert around(image).keeps_undo


@pytest.mark.parametrize("letter", ["x", "ä", os.fsdecode(b"\xff")])
def test_a_long_name_is_cut(image: Path, letter: str) -> None:
    name = letter * (LONGEST_NAME // len(os.fsencode(letter)))
    long = image.rename(image.with_name(name))
    for number in range(3):
        made = Path(around(long).path(str(long), COPY))
        assert made.name.endswith(".copy" if not number else f".copy-{number + 1}")
        made.mkdir()
    assert not around(long).keeps_undo
