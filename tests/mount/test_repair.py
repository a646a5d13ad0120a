"""Repairs through the mount: what is written to a control file, and what becomes of it."""

import contextlib
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from instarfs.image.directory import SUFFIX
from planner.check.wire import CheckResult, ResultFlag
from tests.images.builder import MIB, Image, ImageBuilder
from tests.images.damage import DAMAGES
from tests.mount.conftest import gate
from tests.mount.mounts import (
    DEADLINE,
    INSTARFS,
    Gate,
    MakeMount,
    Mount,
    instarfs,
    leak,
    make_image,
    mounted,
    run,
    settle,
    until,
)

SIZE = 4096
LEAKY = ("leaked-clusters", "low-refcount", "wrong-copied")
LOST = ("leaked-clusters", "lost-l2-table")
HIDDEN = ("leaked-clusters", "snapshot-l1-misaligned")
TWO_OWNERS = ("leaked-clusters", "shared-cluster")


@cache
def content(*damages: str) -> bytes:
    """An image with a snapshot, writes after it, two L2 tables and free clusters, damaged."""
    builder, rng = ImageBuilder(cluster_bits=12, size=3 * MIB), random.Random(1)
    builder.write(0, rng.randbytes(8 * SIZE))
    builder.take_snapshot("before")
    builder.skip(3)
    builder.write(2, rng.randbytes(4 * SIZE))
    builder.write(builder.geometry.l2_entries, rng.randbytes(8 * SIZE))
    builder.skip(4)
    made = Image(bytearray(builder.build().data))
    for name in damages:
        DAMAGES[name](made, rng)
    return bytes(made.data)


def make(tmp_path: Path, *damages: str) -> Path:
    path = tmp_path / "image.qcow2"
    path.write_bytes(content(*damages))
    settle(path)
    return path


