"""What `pip install instarfs` brings is enough for all but a mount, which says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from instarfs.cli.main import commands
from tests.instarfs.cli.test_repair import LEAKY, content

# As if they were not installed: what is in a virtual environment beside them does not matter.
WITHOUT = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('pyfuse3', 'trio'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Nowhere())
"""
START = "from instarfs.cli.start import main; main()"

ARGUMENTS = {
    "check": ("image",),
    "report": ("image",),
    "files": ("image",),
    "plan": ("leaks", "image"),
    "undo": ("image",),
    "trim": ("image",),
    "info": ("image",),
    "map": ("image",),
    "export": ("image", "out"),
    "rescue": ("image",),
    "scan": ("--output", "jsonl", "-q", "image"),
    "schema": ("check",),
    "umount": ("folder",),
}
"""Of every command but the mount; one that is missing here fails."""


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "image").write_bytes(content(*LEAKY))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=False,
        capture_output=True,
        cwd=folder,
        timeout=60,
    )


OTHERS = sorted({*commands.list_commands(click.Context(commands))} - {"mount"})


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_command_does_the_same(name: str, tmp_path: Path) -> None:
    with_it = run(tmp_path / "with", START, name, *ARGUMENTS[name])
    without = run(tmp_path / "without", WITHOUT + START, name, *ARGUMENTS[name])
    assert (without.returncode, without.stdout, without.stderr) == (
        with_it.returncode,
        with_it.stdout.replace(b"/with/", b"/without/"),
        with_it.stderr.replace(b"/with/", b"/without/"),
    )


def test_a_mount_says_what_to_install(tmp_path: Path) -> None:
    refused = run(tmp_path / "x", WITHOUT + START, "mount", "image", "folder")
    assert refused.returncode == 1
    assert refused.stderr.count(b"\n") == 1
    for word in (b"'instarfs[mount]'", b"apt ", b"dnf ", b"pyfuse3"):
        assert word in refused.stderr
