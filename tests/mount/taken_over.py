"""A mount as of a daemon that was taken over: taken_over.py IMAGE DIR TARGET

It shows what is not there: every control file is a link to TARGET, every other file a set-user-ID
program.
"""

import stat
import sys

import pyfuse3
from pyfuse3 import InodeT, RequestContext

from instarfs.daemon import broker
from instarfs.daemon import serve as session
from instarfs.daemon.background import nobody_waits
from instarfs.daemon.logs import log_to_stderr
from instarfs.image.file import Image
from instarfs.mount import operations
from instarfs.mount.nodes import ControlFile, Directory, Node
from instarfs.mount.options import MountOptions

IMAGE, DIRECTORY, TARGET = sys.argv[1:]


class Ownership(operations.Ownership):
    """Whose everything is; what it is has been made up."""

    def mode(self, node: Node) -> int:
        if isinstance(node, Directory):
            return super().mode(node)
        return stat.S_IFLNK | 0o777 if isinstance(node, ControlFile) else stat.S_IFREG | 0o4755


class Operations(operations.Operations):
    """The handlers, with what answers where links lead."""

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.FileNameT:
        return pyfuse3.FileNameT(TARGET.encode())


vars(session)["Ownership"] = Ownership
vars(session)["Operations"] = Operations
log_to_stderr()
image = Image.open(IMAGE)
with broker.separated(image):
    code = session.serve(image, DIRECTORY, MountOptions(), nobody_waits)
sys.exit(code)
