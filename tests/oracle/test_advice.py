"""What a report advises works, of images that QEMU made and that were damaged in every way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.advice import follow_all, run_here
from tests.images.matrix import copy
from tests.oracle.campaign import GROUP_CASES, images_of_group

GROUPS_A_TEST, ROOM = 3, 24 << 20
"""Of the seeded campaign one case of every third group is followed, and none that is larger."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a group of cases."""
    groups = metafunc.config.getoption("--cases") // GROUP_CASES
    metafunc.parametrize("group", range(0, groups, GROUPS_A_TEST))


def test_what_is_advised_works(group: int, seed: int, tmp_path: Path) -> None:
    number = group * GROUP_CASES + 1 + group // GROUPS_A_TEST % (GROUP_CASES - 1)
    image = tmp_path / "image.qcow2"
    for _, damages, case in images_of_group(seed, group, [number]):
        copy(case, image)
        if image.stat().st_size <= ROOM:
            assert damages
            follow_all(lambda: run_here(["report", image]).out, image)
