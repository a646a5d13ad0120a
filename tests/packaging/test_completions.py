"""Completion of the command line, laid as a package lays it, in a real bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[2] / "packaging/completions/install"
INSTARFS = Path(sys.prefix, "bin/instarfs")


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    subprocess.run([INSTALL, folder, INSTARFS], check=True)
    return folder


@pytest.mark.parametrize(
    ("words", "replies"),
    [
        (["instarfs", "umo"], {"umount"}),
        (["instarfs", "check", "--und"], {"--undo-file"}),
        (["instarfs", "plan", ""], {"leaks", "all", "split", "bitmaps", "snapshots"}),
        (["instarfs", "check", "--output", ""], {"human", "json"}),
    ],
)
def test_bash_completes(share: Path, words: list[str], replies: set[str]) -> None:
    script = share / "bash-completion/completions/instarfs"
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1};"
        ' _instarfs_completion instarfs; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{INSTARFS.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert set(done.stdout.split()) == replies


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("zsh/vendor-completions/_instarfs", "#compdef instarfs"),
        ("fish/vendor_completions.d/instarfs.fish", "complete --no-files --command instarfs"),
    ],
)
def test_other_shells_find_theirs(share: Path, name: str, says: str) -> None:
    assert says in (share / name).read_text()
