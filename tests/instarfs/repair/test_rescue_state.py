"""instarfs.repair.rescue_state: what is kept in a file of a rescue that was stopped, and what is
refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instarfs.cli.rescue import kept
from instarfs.errors import RescueStateFailed, RescueStopped
from instarfs.image.file import Image
from instarfs.repair.rescue_state import MARK, RescueState
from planner.progress import unless
from planner.rescue.scanned import Section
from tests.advice import run_here
from tests.instarfs.cli.test_rescue import LOST


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    path = tmp_path / "some image.qcow2"
    path.write_bytes(LOST)
    return path


def state_of(image: Path, path: Path) -> RescueState:
    with Image.open(str(image)) as opened:
        return RescueState.open(str(path), opened.generation())


def made(image: Path) -> Path:
    path = image.with_name("state")
    ended = run_here(["rescue", "--state", path, image], image.parent)
    assert (ended.code, ended.err) == (0, "")
    return path


def test_it_is_kept_beside_what_is_found_and_the_next_goes_on(lost: Path) -> None:
    path = made(lost)
    assert path.stat().st_mode & 0o777 == 0o600
    assert {each.name for each in lost.parent.iterdir()} == {lost.name, path.name}
    before = path.read_bytes()
    told = run_here(["rescue", lost], lost.parent).out
    again = run_here(["rescue", "--state", path, lost], lost.parent).out
    assert again.replace(f"--state {path} ", "") == told
    assert again.count(f"--state {path}") == 2
    assert path.read_bytes() == before


def test_sections_come_back_as_they_were(lost: Path) -> None:
    path = lost.with_name("state")
    state = state_of(lost, path)
    numbers = np.arange(5, dtype=np.int64)
    some = {"a": Section(512, numbers, numbers[:2], numbers[2:4]), "b": Section(1 << 40)}
    state.scanned.sections |= some
    state.save()
    for name, each in state_of(lost, path).scanned.sections.items():
        assert each.done == some[name].done
        for column in ("again", "ends", "filled"):
            assert getattr(each, column).tolist() == getattr(some[name], column).tolist()


def test_in_place_it_goes_on_too(lost: Path) -> None:
    path = made(lost)
    told = run_here(["rescue", "--state", path, lost], lost.parent)
    (plan,) = re.findall(r"--plan (\w+)", told.out)
    words = ["rescue", "--state", path, "--in-place", "--plan", plan, lost]
    assert run_here(words, lost.parent).code == 0
    refused = run_here(["rescue", "--state", path, lost], lost.parent)
    assert refused.code == 1
    assert "was written to since" in refused.err


def must_be_refused(image: Path, path: Path, says: str) -> None:
    before = path.read_bytes() if path.is_file() else b""
    refused = run_here(["rescue", "--state", path, image], image.parent)
    assert (refused.code, refused.err.count("\n"), refused.out) == (1, 1, "")
    assert says in refused.err
    assert "name another file (--state)" in refused.err
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_that_of_another_image_or_of_one_that_changed_is_refused(lost: Path) -> None:
    path, other = made(lost), lost.with_name("other.qcow2")
    other.write_bytes(LOST)
    must_be_refused(other, path, "it is of another image")
    os.utime(lost, ns=(1, 1))
    must_be_refused(lost, path, "the image was written to since")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[: len(MARK) + 3],
        lambda raw: raw + b"\0",
        lambda raw: raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:],
        lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:],
    ],
    ids=["cut", "cut in its digest", "longer", "a bit of its end", "a bit of its head"],
)
def test_a_damaged_one_is_refused(lost: Path, damage: Callable[[bytes], bytes]) -> None:
    path = made(lost)
    path.write_bytes(damage(path.read_bytes()))
    must_be_refused(lost, path, "it is damaged")


def signed(head: object, columns: bytes = b"") -> bytes:
    """A state of that head, with its digest right."""
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    rest = len(raw).to_bytes(8, "little") + raw + columns
    return MARK + hashlib.sha256(rest).digest() + rest


@pytest.mark.parametrize(
    "head",
    [
        b"[" * 100_000,
        b"\xff",
        b"{}",
        [],
        {"image": 1, "scans": []},
        {"image": [], "scans": [["a", 0, 1 << 62, 0, 0]]},
        {"image": [], "scans": [["a", 0, -1, 1, 0]]},
        {"image": [], "scans": [["a", 0, 0]]},
        {"image": [], "scans": [["a", "0", 0, 0, 0]]},
        {"image": [], "scans": [["a", 1e3, 0, 0, 0]]},
        {"image": [], "scans": [[]]},
        {"image": [], "scans": [[str(n), 0, 0, 0, 0] for n in range(1000)]},
    ],
    ids=[f"head {number}" for number in range(12)],
)
def test_what_somebody_made_up_is_refused(lost: Path, head: object) -> None:
    path = lost.with_name("state")
    path.write_bytes(signed(head))
    must_be_refused(lost, path, "it is damaged")


@pytest.mark.parametrize("counts", [(1 << 27, 0, 0), (0, 1 << 26, 1 << 26), (0, 0, 1 << 27)])
def test_one_that_is_a_hole_is_refused_before_it_is_in_memory(
    lost: Path, counts: tuple[int, int, int]
) -> None:
    path = lost.with_name("state")
    path.write_bytes(signed({"image": [], "scans": [["tables", 0, *counts]]}))
    os.truncate(path, path.stat().st_size + (1 << 30))
    tracemalloc.start()
    try:
        with pytest.raises(RescueStateFailed, match="it is damaged"):
            state_of(lost, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_what_is_no_state_is_left_alone(lost: Path) -> None:
    must_be_refused(lost, lost, "it is none")
    path = lost.with_name("state")
    os.mkfifo(path)
    must_be_refused(lost, path, "it is none")
    path.unlink()
    path.mkdir()
    must_be_refused(lost, path, "state")
    must_be_refused(lost, lost / "below", "state")


def test_that_of_another_version_is_refused(lost: Path) -> None:
    path = made(lost)
    raw = path.read_bytes()[len(MARK) + 32 :]
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    head["image"][0] = "0.0.1"
    path.write_bytes(signed(head, raw[8 + int.from_bytes(raw[:8], "little") :]))
    must_be_refused(lost, path, "of another version")


def test_who_stops_it_is_told_how_to_go_on(lost: Path) -> None:
    path = lost.with_name("state")
    state = state_of(lost, path)

    def scan() -> None:
        with kept(state, str(lost)) as stopped:
            state.scanned.sections["a"] = Section(512)
            assert not stopped()
            signal.raise_signal(signal.SIGTERM)
            unless(stopped)("scan", 1, 2)

    with pytest.raises(RescueStopped, match="state keeps how far it was"):
        scan()
    assert state_of(lost, path).scanned.sections["a"].done == 512


def test_what_is_found_is_not_written_where_the_state_is(lost: Path) -> None:
    path = lost.with_name("state")
    refused = run_here(["rescue", "--state", path, "-o", path, lost], lost.parent)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert not path.exists()


def test_where_it_cannot_be_written_what_was_brought_back_is_told_all_the_same(lost: Path) -> None:
    out, folder = lost.with_name("out"), lost.with_name("below")
    rescue: list[str | Path] = ["rescue", "--state", folder / "state", "-o", out, lost]
    ended = run_here(rescue, lost.parent)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert str(folder) in ended.err
    told, kept_there = ended.out, out.read_bytes()
    out.unlink()
    folder.mkdir()
    assert run_here(rescue, lost.parent).out == told
    assert out.read_bytes() == kept_there


def test_where_it_cannot_be_written_what_is_there_stays(lost: Path) -> None:
    path = made(lost)
    before, state = path.read_bytes(), state_of(lost, path)
    broken = replace(state, path=str(lost / "below"))
    with pytest.raises(RescueStateFailed, match="below"):
        broken.save()
    assert path.read_bytes() == before
