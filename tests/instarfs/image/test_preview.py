"""instarfs.image.preview: a plan over an image, in memory."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from instarfs.errors import PreviewOutdated
from instarfs.image.file import Image
from instarfs.image.preview import PreviewImage
from instarfs.repair.planning import run_plan
from planner.repair.overlay import Overlay
from planner.repair.plan import RepairTier
from planner.source import Bytes, read_bytes
from tests.instarfs.cli.test_repair import LEAKY, content


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(content(*LEAKY, "lost-refblock"))
    return path


@pytest.fixture
def preview(image: Path) -> Iterator[PreviewImage]:
    with Image.open(str(image)) as opened:
        plan = run_plan(opened, RepairTier.ALL).plan
        with PreviewImage(opened, plan, opened.generation()) as preview:
            yield preview


@pytest.mark.parametrize("wait", [True, False])
def test_it_reads_as_the_file_with_the_plan_over_it(
    preview: PreviewImage, image: Path, wait: bool
) -> None:
    expected = Overlay(Bytes(image.read_bytes()), preview.plan)
    source = preview.source(wait=wait)
    assert source.size == expected.size == preview.generation().size
    whole = read_bytes(source, 0, source.size)
    assert whole == read_bytes(expected, 0, expected.size)
    for offset, length in ((0, 1), (511, 2), (65535, 70000), (source.size - 3, 10)):
        assert read_bytes(source, offset, length) == read_bytes(expected, offset, length)
    covered = list(source.data_extents(0, source.size))
    assert all(any(a <= at < b for a, b in covered) for at, byte in enumerate(whole) if byte)


def test_once_the_file_was_written_to_it_is_no_more(preview: PreviewImage, image: Path) -> None:
    with image.open("r+b") as file:
        file.write(b"QFI\xfb")
        file.truncate(image.stat().st_size + 512)
    for look in (preview.source, preview.generation):
        with pytest.raises(PreviewOutdated):
            look()


def test_nothing_takes_its_place_and_nothing_writes_to_it(
    preview: PreviewImage, image: Path
) -> None:
    image.unlink()
    image.write_bytes(b"something else")
    assert not preview.is_replaced()
    with pytest.raises(OSError, match=r".") as refused:
        preview.open_to_write()
    assert refused.value.errno == errno.EROFS
