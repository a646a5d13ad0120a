"""Who has a file open and does nothing with it: others are served, and unmounting says so."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from instarfs.mount.nodes import BEHIND_BYTES, SHARED_BYTES
from tests.mount.mounts import MakeMount, Mount, instarfs, leak, make_image

MIB = 1 << 20
STALLED = 40
STREAMED = "tables/l2/0.tsv"


@pytest.fixture
def leaky(tmp_path: Path, mount: MakeMount) -> Mount:
    """A disk of 256 GiB, all of it mapped by one table, and three leaked clusters."""
    options = ("-o", "cluster_size=2M,preallocation=metadata")
    image = make_image(tmp_path / "image.qcow2", "256G", *options)
    leak(image, 3, 2 * MIB)
    return mount(image)


def verdict(mount: Mount) -> object:
    return json.loads(mount.read("check/result.json"))["verdict"]


def repair_and_undo(mount: Mount) -> None:
    """Both must work, by handles of their own."""
    assert verdict(mount) == "leaks"
    (mount / "repair/tier").write_text("leaks")
    assert verdict(mount) == "clean"
    (mount / "repair/undo").write_text("undo")
    assert verdict(mount) == "leaks"


def memory(mount: Mount) -> int:
    """Bytes of the daemon that are in memory."""
    pages = Path(f"/proc/{mount.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def assert_busy(mount: Mount) -> None:
    done = instarfs("umount", mount.path)
    assert (done.returncode, mount.is_mounted()) == (1, True)
    assert done.stderr == (
        f"instarfs: {mount.path}: in use; leave the directory and close its files"
        f" (fuser -vm {mount.path}), then unmount again\n"
    )


def test_readers_that_stop_reading_hold_nobody_up(leaky: Mount) -> None:
    whole = (leaky / STREAMED).read_bytes()
    first, rest = SHARED_BYTES + MIB, SHARED_BYTES + 2 * MIB
    assert len(whole) > rest + 2 * MIB

    def go_on() -> int:
        repair_and_undo(leaky)
        assert (leaky / STREAMED).read_bytes() == whole
        return memory(leaky)

    alone = go_on()
    with ExitStack() as stack:
        files = [
            stack.enter_context((leaky / STREAMED).open("rb", buffering=0)) for _ in range(STALLED)
        ]
        for file in files:
            assert os.pread(file.fileno(), 4096, first) == whole[first : first + 4096]
        beside = go_on()
        assert beside - alone < STALLED * 2 * BEHIND_BYTES + 128 * MIB
        assert max(go_on() for _ in range(3)) - beside < 48 * MIB
        for file in files:
            assert os.pread(file.fileno(), 4096, rest) == whole[rest : rest + 4096]
        assert_busy(leaky)
    assert instarfs("umount", leaky.path).returncode == 0
    assert leaky.wait_for_end() == 0


def test_writers_that_never_write_are_in_nobodys_way(leaky: Mount) -> None:
    with ExitStack() as stack:
        silent = {
            name: stack.enter_context((leaky / f"repair/{name}").open("wb", buffering=0))
            for name in ("tier", "undo", "trim")
        }
        repair_and_undo(leaky)
        assert_busy(leaky)
        silent["tier"].write(b"leaks")
        assert verdict(leaky) == "clean"
        silent["undo"].write(b"undo")
        assert verdict(leaky) == "leaks"
    assert instarfs("umount", leaky.path).returncode == 0
    assert leaky.wait_for_end() == 0
