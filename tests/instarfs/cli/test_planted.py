"""Every byte that a command prints, of images and under names that attack whoever prints them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from instarfs.image.directory import SUFFIX
from tests.advice import Ended, blocks_of, damaged, run_here
from tests.crash.test_rescue import sound
from tests.images.planted import IMAGES, UNREADABLE, require_harmless, require_json
from tests.images.poison import FORGED, MARK, POISON, SEEDS, cut

NAME = os.fsdecode(POISON.replace(b"/", b""))

HUMAN = (
    ("check",),
    ("check", "--data"),
    ("check", "{image}"),
    ("report",),
    ("report", "--follow", "."),
    ("plan", "leaks"),
    ("plan", "all"),
    ("info",),
    ("info", "--backing-chain", "--follow", "."),
    ("map",),
    ("map", "--follow", "."),
    ("files",),
    ("rescue",),
    ("rescue", "--free"),
    ("check", "-r", "leaks"),
    ("check", "-r", "all"),
    ("undo",),
    ("trim",),
)
JSON = (
    ("check",),
    ("check", "{image}"),
    ("plan", "leaks"),
    ("plan", "all"),
    ("info",),
    ("info", "--backing-chain", "--follow", "."),
    ("map",),
    ("map", "--follow", "."),
    ("rescue",),
    ("check", "-r", "all"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    it = tmp_path / NAME[:60]
    it.mkdir()
    monkeypatch.chdir(it)
    return it


def judged(words: Iterable[str | Path], *, is_json: bool = False, tabs: bool = False) -> Ended:
    ended = run_here(words)
    require_harmless(ended.err, words)
    if is_json and ended.out:
        require_json(ended.out, words)
    else:
        require_harmless(ended.out, words, tabs=tabs)
    assert "Traceback" not in ended.err
    return ended


@pytest.mark.parametrize("kind", IMAGES)
def test_what_is_printed_of_an_image(kind: str, folder: Path) -> None:
    image = folder / NAME
    content = bytes(IMAGES[kind]().data)
    (folder / UNREADABLE).write_bytes(IMAGES["unknown-features"]().data)
    told = ""
    for words, is_json in itertools.chain(
        zip(HUMAN, itertools.repeat(False)), zip(JSON, itertools.repeat(True))
    ):
        image.write_bytes(content)
        options = ["--output", "json"] if is_json else []
        filled = [word.format(image=image) for word in words]
        ended = judged([*filled, *options, image], is_json=is_json, tabs=words[0] == "files")
        told += ended.out + ended.err
    assert FORGED.decode() in told  # it was there to be seen


def test_what_is_printed_of_a_snapshot_and_its_files(folder: Path) -> None:
    image = folder / NAME
    image.write_bytes(IMAGES["every-name"]().data)
    for number in ("0", "1", NAME):
        judged(["files", "--snapshot", number, image], tabs=True)


def test_where_it_is_rescued_to(folder: Path) -> None:
    image, like, out = folder / NAME, folder / f"like {NAME[:60]}", folder / f"{NAME[:200]}.qcow2"
    image.write_bytes(bytes(2048) + sound()[2048:])
    like.write_bytes(sound())
    for plan in ((), ("--plan", NAME)):
        judged(["rescue", "--header", like, "--in-place", *plan, image])
    judged(["rescue", "--assume", f"size={NAME}", image])
    judged(["rescue", "--header", like, image])
    for _ in range(2):
        judged(["rescue", "--header", like, "-o", out, image])
    assert out.exists()
    identity = json.loads(judged(["rescue", "--output", "json", image], is_json=True).out)[
        "plan-id"
    ]
    undo = ("--undo-file", f"{out}.undo")
    for words in (("rescue", "--in-place", "--plan", identity), ("undo",), ("undo",)):
        judged([*words, *undo, image])


def test_what_a_scan_tells(folder: Path) -> None:
    images = folder / "images"
    images.mkdir()
    kinds = ("every-name", "unknown-features", "guest")
    for kind in kinds:
        (images / f"{kind} {NAME[:100]}").write_bytes(IMAGES[kind]().data)
    (images / f"link {NAME[:100]}").symlink_to(NAME)
    (images / f"pipe {NAME[:100]}").write_bytes(b"QFI\xfb")
    (images / NAME[:200]).mkdir()
    state, metrics = folder / f"state {NAME[:100]}", folder / "metrics.prom"
    known: list[str | Path] = ["--state", state]
    kept: list[str | Path] = [*known, "--metrics", metrics]
    for words in ([*kept, images], [*known, "--report"], [images], [*known, images]):
        assert judged(["scan", *words]).out.count(MARK) >= len(kinds)
        ended = judged(["scan", "--output", "jsonl", *words])
        for line in ended.out.splitlines():
            require_json(line, words)
    text = metrics.read_text()
    require_harmless(text, metrics)
    # Nothing but comments and series of ours, each with its value.
    series = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(line.startswith("instarfs_scan_") for line in series)
    assert (
        sum(line.startswith("instarfs_scan_image_exit_code{") for line in series) == len(kinds) + 1
    )
    for line in series:
        float(line.rpartition(" ")[2])
    # What is no state, and paths that are not there.
    state.write_bytes(POISON)
    for where in (images, folder / f"none {NAME[:100]}"):
        judged(["scan", "--state", state, where])
        judged(["scan", "--metrics", folder / NAME[:50] / "x", where])
        judged(["scan", "--shard", NAME, where])


def test_where_it_is_exported_to(folder: Path) -> None:
    image, out = folder / NAME, folder / f"{NAME[:200]}.raw"
    for kind in ("data-past-end", "leaked-clusters"):
        image.write_bytes(damaged(kind))
        for _ in range(2):
            judged(["export", image, out])
        require_harmless(out.with_name(f"{out.name}.map").read_text(), kind, tabs=True)
        # Another image, and one that is no longer the same.
        image.write_bytes(damaged(kind) + bytes(512))
        judged(["export", image, out])
        out.unlink()
        judged(["export", image, out])
        out.with_name(f"{out.name}.map").unlink()
        judged(["export", "--snapshot", NAME, image, out])


def test_what_is_printed_of_what_is_no_image(folder: Path) -> None:
    missing, other, pipe = (folder / f"{n}{NAME[:200]}" for n in "abc")
    other.write_bytes(POISON)
    os.mkfifo(pipe)
    for path, command in itertools.product(
        (missing, other, pipe, folder), ("check", "report", "info", "map", "undo", "trim")
    ):
        assert judged([command, path]).code != 0
    for path in (missing, other, pipe, folder):
        assert judged(["mount", path, missing]).code == 1
        assert judged(["umount", path]).code == 1
        assert judged(["check", "--output", "json", path, path], is_json=True).code != 0
        assert judged(["export", path, other]).code != 0
        assert judged(["map", "--follow", path / "x", other]).code != 0


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_printed_of_words_that_mean_nothing(seed: bytes, folder: Path) -> None:
    word = os.fsdecode(seed)
    (folder / "x").write_bytes(damaged("leaked-clusters"))
    for words in (
        (word,),
        (f"-{word}",),
        (f"--{word}",),
        ("check", f"--{word}", "x"),
        ("check", "--output", word, "x"),
        ("check", "-f", word, "x"),
        ("check", "-T", word, "x"),
        ("check", "-r", "all", "--plan", word, "x"),
        ("check", "--object", word, "x"),
        ("check", "--object", f"secret,id=a,{word}", "x"),
        ("check", "--image-opts", word),
        ("check", "--image-opts", f"{word}=a,file.filename=x"),
        ("check", "--image-opts", f"file.filename=x,file.driver={word}"),
        ("check", "--undo-file", word, "-r", "all", "x"),
        ("map", "-s", word, "x"),
        ("mount", "-o", word, "x", "."),
        ("mount", "--preview", word, "x", "."),
        ("schema", word),
        ("files", "--snapshot", word, "x"),
        ("rescue", "--assume", word, "x"),
        ("rescue", "--assume", f"{word}=1", "x"),
        ("export", "--snapshot", word, "x", "y"),
        ("scan", "--output", word, "x"),
        ("scan", "--outdated-after", word, "x"),
    ):
        judged(words)


def test_what_is_printed_of_undo_files(folder: Path) -> None:
    image = folder / NAME[:80]
    content = damaged("wrong-copied")
    image.write_bytes(content)
    undo = image.with_name(image.name + SUFFIX)
    elsewhere = folder / f"undo {NAME[:80]}"
    repaired = judged(["check", "-r", "all", image])
    assert repaired.code == 0
    whole, image_after = undo.read_bytes(), image.read_bytes()
    for at in (*range(0, 2048, 61), len(whole) - 40):
        undo.write_bytes(whole[:at] + POISON + whole[at + len(POISON) :])
        for command in (["check"], ["undo"], ["check", "-r", "all"], ["report"]):
            image.write_bytes(image_after)
            judged([*command, image])
    undo.unlink(missing_ok=True)
    image.write_bytes(content)
    for command in (["check", "-r", "all"], ["undo"], ["undo"]):
        judged([*command, "--undo-file", elsewhere, image])


# ---- commands that are advised ----

SHIM = """#!/bin/sh
for word in "$0" "$@"; do printf '%s\\0' "$word" >> "$TOLD"; done
printf '\\n\\0' >> "$TOLD"
"""


def received(command: str, tmp_path: Path) -> list[list[bytes]]:
    """What the programs of *command* get from a real bash, without being run."""
    shims = tmp_path / "shims"
    shims.mkdir(exist_ok=True)
    for program in ("instarfs", "cp", "find", "mkdir", "rmdir", "mv", "fuser"):
        (shims / program).write_text(SHIM)
        (shims / program).chmod(0o755)
    told = tmp_path / "told"
    told.write_bytes(b"")
    subprocess.run(
        ["bash", "-e", "-c", 'PATH=$1:/usr/bin:/bin; eval "$2"', "bash", shims, command],
        check=True,
        stdout=subprocess.DEVNULL,
        env={"TOLD": str(told), "LC_ALL": "C.UTF-8"},
    )
    programs: list[list[bytes]] = []
    words: list[bytes] = []
    for word in told.read_bytes().split(b"\0")[:-1]:
        if word == b"\n":
            programs.append([words[0].rpartition(b"/")[2], *words[1:]])
            words = []
        else:
            words.append(word)
    return programs


@pytest.mark.parametrize("name", [*cut(60), POISON.replace(b"/", b"")])
def test_what_is_advised_names_exactly_that_file(
    name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = os.fsencode(tmp_path) + b"/" + name.replace(b"/", b"")
    path = Path(os.fsdecode(image))
    path.write_bytes(damaged("lost-l2-table"))
    blocks = blocks_of(run_here(["report", path]).out)
    programs = [
        program
        for block in blocks
        for command in block.commands
        if not command.startswith(("cat ", "echo "))
        for program in received(command, tmp_path)
    ]
    assert {program[0] for program in programs} >= {b"cp", b"mkdir", b"instarfs"}
    for program in programs:
        paths = [word for word in program[1:] if word.startswith(os.fsencode(tmp_path))]
        assert paths, program
        for word in paths:
            assert word.startswith(image), program
            assert word.removeprefix(image) in (
                b"",
                b".copy",
                b".mnt",
                b".mnt/lost",
                b".lost",
                b".raw",
            )
    # Those that stand in a sentence.
    monkeypatch.chdir(tmp_path)
    refused = run_here(["mount", path, f"{path}.none"]).err
    command = refused.rstrip("\n").partition("make it with: ")[2]
    assert received(command, tmp_path) == [[b"mkdir", image + b".none"]]
    path.write_bytes(damaged("wrong-copied"))
    repaired = run_here(["check", "-r", "all", "--undo-file", f"{path}.undo", path])
    command = repaired.out.rstrip("\n").partition("To take it back: ")[2]
    assert received(command, tmp_path) == [
        [b"instarfs", b"undo", b"--undo-file", image + b".undo", image]
    ]
