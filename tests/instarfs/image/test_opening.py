"""instarfs.image.opening: who is kept from the image while it is open."""

from __future__ import annotations

from pathlib import Path

import pytest

from instarfs.errors import ImageInUse
from instarfs.image import locks
from instarfs.image.opening import opened
from tests.instarfs.repair.test_run import healthy


def test_what_is_opened_keeps_writers_away_unless_it_is_told_not_to(
    tmp_path: Path,
) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(healthy())
    with path.open("r+b") as other:

        def begin_to_write() -> None:
            with locks.held(other.fileno(), str(path), locks.READ_WRITE):
                pass

        with opened(str(path)), pytest.raises(ImageInUse):
            begin_to_write()
        for access in (None, locks.FORCE_SHARE):
            with opened(str(path), access=access):
                begin_to_write()
