"""`mount.fuse.instarfs`: what mount(8) runs for the type ``fuse.instarfs``, from fstab too.

Its grammar is fixed, see mount(8), "EXTERNAL HELPERS":
``mount.TYPE SPEC DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE.SUBTYPE]``.
Importing this loads no more than the command does.
"""

from __future__ import annotations

import getopt
import sys

from instarfs.cli.room import end
from instarfs.cli.start import main as run
from instarfs.text import printable

_USAGE = "mount.fuse.instarfs IMAGE DIR [-sfnv] [-o OPTIONS]"


def main() -> None:
    """Mount as mount(8) says. Never returns."""
    try:
        switches, operands = getopt.gnu_getopt(sys.argv[1:], "sfnvN:o:t:")
    except getopt.GetoptError as error:
        end(f"{printable(str(error))} (usage: {_USAGE})")
    if len(operands) != 2:
        end(f"an image and a directory are needed (usage: {_USAGE})")
    if any(name == "-f" for name, _ in switches):
        sys.exit(0)
    words = [word for name, value in switches if name == "-o" for word in ("-o", value)]
    # "--": a name may begin with a dash.
    sys.argv[1:] = ["mount", *words, "--", *operands]
    run()
