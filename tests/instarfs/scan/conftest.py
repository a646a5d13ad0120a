"""Processes that check, started once for many tests."""

from collections.abc import Iterator

import pytest

from instarfs.scan.workers import Nursery
from tests.instarfs.scan.scans import JOBS, limits


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery(JOBS, limits()) as started:
        yield started
