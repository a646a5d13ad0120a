"""What a person chooses, judged by QEMU: a few images of the campaign of choices.

`python -m tests.oracle --choices` judges more on every core.
"""

from __future__ import annotations

import pytest

from tests.images.matrix import MATRIX
from tests.oracle.campaign import GROUP_CASES
from tests.oracle.choices import run_choice_group

STEP = 9
"""Of so many sorts of images one, with one damaged image each."""


@pytest.mark.parametrize("group", range(0, len(MATRIX), STEP))
def test_what_is_chosen_is_done_and_costs_nothing(group: int, seed: int) -> None:
    only = group * GROUP_CASES + group // STEP % GROUP_CASES
    cases = list(run_choice_group(seed, group, only))
    assert len(cases) == 1
    wrong = [case for case in cases if not case.passed]
    assert not wrong, "\n\n".join(map(str, wrong))
