"""Repairs one after the other: a few images of that campaign.

`python -m tests.oracle --again` judges more on every core.
"""

from __future__ import annotations

import pytest

from tests.oracle.again import ROWS, run_sequence_group

STEP = 7
"""Of so many sorts of images with snapshots one."""


@pytest.mark.parametrize("group", range(4, len(ROWS), STEP))
def test_what_a_repair_has_kept_no_other_frees_unasked(group: int, seed: int) -> None:
    cases = list(run_sequence_group(seed, group))
    assert any(case.damages for case in cases)
    wrong = [case for case in cases if case.faults]
    assert not wrong, "\n\n".join(map(str, wrong))
