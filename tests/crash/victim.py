"""A process that repairs an image and is killed on the way: ``python -m tests.crash.victim``.

Reads orders from stdin, one a line: JSON with ``path``, ``work`` (``repair`` or ``undo``),
``tier``, ``quote``, and ``calls``: after so many calls that change a file it kills itself with
SIGKILL, in the middle of the next one where that is a write. Each order is carried out in a child
of its own, so that a kill costs no start of Python. Answers with the number of calls, or
``killed``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable

from instarfs.image.file import Image
from instarfs.repair.run import Repairer
from planner.repair.plan import RepairTier

CHANGING = ("pwrite", "fsync", "fdatasync", "ftruncate", "rename", "unlink")


class Countdown:
    """Wraps the calls that change files, and kills the process at one of them."""

    def __init__(self, calls: int) -> None:
        self._left = calls
        self.seen = 0
        for name in CHANGING:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.seen += 1
            if self._left == 0:
                if name == "pwrite":
                    fd, data, offset = args
                    function(fd, memoryview(data)[: len(data) // 1024 * 512], offset)  # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1
            return function(*args, **kwargs)

        return call


def carry_out(order: dict[str, str | int]) -> int:
    countdown = Countdown(int(order["calls"]))
    with Image.open(str(order["path"])) as image:
        repairer = Repairer(image)
        if order["work"] == "undo":
            repairer.undo()
        else:
            repairer.repair(RepairTier(str(order["tier"])), str(order["quote"]))
    return countdown.seen


def main() -> None:
    for line in sys.stdin:
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            os.write(send, str(carry_out(json.loads(line))).encode())
            os._exit(0)
        os.close(send)
        _, status = os.waitpid(child, 0)
        answer = os.read(receive, 100).decode()
        os.close(receive)
        print("killed" if os.WIFSIGNALED(status) else answer or "failed", flush=True)


if __name__ == "__main__":
    main()
