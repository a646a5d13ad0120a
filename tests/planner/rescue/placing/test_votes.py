"""planner.rescue.placing.votes: what counts as a vote, and what decides."""

from __future__ import annotations

import numpy as np

from planner.rescue.placing.votes import (
    Ballots,
    Evidence,
    Tally,
    Votes,
    classes_of,
    fitting,
    tally,
    without_rivals,
)

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
    found = tally([votes((1, 5, 0), (1, 5, 512), (1, 6, 1024)), votes((2, 6, 0))]).ballots()
    assert columns(found) == [(1, 5, 2), (1, 6, 1), (2, 6, 1)]
    assert columns(found.best()) == [(1, 5, 2), (2, 6, 1)]
    assert not len(found.undisputed())


def columns(found: Ballots) -> list[tuple[int, int, int]]:
    return list(zip(found.table.tolist(), found.window.tolist(), found.count.tolist(), strict=True))


def test_votes_of_all_classes_are_counted_together_and_each_is_told() -> None:
    found = tally([votes((1, 5, 0)), Votes(Evidence.DIRECTORY, *np.array([[1], [5], [0]]))])
    assert columns(found.ballots()) == [(1, 5, 2)]
    assert classes_of(int(found.ballots().evidence[0])) == (Evidence.CHECKSUM, Evidence.DIRECTORY)


def test_a_table_that_one_window_alone_was_voted_for_where_none_other_was_is_undisputed() -> None:
    found = tally([votes((1, 5, 0), (1, 5, 512), (2, 6, 0), (3, 6, 512), (4, 1 << 60, 0))])
    assert columns(found.ballots().undisputed()) == [(1, 5, 2), (4, 1 << 60, 1)]


def test_what_was_voted_for_a_window_before_is_left_out_of_what_is_new() -> None:
    old, new = tally([votes((1, 5, 0))]), tally([votes((1, 5, 0), (1, 6, 0), (2, 5, 0))])
    assert columns(new.besides(old).ballots()) == [(1, 6, 1), (2, 5, 1)]
    assert columns(new.besides(Tally.none()).ballots()) == columns(new.ballots())
