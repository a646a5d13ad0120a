"""The tree without a mount: what it costs to list what there may be very many of."""

import tracemalloc
from pathlib import Path

from instarfs.image.file import Image
from instarfs.inspect.inspector import Inspector
from instarfs.mount.nodes import Directory
from instarfs.mount.tree import build_tree
from tests.images.bombs import BOMBS


async def test_a_listed_snapshot_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(BOMBS["snapshots-of-nothing"]().data)
    with Image.open(str(path)) as image:
        snapshots = await build_tree(Inspector(image)).child("snapshots")
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
        assert await last.names() == ["info.json", "disk.raw"]
