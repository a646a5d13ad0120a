"""`instarfs check` of several images: what is said of each, and how it ends."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from instarfs.cli.main import main
from instarfs.errors import WORST_FIRST
from tests.images.builder import Image
from tests.images.damage import DAMAGES
from tests.instarfs.repair.test_run import healthy

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["instarfs", "check", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        return int(exited.value.code or 0), *capfd.readouterr()

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image for each exit code, by its name: ``1`` is not there."""
    monkeypatch.chdir(tmp_path)
    for name, damages in (("0", ()), ("2", ("wrong-copied",)), ("3", ("leaked-clusters",))):
        made, rng = Image(bytearray(healthy())), random.Random(1)
        for damage in damages:
            DAMAGES[damage](made, rng)
        Path(name).write_bytes(made.data)
    Path("63").write_bytes(b"no image")
    return tmp_path


@pytest.mark.parametrize("names", ["0", "1", "2", "3", "63"])
def test_each_alone(names: str, folder: Path, check: Run) -> None:
    assert check(names)[0] == int(names)


@pytest.mark.parametrize(
    "names", ["0 0", "0 3", "3 2", "63 2 3", "2 63", "3 63 0", "2 1 3 0 63", "1 0"]
)
@pytest.mark.parametrize("options", [(), ("-q",), ("--output=json",), ("-f", "qcow2", "-U")])
def test_the_exit_code_is_the_worst(
    names: str, options: tuple[str, ...], folder: Path, check: Run
) -> None:
    codes = [int(name) for name in names.split()]
    if "-f" in options:
        # What is said to be qcow2 and is not could not be checked.
        codes = [1 if code == 63 else code for code in codes]
    code, out, err = check(*options, *names.split())
    assert code == min(codes, key=WORST_FIRST.index)
    assert err.count("instarfs: ") == sum(code in (1, 63) for code in codes)
    assert bool(out) == ("-q" not in options)


def test_json_is_an_array_of_what_is_said_of_each(folder: Path, check: Run) -> None:
    names = ("2", "1", "0", "63", "3")
    code, out, err = check("--output=json", *names)
    values = json.loads(out)
    assert code == 1
    assert [(value["filename"], value["exit-code"]) for value in values] == [
        (name, int(name)) for name in names
    ]
    for name, value in zip(names, values, strict=True):
        if name != "1":
            assert json.loads(check("--output=json", name)[1]) == value
    assert values[1]["error"]["message"] == "1: no such file; check the path"
    assert [line.partition(": ")[2] for line in err.splitlines()] == [
        values[1]["error"]["message"],
        "63: not a qcow2 image: it begins with 0x6e6f2069, not 0x514649fb",
    ]


def test_each_block_begins_with_the_name(folder: Path, check: Run) -> None:
    code, out, err = check("3", "1", "0")
    assert code == 1
    blocks = out.split("\nimage: ")
    assert blocks[0].startswith("image: 3\n\n9 leaked clusters were found on the image.\n")
    assert blocks[1:] == ["1\n", f"0\n{check('0')[1]}"]
    lines = err.splitlines()
    assert lines[-1] == "instarfs: 1: no such file; check the path"
    assert all(line.startswith("3: Leaked ") for line in lines[:-2])
    assert lines[-2] == "3: NOTE what it means, and what to do: instarfs report 3"


def test_images_named_by_options(folder: Path, check: Run) -> None:
    code, out, _ = check("--image-opts", "--output=json", "file.filename=2", "file.filename=0")
    assert code == 2
    assert [value["filename"] for value in json.loads(out)] == ["2", "0"]


def test_one_image_is_repaired_at_a_time(folder: Path, check: Run) -> None:
    before = Path("3").read_bytes()
    code, out, err = check("-r", "leaks", "3", "3")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "one image at a time" in err
    assert Path("3").read_bytes() == before


def test_an_image_that_is_only_to_be_read_is_not_repaired(folder: Path, check: Run) -> None:
    before = Path("3").read_bytes()
    code, out, err = check("-r", "leaks", "--image-opts", "file.filename=3,read-only=on")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "read-only=on" in err
    assert Path("3").read_bytes() == before


def test_how_long_to_look_is_for_what_may_be_written_to(folder: Path, check: Run) -> None:
    code, out, err = check("--settle", "1", "0")
    assert (code, out) == (1, "")
    assert "add -U" in err
    assert check("--settle", "1", "-U", "0")[0] == 0