def undo_file_of(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def tell(path: Path, command: bytes) -> int:
    """Write *command* in one write: 0, or its errno. Closing works, and so does opening, but where
    a repair is running.
    """
    with contextlib.ExitStack() as stack:
        try:
            control = os.open(path, os.O_WRONLY)
            stack.callback(os.close, control)
            written = os.write(control, command)
        except OSError as error:
            return error.errno or -1
        assert written == len(command)
        return 0


@contextlib.contextmanager
def started(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A program that is running, and killed at the end if it has not ended by itself."""
    program = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    try:
        yield program
    finally:
        program.kill()
        program.communicate()


def started_writing(
    mounted: Mount, command: str
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """A shell that writes *command* to `repair/tier`."""
    script = 'echo "$2" > "$1"'
    return started("bash", "-c", script, "bash", mounted / "repair/tier", command)


def values(mounted: Mount, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(mounted.read(name))
    return value


def numbers(value: dict[str, Any]) -> list[int]:
    return [value[key] for key in ("found", "planned", "repaired", "left")]


@pytest.fixture
def leaky(mount: MakeMount, tmp_path: Path) -> Mount:
    return mount(make(tmp_path, *LEAKY))


# ---- from a word to a repaired image ----


def test_leaks_then_all_then_undo(leaky: Mount) -> None:
    assert tell(leaky / "repair/tier", b"leaks\n") == 0
    assert leaky.read("repair/tier") == "none [leaks] all split bitmaps snapshots\n"
    found = values(leaky, "check/result.json")
    assert found["leaks"] == 0
    after_leaks = leaky.image.read_bytes()
    assert tell(leaky / "repair/tier", b"all\n") == 0
    assert leaky.read("repair/tier") == "none leaks [all] split bitmaps snapshots\n"
    assert values(leaky, "check/result.json")["verdict"] == "clean"
    run("qemu-img", "check", leaky.image)
    shown = leaky.read("repair/undo")
    assert shown.startswith("write `undo` to take the last repair back (tier all,")
    assert shown.endswith("; 1 more before it\n")
    assert tell(leaky / "repair/undo", b"undo\n") == 0
    assert leaky.image.read_bytes() == after_leaks
    assert leaky.read("repair/tier") == "[none] leaks all split bitmaps snapshots\n"
    assert values(leaky, "check/result.json")["corruptions"] == found["corruptions"] > 0
    done = values(leaky, "repair/result.json")
    assert (done["status"], done["undoable"]) == ("undone", 1)
    assert tell(leaky / "repair/undo", b"undo\n") == 0
    assert leaky.image.read_bytes() == content(*LEAKY)
    assert values(leaky, "repair/result.json")["undoable"] == 0
    assert tell(leaky / "repair/undo", b"undo\n") == errno.ENODATA


def test_what_no_longer_fits_is_neither_counted_nor_offered(
    mount: MakeMount, tmp_path: Path
) -> None:
    """Somebody writes between two repairs."""
    it = mount(make_image(tmp_path / "image.qcow2", "4M"))
    leak(it.image, 3)
    assert tell(it / "repair/tier", b"leaks\n") == 0
    assert it.read("repair/undo").endswith(")\n")
    run("qemu-io", "-c", "write 1M 64k", it.image)
    fits = ", if it still fits: the image may have been written to after it\n"
    assert it.read("repair/undo").endswith(fits)
    leak(it.image, 3)
    assert tell(it / "repair/tier", b"leaks\n") == 0
    done = values(it, "repair/result.json")
    assert (done["undoable"], done["no-longer-undoable"]) == (1, 1)
    stays = "; the repair before it can no longer be taken back: the image was written to"
    assert it.read("repair/undo").endswith(f"{stays} in between\n")
    assert tell(it / "repair/undo", b"undo\n") == 0
    done = values(it, "repair/result.json")
    assert (done["undoable"], "the image was written to" in str(done["reason"])) == (0, True)
    assert tell(it / "repair/undo", b"undo\n") == errno.ESTALE


def test_a_word_for_another_control_file_is_said_to_be(leaky: Mount) -> None:
    for word, file, right in (
        ("undo", "tier", "undo"),
        ("trim", "undo", "trim"),
        ("leaks", "trim", "tier"),
        ("all 012345", "undo", "tier"),
    ):
        assert tell(leaky / f"repair/{file}", word.encode()) == errno.EINVAL
        said = values(leaky, "repair/result.json")["reason"]
        assert said.endswith(f"; `{word.split()[0]}` is for repair/{right}")


def test_undo_brings_back_every_byte(leaky: Mount) -> None:
    assert leaky.read("repair/undo") == "nothing to take back\n"
    assert tell(leaky / "repair/undo", b"undo\n") == errno.ENODATA
    assert tell(leaky / "repair/tier", b"all\n") == 0
    assert leaky.image.read_bytes() != content(*LEAKY)
    assert tell(leaky / "repair/undo", b"undo\n") == 0
    assert leaky.image.read_bytes() == content(*LEAKY)


def test_the_same_numbers_everywhere(leaky: Mount) -> None:
    found = values(leaky, "check/result.json")
    plan = values(leaky, "repair/plan/all.json")
    assert values(leaky, "repair/result.json")["status"] == "none"
    assert tell(leaky / "repair/tier", b"all\n") == 0
    result, check = values(leaky, "repair/result.json"), values(leaky, "check/result.json")
    assert numbers(result) == numbers(check) == [plan["found"], plan["planned"], plan["planned"], 0]
    assert plan["found"] == sum(found["counts"].values())
    assert result["plan-id"] == check["plan-id"] == plan["plan-id"]
    assert result["undo-file"] == str(undo_file_of(leaky.image))
    for value in (result, check):
        assert value["leaks-fixed"] == found["leaks"]
        assert value["corruptions-fixed"] == found["corruptions"]
        assert value["repair-incomplete"] is False
    wire = CheckResult.from_bytes((leaky / "check/result.bin").read_bytes())
    assert wire.repaired_leaks == found["leaks"]
    assert wire.repaired_refcounts == found["counts"]["refcount-low"]
    assert wire.repaired_corruptions == found["counts"]["l2-copied"]
    assert not wire.has(ResultFlag.REPAIR_INCOMPLETE)
    assert f"all: repaired: tier all, plan {plan['plan-id']}: found" in leaky.log


def test_a_clean_image_is_not_touched(mount: MakeMount, tmp_path: Path) -> None:
    it = mount(make(tmp_path))
    before = it.image.stat()
    for _ in range(2):
        assert tell(it / "repair/tier", b"all\n") == 0
    after = it.image.stat()
    assert it.image.read_bytes() == content()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert values(it, "repair/result.json")["status"] == "nothing-to-do"
    assert not undo_file_of(it.image).exists()


def test_every_file_shows_the_new_state(leaky: Mount) -> None:
    names = ["check/result.json", "check/leaks", "check/report.txt", "check/findings.jsonl"]
    names += ["repair/plan/all.json", "repair/undo", "repair/result.json"]
    before = [leaky.read(name) for name in names]
    with (leaky / "check/report.txt").open() as early:
        first = early.read()
        assert tell(leaky / "repair/tier", b"all\n") == 0
        early.seek(0)
        assert early.read() == first
    after = [leaky.read(name) for name in names]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert values(leaky, "repair/plan/all.json")["status"] == "nothing-to-do"


def test_what_looks_lost_goes_only_when_the_plan_is_quoted(
    mount: MakeMount, tmp_path: Path
) -> None:
    it = mount(make(tmp_path, *LOST))
    assert tell(it / "repair/tier", b"leaks\n") == errno.EUCLEAN
    refusal = values(it, "repair/result.json")
    assert (refusal["status"], refusal["errno"]) == ("refused", "EUCLEAN")
    assert refusal["refusal"] == "AMBIGUOUS_CORRUPTION"
    assert "looks like a lost L2 table" in refusal["reason"]
    assert refusal["plan-id"] in refusal["reason"]
    assert it.image.read_bytes() == content(*LOST)
    assert it.read("repair/tier") == "[none] leaks all split bitmaps snapshots\n"
    plan = values(it, "repair/plan/leaks.json")
    assert plan["plan-id-must-be-quoted"] is True
    assert plan["plan-id"] == refusal["plan-id"]
    assert tell(it / "repair/tier", f"leaks {plan['plan-id']}\n".encode()) == 0
    assert values(it, "check/result.json")["leaks"] == 0


def test_a_plan_that_is_no_longer_what_would_be_done(leaky: Mount) -> None:
    quote = values(leaky, "repair/plan/all.json")["plan-id"]
    assert tell(leaky / "repair/tier", b"all 0123456789ab") == errno.ESTALE
    with leaky.image.open("r+b") as file:
        damaged = Image(bytearray(content(*LEAKY)))
        DAMAGES["missing-refcount"](damaged, random.Random(2))
        file.write(damaged.data)
    settle(leaky.image)
    assert tell(leaky / "repair/tier", f"all {quote}".encode()) == errno.ESTALE
    assert values(leaky, "repair/result.json")["errno"] == "ESTALE"
    assert leaky.image.read_bytes() == bytes(damaged.data)
    quote = values(leaky, "repair/plan/all.json")["plan-id"]
    # As with the ids of commits, the beginning is enough.
    assert tell(leaky / "repair/tier", f"all {quote[:6].upper()}".encode()) == 0
    assert values(leaky, "check/result.json")["verdict"] == "clean"


def test_an_image_that_took_the_place_of_the_one_that_was_reviewed(leaky: Mount) -> None:
    other = leaky.image.with_name("other")
    other.write_bytes(content(*LOST))
    settle(other)
    other.rename(leaky.image)
    assert tell(leaky / "repair/tier", b"all\n") == errno.ESTALE
    assert leaky.image.read_bytes() == content(*LOST)
    leaky.read("check/report.txt")
    assert tell(leaky / "repair/trim", b"trim\n") == errno.EUCLEAN


def test_what_is_left_is_named(mount: MakeMount, tmp_path: Path) -> None:
    it = mount(make(tmp_path, *TWO_OWNERS))
    assert tell(it / "repair/tier", b"all\n") == errno.EUCLEAN
    result, check = values(it, "repair/result.json"), values(it, "check/result.json")
    assert result["status"] == check["repair-status"] == "incomplete"
    assert numbers(result) == numbers(check)
    found, planned, repaired, left = numbers(result)
    assert (planned, found) == (repaired, repaired + left)
    # The cluster with two owners, and what leaks: one of the two owners has lost its own.
    assert left == 1 + check["leaks"]
    owners, leaks = result["left-findings"]
    assert owners == {
        "kind": "multiple-owners",
        "count": 1,
        "reason": "the image does not say which owner is right",
    }
    assert (leaks["kind"], leaks["count"]) == ("leak", check["leaks"])
    assert it.read("repair/tier") == "none leaks [all] split bitmaps snapshots\n"
    wire = CheckResult.from_bytes((it / "check/result.bin").read_bytes())
    assert wire.has(ResultFlag.REPAIR_INCOMPLETE)


def test_a_refusal_is_shown_as_a_plan_too(mount: MakeMount, tmp_path: Path) -> None:
    it = mount(make(tmp_path, *HIDDEN))
    plan = values(it, "repair/plan/leaks.json")
    assert (plan["status"], plan["finding"]) == ("refused", "snapshot-l1-misaligned")
    assert tell(it / "repair/tier", b"leaks") == errno.EUCLEAN
    result = values(it, "repair/result.json")
    for key in ("status", "finding", "refusal"):
        assert result[key] == plan[key]
    assert plan["reason"] in result["reason"]
    assert it.image.read_bytes() == content(*HIDDEN)


def test_trim_gives_back_what_is_free(mount: MakeMount, tmp_path: Path) -> None:
    it = mount(make(tmp_path, "leaked-clusters"))
    assert it.read("repair/trim").startswith("write `trim` to give the disk space of all free")
    assert tell(it / "repair/trim", b"trim") == errno.EUCLEAN
    assert tell(it / "repair/tier", b"leaks") == 0
    assert tell(it / "repair/trim", b"trim") == 0
    result = values(it, "repair/result.json")
    assert result["status"] == "trimmed"
    # What the repair fixed is still what it fixed; trimming changed the file, not its meaning.
    assert values(it, "check/result.json")["leaks-fixed"] > 0
    assert it.image.read_bytes() != content("leaked-clusters")
    assert it.read("repair/tier") == "none [leaks] all split bitmaps snapshots\n"


def test_without_undo(mount: MakeMount, tmp_path: Path) -> None:
    it = mount(make(tmp_path, *LEAKY), "--no-undo")
    assert tell(it / "repair/tier", b"all") == 0
    assert not undo_file_of(it.image).exists()
    assert it.read("repair/undo") == "nothing to take back\n"
    assert tell(it / "repair/undo", b"undo") == errno.ENODATA
    assert values(it, "repair/result.json")["errno"] == "ENODATA"


def test_a_read_only_mount_repairs_nothing(mount: MakeMount, tmp_path: Path) -> None:
    it = mount(make(tmp_path, *LEAKY), "--read-only")
    for name in ("tier", "undo", "trim"):
        assert tell(it / f"repair/{name}", b"leaks\n") == errno.EROFS
    assert values(it, "repair/plan/all.json")["status"] == "planned"
    assert it.image.read_bytes() == content(*LEAKY)


def test_two_mounts_of_one_image(mount: MakeMount, leaky: Mount) -> None:
    other = mount(leaky.image)
    assert values(other, "check/result.json")["leaks"] > 0
    assert tell(leaky / "repair/tier", b"all") == 0
    assert values(other, "check/result.json")["verdict"] == "clean"
    # The repair was the other mount's; that it can be taken back is seen here too.
    assert values(other, "check/result.json")["leaks-fixed"] == 0
    assert other.read("repair/tier") == "[none] leaks all split bitmaps snapshots\n"
    assert tell(other / "repair/undo", b"undo") == 0
    assert leaky.image.read_bytes() == content(*LEAKY)
    assert leaky.read("repair/undo") == "nothing to take back\n"


# ---- how a word can arrive ----


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount of a clean image: whatever is understood succeeds, and changes nothing."""
    folder = tmp_path_factory.mktemp("clean")
    image, directory = make(folder), folder / "mnt"
    with mounted([*INSTARFS, "mount", "-f", image, directory], image, directory) as it:
        yield it
        assert it.image.read_bytes() == content()


@pytest.fixture
def tier(clean: Mount) -> Path:
    """Its control file, with another tier applied than `all`."""
    assert tell(clean / "repair/tier", b"leaks") == 0
    return clean / "repair/tier"


def is_applied(tier: Path) -> bool:
    return tier.read_text() == "none leaks [all] split bitmaps snapshots\n"


def shell(script: str, *arguments: str | Path, program: str = "bash") -> str:
    """What a script complains about, on stderr."""
    done = subprocess.run(
        [program, "-c", script, program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
        timeout=DEADLINE,
    )
    assert (done.returncode == 0) == (not done.stderr), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "script",
    [
        'echo all > "$1"',
        'echo all >> "$1"',
        'echo "  all " > "$1"',
        'printf all > "$1"',
        'printf "\\tall\\n" > "$1"',
        'echo all | tee "$1" > /dev/null',
        'echo all | tee -a "$1" > /dev/null',
        'echo all | dd of="$1" status=none',
        'echo all | dd of="$1" status=none conv=notrunc oflag=append',
        'echo all | dd of="$1" status=none seek=1000 bs=4 conv=notrunc',
        'echo all | cat > "$1"',
        'echo all 1<> "$1"',
        'exec 3> "$1"; echo all >&3; exec 3>&-',
        'python3 -c \'import sys; open(sys.argv[1], "w").write("all\\n")\' "$1"',
        'python3 -c \'import sys; open(sys.argv[1], "r+b", 0).write(b"all")\' "$1"',
    ],
)
def test_every_way_to_write(tier: Path, script: str) -> None:
    assert shell(script, tier) == ""
    assert is_applied(tier)


def test_a_shell_that_is_not_bash(tier: Path) -> None:
    assert shell('echo all > "$1"', tier, program="dash") == ""
    assert is_applied(tier)


def test_copying_a_file_there(tier: Path, tmp_path: Path) -> None:
    word = tmp_path / "word"
    word.write_text("all\n")
    run("cp", word, tier)
    assert is_applied(tier)


@pytest.mark.parametrize(
    "command",
    [
        *(b"", b" ", b"\n", b"none", b"ALL", b"alll", b"al", b"all,leaks", b"all leaks"),
        *(b"all\n\n", b"\nall", b"all\nall", b"all\0", b"all\r\n", b"undo", b"\xff"),
        *(b"all 12345", b"all 0123456789abc", b"all 01234g", b"all 012345 6", b"all012345"),
        *(b"x" * 300_000, b"all".ljust(70_000) + b"x"),
    ],
    ids=lambda command: repr(command[:20]),
)
def test_what_is_no_tier_is_invalid(clean: Mount, tier: Path, command: bytes) -> None:
    # Nothing is sent to us for a write of no bytes.
    assert tell(tier, command) == (errno.EINVAL if command else 0)
    assert not is_applied(tier)
    if command:
        result = values(clean, "repair/result.json")
        assert (result["status"], result["errno"]) == ("refused", "EINVAL")
        assert "means nothing here; write `leaks` or `all`" in result["reason"]
    for name in ("undo", "trim"):
        if command.strip() != name.encode():
            assert tell(clean / f"repair/{name}", command) == (errno.EINVAL if command else 0)


def test_a_word_that_comes_in_pieces_is_several_commands(tier: Path) -> None:
    assert "Invalid argument" in shell('echo all | dd of="$1" bs=1 status=none', tier)
    assert not is_applied(tier)
    # The pieces are judged one by one, wherever they go.
    control = os.open(tier, os.O_RDWR)
    with contextlib.closing(os.fdopen(control, "r+b", buffering=0)) as file:
        with pytest.raises(OSError, match="Invalid argument"):
            os.pwrite(control, b"al", 0)
        with pytest.raises(OSError, match="Invalid argument"):
            os.pwrite(control, b"l", 2)
        assert os.pwrite(control, b"all", 1 << 40) == 3
        assert file.read() == b"none leaks [all] split bitmaps snapshots\n"
        os.lseek(control, 12345, os.SEEK_SET)
        assert os.write(control, b"leaks") == 5
        os.lseek(control, 0, os.SEEK_SET)
        assert file.read() == b"none [leaks] all split bitmaps snapshots\n"


def test_truncating_and_closing_mean_nothing(tier: Path) -> None:
    before = tier.read_text()
    run("truncate", "-s", "0", tier)
    for flags in (os.O_TRUNC, os.O_APPEND, os.O_CREAT):
        os.close(os.open(tier, os.O_WRONLY | flags))
    assert tier.read_text() == before
    assert tier.stat().st_size == len(before)


def test_python_writes_again_at_close_what_failed_and_that_changes_nothing(
    mount: MakeMount, tmp_path: Path
) -> None:
    it = mount(make(tmp_path, *TWO_OWNERS))
    program = (
        "import sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "file.write('all\\n')\n"
        "try: file.close()\n"
        "except OSError as error: print(error.errno)\n"
    )
    assert run(sys.executable, "-c", program, it / "repair/tier") == f"{errno.EUCLEAN}\n"
    assert it.log.count("all: incomplete") == 2
    assert values(it, "repair/result.json")["repaired"] > 0
    # Another tier, or another image, is another question.
    plan = values(it, "repair/plan/leaks.json")["plan-id"]
    assert tell(it / "repair/tier", f"leaks {plan}".encode()) == 0
    assert values(it, "repair/result.json")["tier"] == "leaks"
    assert tell(it / "repair/undo", b"undo") == 0
    assert tell(it / "repair/undo", b"undo") == 0
    assert it.image.read_bytes() == content(*TWO_OWNERS)
    assert tell(it / "repair/tier", b"all") == errno.EUCLEAN
    assert values(it, "repair/result.json")["repaired"] > 0


# ---- an image that others use ----


def test_an_image_in_use_is_not_repaired(
    mount: MakeMount, image: Path, vm: subprocess.Popen[str]
) -> None:
    it = mount(image)
    before = image.read_bytes()
    for name, word in (("tier", b"all"), ("undo", b"undo"), ("trim", b"trim")):
        assert tell(it / f"repair/{name}", word) == errno.EBUSY
        assert "another process has the image open" in values(it, "repair/result.json")["reason"]
    assert image.read_bytes() == before
    assert not undo_file_of(image).exists()
    assert "while a program writes to it" in it.read("check/report.txt")
    assert values(it, "repair/plan/all.json")["status"] == "refused"
    vm.terminate()
    vm.wait()
    assert tell(it / "repair/tier", b"all") == 0


def test_an_image_that_qemu_io_has_open_is_not_repaired(leaky: Mount) -> None:
    for reading in ([], ["-r"]):
        with started("qemu-io", *reading, leaky.image) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write("length\n")
            program.stdin.flush()
            assert "3 MiB" in program.stdout.readline()
            assert tell(leaky / "repair/tier", b"leaks") == errno.EBUSY
            assert values(leaky, "repair/result.json")["errno"] == "EBUSY"
            program.communicate("quit\n", timeout=DEADLINE)
        assert leaky.image.read_bytes() == content(*LEAKY)
    assert tell(leaky / "repair/tier", b"leaks") == 0


def test_a_repair_waits_for_the_check_of_its_own_mount(gated: Gate) -> None:
    mounted = gated.mount
    with started("cat", mounted / "check/result.json") as reader:
        until(lambda: gated.checks == 1, "the check began")
        with started_writing(mounted, "all") as writer:
            until(lambda: "waiting" in mounted.read("repair/progress"), "the repair waited")
            assert tell(mounted / "repair/undo", b"undo") == errno.EBUSY
            gated.open()
            output, _ = reader.communicate(timeout=DEADLINE)
            assert json.loads(output)["image-in-use"] is False
            assert end_of(writer) == ""


# ---- in the middle of a repair ----


def end_of(writer: subprocess.Popen[str]) -> str:
    """What the writer complains about, once it has ended."""
    return writer.communicate(timeout=DEADLINE)[1]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Gate]:
    """A mount of a damaged image whose repairs wait at a gate."""
    with gate("gated_repair.py", make(tmp_path, *LEAKY), tmp_path) as it:
        yield it


@pytest.fixture
def writer(held: Gate) -> Iterator[subprocess.Popen[str]]:
    """Somebody who waits for a repair of `held`, which has begun to write."""
    with started_writing(held.mount, "all") as process:
        until(lambda: held.steps, "the first stage was written")
        yield process


def test_everything_else_answers_meanwhile(held: Gate, writer: subprocess.Popen[str]) -> None:
    it = held.mount
    assert it.image.read_bytes() != content(*LEAKY)
    assert it.read("repair/progress").startswith("writing ")
    assert it.read("check/progress") == "idle\n"
    assert it.read("repair/tier") == "[none] leaks all split bitmaps snapshots\n"
    assert it.read("repair/undo") == "a repair is running\n"
    assert values(it, "repair/result.json")["status"] == "none"
    # A check now sees what is half-written, marked corrupt for as long as it is, and says in use.
    half = values(it, "check/result.json")
    assert (half["verdict"], half["image-in-use"]) == ("corrupt", True)
    assert "interrupted-repair" not in half
    assert values(it, "repair/plan/leaks.json")["status"] == "refused"
    run("ls", "-lR", it.path)
    run("df", it.path)
    held.open()
    assert end_of(writer) == ""
    assert values(it, "check/result.json")["verdict"] == "clean"
    assert it.read("repair/progress") == "idle\n"


def access_of(mount: Mount) -> set[int]:
    """How the daemon has the image open: of O_RDONLY, O_WRONLY and O_RDWR."""
    daemon, image = Path(f"/proc/{mount.process.pid}"), mount.image.stat()
    found = set()
    for link in (daemon / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if (link.stat().st_dev, link.stat().st_ino) == (image.st_dev, image.st_ino):
                flags = re.search(r"flags:\s*(\d+)", (daemon / "fdinfo" / link.name).read_text())
                assert flags is not None
                found.add(int(flags[1], 8) & os.O_ACCMODE)
    return found


def test_the_image_is_open_for_writing_only_while_it_is_repaired(held: Gate) -> None:
    it = held.mount
    for name in ("check/report.txt", "repair/plan/all.json", "lost/triage.json"):
        it.read(name)
    assert access_of(it) == {os.O_RDONLY}
    with started_writing(it, "all") as writer:
        until(lambda: held.steps, "the first stage was written")
        assert access_of(it) == {os.O_RDONLY, os.O_RDWR}
        held.open()
        assert end_of(writer) == ""
    assert access_of(it) == {os.O_RDONLY}


def test_the_report_of_a_half_written_image_gives_no_advice(
    held: Gate, writer: subprocess.Popen[str]
) -> None:
    report = held.mount.read("check/report.txt")
    assert ": corrupt\n" in report
    assert "while a program writes to it" in report
    assert "repair/tier" not in report
    held.open()
    assert end_of(writer) == ""
    assert ": clean\n" in held.mount.read("check/report.txt")


def test_a_second_writer_is_told_at_once(held: Gate) -> None:
    early = os.open(held.mount / "repair/trim", os.O_WRONLY)
    with started_writing(held.mount, "leaks") as writer:
        until(lambda: held.steps, "the first stage was written")
        for name, word in (("tier", "all"), ("undo", "undo"), ("trim", "trim")):
            complaint = shell(f'echo {word} > "$1"', held.mount / f"repair/{name}")
            assert "Device or resource busy" in complaint
        with pytest.raises(OSError, match="Device or resource busy"):
            os.write(early, b"trim")
        os.close(early)
        assert writer.poll() is None
        held.open()
        assert end_of(writer) == ""
    assert values(held.mount, "repair/result.json")["tier"] == "leaks"


def test_qemu_refuses_the_image_meanwhile(held: Gate, writer: subprocess.Popen[str]) -> None:
    for command in (["qemu-img", "check"], ["qemu-io", "-c", "write 0 4k"]):
        refused = subprocess.run(
            [*command, held.mount.image], check=False, capture_output=True, text=True
        )
        assert refused.returncode != 0
        assert "lock" in refused.stderr
    assert "lock" in instarfs("check", held.mount.image).stderr
    held.open()
    assert end_of(writer) == ""
    run("qemu-img", "check", held.mount.image)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_daemon_rolls_back_and_says_so(
    held: Gate, writer: subprocess.Popen[str], number: signal.Signals
) -> None:
    held.mount.process.send_signal(number)
    assert held.mount.wait_for_end() == 0
    assert "Operation canceled" in end_of(writer)
    assert held.mount.image.read_bytes() == content(*LEAKY)
    assert not undo_file_of(held.mount.image).exists()
    assert f"{number.name}: unmounting\ninstarfs: all: rolled back: " in held.mount.log
    assert "the image is as it was before" in held.mount.log


def test_umount_rolls_back_too(held: Gate, writer: subprocess.Popen[str]) -> None:
    done = instarfs("umount", held.mount.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert held.mount.wait_for_end() == 0
    assert "Operation canceled" in end_of(writer)
    assert held.mount.image.read_bytes() == content(*LEAKY)
    assert "all: rolled back: " in held.mount.log


def test_a_lazy_unmount_lets_it_finish(held: Gate, writer: subprocess.Popen[str]) -> None:
    run("fusermount3", "-u", "-z", held.mount.path)
    held.open()
    assert end_of(writer) == ""
    assert held.mount.wait_for_end() == 0
    assert "all: repaired: " in held.mount.log
    run("qemu-img", "check", held.mount.image)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_writer_that_is_killed_takes_its_repair_along(
    held: Gate, writer: subprocess.Popen[str], number: signal.Signals
) -> None:
    writer.send_signal(number)
    writer.wait(DEADLINE)
    until(lambda: held.mount.read("repair/progress") == "idle\n", "the repair had ended")
    assert held.mount.image.read_bytes() == content(*LEAKY)
    assert values(held.mount, "repair/result.json")["status"] == "rolled-back"
    assert held.mount.read("repair/tier") == "[none] leaks all split bitmaps snapshots\n"
    held.open()
    assert tell(held.mount / "repair/tier", b"all") == 0


def test_a_writer_that_is_stopped_lets_its_repair_go_on(
    held: Gate, writer: subprocess.Popen[str]
) -> None:
    writer.send_signal(signal.SIGSTOP)
    held.open()
    until(lambda: held.mount.read("repair/progress") == "idle\n", "the repair had ended")
    assert values(held.mount, "check/result.json")["verdict"] == "clean"
    assert tell(held.mount / "repair/undo", b"undo") == 0
    assert held.mount.image.read_bytes() == content(*LEAKY)
    writer.send_signal(signal.SIGCONT)
    assert end_of(writer) == ""


@pytest.mark.parametrize("wayout", ["repair", "undo"])
def test_a_repair_that_was_interrupted_is_shown_and_taken_back_first(
    held: Gate, writer: subprocess.Popen[str], mount: MakeMount, wayout: str
) -> None:
    held.mount.process.kill()
    held.mount.process.wait()
    writer.wait(DEADLINE)
    image = held.mount.image
    settle(image)
    half = image.read_bytes()
    again = mount(image)
    assert "was interrupted" in again.log
    check, result = values(again, "check/result.json"), values(again, "repair/result.json")
    assert result["status"] == "interrupted"
    assert check["interrupted-repair"] == result["interrupted-repair"]
    assert check["interrupted-repair"]["tier"] == "all"
    assert check["interrupted-repair"]["undo-file"] == str(undo_file_of(image))
    assert "was interrupted" in again.read("check/report.txt")
    assert again.read("repair/undo").startswith("a repair was interrupted: write `undo`")
    plan = values(again, "repair/plan/all.json")
    assert plan["status"] == "refused"
    assert "was interrupted" in plan["reason"]
    assert tell(again / "repair/trim", b"trim") == errno.EUCLEAN
    assert image.read_bytes() == half
    if wayout == "undo":
        assert tell(again / "repair/undo", b"undo") == 0
        assert image.read_bytes() == content(*LEAKY)
    else:
        assert tell(again / "repair/tier", b"all") == 0
        assert values(again, "repair/result.json")["interrupted-repair-taken-back"] is True
        assert values(again, "check/result.json")["verdict"] == "clean"
        assert tell(again / "repair/undo", b"undo") == 0
        assert image.read_bytes() == content(*LEAKY)
    assert "interrupted-repair" not in values(again, "check/result.json")
