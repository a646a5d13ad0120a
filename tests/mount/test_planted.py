"""Every byte of every file of a mount, and of its log, where names attack whoever reads them."""

from __future__ import annotations

import contextlib
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from instarfs.image.directory import SUFFIX
from tests.images.planted import IMAGES, UNREADABLE, require_harmless, require_json
from tests.images.poison import MARK, POISON
from tests.mount.mounts import INSTARFS, Mount, mounted, settle

NAME = os.fsdecode(POISON.replace(b"/", b""))
BINARY = ("image.qcow2", "disk.raw", "vmstate.raw", "result.bin")
TABLES = (".tsv", "leaks", "corruptions", "refcounts")
# In `planted_guest` the last two are of a file, and of a partition that holds nothing known.
EXPLAINED = (
    *("explain/host/0", "explain/host/65536", "explain/guest/0", "explain/guest/0x180005"),
    *("explain/guest/0x120000", "explain/guest/0x400000"),
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount under a name that attacks, in the place of whose image others are put."""
    folder = tmp_path_factory.mktemp("planted") / NAME[:60]
    folder.mkdir()
    image, directory = folder / NAME, folder / f"mnt {NAME[:60]}"
    (folder / UNREADABLE).write_bytes(IMAGES["unknown-features"]().data)
    image.write_bytes(IMAGES["every-name"]().data)
    settle(image)
    command: list[str | Path] = [*INSTARFS, "mount", "-f", "--follow", folder, image, directory]
    with mounted(command, image, directory) as it:
        yield it
    require_harmless(it.log, "the log")


def files(mount: Mount) -> Iterator[Path]:
    for at, folders, names in os.walk(mount.path):
        for name in [*folders, *names]:
            require_harmless(name, at)
            assert os.listxattr(Path(at) / name) == []
        yield from (Path(at) / name for name in names)
    yield from (mount / name for name in EXPLAINED)


def require_harmless_files(mount: Mount) -> int:
    """How often what was planted was seen."""
    seen = 0
    for path in files(mount):
        where = path.relative_to(mount.path)
        if path.name in BINARY or (where.parts[0] == "lost" and path.suffix != ".json"):
            continue
        text = path.read_bytes().decode()
        seen += text.count(MARK)
        if path.suffix == ".json":
            require_json(text, where)
        elif path.suffix == ".jsonl":
            for line in text.splitlines():
                require_json(line, where)
        else:
            require_harmless(text, where, tabs=path.name.endswith(TABLES))
        if path.suffix == ".svg":
            drawn = ET.fromstring(text)  # noqa: S314 - our own, and that is what is tested
            require_harmless("\n".join(drawn.itertext()), where)
            assert MARK not in {each.tag.rpartition("}")[2] for each in drawn.iter()}
    return seen


def put(mount: Mount, kind: str) -> None:
    new = mount.image.with_name("new")
    new.write_bytes(IMAGES[kind]().data)
    settle(new)
    new.replace(mount.image)


@pytest.mark.parametrize("kind", IMAGES)
def test_what_the_files_of_a_mount_say(kind: str, planted: Mount) -> None:
    put(planted, kind)
    assert require_harmless_files(planted)


def test_what_they_say_of_repairs(planted: Mount) -> None:
    put(planted, "every-name")
    plan = json.loads((planted / "repair/plan/all.json").read_text())
    words = [
        ("tier", POISON),
        ("tier", b"all " + plan["plan-id"].encode()),
        ("undo", POISON),
        ("undo", b"undo"),
        ("undo", b"undo"),
        ("trim", b"trim"),
    ]
    undo = planted.image.with_name(planted.image.name + SUFFIX)
    undo.unlink(missing_ok=True)
    for file, word in words:
        with contextlib.suppress(OSError):
            (planted / "repair" / file).write_bytes(word)
        assert require_harmless_files(planted)
        require_harmless(planted.log, word)
    for content in (b"", POISON, bytes(4096)):
        undo.write_bytes(content)
        undo.chmod(0o600)
        assert require_harmless_files(planted)
    undo.unlink()
    planted.image.unlink()
    assert require_harmless_files(planted)
