"""A short campaign: what is hit is named, and nothing else is."""

from pathlib import Path

from tests.guestfs.campaign import run, settings


def test_what_is_hit_is_named_and_nothing_else(cases: int, seed: int, tmp_path: Path) -> None:
    hit = 0
    with settings(seed, ("ext4", "ext2")) as made:
        for number in range(cases // 10):
            case = run(made, seed, number, tmp_path)
            assert not case.lost, case
            assert not case.wrong, case
            hit += case.found
    assert hit
