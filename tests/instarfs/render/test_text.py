"""Names from an image as text: nothing lost, nothing that a terminal obeys."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instarfs.render.text import (
    OBJECTS_A_PART,
    SHORT,
    decode_name,
    json_bytes,
    json_parts,
    printable,
    short_name,
)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"plain name", "plain name"),
        ("bäck 日本".encode(), "bäck 日本"),
        (b"a\nb\tc", r"a\nb\tc"),
        (b"\x1b[31m", r"\x1b[31m"),
        (b"nul\0", r"nul\x00"),
        ("\u202egnp".encode(), r"\u202egnp"),
        ("\x9b31m".encode(), r"\x9b31m"),
        (b"\xff\xfe", r"\xff\xfe"),
    ],
)
def test_printable(raw: bytes, shown: str) -> None:
    assert printable(decode_name(raw)) == shown


@given(st.binary())
def test_a_name_survives_json(raw: bytes) -> None:
    text = json.loads(json_bytes({"name": decode_name(raw)}))["name"]
    assert text.encode(errors="surrogateescape") == raw


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), min_size=1)))
def test_parts_are_the_same_json(objects: list[dict[str, object]]) -> None:
    value = {"first": {"a": [1, {"b": "\n"}], "c": []}, "list": objects, "last": None}
    parts = json_parts({**value, "list": iter(objects)})
    assert b"".join(parts) == json_bytes(value)


def test_a_long_list_comes_in_many_parts() -> None:
    objects = [{"a": n, "b": "x"} for n in range(4 * OBJECTS_A_PART)]
    parts = list(json_parts({"list": iter(objects)}))
    assert b"".join(parts) == json_bytes({"list": objects})
    assert max(map(len, parts)) < len(json_bytes({"list": objects})) / 2


@given(st.binary())
def test_nothing_that_a_terminal_obeys_is_left(raw: bytes) -> None:
    assert printable(decode_name(raw)).isprintable()


@given(st.binary())
def test_a_name_in_a_sentence_is_short_or_whole(raw: bytes) -> None:
    shown = short_name(raw)
    assert shown.isprintable()
    if len(raw) <= SHORT:
        assert shown == printable(decode_name(raw))


def test_a_name_as_long_as_an_image_can_have_it() -> None:
    assert short_name(b"a" * 65535) == "a" * SHORT + "..."
    assert short_name("日".encode() * SHORT) == "日" * SHORT
    assert short_name("日".encode() * (SHORT + 1)) == "日" * SHORT + "..."
