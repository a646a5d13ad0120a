"""lost/triage.json, and the same in words."""

import json
import random
from typing import Any

import pytest

import instarfs.render.triage
from instarfs.render.triage import LISTED_TABLES, triage_json, triage_lines
from planner.check.check import check_image
from planner.triage.triage import triage_leaks
from tests.images.builder import Image, ImageBuilder
from tests.images.damage import DAMAGES
from tests.images.sample import sample


def damaged(*names: str) -> Image:
    image = sample().build()
    for name in names:
        DAMAGES[name](image, random.Random(1))
    return image


def value_of(image: Image) -> dict[str, Any]:
    report = check_image(image.source)
    triage = triage_leaks(image.source, report)
    value: dict[str, Any] = json.loads(triage_json(triage, report, "disk"))
    return value


def lines_of(image: Image) -> list[str]:
    return triage_lines(triage_leaks(image.source, check_image(image.source)))


def test_runs_are_those_of_the_files_and_say_who_mapped_them() -> None:
    image = damaged("leaked-clusters", "lost-l2-table")
    value = value_of(image)
    runs = value["runs"]
    assert value["run-count"] == len(runs)
    assert sum(run["length"] for run in runs) == value["leaked-bytes"]
    assert [run["file"] for run in runs] == [f"lost/{run['offset']}" for run in runs]
    table = next(run for run in runs if "L2 table" in run["looks-like"])
    assert table["starts-with"] == {"text": 10}
    assert table["mapped-by"] == [value["tables"][0]["offset"]]
    assert value["looks-like"] == {"zeros": 11, "data": 10, "L2 table": 1}


def test_a_place_ends_with_the_disk() -> None:
    builder = ImageBuilder(size=(2 << 21) + 4096, cluster_bits=12)
    for l1_index in range(3):
        builder.write(l1_index * builder.geometry.l2_entries, random.Random(1).randbytes(4096))
    image = builder.build()
    image.set_word(image.l1_at(2), 0)
    (table,) = value_of(image)["tables"]
    (place,) = table["may-have-stood"]
    assert (place["guest-offset"], place["guest-length"]) == (2 << 21, 4096)


def test_a_lost_snapshot_is_described() -> None:
    value = value_of(damaged("lost-snapshot"))
    (snapshot,) = value["lost-snapshots"]
    assert (snapshot["id"], snapshot["name"]) == ("1", "before upgrade")
    l1, l2 = sorted(value["tables"], key=lambda table: table["looks-like"])
    assert l1["snapshot"] == snapshot
    place = l2["may-have-stood"][0]
    assert (place["l1-entry"], place["snapshot"]) == ("in-lost-snapshot", None)


def test_what_a_lost_snapshot_mapped_does_not_end_with_the_disk() -> None:
    builder = ImageBuilder(size=4 << 21, cluster_bits=12)
    first = [l1_index * builder.geometry.l2_entries for l1_index in range(4)]
    for cluster in first:
        builder.write(cluster, random.Random(1).randbytes(4096))
    builder.take_snapshot("of the larger disk")
    for cluster in first:
        builder.write(cluster, random.Random(2).randbytes(4096))
    image = builder.build()
    image.change_header(size=2 << 21, nb_snapshots=0)
    tables = value_of(image)["tables"]
    places = [place for table in tables for place in table["may-have-stood"]]
    lost = [place for place in places if place["l1-entry"] == "in-lost-snapshot"]
    assert sorted(place["guest-offset"] for place in lost) == [0 << 21, 1 << 21, 2 << 21, 3 << 21]
    assert {place["guest-length"] for place in lost} == {1 << 21}


def test_an_image_without_leaks_has_nothing_to_tell() -> None:
    value = value_of(damaged())
    assert (value["runs"], value["tables"], value["in-words"]) == ([], [], [])


def test_lists_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instarfs.render.triage, "LISTED_RUNS", 2)
    value = value_of(damaged("leaked-clusters"))
    assert len(value["runs"]) == 2 < value["run-count"]


def test_words_begin_with_all_of_it() -> None:
    first, suspect = lines_of(damaged("leaked-clusters", "lost-l2-table"))
    assert first == (
        "all 22 leaked clusters were looked at: 11 zeros, 10 data, 1 L2 table"
        " (recognised by how they begin: 10 text)"
    )
    assert "looks like a lost L2 table" in suspect
    assert suspect.endswith("they look like: 10 data (recognised by how they begin: 10 text)")


def test_words_list_the_first_tables_and_count_the_others() -> None:
    builder = ImageBuilder(size=64 << 20, cluster_bits=12)
    number = builder.geometry.l1_entries_needed
    for l1_index in range(number):
        builder.write(l1_index * builder.geometry.l2_entries, random.Random(1).randbytes(4096))
    image = builder.build()
    for l1_index in range(number):
        image.set_word(image.l1_at(l1_index), 0)
    lines = lines_of(image)
    assert len(lines) == 1 + LISTED_TABLES + 1
    assert lines[-1] == f"... and {number - LISTED_TABLES} more that look lost: lost/triage.json"


def test_names_from_the_image_do_not_reach_a_terminal() -> None:
    builder = ImageBuilder(size=8 << 20, cluster_bits=12)
    builder.write(0, b"x")
    builder.take_snapshot("evil\x1b[2J\n")
    builder.write(0, b"y")
    image = builder.build()
    image.change_header(nb_snapshots=0)
    text = "".join(lines_of(image))
    assert "evil" in text
    assert text.isprintable()
