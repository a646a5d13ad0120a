"""A tree without an image, whose files fail in every way: fake_tree.py DIR [fails-to-load]"""

import itertools
import os
import sys
from contextlib import nullcontext
from typing import NoReturn

from instarfs.daemon import process as daemon
from instarfs.daemon.background import nobody_waits
from instarfs.daemon.logs import log_to_stderr
from instarfs.errors import ImageReadFailed
from instarfs.inspect.shared_value import Edition
from instarfs.mount.nodes import ControlFile, FixedDirectory, GeneratedFile, LiveFile
from instarfs.mount.operations import Facts, Operations, Ownership


class Known:
    """A value that is always known."""

    def peek(self) -> Edition[str]:
        return Edition("content")

    async def get(self) -> Edition[str]:
        return self.peek()


def fail(*_: object) -> NoReturn:
    raise ZeroDivisionError("a bug")


def fail_as_expected(_: str) -> bytes:
    raise ImageReadFailed("image", 512, "Input/output error")


def take_too_much(_: str) -> NoReturn:
    raise MemoryError


def start_no_thread(_: str) -> NoReturn:
    raise RuntimeError("can't start new thread")


async def fail_to_act(_: bytes) -> None:
    fail()


class UnknownSize(LiveFile):
    """Fails already when its attributes are asked for."""

    def size(self) -> int:
        fail()


ROOT = FixedDirectory(
    {
        "good": GeneratedFile(Known(), str.encode),
        "bug": GeneratedFile(Known(), fail),
        "error": GeneratedFile(Known(), fail_as_expected),
        "huge": GeneratedFile(Known(), take_too_much),
        "threaded": GeneratedFile(Known(), start_no_thread),
        "text": GeneratedFile(Known(), str.upper),  # type: ignore[arg-type]
        "large": GeneratedFile(Known(), lambda _: bytes(range(256)) * 20_000),
        "endless": GeneratedFile(Known(), lambda _: itertools.repeat(b"and so on\n" * 1000)),
        "control": ControlFile(lambda: b"state\n", fail_to_act),
        "below": FixedDirectory({"unknown": UnknownSize(lambda: b"")}),
        "empty": FixedDirectory({}),
        "many": FixedDirectory({f"{n:0200}": LiveFile(str(n).encode) for n in range(2000)}),
    }
)

log_to_stderr()
operations = Operations(
    ROOT, lambda: Facts(size=0, mtime_ns=0), Ownership(os.getuid(), os.getgid())
)
load = fail if "fails-to-load" in sys.argv[2:] else lambda: None
service = daemon.Service(operations, cancel=lambda: None, load=load)
sys.exit(daemon.run(lambda: nullcontext(service), sys.argv[1], set(), ready=nobody_waits))
