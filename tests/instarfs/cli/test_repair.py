"""`instarfs check -r`, `plan`, `undo`, `trim`: what they print, how they end, what they change."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from instarfs.cli.main import main
from instarfs.cli.stopping import stoppable
from instarfs.image.directory import SUFFIX
from instarfs.repair.execute import execute
from instarfs.text import shell_path
from planner.repair.tiers import Proposal, propose
from tests.advice import blocks_of, follow, follow_all
from tests.images.builder import Image
from tests.images.damage import DAMAGES
from tests.instarfs.repair.test_run import healthy
from tests.schemas import require_valid_output

LEAKY = ("leaked-clusters", "low-refcount", "wrong-copied")
LOST = ("leaked-clusters", "lost-l2-table")
TWO_OWNERS = ("leaked-clusters", "shared-cluster")


@cache
def content(*damages: str) -> bytes:
    made, rng = Image(bytearray(healthy())), random.Random(1)
    for name in damages:
        DAMAGES[name](made, rng)
    return bytes(made.data)


class Ended:
    """The exit code and both outputs of one run."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out.decode(), err.decode()

    @property
    def json(self):
        return json.loads(self.out)


Run = Callable[..., Ended]


@pytest.fixture
def instarfs(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr("sys.argv", ["instarfs", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        ended = Ended(int(exited.value.code or 0), *capfdbinary.readouterr())
        require_valid_output(arguments, ended.out)
        return ended

    return run


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(*damages: str) -> Path:
        path = tmp_path / "some image.qcow2"
        path.write_bytes(content(*damages))
        return path

    return make


def undo_file_of(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


# ---- check -r ----


def test_check_r_all_prints_what_qemu_img_prints_and_what_was_done(instarfs: Run, make) -> None:
    image = make(*LEAKY)
    before = instarfs("check", "--output=json", image).json
    ended = instarfs("check", "-r", "all", image)
    assert (ended.code, ended.err) == (0, "")
    shown = ended.out.splitlines()
    assert shown[:6] == [
        "The following inconsistencies were found and repaired:",
        "",
        f"    {before['leaks']} leaked clusters",
        f"    {before['corruptions']} corruptions",
        "",
        "Double checking the fixed image now...",
    ]
    again = subprocess.run(["qemu-img", "check", image], check=True, capture_output=True, text=True)
    assert again.stdout in ended.out
    assert shown[-2].startswith("repaired: tier all, plan ")
    assert shown[-1] == f"To take it back: instarfs undo {shell_path(str(image))}"


def test_check_r_of_a_chosen_tier_says_what_it_came_to(instarfs: Run, make) -> None:
    image = make("shared-cluster")
    plan = instarfs("plan", "split", "--output=json", image).json
    ended = instarfs("check", "-r", "split", "--plan", plan["plan-id"], image)
    assert ended.code == 0, ended.err
    said = "; ".join(plan["plan-id-must-be-quoted-because"])
    line = next(line for line in ended.out.splitlines() if line.startswith("repaired: tier split"))
    assert line.endswith(f": {said}")


@pytest.mark.parametrize(
    ("tier", "damages"),
    [
        ("leaks", ()),
        ("leaks", ("leaked-clusters",)),
        ("all", ()),
        ("all", LEAKY),
        ("all", ("dirty-bit",)),
        ("all", ("missing-refcount", "lost-refblock")),
    ],
    ids=str,
)
def test_check_r_json_is_that_of_qemu_img(
    instarfs: Run, make, tmp_path: Path, tier: str, damages: tuple[str, ...]
) -> None:
    image = make(*damages)
    other = tmp_path / "other.qcow2"
    other.write_bytes(image.read_bytes())
    before = instarfs("check", "--output=json", image).json
    ended = instarfs("check", "-r", tier, "--output", "json", image)
    theirs = subprocess.run(
        ["qemu-img", "check", "-r", tier, "--output=json", other],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.code == theirs.returncode == 0
    ours = ended.json
    for key in ("corruptions", "leaks", "check-errors", "allocated-clusters", "total-clusters"):
        # One that is 0 is left out by both, or by neither.
        assert ours.get(key) == json.loads(theirs.stdout).get(key), key
    for key in ("leaks", "corruptions"):
        assert ours.get(f"{key}-fixed", 0) == before.get(key, 0) - ours.get(key, 0)
    assert ours["repaired"] == ours["planned"] == ours["found"] - ours["left"]
    assert ours["exit-code"] == ended.code


def test_the_exit_code_is_that_of_the_state_after(instarfs: Run, make) -> None:
    image = make(*LEAKY)
    ended = instarfs("check", "-r", "leaks", "--output=json", image)
    assert (ended.code, ended.err) == (2, "")
    assert ("leaks" in ended.json, ended.json["repair-incomplete"]) == (False, False)
    assert {each["kind"] for each in ended.json["left-findings"]} == {"refcount-low", "l2-copied"}
    assert all(each["reason"] for each in ended.json["left-findings"])


def test_what_cannot_be_mended_is_named(instarfs: Run, make) -> None:
    image = make(*TWO_OWNERS)
    ended = instarfs("check", "-r", "all", image)
    # QEMU counts nothing any more and says 0; the loss is named, and so the image is not clean.
    assert ended.code == 2
    assert "incomplete: tier all, plan " in ended.out
    assert ", left 11\n" in ended.out
    assert "1 x multiple-owners: the image does not say which owner is right" in ended.out
    # The cluster that one of the two has lost.
    assert "10 x leak: something among them may be lost" in ended.out
    assert "ERROR host cluster at" in ended.err
    value = instarfs("check", "-r", "all", "--output=json", image).json
    assert (value["repair-incomplete"], value["left"], value["repaired"]) == (True, 11, 0)
    assert (value["verdict"], value["exit-code"]) == ("corrupt", 2)


def test_what_is_refused_is_one_line_and_exit_code_1(instarfs: Run, make) -> None:
    image = make(*LOST)
    for output in ("human", "json"):
        ended = instarfs("check", "-r", "leaks", "--output", output, image)
        assert (ended.code, ended.err.count("\n")) == (1, 1)
        assert ended.err.startswith(f"instarfs: {image}: the leaked cluster at ")
        assert image.read_bytes() == content(*LOST)
        assert not undo_file_of(image).exists()
    value = ended.json
    assert (value["repair-status"], "leaks-fixed" in value) == ("refused", False)
    assert value["plan-id"] in value["reason"]
    assert value["exit-code"] == 1
    assert value["suspect-count"] == len(value["suspects"]) == 1
    ended = instarfs("check", "-r", "leaks", "--plan", value["plan-id"], "-q", image)
    assert (ended.code, ended.out, ended.err) == (0, "", "")


@pytest.mark.parametrize("tier", ["leaks", "all"])
def test_who_quotes_a_plan_gets_success_when_exactly_that_was_done(
    instarfs: Run, make, tier: str
) -> None:
    image = make("low-refcount", *TWO_OWNERS)
    plan = instarfs("plan", tier, "--output=json", image).json
    quoting = ("check", "-r", tier, "--plan", plan["plan-id"], "--output=json", image)
    ended = instarfs(*quoting)
    assert (ended.code, ended.err) == (0, "")
    assert (ended.json["exit-code"], ended.json["verdict"]) == (0, "corrupt")
    assert ended.json["left"] == plan["left"] > 0
    assert instarfs("check", "-r", tier, "--output=json", image).code == 2
    ended = instarfs(*quoting)  # of a plan that is another by now
    assert (ended.code, ended.json["exit-code"]) == (1, 1)


def test_a_plan_that_is_another(instarfs: Run, make) -> None:
    image = make(*LEAKY)
    ended = instarfs("check", "-r", "all", "--plan", "0123456789ab", image)
    assert (ended.code, ended.out) == (1, "")
    assert "plan 0123456789ab is not what would be done now" in ended.err
    assert image.read_bytes() == content(*LEAKY)


def test_twice_changes_nothing_more(instarfs: Run, make) -> None:
    image = make(*LEAKY)
    assert instarfs("check", "-r", "all", image).code == 0
    repaired, status = image.read_bytes(), image.stat()
    ended = instarfs("check", "-r", "all", image)
    assert ended.code == 0
    assert "nothing to do: tier all, plan" in ended.out
    assert "were found and repaired" not in ended.out
    assert image.read_bytes() == repaired
    assert image.stat().st_mtime_ns == status.st_mtime_ns


def test_without_an_undo_file(instarfs: Run, make) -> None:
    image = make(*LEAKY)
    ended = instarfs("check", "-r", "all", "--no-undo", image)
    assert ended.code == 0
    assert "instarfs undo" not in ended.out
    assert not undo_file_of(image).exists()


def test_repairs_are_taken_back_one_by_one_from_where_the_command_says(
    instarfs: Run, make, tmp_path: Path
) -> None:
    image, undo = make(*LEAKY), tmp_path / "the undo"
    option = ("--undo-file", undo)
    assert instarfs("check", "-r", "leaks", *option, image).code == 2
    ended = instarfs("check", "-r", "all", *option, image)
    assert (ended.code, ended.err) == (0, "")
    command = f"instarfs undo --undo-file {shell_path(str(undo))} {shell_path(str(image))}"
    last = f"To take it back: {command} (1 repair before it can be taken back after that)"
    assert ended.out.splitlines()[-1] == last
    assert not undo_file_of(image).exists()
    assert "nothing to undo" in instarfs("undo", image).err
    ended = instarfs("undo", *option, image)
    assert (ended.code, ended.err) == (0, "")
    assert ": 1 repair more can be taken back\n" in ended.out
    assert ended.out.splitlines()[-1] == f"To go on: {command}"
    ended = instarfs("undo", *option, image)
    assert (ended.code, len(ended.out.splitlines())) == (0, 1)
    assert image.read_bytes() == content(*LEAKY)
    assert instarfs("undo", *option, image).code == 1


def test_progress_is_on_stderr(instarfs: Run, make) -> None:
    ended = instarfs("check", "-r", "all", "-p", "-q", make(*LEAKY))
    assert (ended.code, ended.out) == (0, "")
    assert "writing" in ended.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("check", "-r", "most", "x"), "'most' is not one of 'leaks', 'all'"),
        (("check", "-r", "all", "-U", "x"), "shares the image with nobody"),
        (("check", "--plan", "3f9a2c", "x"), "add -r"),
        (("check", "--no-undo", "x"), "add -r"),
        (("check", "--undo-file", "u", "x", "y"), "one image at a time"),
        (("check", "-r", "all"), "Missing argument 'IMAGE...'"),
        (("plan", "x"), "'x' is not one of 'leaks', 'all'"),
        (("undo",), "Missing argument 'IMAGE'"),
        (("trim", "--all", "x"), "No such option"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_1(
    instarfs: Run, arguments: tuple[str, ...], complaint: str
) -> None:
    ended = instarfs(*arguments)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert complaint in ended.err


@pytest.mark.parametrize("command", [("check", "-r", "all"), ("undo",), ("trim",)], ids=" ".join)
def test_what_is_no_image_or_is_not_there(
    instarfs: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    text = tmp_path / "text"
    text.write_text("hello\n" * 1000)
    ended = instarfs(*command, text)
    assert (ended.code, ended.err.count("\n")) == (1 if command == ("undo",) else 63, 1)
    assert ended.err.startswith(f"instarfs: {text}: ")
    for path in (tmp_path, tmp_path / "none", Path("/dev/null")):
        ended = instarfs(*command, path)
        assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize("command", [("check", "-r", "all"), ("undo",), ("trim",)], ids=" ".join)
def test_an_image_in_use_is_refused(instarfs: Run, make, command: tuple[str, ...]) -> None:
    image = make(*LEAKY)
    with subprocess.Popen(
        ["qemu-io", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        try:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write("length\n")
            program.stdin.flush()
            assert "3 MiB" in program.stdout.readline()
            ended = instarfs(*command, image)
            assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
            assert "Failed to get" in ended.err
            assert ended.err.endswith("stop it first\n")
        finally:
            program.communicate("quit\n", timeout=20)
    assert not undo_file_of(image).exists()


# ---- undo and trim ----


def test_undo_brings_back_every_byte_and_says_what_is_then(instarfs: Run, make) -> None:
    image = make(*LEAKY)
    assert instarfs("check", "-q", "-r", "all", image).code == 0
    ended = instarfs("undo", image)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("undone: tier all, plan ")
    assert image.read_bytes() == content(*LEAKY)
    ended = instarfs("undo", image)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)


def test_undo_refuses_an_image_that_was_written_to(instarfs: Run, make) -> None:
    image = make(*LEAKY)
    assert instarfs("check", "-q", "-r", "all", image).code == 0
    subprocess.run(["qemu-io", "-c", "write -P 1 2M 64k", image], check=True, capture_output=True)
    before = image.read_bytes()
    ended = instarfs("undo", image)
    assert ended.code == 1
    assert "nothing was written" in ended.err
    assert image.read_bytes() == before


def test_trim(instarfs: Run, make) -> None:
    image = make("leaked-clusters")
    ended = instarfs("trim", image)
    assert (ended.code, ended.out) == (1, "")
    assert "not clean: leaks; repair it first" in ended.err
    assert instarfs("check", "-q", "-r", "leaks", image).code == 0
    ended = instarfs("trim", image)
    assert (ended.code, ended.err) == (0, "")
    assert " bytes given back: what the free clusters held is gone" in ended.out
    assert instarfs("trim", "-q", image).out == ""


# ---- plan, and a repair that was interrupted ----


def test_plan_shows_what_check_r_then_does(instarfs: Run, make) -> None:
    image = make(*LEAKY)
    plan = instarfs("plan", "all", "--output", "json", image).json
    assert image.read_bytes() == content(*LEAKY)
    done = instarfs("check", "-r", "all", "--plan", plan["plan-id"], "--output=json", image).json
    for key in ("plan-id", "found", "planned", "left", "left-findings"):
        assert done[key] == plan[key]
    for key, value in plan["predicted"].items():
        assert done.get(key, 0) == value


@pytest.mark.parametrize("output", ["human", "json"])
def test_there_is_no_plan_of_an_image_that_was_written_to_while_it_was_planned(
    instarfs: Run, make, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    image = make(*LEAKY)
    os.utime(image, (0, 0))

    def write_first(*arguments: Any, **options: Any) -> Proposal:
        proposal = propose(*arguments, **options)
        make("leaked-clusters")
        return proposal

    monkeypatch.setattr("instarfs.repair.planning.propose", write_first)
    ended = instarfs("plan", "all", "--output", output, image)
    why = "the image changed while it was planned; stop its writer first"
    assert (ended.code, ended.err) == (1, f"instarfs: {image}: {why}\n")
    assert output == "human" or ended.json["status"] == "refused"
    assert "plan-id" not in ended.out


@pytest.fixture
def interrupted(instarfs: Run, make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image whose repair ended in the middle, as by a power failure."""
    image: Path = make(*LEAKY)

    class PowerFailure(BaseException):
        pass

    def fail(*arguments: Any, **options: Any) -> None:
        execute(*arguments, **options)
        raise PowerFailure

    with monkeypatch.context() as patched:
        patched.setattr("instarfs.repair.run.execute", fail)
        patched.setattr("instarfs.repair.writing.Session.withdraw", lambda _session: None)
        with pytest.raises(PowerFailure):
            instarfs("check", "-r", "all", image)
    assert image.read_bytes() != content(*LEAKY)
    return image


def test_an_interrupted_repair_is_shown(instarfs: Run, interrupted: Path) -> None:
    half = interrupted.read_bytes()
    ended = instarfs("check", "--output=json", interrupted)
    assert ended.json["interrupted-repair"]["tier"] == "all"
    assert ended.json["interrupted-repair"]["undo-file"] == str(undo_file_of(interrupted))
    assert "was interrupted" in instarfs("check", interrupted).err
    ended = instarfs("plan", "all", interrupted)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "was interrupted" in ended.err
    assert instarfs("trim", interrupted).code == 1
    assert interrupted.read_bytes() == half


def _look(instarfs: Run, image: Path, command: str, *options: str) -> tuple[Ended, bytes]:
    """What *command* says of *image*, and what it made of it if it makes a file."""
    out = image.with_name("disk.raw")
    ended = instarfs(command, *options, image, *([out] if command == "export" else []))
    made = out.read_bytes() if command == "export" else b""
    for path in (out, out.with_name("disk.raw.map")):
        path.unlink(missing_ok=True)
    return ended, made


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("info",), ""),
        (("info", "--output=json"), "interrupted-repair"),
        (("map",), ""),
        (("map", "--output=json"), ""),
        (("files",), ""),
        (("rescue",), ""),
        (("rescue", "--output=json"), "interrupted-repair"),
        (("scan",), ""),
        (("scan", "--output=jsonl"), "interrupted"),
        (("export",), ""),
    ],
)
def test_whatever_looks_says_in_a_line_that_a_repair_was_interrupted(
    instarfs: Run, interrupted: Path, words: tuple[str, ...], key: str
) -> None:
    half = interrupted.read_bytes()
    told, _ = _look(instarfs, interrupted, *words)
    (note,) = [line for line in told.err.splitlines() if "was interrupted" in line]
    assert "NOTE a repair (tier all, plan " in note
    assert note.endswith(f"instarfs undo {shell_path(str(interrupted))}")
    assert f'"{key}":' in told.out or not key
    assert interrupted.read_bytes() == half


@pytest.mark.parametrize("command", ["info", "map", "files", "export"])
def test_what_is_shown_of_an_interrupted_repair_is_the_image_as_it_lies(
    instarfs: Run, interrupted: Path, tmp_path: Path, command: str
) -> None:
    told, made = _look(instarfs, interrupted, command)
    undo_file_of(interrupted).rename(tmp_path / "aside")
    alone, alike = _look(instarfs, interrupted, command)
    assert (told.code, told.out, made) == (alone.code, alone.out, alike)
    assert told.err.splitlines()[1:] == alone.err.splitlines()


@pytest.mark.parametrize("command", ["files", "export", "scan"])
def test_who_wants_nothing_said_is_told_nothing_of_an_interrupted_repair(
    instarfs: Run, interrupted: Path, command: str
) -> None:
    told, _ = _look(instarfs, interrupted, command, "-q")
    assert "interrupted" not in told.err


def test_a_report_leads_out_of_an_interrupted_repair(instarfs: Run, interrupted: Path) -> None:
    (block,) = blocks_of(instarfs("report", interrupted).out)
    assert "  # Take back the repair that was interrupted, then look again:" in block.lines
    assert follow(block.lines, interrupted.parent).code == 0
    assert interrupted.read_bytes() == content(*LEAKY)
    follow_all(lambda: instarfs("report", interrupted).out, interrupted)


def test_an_interrupted_repair_is_taken_back_before_another(
    instarfs: Run, interrupted: Path
) -> None:
    ended = instarfs("check", "-r", "all", interrupted)
    assert ended.code == 0
    assert "A repair that had been interrupted was taken back first.\n" in ended.out
    assert instarfs("undo", interrupted).code == 0
    assert interrupted.read_bytes() == content(*LEAKY)


def test_what_was_taken_back_is_said_also_where_the_repair_is_then_refused(
    instarfs: Run, interrupted: Path
) -> None:
    ended = instarfs("check", "-r", "all", "--plan", "000000", interrupted)
    assert (ended.code, ended.out) == (1, "")
    first, second = ended.err.splitlines()
    assert first == "NOTE A repair that had been interrupted was taken back first."
    assert second.startswith(f"instarfs: {interrupted}: plan 000000 is not what would be done now")
    assert interrupted.read_bytes() == content(*LEAKY)


def test_an_interrupted_repair_is_shown_where_its_undo_file_is_elsewhere(
    instarfs: Run, interrupted: Path, tmp_path: Path
) -> None:
    undo = undo_file_of(interrupted).rename(tmp_path / "the undo")
    assert "was interrupted" not in instarfs("check", interrupted).err
    shown = instarfs("check", "--undo-file", undo, interrupted).err
    assert "was interrupted" in shown
    command = f"instarfs undo --undo-file {shell_path(str(undo))} {shell_path(str(interrupted))}"
    assert f"and so does: {command}\n" in shown
    assert "was interrupted" not in instarfs("plan", "all", interrupted).err
    assert command in instarfs("plan", "--undo-file", undo, "all", interrupted).err
    assert command in instarfs("trim", "--undo-file", undo, interrupted).err
    assert instarfs("undo", "--undo-file", undo, interrupted).code == 0
    assert interrupted.read_bytes() == content(*LEAKY)


def test_an_interrupted_repair_is_undone(instarfs: Run, interrupted: Path) -> None:
    ended = instarfs("undo", interrupted)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("undone")
    assert interrupted.read_bytes() == content(*LEAKY)
    assert not undo_file_of(interrupted).exists()


# ---- being told to stop ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_rolls_a_repair_back(
    instarfs: Run, make, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    image = make(*LEAKY)

    def stop_in_the_middle(*arguments: Any, **options: Any) -> None:
        execute(*arguments, **options)
        os.kill(os.getpid(), number)

    monkeypatch.setattr("instarfs.repair.run.execute", stop_in_the_middle)
    ended = instarfs("check", "-r", "all", image)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "cancelled; the image is as it was before" in ended.err
    assert image.read_bytes() == content(*LEAKY)
    assert not undo_file_of(image).exists()


def test_signals_that_were_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_whether_a_file_can_be_read_is_found_out_by_opening_it(
    instarfs: Run, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make()
    # What click would ask, to answer in its own words.
    monkeypatch.setattr("os.access", lambda *_arguments, **_options: False)
    for command in (("check",), ("check", "-r", "all"), ("plan", "all"), ("info",), ("trim",)):
        assert instarfs(*command, image).code == 0


@pytest.mark.parametrize("name", ["/proc/self/fd/{}", "/dev/fd/{}", "{link}"])
def test_what_takes_it_back_works_in_another_process(
    instarfs: Run, tmp_path: Path, name: str
) -> None:
    image, link = tmp_path / "an image", tmp_path / "link"
    image.write_bytes(content(*LEAKY))
    fd = os.open(image, os.O_RDWR)
    link.symlink_to(f"/proc/self/fd/{fd}")
    path = name.format(fd, link=link)
    told = instarfs("report", path)
    repaired = instarfs("check", "-r", "all", path)
    os.close(fd)
    assert path not in told.out
    assert (repaired.code, repaired.err) == (0, "")
    command = repaired.out.rpartition("To take it back: ")[2].strip()
    assert command == f"instarfs undo {shell_path(str(image))}"
    assert instarfs("undo", image).code == 0
    assert image.read_bytes() == content(*LEAKY)


def test_a_descriptor_of_what_has_no_name_keeps_its_own(instarfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(content(*LEAKY))
    fd = os.open(image, os.O_RDWR)
    image.unlink()
    image.write_bytes(content())
    path = f"/proc/self/fd/{fd}"
    assert (
        f"NOTE what it means, and what to do: instarfs report {path}" in instarfs("check", path).err
    )
    os.close(fd)
    assert image.read_bytes() == content()
