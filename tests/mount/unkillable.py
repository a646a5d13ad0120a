"""A mount as of a daemon that was taken over and will not be killed: unkillable.py IMAGE DIR

Who looks up the name "slow" is never answered. Meanwhile it tells the kernel to forget a name of
the same directory, for which that waits until the look-up has ended, and lets no signal end this.
"""

import os
import struct
import sys
import threading

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileNameT, InodeT, RequestContext

from instarfs.daemon import broker
from instarfs.daemon import serve as session
from instarfs.daemon.background import nobody_waits
from instarfs.daemon.logs import log_to_stderr
from instarfs.image.file import Image
from instarfs.mount import operations
from instarfs.mount.options import MountOptions
from tests.mount.own_descriptors import a_descriptor_of

IMAGE, DIRECTORY = sys.argv[1:]

FUSE_NOTIFY_INVAL_ENTRY = 3


def forget_a_name() -> None:
    # Not by pyfuse3, which may have a thread of its own for it.
    device = a_descriptor_of("/dev/fuse")
    told = struct.pack("=QII", pyfuse3.ROOT_INODE, 1, 0) + b"x\0"
    os.write(device, struct.pack("=IiQ", 16 + len(told), FUSE_NOTIFY_INVAL_ENTRY, 0) + told)


class Operations(operations.Operations):
    """The handlers, and one name that is not answered."""

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        if name == b"slow":
            threading.Thread(target=forget_a_name, daemon=True).start()
            await trio.sleep_forever()
        return await super().lookup(parent_inode, name, ctx)


vars(session)["Operations"] = Operations
log_to_stderr()
image = Image.open(IMAGE)
with broker.separated(image):
    code = session.serve(image, DIRECTORY, MountOptions(), nobody_waits)
sys.exit(code)
