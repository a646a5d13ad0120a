"""Rescues and mounts: of an image whose header is gone, and of what a rescue would make of it."""

from pathlib import Path

from instarfs.image.directory import SUFFIX
from tests.instarfs.cli.test_rescue import LOST, interrupted
from tests.mount.mounts import MakeMount, instarfs


def test_a_rescue_that_was_interrupted_is_taken_back_in_a_mount(
    mount: MakeMount, tmp_path: Path
) -> None:
    """Its header is not there yet, and all the same it can be mounted: to take it back."""
    image = tmp_path / "disk.qcow2"
    image.write_bytes(LOST)
    folder = tmp_path / "empty"
    folder.mkdir()
    assert instarfs("mount", image, folder).returncode == 63
    interrupted(image)
    it = mount(image)
    assert "interrupted" in it.read("check/report.txt")
    assert "interrupted" in it.read("repair/undo")
    (it / "repair/undo").write_text("undo")
    assert image.read_bytes() == LOST
    assert not image.with_name(image.name + SUFFIX).exists()
