"""A mount whose check first tries what a daemon must not be able to do: confined.py IMAGE DIR UID

Each attempt and what came of it is a line in the log. Serves as the user UID, 0 or another.
"""

import codecs
import ctypes
import errno
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from instarfs.image import FileSource, Image
from instarfs.mount import daemon, session
from instarfs.mount.options import MountOptions
from planner.check import check_image
from planner.report import Report

IMAGE, DIRECTORY, UID = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

PROC_KCORE = "/proc/kcore"


def open_socket(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


def unmount_root() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.umount2(b"/proc", 2):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def make_undo_file() -> None:
    path = IMAGE.with_name(f"{IMAGE.name}.instarfs-undo.new")
    path.write_bytes(b"undo")
    path.rename(path.with_suffix(""))
    path.with_suffix("").unlink()


ATTEMPTS: dict[str, Callable[[], object]] = {
    "read-passwd": lambda: Path("/etc/passwd").read_bytes(),
    "list-root": lambda: list(Path("/").iterdir()),
    "write-elsewhere": lambda: os.close(os.open("/dev/full", os.O_WRONLY)),
    "make-elsewhere": lambda: Path("/var/lib/instarfs-was-here").touch(),
    "read-kernel-memory": lambda: os.close(os.open(PROC_KCORE, os.O_RDONLY)),
    "run-a-program": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
    "tcp-socket": lambda: open_socket(socket.AF_INET, socket.SOCK_STREAM),
    "tcp6-socket": lambda: open_socket(socket.AF_INET6, socket.SOCK_STREAM),
    "udp-socket": lambda: open_socket(socket.AF_INET, socket.SOCK_DGRAM),
    "packet-socket": lambda: open_socket(socket.AF_PACKET, socket.SOCK_RAW),
    "unmount": unmount_root,
    "change-root": lambda: os.chroot("/"),
    "have-3-gibibytes": lambda: bytearray(3 << 30),
    "signal-its-parent": lambda: os.kill(os.getppid(), 0),
    "read-image": IMAGE.read_bytes,
    "write-image": lambda: os.close(os.open(IMAGE, os.O_RDWR)),
    "make-undo-file": make_undo_file,
    "local-socket": lambda: open_socket(socket.AF_UNIX, socket.SOCK_DGRAM),
}


def check(
    source: FileSource,
    *,
    progress: Callable[[str, int, int], None],
    cancelled: Callable[[], bool],
) -> Report:
    """`check_image`, after all attempts."""
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            outcome = "done"
        except OSError as failed:
            outcome = errno.errorcode[failed.errno or 0]
        except MemoryError:
            outcome = "ENOMEM"
        session.log.info("%s %s", name, outcome)
    return check_image(source, progress=progress, cancelled=cancelled)


daemon.log_to_stderr()
image = Image.open(str(IMAGE))
if UID:
    codecs.lookup("ascii")  # which the user may not be able to read afterwards
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
sys.exit(session.serve(image, DIRECTORY, MountOptions(), daemon.nobody_waits, check=check))
