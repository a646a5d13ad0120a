"""Seeded cases in which `qemu-img check` and our check must agree.

`make test ARGS="--cases 5000 --seed 7"` runs more; `python -m tests.oracle` does so on every core.
"""

from __future__ import annotations

import pytest

from tests.images.matrix import MATRIX
from tests.images.random_damage import KINDS
from tests.oracle.campaign import groups, row_of, run_group


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a group of cases; its name says the row."""
    if "group" not in metafunc.fixturenames:
        return
    seed, cases = metafunc.config.getoption("--seed"), metafunc.config.getoption("--cases")
    metafunc.parametrize(
        "group",
        [pytest.param(group, id=f"{group}-{row_of(seed, group).name}") for group in groups(cases)],
    )


def test_agrees_with_qemu(group: int, seed: int, cases: int) -> None:
    wrong = [case for case in run_group(seed, group, cases) if not case.judgement.agreed]
    assert not wrong, "\n\n".join(map(str, wrong))


def test_matrix_covers_every_cluster_size_and_refcount_width() -> None:
    assert {row.cluster_bits for row in MATRIX if row.version == 3} == set(range(9, 22))
    assert {row.refcount_bits for row in MATRIX} == {1, 2, 4, 8, 16, 32, 64}


def test_at_least_thirty_kinds_of_damage() -> None:
    assert len(KINDS) >= 30
