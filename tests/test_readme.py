"""The README shows real output: its console blocks are run here, in order, in one folder."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SHOWN_FOLDER = "/home/you"


def transcript() -> list[tuple[str, str]]:
    """(command, output) of every console block, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    steps: list[tuple[str, str]] = []
    for line in "".join(blocks).splitlines(keepends=True):
        if line.startswith("$ "):
            steps.append((line[2:].rstrip("\n"), ""))
        else:
            command, output = steps[-1]
            steps[-1] = (command, output + line)
    return steps


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout.replace(str(folder), SHOWN_FOLDER)


def test_every_command_of_the_readme_prints_what_it_shows(tmp_path: Path) -> None:
    for name in ("examples", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    steps = transcript()
    try:
        printed = [(command, run(command, tmp_path)) for command, _ in steps]
    finally:
        subprocess.run(["fusermount3", "-q", "-u", "-z", str(tmp_path / "mnt")], check=False)
    assert printed == steps


def test_every_line_of_python_in_the_readme_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"^```pycon\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    make: list[str | Path] = [sys.executable, ROOT / "examples/make_image.py", "damaged.qcow2"]
    subprocess.run(make, check=True, capture_output=True)
    test = doctest.DocTestParser().get_doctest(block, {}, "README.md", None, None)
    assert len(test.examples) > 10
    printed: list[str] = []
    doctest.DocTestRunner().run(test, out=printed.append)
    assert not "".join(printed)
