"""What is printed and shown for the whole corpus: to see what a change changes in words.

python -m tests.printed --write        # take what is printed now for right
python -m tests.printed --keep DIR     # every output as a file below DIR, for `diff -r`
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio
from click.testing import CliRunner

from instarfs.cli.main import commands
from instarfs.errors import DOMAIN_ERRORS
from instarfs.image.file import Image
from instarfs.inspect.inspector import inspecting
from instarfs.mount.nodes import Directory, Node
from instarfs.mount.tree import build_tree
from tests.images.corpus import RULES
from tests.images.damage import DAMAGES
from tests.images.sample import sample

EXPECTED = Path(__file__).with_name("printed.tsv")

NAME = "image.qcow2"
SIZE, CLUSTER_BITS = 16 << 20, 12
"""Of the disk with every sample damage."""

COMMANDS = (
    ("check",),
    ("check", "--output=json"),
    ("plan", "leaks"),
    ("plan", "all"),
    ("plan", "all", "--output=json"),
    ("info",),
    ("info", "--output=json"),
    ("map",),
    ("map", "--output=json"),
    ("report",),
)
FAILED, ENDED = "Error: ", "\nended: "
"""What follows the output of a command."""

_TIMES = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[^\s\"]*")


def images() -> dict[str, bytes]:
    """Every image of the corpus, by name."""
    made = {name: bytes(make().image.data) for name, make in RULES.items()}
    for name, inflict in DAMAGES.items():
        image = sample(size=SIZE, cluster_bits=CLUSTER_BITS).build()
        inflict(image, random.Random(1))
        made[f"sample-{name}"] = bytes(image.data)
    return made


@contextmanager
def _room() -> Iterator[Path]:
    """A folder with a path as long as ever: lines are broken where they are too long."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="instarfs-", dir="/tmp") as room:
        os.chdir(room)
        try:
            yield Path(room)
        finally:
            os.chdir(before)


def printed(data: bytes) -> dict[str, str]:
    """What the commands print of an image, and what a mount of it shows, by name."""
    with _room() as room:
        Path(NAME).write_bytes(data)
        found = {}
        for command in COMMANDS:
            done = CliRunner().invoke(commands, [*command, NAME])
            said, ended = done.output, done.exception
            if isinstance(ended, DOMAIN_ERRORS):  # as the process ends then
                said, ended = f"{said}{FAILED}{ended}\n", SystemExit(ended.exit_code)
            code = ended.code if isinstance(ended, SystemExit) else ended
            found[" ".join(command)] = f"{said}{ENDED}{code!r}\n"
        found |= trio.run(_shown)
        return {
            name: _TIMES.sub("TIME", text).replace(str(room), "ROOM")
            for name, text in found.items()
        }


async def _shown() -> dict[str, str]:
    with Image.open(NAME) as image:
        async with inspecting(image) as inspector:
            return {name: text async for name, text in _files(build_tree(inspector), "")}


async def _files(node: Node | None, path: str) -> AsyncIterator[tuple[str, str]]:
    if isinstance(node, Directory):
        for name in await node.names():
            async for each in _files(await node.child(name), f"{path}/{name}"):
                yield each
    elif node is not None and not path.endswith(".raw"):
        handle = await node.open()
        parts, at = [], 0
        while part := await handle.read(at, 1 << 20):
            parts.append(bytes(part))
            at += len(part)
        yield path, b"".join(parts).decode("latin-1")


def digest(shown: dict[str, str]) -> str:
    """A short hash of all that `printed` gives."""
    whole = hashlib.sha256()
    for name, text in shown.items():
        whole.update(f"{name}\0{text}\0".encode())
    return whole.hexdigest()[:16]


def expected() -> dict[str, str]:
    """By image, what ``--write`` took for right."""
    return dict(line.split("\t") for line in EXPECTED.read_text().splitlines())


def main() -> None:
    """What the module's docstring says."""
    parser = argparse.ArgumentParser(prog="python -m tests.printed")
    parser.add_argument("--write", action="store_true", help="take what is printed for right")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="every output as a file below DIR")
    options = parser.parse_args()
    if options.keep:
        for image, data in images().items():
            for name, text in printed(data).items():
                kept = options.keep / image / name.strip("/").replace("/", "_").replace(" ", "_")
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(text)
    if options.write:
        lines = [f"{image}\t{digest(printed(data))}\n" for image, data in images().items()]
        EXPECTED.write_text("".join(lines))


if __name__ == "__main__":
    main()
