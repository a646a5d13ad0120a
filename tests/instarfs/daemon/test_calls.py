"""instarfs.daemon.calls from inside: what a process of a mount tries, once it is confined.

Each is a process of its own, since nothing that is given up comes back. Where Landlock has a say
too it is switched off here, so that the filter is what refuses; with it is in test_confinement.py.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from instarfs.daemon.seccomp import MACHINES
from tests.mount.mounts import environment

PROGRAM = Path(__file__).with_name("trying.py")

known = pytest.mark.skipif(os.uname().machine not in MACHINES, reason="its calls are not known")
pytestmark = known

OF_DAEMON = {
    "read", "write-at", "flush", "flush-data", "cut-image", "punch", "lock", "limit-itself",
    "leave-session", "may-it-write", "what-file-system", "look-at-image",
}  # fmt: skip
FOR_SOME = {
    "daemon": OF_DAEMON,
    "broker": {"open-to-write", "make-undo", "remove-undo", "flush", "send-descriptor"},
    "reading broker": {"send-descriptor"},
}
"""What one process needs and another has no use for."""

FOR_ALL = {
    "open-to-read", "stat", "thread", "memory", "close", "wait-a-moment", "own-signal", "receive",
    "where-a-link-leads", "change-its-name", "is-it-mounted",
}  # fmt: skip


@functools.cache
def tried(who: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, PROGRAM, who],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    outcomes: dict[str, str] = json.loads(done.stdout)
    return outcomes


@pytest.mark.parametrize("who", FOR_SOME)
def test_what_is_needed_works_and_all_else_is_refused(who: str) -> None:
    outcomes = tried(who)
    done = {name for name, outcome in outcomes.items() if outcome == "done"}
    assert done == FOR_ALL | FOR_SOME[who]
    refused = {name: it for name, it in outcomes.items() if name not in done}
    assert len(refused) > 2000
    # glibc goes on with clone(2) where there is no clone3(2).
    assert refused.pop("clone3") == "ENOSYS"
    assert set(refused.values()) == {"EPERM"}, refused


AS_32_BITS = """
import ctypes, mmap, sys
from instarfs.image.file import Image
from instarfs.daemon import confinement

page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000 cd80 c3"))  # mov eax, getpid of i386; int 0x80; ret
ask = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
ask()
print("asked", flush=True)
confinement.Confinement.of_daemon(Image.open(sys.argv[1])).enforce()
ask()
print("asked again", flush=True)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has calls of 32 bits besides")
def test_a_call_of_32_bits_ends_the_process(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    done = subprocess.run(
        [sys.executable, "-c", AS_32_BITS, image],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
    )
    if not done.stdout:
        pytest.skip("this kernel has no calls of 32 bits")
    assert (done.stdout, done.returncode) == ("asked\n", -signal.SIGSYS)
