"""A short campaign: what is hit is named, and nothing else is."""

from pathlib import Path

import pytest

from tests.guestfs.campaign import run
from tests.guestfs.settings import settings


@pytest.mark.parametrize("is_bare", [False, True])
def test_what_is_hit_is_named_and_nothing_else(
    cases: int, seed: int, tmp_path: Path, is_bare: bool
) -> None:
    hit = 0
    with settings(seed, ("ext4", "fat32"), is_bare=is_bare) as made:
        for number in range(cases // 20):
            case = run(made, seed, number, tmp_path)
            assert not case.lost, case
            assert not case.wrong, case
            hit += case.found
    assert hit
