"""`instarfs rescue`: what it prints, how it ends, and that nothing is written that was not read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.repair.journal import Record, digest_of
from instarfs.repair.run import Repairer
from instarfs.repair.undo_place import Identity
from planner.progress import Progress
from planner.rescue.rescue import Rescue
from planner.source import SECTOR, Source
from tests.advice import run_here
from tests.crash.test_rescue import cached_find, rescue_of, sound
from tests.images.builder import MIB, ImageBuilder
from tests.images.builder import Image as BuiltImage
from tests.undo_files import encoded

LOST = bytes(2048) + sound()[2048:]
PLAN = rescue_of(LOST).plan


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """An image of which the header is gone."""
    path = tmp_path / "some image.qcow2"
    path.write_bytes(LOST)
    return path


def interrupted(image: Path) -> None:
    """A rescue of *image* was interrupted before its last stage: it has no header yet."""
    found = rescue_of(LOST)
    record = Record(PLAN, digest_of(LOST[:SECTOR]), found.after.counters, Identity(0, 0))
    undo = image.with_name(image.name + SUFFIX)
    undo.write_bytes(encoded(record))
    undo.chmod(0o600)


def commands_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("      instarfs ")]


def test_the_report_says_how_to_have_it_and_each_command_works(lost: Path) -> None:
    told = run_here(["rescue", lost.name], lost.parent)
    assert (told.code, told.err) == (0, "")
    out, in_place = commands_of(told.out)
    assert in_place.split()[1:5] == ["rescue", "--in-place", "--plan", PLAN.id]
    for command in (out, in_place):
        ended = run_here(_words(command)[1:], lost.parent)
        assert (ended.code, ended.err) == (0, "")
    rescued = lost.with_name("RESCUED.qcow2")
    assert rescued.read_bytes() == lost.read_bytes()
    subprocess.run(["qemu-img", "check", "-q", lost], check=True)
    assert run_here(["undo", "-q", lost]).code == 0
    assert lost.read_bytes() == LOST
    assert {each.name for each in lost.parent.iterdir()} == {lost.name, rescued.name}


def test_what_is_mapped_beyond_the_end_of_a_disk_can_be_read(tmp_path: Path) -> None:
    builder = ImageBuilder(size=64 * MIB)
    builder.write(0, b"first")
    builder.write(900, b"last")
    image = builder.build()
    image.change_header(size=MIB)
    path = tmp_path / "x.qcow2"
    path.write_bytes(image.data)
    (rescue,) = commands_of(run_here(["report", path]).out)
    told = run_here(_words(rescue)[1:], tmp_path)
    assert told.code == 0
    larger, free = commands_of(told.out)
    assert "--free" in free
    found = run_here(_words(larger)[1:], tmp_path)
    assert found.code == 0
    written = run_here(_words(commands_of(found.out)[0])[1:], tmp_path)
    assert (written.code, written.err) == (0, "")
    disk = tmp_path / "disk.raw"
    assert run_here(["export", "-q", tmp_path / "RESCUED.qcow2", disk]).code == 0
    assert disk.stat().st_size == 901 << 16
    assert disk.read_bytes()[900 << 16 :].startswith(b"last")
    # Of a disk of no bytes nobody need ask.
    image.change_header(size=0)
    path.write_bytes(image.data)
    (rescue,) = commands_of(run_here(["report", path]).out)
    told = run_here([*_words(rescue)[1:-2], "--output", "json", "--", path], tmp_path)
    assert json.loads(told.out)["header"]["size"] == 901 << 16


def test_extensions_that_make_no_sense_end(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    data = bytearray(ImageBuilder(size=MIB, more_extensions=((0x1234, b"x"),)).build().data)
    at = data.index((0x1234).to_bytes(4, "big"))
    data[at + 4 : at + 8] = (1 << 30).to_bytes(4, "big")
    path.write_bytes(data)
    assert f"  extensions: what stands at {at} makes no sense" in run_here(["rescue", path]).out
    told = json.loads(run_here(["rescue", "--output", "json", path]).out)
    assert told["changed"] == ["extensions"]
    done = run_here(["rescue", "--in-place", "--plan", told["plan-id"], path])
    assert (done.code, done.err) == (0, "")
    subprocess.run(["qemu-img", "check", "-q", path], check=True)


def _words(command: str) -> list[str]:
    return subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], check=True, capture_output=True, text=True
    ).stdout.splitlines()


@pytest.mark.parametrize(
    ("quote", "says"),
    [
        ((), f"--in-place --plan {PLAN.id}"),
        (("--plan", "0123456789ab"), f"that is {PLAN.id}"),
        (("--plan", PLAN.id[:4]), f"that is {PLAN.id}"),
    ],
)
def test_without_its_plans_id_nothing_is_written(
    lost: Path, quote: tuple[str, ...], says: str
) -> None:
    before = lost.stat()
    refused = run_here(["rescue", "--in-place", *quote, lost])
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert says in refused.err
    assert lost.read_bytes() == LOST
    assert lost.stat().st_mtime_ns == before.st_mtime_ns
    assert [each.name for each in lost.parent.iterdir()] == [lost.name]


def test_what_is_known_of_it_is_part_of_every_command(lost: Path) -> None:
    other = lost.with_name("like it.qcow2")
    other.write_bytes(sound())
    for known in (
        ["--free"],
        ["--assume", "size=0x90000", "--assume", "header_length=104"],
        ["--header", str(other)],
    ):
        told = run_here(["rescue", *known, lost.name], lost.parent)
        assert told.code == 0
        for command in commands_of(told.out):
            words = _words(command)
            assert set(known) <= set(words)
    ended = run_here(_words(commands_of(told.out)[1])[1:], lost.parent)
    assert (ended.code, ended.err) == (0, "")
    assert lost.read_bytes() == sound()


def test_where_the_undo_file_is_can_be_said(lost: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    told = run_here(["rescue", "--undo-file", elsewhere, lost])
    assert run_here(_words(commands_of(told.out)[1])[1:]).code == 0
    assert elsewhere.exists()
    subprocess.run(["qemu-img", "check", "-q", lost], check=True)
    assert run_here(["undo", "-q", "--undo-file", elsewhere, lost]).code == 0
    assert lost.read_bytes() == LOST
    assert not elsewhere.exists()


def test_a_second_name_has_no_undo_file_and_says_what_to_do(lost: Path, tmp_path: Path) -> None:
    (tmp_path / "second name").hardlink_to(lost)
    refused = run_here(["rescue", "--in-place", "--plan", PLAN.id, lost])
    assert refused.code == 1
    assert "--undo-file" in refused.err
    assert "--no-undo" not in refused.err
    assert lost.read_bytes() == LOST


def test_what_a_machine_wrote_since_is_not_undone(lost: Path) -> None:
    assert run_here(["rescue", "--in-place", "--plan", PLAN.id, lost]).code == 0
    forgets = ["qemu-io", "-f", "qcow2", "-d", "unmap", "-c", "discard 12k 2k"]
    subprocess.run([*forgets, str(lost)], check=True, capture_output=True)
    assert lost.stat().st_size == len(LOST)
    refused = run_here(["undo", lost])
    assert refused.code == 1
    assert "written to" in refused.err


def test_trim_after_a_rescue_keeps_what_undo_needs(lost: Path) -> None:
    assert run_here(["rescue", "--in-place", "--plan", PLAN.id, lost]).code == 0
    assert run_here(["trim", lost]).code in (0, 1)
    assert run_here(["undo", "-q", lost]).code == 0
    assert lost.read_bytes()[:2048] == LOST[:2048]


def test_json_tells_the_plan_and_what_became_of_it(lost: Path) -> None:
    planned = run_here(["rescue", "--output", "json", lost])
    assert f'"plan-id": "{PLAN.id}"' in planned.out
    done = run_here(["rescue", "--output", "json", "--in-place", "--plan", PLAN.id, lost])
    assert '"status": "repaired"' in done.out
    assert '"tier": "rescue"' in done.out
    nothing = run_here(["rescue", "--output", "json", lost])
    assert '"status": "nothing-to-do"' in nothing.out


def test_one_that_was_interrupted_is_told_and_taken_back(lost: Path) -> None:
    interrupted(lost)
    for command in ("check", "report"):
        told = run_here([command, lost])
        assert told.code == 63
        assert "instarfs undo" in told.out + told.err
    assert run_here(["undo", lost]).code == 0
    assert [each.name for each in lost.parent.iterdir()] == [lost.name]
    assert lost.read_bytes() == LOST


def test_found_in_what_an_interrupted_one_left_a_rescue_is_not_advised_in_place(
    lost: Path,
) -> None:
    interrupted(lost)
    told = run_here(["rescue", lost.name], lost.parent)
    assert told.code == 0
    (note,) = told.err.splitlines()
    (out,) = commands_of(told.out)
    assert " -o RESCUED.qcow2 " in out
    assert told.out.endswith(f"In the image itself something else comes first: {note[5:]}\n")
    found = json.loads(run_here(["rescue", "--output", "json", lost]).out)
    assert found["interrupted-repair"]["tier"] == "rescue"
    assert lost.read_bytes() == LOST


def test_one_that_was_interrupted_is_taken_back_before_the_next(lost: Path) -> None:
    interrupted(lost)
    done = run_here(["rescue", "--in-place", "--plan", PLAN.id, lost])
    assert (done.code, done.err) == (0, "")
    assert "interrupted" in done.out
    subprocess.run(["qemu-img", "check", "-q", lost], check=True)


def disk(path: Path, change: Callable[[BuiltImage], None]) -> Path:
    """An image of two L2 tables that say nothing of where they belong, and what *change* does."""
    builder = ImageBuilder(cluster_bits=12, size=8 * MIB)
    for cluster in (*range(40), *range(600, 640)):
        builder.write(cluster, b"data")
    image = builder.build()
    change(image)
    path.write_bytes(image.data)
    return path


def without_tables(image: BuiltImage) -> None:
    image.set_word(image.l1_at(0), 0)
    image.set_word(image.l1_at(1), 0)


def with_leaked_data(image: BuiltImage) -> None:
    image.set_word(image.l2_at(3), 0)


@pytest.mark.parametrize(
    ("change", "look", "write"),
    [(lambda _: None, 0, 0), (with_leaked_data, 0, 1), (without_tables, 1, 1)],
    ids=["nothing wrong", "no table lost", "no place proven"],
)
def test_where_nothing_comes_back_the_exit_code_says_so(
    tmp_path: Path, change: Callable[[BuiltImage], None], look: int, write: int
) -> None:
    path = disk(tmp_path / "x.qcow2", change)
    before, out = path.read_bytes(), tmp_path / "out"
    told = run_here(["rescue", path])
    assert (told.code, told.err) == (look, "")
    assert ("Nothing comes back" in told.out) == bool(look)
    as_json = run_here(["rescue", "--output", "json", path])
    assert as_json.code == look
    wanted = run_here(["rescue", "-o", out, path])
    assert (wanted.code, wanted.err) == (write, "")
    assert ("written" in wanted.out) == bool(write)
    plan = json.loads(as_json.out)["plan-id"]
    assert run_here(["rescue", "--in-place", "--plan", plan, path]).code == write
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "arguments",
    [("--in-place", "-o", "OUT"), ("--plan", "0123456789ab"), ("--in-place", "-U")],
)
def test_ways_that_exclude_each_other_are_one_line(lost: Path, arguments: tuple[str, ...]) -> None:
    refused = run_here(["rescue", *arguments, lost])
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert lost.read_bytes() == LOST


def test_what_is_written_to_meanwhile_is_not_rescued(lost: Path) -> None:
    def find(source: Source, *, can_grow: bool, progress: Progress) -> Rescue:
        found = cached_find(source, can_grow=can_grow, progress=progress)
        with lost.open("r+b") as file:
            file.write(b"somebody else")
        return found

    with Image.open(str(lost)) as image:
        outcome = Repairer(image).rescue(PLAN.id, find)
    assert "written to while it was looked at" in outcome.reason
    assert lost.read_bytes() == b"somebody else" + LOST[13:]


def test_the_report_of_no_image_says_how_to_ask_whether_it_was_one(lost: Path) -> None:
    told = run_here(["report", lost.name], lost.parent)
    assert (told.code, told.out, told.err.count("\n")) == (63, "", 1)
    command = told.err.strip().rpartition("; if it was one: ")[2]
    assert run_here(_words(command)[1:], lost.parent).code == 0
