"""Images of whole file systems, as the tests of all readers open them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from planner.guestfs.reading import Holes
from tests.oracle.scene import FileSource
from tests.planner.guestfs.walks import holed


@pytest.fixture
def held() -> Iterator[Callable[..., Holes]]:
    """Opens a file as a source, with holes at (offset, length), for as long as the test takes."""
    with ExitStack() as files:

        def hold(path: Path, *holes: tuple[int, int]) -> Holes:
            return holed(FileSource(files.enter_context(path.open("rb")).fileno()), *holes)

        yield hold
