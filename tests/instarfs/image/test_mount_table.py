"""instarfs.image.mount_table: the kernel's own lines, and what it leaves unescaped in them."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from instarfs.image.mount_table import MOUNT_TABLE, mounts_in


def as_the_kernel_writes(name: bytes) -> bytes:
    """As mangle() of Linux does."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in name)


@given(st.lists(st.binary(min_size=1).filter(lambda name: b"\0" not in name), min_size=1))
def test_any_name_is_read_back(names: list[bytes]) -> None:
    table = b"".join(
        b"%d 1 0:%d / %s rw,nosuid shared:5 master:3 - fuse.instarfs %s rw,user_id=7\n"
        % (number, number, as_the_kernel_writes(name), as_the_kernel_writes(name))
        for number, name in enumerate(names)
    )
    found = list(mounts_in(table))
    assert [mount.point for mount in found] == names
    assert [mount.number for mount in found] == list(range(len(names)))
    assert {mount.filesystem for mount in found} == {"fuse.instarfs"}


def test_the_table_of_this_machine() -> None:
    device = os.stat("/proc").st_dev  # noqa: PTH116 - of a path that is no file
    number = f"{os.major(device)}:{os.minor(device)}"
    found = [mount for mount in mounts_in(MOUNT_TABLE.read_bytes()) if mount.point == b"/proc"]
    assert [(mount.filesystem, mount.device) for mount in found][-1:] == [("proc", number)]
