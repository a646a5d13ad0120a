"""instarfs.cli.start: signals that come before a command begins, and after it has done its work."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.instarfs.cli.test_repair import LEAKY, content

# The last that happens in a Python program before it tears itself down; and while results are told.
AT_END = "import atexit, os, sys; atexit.register(lambda: os.kill(os.getpid(), {number}))\n"
IN_OUTPUT = """
import os, sys
import instarfs.render.repair as it
whole = it.fixed_human
def told(outcome):
    os.kill(os.getpid(), {number})
    return whole(outcome)
it.fixed_human = told
"""

# When nothing of the command is left.
LET_GO = """
import os
import click
whole = click.Context.__exit__
def let_go(context, *error):
    whole(context, *error)
    if not context._depth:
        os.kill(os.getpid(), {number})
click.Context.__exit__ = let_go
"""

RUN = "from instarfs.cli.start import main; main()\n"
NUMBERS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program + RUN, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "moment", [AT_END, IN_OUTPUT, LET_GO], ids=["at the end", "in the output", "let go"]
)
def test_what_was_done_is_what_the_exit_code_says(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    image = tmp_path / "image"
    image.write_bytes(content(*LEAKY))
    done = run(moment.format(number=int(number)), "check", "-r", "all", image)
    assert (done.returncode, done.stderr) == (0, "")
    assert "To take it back: instarfs undo" in done.stdout
    assert image.read_bytes() != content(*LEAKY)


AS_IT_IS_LOADED = """
import os, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("module", ["instarfs.cli.room", "click", "instarfs.cli.check"])
def test_who_is_interrupted_while_a_command_is_loaded_ends_without_a_word(module: str) -> None:
    done = run(AS_IT_IS_LOADED.format(module=module), "check", "image")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_before_a_command_begins_next_to_nothing_is_loaded() -> None:
    """Until then nobody but Python knows what to do when it is interrupted."""
    load = "import re, signal, sys; had = {*sys.modules}; import instarfs.cli.start as it\n"
    done = run(load + "print(*sorted({*sys.modules} - had)); sys.exit()\n")
    assert {*done.stdout.split()} - {"__future__", "gc"} == {
        *("instarfs", "instarfs.cli", "instarfs.cli.loading", "instarfs.cli.start")
    }
