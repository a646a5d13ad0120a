"""instarfs.render.rescue: of very many lost tables a text names some, and JSON comes in parts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from instarfs.render.rescue import (
    COLUMNS,
    LISTED_TABLES,
    Asked,
    Rescued,
    placements_tsv,
    rescue_json,
    rescue_txt,
)
from planner.rescue.placing.placements import Placements
from planner.rescue.rescue import Rescue, rescue
from planner.source import Bytes
from tests.instarfs.cli.test_rescue import LOST

ASKED = Asked("/some/image.qcow2")


def found(count: int) -> Rescue:
    """A rescue with so many tables, all of them placed."""
    number, none = np.arange(count), np.zeros(count, dtype=np.int64)
    votes = none + 3, none
    tables = Placements.of(number << 16, number, (none + 1).astype(np.uint8), votes, number >= 0)
    return replace(rescue(Bytes(LOST)), placements=tables)


def test_a_text_names_the_first_tables_and_says_that_there_are_more() -> None:
    for count, more in ((LISTED_TABLES, 0), (LISTED_TABLES + 1, 1)):
        lines = rescue_txt(found(count), ASKED, None).splitlines()
        named = [line for line in lines if line.split()[-2:] == ["yes", "-"]]
        assert len(named) == LISTED_TABLES
        assert lines.count("  ... all of them: --output json") == more


def test_json_and_tsv_come_in_parts_with_every_table() -> None:
    many = found(100_000)
    parts = list(rescue_json(many, ASKED, None))
    assert max(map(len, parts)) < 1 << 20
    told = json.loads(b"".join(parts))["placements"]
    assert [each["offset"] >> 16 for each in told] == list(range(100_000))
    rows = list(placements_tsv(many.placements))
    assert max(map(len, rows)) < 1 << 20
    first, *rest = b"".join(rows).decode().splitlines()
    assert first == "#" + "\t".join(COLUMNS)
    assert len(rest) == 100_000


def test_the_plan_of_a_preview_is_told_each_time_that_it_is_asked_for() -> None:
    few = found(3)
    shown = Rescued.of(few, ASKED)
    assert b"".join(shown.plan()) == b"".join(shown.plan())
    assert b"".join(shown.plan()) == b"".join(rescue_json(few, ASKED, None))


def test_where_no_header_is_believed_and_other_things_are_put_right_there_is_no_next_best() -> None:
    some = found(1)
    none = replace(some, headers=replace(some.headers, hypotheses=[]))
    told = json.loads(b"".join(rescue_json(none, ASKED, None)))
    assert (told["next-best"], told["changed"]) == (None, [])
    assert rescue_txt(none, ASKED, None)
