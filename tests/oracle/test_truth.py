"""What a report calls safe reads as before, and no more is missing than can be."""

import pytest

from tests.oracle.campaign import groups
from tests.oracle.truth import run_truth_group


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = metafunc.config.getoption("cases") // 4
    metafunc.parametrize("group", groups(cases))


def test_what_is_called_safe_reads_as_before(group: int, seed: int, cases: int) -> None:
    untrue = [case for case in run_truth_group(seed, group, cases) if case.verdict.faults]
    assert not untrue, "\n".join(map(str, untrue))
