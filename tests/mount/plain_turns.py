"""A mount whose pyfuse3 is one that is not known: plain_turns.py IMAGE DIR"""

import sys

import pyfuse3

from instarfs.daemon import broker
from instarfs.daemon import serve as session
from instarfs.daemon.background import nobody_waits
from instarfs.daemon.logs import log_to_stderr
from instarfs.image.file import Image
from instarfs.mount.options import MountOptions

IMAGE, DIRECTORY = sys.argv[1:]

vars(pyfuse3)["__version__"] = "99.0"
log_to_stderr()
image = Image.open(IMAGE)
with broker.separated(image):
    code = session.serve(image, DIRECTORY, MountOptions(), nobody_waits)
sys.exit(code)
