"""Following the advice of a report as somebody would: its commands, pasted into a real bash.

Programs of ours that only read or write an image are run in this process, so that a test can follow
hundreds of reports: bash hands their arguments over, as it split them, and gets the exit code. What
mounts runs as it is.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from examples.make_image import DAMAGES, MIB, sample
from instarfs.cli.main import main
from instarfs.image.directory import SUFFIX
from tests.mount.mounts import DEADLINE, environment
from tests.planner.corpus import RULES

HEADING, COMMAND = "  - ", "      "

_PRELUDE = """
set -e
trap 'echo "FAILED: $BASH_COMMAND" >&2' ERR
instarfs() {
    case $1 in
    mount | umount) "$PYTHON" -m instarfs "$@" 7>&- 8<&- ;;
    *)
        printf '%s\\0' "$PWD" "$@" '' >&7
        read -r code <&8
        return "$code"
        ;;
    esac
}
"""


@dataclass(frozen=True)
class Step:
    """What is to be done, and its commands, as the report prints them."""

    heading: str
    commands: tuple[str, ...]


def steps_of(text: str) -> list[Step]:
    """The steps of the section `What to do now`."""
    _, found, after = text.partition("\nWhat to do now:\n")
    steps: list[Step] = []
    for line in after.partition("\n\n")[0].splitlines() if found else ():
        if line.startswith(COMMAND):
            step = steps.pop()
            steps.append(Step(step.heading, (*step.commands, line.removeprefix(COMMAND))))
        else:
            assert line.startswith(HEADING), line
            steps.append(Step(line.removeprefix(HEADING), ()))
    return steps


@dataclass(frozen=True)
class Followed:
    """What came of it. ``codes``: what each program of ours that ran in this process ended with."""

    code: int
    errors: str
    codes: list[int]


def follow(commands: Iterable[str], folder: Path) -> Followed:
    """Paste *commands* into bash, in *folder*, under `set -e`."""
    requests, from_bash = os.pipe()
    to_bash, answers = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, requests)
        stack.callback(os.close, answers)
        errors = stack.enter_context(tempfile.TemporaryFile())
        start = f'exec 7>&{from_bash} 8<&{to_bash} {from_bash}>&- {to_bash}<&-; eval "$1"'
        bash = subprocess.Popen(
            ["bash", "-c", start, "bash", "\n".join([_PRELUDE, *commands])],
            cwd=folder,
            env={**environment(), "PYTHON": sys.executable},
            pass_fds=(from_bash, to_bash),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        os.close(from_bash)
        os.close(to_bash)
        codes = []
        for directory, arguments in _requests(requests):
            ended = run_here(arguments, directory)
            errors.write(ended.err.encode(errors="backslashreplace"))
            errors.flush()
            codes.append(ended.code)
            os.write(answers, b"%d\n" % ended.code)
        code = bash.wait(DEADLINE)
        errors.seek(0)
        return Followed(code, errors.read().decode(errors="replace"), codes)


def _requests(pipe: int) -> Iterator[tuple[str, list[str]]]:
    """The directory and the arguments of each command: each ends with a NUL, and all with two."""
    request = b""
    while part := os.read(pipe, 1 << 16):
        request += part
        if request.endswith(b"\0\0"):
            directory, *arguments = map(os.fsdecode, request[:-2].split(b"\0"))
            yield directory, arguments
            request = b""


@dataclass(frozen=True)
class Ended:
    """The exit code and both outputs of a command of ours."""

    code: int
    out: str
    err: str


def run_here(arguments: Iterable[str | Path], directory: str | Path = ".") -> Ended:
    """Run the command line in this process."""
    argv, sys.argv = sys.argv, ["instarfs", *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with contextlib.chdir(directory), _instead_of(1, out), _instead_of(2, err):
            try:
                main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0
            finally:
                sys.argv = argv
        for stream in (out, err):
            stream.seek(0)
        return Ended(code, out.read().decode(), err.read().decode())


@contextlib.contextmanager
def _instead_of(descriptor: int, file: IO[bytes]) -> Iterator[None]:
    """What is written to *descriptor* goes to *file*."""
    kept = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


def undoes(step: Step) -> bool:
    """Whether it takes a repair back."""
    return any(re.match(r"instarfs undo |echo undo ", command) for command in step.commands)


def repairs(step: Step) -> bool:
    """Whether it changes the image."""
    commands = step.commands
    return any("check -r " in each or each.endswith("/repair/tier") for each in commands)


KINDS = [*RULES, *DAMAGES]
"""Every kind of damage that the rules of the check and the maker of samples know."""


def damaged(kind: str) -> bytes:
    """An image with that kind of damage."""
    if kind in RULES:
        return bytes(RULES[kind]().image.data)
    image = sample(size=64 * MIB, cluster_bits=12).build()
    DAMAGES[kind](image, random.Random(kind))
    return bytes(image.data)


MOST_REPAIRS = 4


def follow_all(report: Callable[[], str], image: Path, folder: Path | None = None) -> None:
    """Do all that the report of *image* advises; and then, without taking anything back, what it
    and those after it advise, until none advises a repair.

    *report* asks for it; it is followed in *folder*, or else beside the image. Everything succeeds
    but what is said to may not; nothing that was there is gone; what is taken back is taken back to
    the byte.
    """
    before = image.read_bytes()
    steps = steps_of(report())
    _require_success(steps, image, folder)
    if not any(map(repairs, steps)) or any(map(undoes, steps)):
        assert image.read_bytes() == before
    else:
        image.write_bytes(before)
    for _ in range(MOST_REPAIRS):
        steps = steps_of(report())
        if not any(map(repairs, steps)):
            return
        before = image.read_bytes()
        _require_success([step for step in steps if not undoes(step)], image, folder)
        assert image.read_bytes() != before
    raise AssertionError("a repair is advised again and again")


def _require_success(steps: Iterable[Step], image: Path, folder: Path | None) -> None:
    folder = folder or image.parent
    kept = _files(folder, image)
    certain = [step for step in steps if not may_fail(step)]
    followed = follow((command for step in certain for command in step.commands), folder)
    assert followed.code == 0, followed
    followed = [follow(step.commands, folder) for step in steps if may_fail(step)]
    now = _files(folder, image)
    if folder == image.parent:
        _require_lists(followed, {name: now[name] for name in now.keys() - kept.keys()})
        assert {name: now.get(name) for name in kept} == kept
    assert set(kept.values()) <= set(now.values())


def _require_lists(exports: list[Followed], made: dict[str, bytes | tuple[int, ...]]) -> None:
    """What could not be read is listed, exactly where the exit code says that there is such."""
    lists = [content for name, content in made.items() if name.endswith(".map")]
    assert len(lists) == len(exports)
    for export, content in zip(exports, lists, strict=True):
        assert export.code == int(isinstance(content, bytes) and b"  -\n" in content), export


def may_fail(step: Step) -> bool:
    """Whether its text says so beforehand."""
    return "exit code 1" in step.heading


LARGE = 8 << 20


def _files(folder: Path, image: Path) -> dict[str, bytes | tuple[int, ...]]:
    """All files in *folder* but the image and its undo file: their bytes; of large ones, times."""
    others = {image.name, image.name + SUFFIX}
    found: dict[str, bytes | tuple[int, ...]] = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in others:
            status = path.stat()
            is_large = status.st_size > LARGE
            times = (status.st_size, status.st_mtime_ns)
            found[str(path)] = times if is_large else path.read_bytes()
    return found
