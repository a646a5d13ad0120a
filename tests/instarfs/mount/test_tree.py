"""The tree without a mount: what it costs to list what there may be very many of, and how what it
is asked for ends.
"""

import threading
import tracemalloc
from pathlib import Path

import pytest
import trio

from instarfs.errors import ReadCancelled
from instarfs.image.file import FileSource, Image
from instarfs.inspect.inspector import inspecting
from instarfs.mount.nodes import SHARED_BYTES, Directory, File, Node
from instarfs.mount.tree import build_tree
from instarfs.render import columns
from planner.arrays import U8
from tests.fuzz.holed import leaks_in_holes
from tests.images.bombs import BOMBS
from tests.images.sample import sample

DEADLINE = 10


async def test_a_listed_snapshot_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(BOMBS["snapshots-of-nothing"]().data)
    async with inspecting(Image.open(str(path))) as inspector:
        snapshots = await build_tree(inspector).child("snapshots")
        assert isinstance(snapshots, Directory)
        names = await snapshots.names()
        tracemalloc.start()
        try:
            # As long as a listing is known to the kernel, its nodes are held.
            nodes = [await snapshots.child(name) for name in names]
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(nodes) == 18000
        assert held < 1024 * len(nodes)
        last = nodes[-1]
        assert isinstance(last, Directory)
        assert await last.names() == ["info.json", "disk.raw", "files.tsv"]


async def find(root: Directory, path: str) -> Node:
    node: Node | None = root
    for name in path.split("/"):
        assert isinstance(node, Directory)
        node = await node.child(name)
    assert node is not None
    return node


async def open_file(root: Directory, path: str) -> None:
    node = await find(root, path)
    assert isinstance(node, File)
    await node.open()


@pytest.mark.parametrize("name", ["check/leaks", "check/refcounts", "tables/clusters.tsv"])
async def test_of_a_long_list_the_beginning_is_made_when_it_is_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def noted(column: U8) -> bytes:
        text = content(column)
        made.append(len(text))
        return text

    content = columns.content
    monkeypatch.setattr(columns, "content", noted)
    path = tmp_path / "image.qcow2"
    leaks_in_holes(b"\x55", 2).write(path)
    async with inspecting(Image.open(str(path))) as inspector:
        node = await find(build_tree(inspector), name)
        assert isinstance(node, File)
        handle = await node.open()
        assert handle.size() > 2 * SHARED_BYTES > sum(made)
        assert await handle.read(handle.size() - 1, 2) == b"\n"


@pytest.mark.parametrize(
    "name", ["explain/host/0", "explain/guest/0", "tables/l1.tsv", "tables/l2/0.tsv"]
)
async def test_who_looks_while_all_is_cancelled_is_let_go_at_once(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the disk may not have answered."""
    path = tmp_path / "image.qcow2"
    path.write_bytes(sample().build().data)
    started, gate = threading.Event(), threading.Event()
    read_into = FileSource.read_into

    def read(source: FileSource, offset: int, buffer: memoryview) -> None:
        started.set()
        gate.wait(2 * DEADLINE)
        read_into(source, offset, buffer)

    monkeypatch.setattr(FileSource, "read_into", read)
    async with inspecting(Image.open(str(path))) as inspector:
        root = build_tree(inspector)

        async def refused() -> None:
            with pytest.raises(ReadCancelled):
                await open_file(root, name)

        try:
            with trio.fail_after(DEADLINE):
                async with trio.open_nursery() as tasks:
                    tasks.start_soon(refused)
                    await trio.to_thread.run_sync(started.wait)
                    inspector.cancel()
        finally:
            gate.set()
        with trio.fail_after(DEADLINE):
            await open_file(root, name)
