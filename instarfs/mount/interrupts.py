"""Whether a process that waits for us has been told to end.

Read from /proc, for pyfuse3 keeps the kernel's own notice (FUSE_INTERRUPT) to itself.
"""

from __future__ import annotations

import signal
from pathlib import Path

# Not the job-control signals: who is stopped in the middle of a read goes on with it later.
_ENDING = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGKILL,
    signal.SIGALRM,
    signal.SIGTERM,
)
_ENDING_MASK = sum(1 << (number - 1) for number in _ENDING)


def is_interrupted(pid: int) -> bool:
    """Whether a signal that ends a program is pending, unblocked, for process or thread *pid*.

    False where that cannot be known: the process is gone, hidden, or in another PID namespace (0).
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    masks = {
        name: int(value, 16)
        for name, _, value in (line.partition(":") for line in status.split("\n"))
        if name in ("SigPnd", "ShdPnd", "SigBlk")
    }
    pending = masks.get("SigPnd", 0) | masks.get("ShdPnd", 0)
    return bool(pending & ~masks.get("SigBlk", 0) & _ENDING_MASK)
