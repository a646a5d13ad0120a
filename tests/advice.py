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

from instarfs.cli.main import main
from instarfs.image.directory import SUFFIX
from tests.images.builder import MIB
from tests.images.corpus import RULES
from tests.images.damage import DAMAGES
from tests.images.sample import sample
from tests.mount.mounts import DEADLINE, environment

HEADING, COMMAND = "  # ", "      "

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
class Block:
    """What the report advises together. ``lines``: what is below ``title``, to be pasted as it
    is; ``commands``: without what is said between them.
    """

    title: str
    lines: tuple[str, ...]

    @property
    def commands(self) -> list[str]:
        return [line.strip() for line in self.lines if line.startswith(COMMAND)]


def blocks_of(text: str) -> list[Block]:
    """What is advised in a report: first, where there is anything to do, `What to do now`."""
    _, found, after = text.partition("\nWhat to do now:\n")
    if not found:
        return []
    sections = [section.splitlines() for section in f"What to do now:\n{after}".split("\n\n")]
    blocks = [Block(title, tuple(lines)) for title, *lines in sections]
    advised = [block for block in blocks if block.commands or block is blocks[0]]
    for block in advised:
        assert all(line.startswith((HEADING, COMMAND)) for line in block.lines), block
    return advised


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


def undoes(block: Block) -> bool:
    """Whether it takes a repair back, be it an interrupted one."""
    return any(re.match(r"instarfs undo |echo undo ", command) for command in block.commands)


def repairs(block: Block) -> bool:
    """Whether it changes the image."""
    commands = block.commands
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


MOST_REPAIRS = 6


def follow_all(report: Callable[[], str], image: Path, folder: Path | None = None) -> None:
    """Do all that the report of *image* advises; and then, without taking anything back, what it
    and those after it advise, until none advises a repair.

    *report* asks for it; it is followed in *folder*, or else beside the image. Everything succeeds
    but what is said to may not; nothing that was there is gone; a block that is pasted as a whole
    does what it says, and the one that takes a repair back does so to the byte.
    """
    before = image.read_bytes()
    for number in range(MOST_REPAIRS):
        blocks = blocks_of(report())
        if not any(map(repairs, blocks)):
            _require_success(blocks, image, folder)
            assert image.read_bytes() == before
            return
        if number == 0:
            for block in filter(undoes, blocks):
                _require_success([each for each in blocks if not undoes(each)], image, folder)
                assert image.read_bytes() != before
                followed = follow(block.lines, folder or image.parent)
                assert followed.code == 0, followed
                assert image.read_bytes() == before
            blocks = blocks_of(report())  # the names of what was kept are taken now
        assert not any(repairs(block) and undoes(block) for block in blocks)
        _require_success([block for block in blocks if not undoes(block)], image, folder)
        assert image.read_bytes() != before
        before = image.read_bytes()
    raise AssertionError("a repair is advised again and again")


def _require_success(blocks: Iterable[Block], image: Path, folder: Path | None) -> None:
    folder = folder or image.parent
    kept = _files(folder, image)
    certain = [block for block in blocks if not may_fail(block)]
    followed = follow((line for block in certain for line in block.lines), folder)
    assert followed.code == 0, followed
    uncertain = [block for block in blocks if may_fail(block)]
    followed_them = [(block, follow(block.lines, folder)) for block in uncertain]
    exports = [done for block, done in followed_them if exports_disk(block)]
    exports += [followed] * sum(exports_disk(block) for block in certain)
    now = _files(folder, image)
    if folder == image.parent:
        _require_lists(exports, {name: now[name] for name in now.keys() - kept.keys()})
        assert {name: now.get(name) for name in kept} == kept
    assert set(kept.values()) <= set(now.values())


def _require_lists(exports: list[Followed], made: dict[str, bytes | tuple[int, ...]]) -> None:
    """What could not be read is listed, exactly where the exit code says that there is such."""
    lists = [content for name, content in made.items() if name.endswith(".map")]
    assert len(lists) == len(exports)
    for export, content in zip(exports, lists, strict=True):
        assert export.code == int(isinstance(content, bytes) and b"  -\n" in content), export


def may_fail(block: Block) -> bool:
    """Whether its text says so beforehand."""
    return "exit code 1" in block.title


def exports_disk(block: Block) -> bool:
    """Whether it copies the guest's disk out."""
    return any(command.startswith("instarfs export ") for command in block.commands)


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
