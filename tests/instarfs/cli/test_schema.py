"""`instarfs schema`: closed schemas of all JSON that there is, which everything else is held to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from instarfs.render.schemas import SUBJECTS, schema
from tests.instarfs.cli.test_repair import Run, content, instarfs
from tests.schemas import name_for, require_valid, require_valid_output

__all__ = ["instarfs"]  # a fixture


def objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every schema of an object within."""
    if isinstance(value, dict):
        if value.get("type") == "object":
            yield value
        for each in value.values():
            yield from objects_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from objects_in(each)


def test_without_a_name_it_lists_all(instarfs: Run) -> None:
    lines = instarfs("schema").out.splitlines()
    assert {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in lines} == SUBJECTS


@pytest.mark.parametrize("name", SUBJECTS)
def test_each_is_a_schema_that_closes_every_object(name: str, instarfs: Run) -> None:
    printed = instarfs("schema", name).json
    jsonschema.Draft202012Validator.check_schema(printed)
    assert printed == schema(name)
    assert printed["$id"] == f"urn:instarfs:{name}"
    for each in objects_in(printed):
        # Where keys are words of a list, or names, what they lead to is said instead.
        assert "additionalProperties" in each
        assert (each["additionalProperties"] is False) == ("properties" in each)
        for key, value in each.get("properties", {}).items():
            assert value["description"], key


def test_what_there_is_no_schema_of_is_one_line(instarfs: Run) -> None:
    done = instarfs("schema", "chekc")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert "'chekc' is not one of" in done.err


def test_every_file_has_its_own() -> None:
    names = {
        "check/result.json": "check",
        "/check/findings.jsonl": "finding",
        "image/map.json": "map",
        "lost/triage.json": "triage",
        "repair/plan/all.json": "plan",
        "repair/result.json": "repair",
        "snapshots/12/info.json": "snapshot",
        "check/report.txt": None,
    }
    assert {path: name_for(path.lstrip("/")) for path in names} == names
    assert {name for name in names.values() if name} <= SUBJECTS.keys()


@pytest.mark.parametrize("where", ["", "cut-off", "counts"])
def test_a_key_that_is_not_documented_is_noticed(where: str, tmp_path: Path, instarfs: Run) -> None:
    image = tmp_path / "image"
    image.write_bytes(content("data-past-end"))
    value = instarfs("check", "--output=json", image).json
    value["cut-off"] = {"ends-at": 1, "needs": 2}
    require_valid("check", json.dumps(value))
    (value[where] if where else value)["unheard-of"] = 1
    with pytest.raises(AssertionError, match="unheard-of"):
        require_valid("check", json.dumps(value))


def test_a_key_that_is_missing_is_noticed(tmp_path: Path, instarfs: Run) -> None:
    image = tmp_path / "image"
    image.write_bytes(content("leaked-clusters"))
    value = instarfs("plan", "leaks", "--output=json", image).json
    del value["predicted"]["leaks"]
    with pytest.raises(AssertionError):
        require_valid("plan", json.dumps(value))


def test_what_a_rescue_prints(tmp_path: Path, instarfs: Run) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 12) + content()[1 << 12 :])
    done = instarfs("rescue", "--output=json", image)
    assert (done.code, done.err) == (0, "")
    require_valid_output(("rescue", "--output=json"), done.out)
    assert done.json["changed"]
    in_place = ("rescue", "--output=json", "--in-place", "--plan", done.json["plan-id"])
    done = instarfs(*in_place, image)
    assert (done.code, done.err) == (0, "")
    require_valid_output(in_place, done.out)
    assert done.json["repaired"] == 1
    require_valid_output(
        ("rescue", "--output=json"), instarfs("rescue", "--output=json", image).out
    )
