"""planner.rescue.placing.votes: what counts as a vote, and what decides."""

from __future__ import annotations

import numpy as np

from planner.rescue.placing.votes import Evidence, Votes, fitting, tally, without_rivals

WINDOW = 1 << 20


def votes(*rows: tuple[int, int, int]) -> Votes:
    """Rows of table, window, place within the window."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Votes(Evidence.CHECKSUM, *columns)


def rows(found: Votes) -> set[tuple[int, int, int]]:
    columns = (found.table.tolist(), found.window.tolist(), found.inside.tolist())
    return set(zip(*columns, strict=True))


def test_a_block_that_fits_several_windows_says_nothing() -> None:
    assert rows(without_rivals(votes((1, 5, 0), (1, 6, 0), (1, 5, 512)))) == {(1, 5, 512)}


def test_a_place_that_blocks_of_several_tables_fit_says_nothing() -> None:
    assert rows(without_rivals(votes((1, 5, 0), (2, 5, 0), (2, 5, 512)))) == {(2, 5, 512)}


def test_the_same_vote_twice_is_one() -> None:
    assert rows(without_rivals(votes((1, 5, 0), (1, 5, 0)))) == {(1, 5, 0)}


def test_nothing_is_no_vote() -> None:
    assert not len(without_rivals(votes()))
    assert not tally([votes()])


def test_a_block_fits_where_its_place_within_a_window_is_the_right_one() -> None:
    table, inside = np.array([1, 1, 1, 1]), np.array([0, 512, 512, 4096])
    offset = np.array([3 * WINDOW, 4 * WINDOW + 512, 4 * WINDOW, -1])
    assert rows(fitting(Evidence.CHECKSUM, table, inside, offset, WINDOW)) == {
        (1, 3, 0),
        (1, 4, 512),
    }


def test_a_block_lies_nowhere_before_the_disk() -> None:
    found = fitting(Evidence.CHECKSUM, np.array([1]), np.array([512]), np.array([-WINDOW]), WINDOW)
    assert not len(found)


def test_votes_for_other_windows_than_the_best_are_against_it() -> None:
    found = tally([votes((1, 5, 0), (1, 5, 512), (1, 6, 1024)), votes((2, 6, 0))])
    assert (found[1].best, found[1].count(5), found[1].against) == (5, 2, 1)
    assert (found[2].best, found[2].against) == (6, 0)
