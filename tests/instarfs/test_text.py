"""Names from an image as text: nothing that a terminal obeys, and JSON that every reader takes."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instarfs.text import (
    OBJECTS_A_PART,
    json_array,
    json_bytes,
    json_parts,
    json_text,
    markup,
    printable,
    shell_path,
    text_lines,
)
from planner.qcow2.names import SHORT, brief_name, decode_name


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"plain name", "plain name"),
        ("bäck 日本".encode(), "bäck 日本"),
        (b"a\nb\tc", r"a\nb\tc"),
        (b"\x1b[31m", r"\x1b[31m"),
        (b"ended\0nul\0", "ended"),
        (b"\0", ""),
        ("\u202egnp".encode(), r"\u202egnp"),
        ("\x9b31m".encode(), r"\x9b31m"),
        (b"\xff\xfe", r"\xff\xfe"),
    ],
)
def test_printable(raw: bytes, shown: str) -> None:
    assert printable(decode_name(raw)) == shown


PATHS = st.lists(
    st.one_of(
        st.sampled_from([bytes([byte]) for byte in range(1, 256)]),
        st.sampled_from([b"'", b"\\", b"$(", b"!", b"-", b"~", b"\\x4", b"\xe2\x80\xae", b"\xc3"]),
        st.text("aB/ \u00e9\u65e5\u202e\ud7ff", max_size=3).map(str.encode),
    ),
    max_size=9,
).map(b"".join)


@given(st.lists(PATHS, min_size=1, max_size=20))
@settings(max_examples=50)
def test_bash_reads_a_path_as_it_is_and_takes_it_for_no_option(paths: list[bytes]) -> None:
    words = [shell_path(os.fsdecode(path)) for path in paths]
    assert all(word.isprintable() for word in words)
    script = "\n".join(f"printf '%s\\0' {word}" for word in words).encode()
    read = subprocess.run(["bash", "-e"], input=script, check=True, capture_output=True).stdout
    wanted = [b"./" + path if path.startswith(b"-") else path for path in paths]
    assert read.split(b"\0")[:-1] == wanted


@given(st.text().filter(lambda name: "\0" not in name))
def test_a_name_survives_json(name: str) -> None:
    assert json.loads(json_bytes({"name": decode_name(name.encode())})) == {"name": name}


@given(st.lists(st.binary() | st.just(b"\\udcff\\") | st.text().map(str.encode)))
def test_json_is_unicode_whatever_the_names(raw: list[bytes]) -> None:
    """All three ways to JSON."""
    names = [decode_name(name) for name in raw]
    right = [name.partition(b"\0")[0].decode(errors="replace") for name in raw]
    assert json.loads(json_bytes({"names": names})) == {"names": right}
    assert json.loads(json_text(names)) == right
    parts = json_parts({"list": iter([{"name": name} for name in names]), "names": names})
    listed = {"list": [{"name": name} for name in right], "names": right}
    assert json.loads(b"".join(parts)) == listed


def test_an_escape_of_two_surrogates_is_one_character() -> None:
    assert json.loads(json_text("\U0001f600\udcff\\ud800")) == "\U0001f600\ufffd\\ud800"


def test_a_path_under_an_ascii_locale_is_what_it_is() -> None:
    broken = 'bäck"日本'.encode().decode("ascii", "surrogateescape")
    assert json.loads(json_text(broken)) == 'bäck"日本'


@given(st.lists(st.dictionaries(st.text(), st.lists(st.text()), min_size=1)), st.randoms())
def test_an_array_of_documents(values: list[dict[str, object]], rng: random.Random) -> None:
    def cut(document: bytes) -> Iterator[bytes]:
        while document:
            length = rng.randrange(1, 9)
            yield document[:length]
            document = document[length:]

    whole = [json_bytes(value) for value in values]
    text = b"".join(json_array(whole))
    assert text == json.dumps(values, indent=4).encode() + b"\n"
    assert b"".join(json_array(map(cut, whole))) == text


FLAT = st.text() | st.integers() | st.booleans() | st.none()


@given(st.dictionaries(st.text(), FLAT | st.lists(FLAT) | st.dictionaries(st.text(), FLAT)))
def test_an_object_is_indented_as_json_does_it(value: dict[str, object]) -> None:
    assert json_bytes(value) == (json_text(value, indent=4) + "\n").encode()


def test_an_object_of_nothing_but_single_values_is_not_indented_in_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That takes most of the time that a mount needs for a small file."""
    value: dict[str, object] = {"name": "n\x7f", "size": 1, "icount": None}
    expected = (json_text(value, indent=4) + "\n").encode()
    monkeypatch.delattr(json.encoder, "_make_iterencode")
    assert json_bytes(value) == expected


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), min_size=1)))
def test_parts_are_the_same_json(objects: list[dict[str, object]]) -> None:
    value = {"first": {"a": [1, {"b": "\n"}], "c": []}, "list": objects, "last": None}
    parts = json_parts({**value, "list": iter(objects)})
    assert b"".join(parts) == json_bytes(value)


@given(
    st.lists(
        st.dictionaries(
            st.text(),
            st.lists(st.text()) | st.text("\n ") | st.dictionaries(st.text(), st.none()),
            min_size=1,
        )
    )
)
def test_lists_that_lie_deeper_are_the_same_json(objects: list[dict[str, object]]) -> None:
    def value(listed: object) -> dict[str, object]:
        return {"a": {"b": {"list": listed, "c": [{"d": []}]}, "list": listed}, "e": {}}

    once = value(objects)
    parts = json_parts(
        {"a": {"b": {"list": iter(objects), "c": [{"d": []}]}, "list": iter(objects)}, "e": {}}
    )
    assert b"".join(parts) == json_bytes(once)


def test_a_long_list_comes_in_many_parts() -> None:
    objects = [{"a": n, "b": "x"} for n in range(4 * OBJECTS_A_PART)]
    parts = list(json_parts({"list": iter(objects)}))
    assert b"".join(parts) == json_bytes({"list": objects})
    assert max(map(len, parts)) < len(json_bytes({"list": objects})) / 2


@given(st.binary())
def test_nothing_that_a_terminal_obeys_is_left(raw: bytes) -> None:
    shown = printable(decode_name(raw))
    assert shown.isprintable()
    assert printable(shown) == shown


@given(st.lists(st.text()))
def test_a_line_stays_a_line(lines: list[str]) -> None:
    assert text_lines(lines).split("\n") == [*map(printable, lines), ""]


@given(st.text())
def test_json_is_ascii_that_prints(text: str) -> None:
    assert json_text([text]).isprintable()
    assert json_text([text]).isascii()


@given(st.binary())
def test_a_name_in_a_sentence_is_short_or_whole(raw: bytes) -> None:
    shown = brief_name(raw)
    assert len(shown) <= SHORT + len("...")
    if len(raw.partition(b"\0")[0]) <= SHORT:
        assert shown == decode_name(raw)


def test_a_name_as_long_as_an_image_can_have_it() -> None:
    assert brief_name(b"a" * 65535) == "a" * SHORT + "..."
    assert brief_name("日".encode() * SHORT) == "日" * SHORT
    assert brief_name("日".encode() * (SHORT + 1)) == "日" * SHORT + "..."


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"])))
def test_a_reader_of_markup_has_the_text_again(text: str) -> None:
    element = ET.fromstring(f'<a b="{markup(text)}">{markup(text)}</a>')  # noqa: S314
    assert (element.text or "", element.get("b")) == (text, text)
