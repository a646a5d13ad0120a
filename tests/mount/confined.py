"""A mount whose check first tries what a daemon can do, and must not: confined.py IMAGE DIR UID

Each attempt and what came of it is a line in the log. Serves as the user UID, 0 or another. Beside
IMAGE are its neighbour, a directory that is followed, and a socket where somebody listens.
"""

import codecs
import ctypes
import errno
import fcntl
import importlib
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from instarfs.daemon import broker, process
from instarfs.daemon import serve as session
from instarfs.daemon.background import nobody_waits
from instarfs.daemon.logs import log_to_stderr
from instarfs.guest.follow import Follow
from instarfs.image.directory import Opening
from instarfs.image.file import Image
from instarfs.image.linux import is_mounted, openat2
from instarfs.mount import mountpoint
from instarfs.mount.options import MountOptions
from instarfs.repair.undo_place import UndoPlace
from planner.check.check import check_image
from planner.check.report import Report
from planner.progress import Progress
from planner.source import Source
from tests.mount.own_descriptors import a_descriptor_of

IMAGE, DIRECTORY, UID = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
NEIGHBOUR = IMAGE.with_name("neighbour.qcow2")
FOLLOWED = IMAGE.with_name("followed") / "base"
LISTENER = str(IMAGE.with_name("listener"))
UNDO = IMAGE.with_name(f"{IMAGE.name}.instarfs-undo")

PROC_KCORE = "/proc/kcore"
NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
DATAGRAMS = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # as the log has one
PR_SET_NAME = 15


def open_socket(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


def unmount_root() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.umount2(b"/proc", 2):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def open_and_close(path: Path | str, flags: int, *, directory: int | None = None) -> None:
    os.close(os.open(path, flags, dir_fd=directory))


image: Image  # opened below, before any of these is called


def have_the_image_opened_for_writing() -> int:
    """While no repair is under way: nobody but the daemon knows when one is."""
    return image.hands.open(Opening.IMAGE_TO_WRITE, image.directory, image.name)


def write_the_image() -> None:
    """Nothing, or what is checked afterwards would have changed."""
    fd = have_the_image_opened_for_writing()
    os.pwrite(fd, b"", 0)
    os.close(fd)


def lock(fd: int) -> None:
    """As QEMU does who uses an image, or lets nobody else write to it: for reading is enough."""
    taken = struct.pack("hhqqixxxx", fcntl.F_RDLCK, os.SEEK_SET, 100, 200, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, taken)
    os.close(fd)


def limit(what: int, *, to: int) -> None:
    """And back."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (to, hard))
    resource.setrlimit(what, (soft, hard))


def lift_the_limit_on_memory() -> None:
    """As far as the hard one, and that as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (soft + 4096, max(hard, soft + 4096)))
    except ValueError as error:  # Python's word for it
        raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from error


def call_itself(name: bytes) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)
    if Path("/proc/thread-self/comm").read_bytes() != name + b"\n":
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def have_a_stack_of_3_gibibytes() -> None:
    """A page of its own, moved to where there is room: what is a stack counts to no limit here."""
    (line,) = (it for it in Path("/proc/self/maps").read_text().splitlines() if "[stack]" in it)
    lowest = int(line.partition("-")[0], 16)
    library = ctypes.CDLL(None, use_errno=True)
    library.mremap.restype = ctypes.c_void_p
    library.mremap.argtypes = (ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int)
    where = library.mremap(lowest, mmap.PAGESIZE, 3 << 30, 1)
    if where == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    library.munmap(ctypes.c_void_p(where), ctypes.c_size_t(3 << 30))


def fill_a_file_in_memory() -> None:
    """That which is there for what libfuse says; and empty it again."""
    fd = a_descriptor_of("/memfd:stderr")
    size = os.fstat(fd).st_size
    os.pwrite(fd, b"?", 3 << 30)
    os.ftruncate(fd, size)


def read_a_pipe_that_it_writes_to() -> None:
    """As stderr may be one."""
    fd = a_descriptor_of("pipe:")
    open_and_close(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK)


def find_out_how_full_a_disk_is() -> None:
    fd = os.open("/usr", os.O_PATH)
    assert os.statvfs(fd).f_bfree >= 0
    os.close(fd)


def have_followed_flushed() -> None:
    """Which it may only read."""
    fd = os.open(FOLLOWED, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def have_an_undo_file_made() -> None:
    with UndoPlace.beside(image) as place:
        fd = place.make()
        os.write(fd, b"undo")
        os.ftruncate(fd, 1 << 40)
        os.ftruncate(fd, 0)
        os.close(fd)
        place.sync()
        place.remove()


def fill_the_disk_with_an_undo_file() -> None:
    with UndoPlace.beside(image) as place:
        fd = place.make()
        try:
            fill_the_disk_with(fd)
        finally:
            os.close(fd)
            place.remove()


def fill_the_disk_with_what_has_no_name() -> None:
    """An undo file that was removed, and that it has open."""
    with UndoPlace.beside(image) as place:
        fd = place.make()
        place.remove()
    assert os.fstat(fd).st_nlink == 0
    fill_the_disk_with(fd)
    os.close(fd)


def fill_the_disk_with_the_image() -> None:
    """And cut it again."""
    fd = have_the_image_opened_for_writing()
    fill_the_disk_with(fd)
    os.close(fd)


def fill_the_disk_with(fd: int) -> None:
    """A little: nobody asks how much. *fd* is as long as it was afterwards."""
    before, more = os.fstat(fd), 4 << 20
    os.pwrite(fd, b"?" * more, before.st_size)
    os.fsync(fd)
    taken = os.fstat(fd).st_blocks - before.st_blocks
    os.ftruncate(fd, before.st_size)
    assert taken * 512 >= more


class ReadAhead(mountpoint.ReadAhead):
    """What chooses how far the kernel reads ahead of the mount, and is held until it answers."""

    chosen = Path("/sys/class/bdi/0:0/read_ahead_kb")

    def widen(self) -> None:
        """After all attempts of a daemon that has answered nobody yet."""
        type(self).chosen = Path(f"/proc/self/fd/{self._fd}").readlink()
        try_all({**EARLY, "choose-how-far-is-read-ahead-early": self._choose})
        super().widen()

    def _choose(self) -> None:
        if self._fd < 0:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        os.pwrite(self._fd, b"8\n", 0)


def children() -> Iterator[int]:
    pid = os.getpid()
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def read_memory_of_children() -> None:
    """Which reach further than this process."""
    refused = 0
    for child in children():
        try:
            open_and_close(f"/proc/{child}/mem", os.O_RDWR)
        except PermissionError:
            refused += 1
    if refused == 2:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


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
    "local-stream-socket": lambda: open_socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "local-datagram-socket": lambda: open_socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    "pair-of-sockets": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
    "unmount": unmount_root,
    "change-root": lambda: os.chroot("/"),
    "have-3-gibibytes": lambda: bytearray(3 << 30),
    "signal-its-parent": lambda: os.kill(os.getppid(), 0),
    "lift-its-limit-on-memory": lift_the_limit_on_memory,
    "limit-its-parent": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, NO_LIMIT),
    "make-a-program-set-user-id": lambda: Path(sys.executable).chmod(0o4755),
    "run-from-memory": lambda: os.close(os.memfd_create("program")),
    "read-memory-of-children": read_memory_of_children,
    "open-image": lambda: open_and_close(IMAGE, os.O_RDONLY),
    "open-image-again-to-write": lambda: open_and_close(
        f"/proc/self/fd/{image.fileno()}", os.O_RDWR
    ),
    "list-directory": lambda: list(IMAGE.parent.iterdir()),
    "read-neighbour": NEIGHBOUR.read_bytes,
    "read-neighbour-by-descriptor": lambda: open_and_close(
        NEIGHBOUR.name, os.O_RDONLY, directory=image.directory
    ),
    "write-neighbour": lambda: open_and_close(NEIGHBOUR, os.O_WRONLY),
    "open-neighbour-for-neither": lambda: open_and_close(NEIGHBOUR, os.O_ACCMODE),
    "open-a-device-for-neither": lambda: open_and_close("/dev/full", os.O_ACCMODE),
    "open-by-openat2": lambda: os.close(openat2(image.directory, ".", os.O_PATH, 0)),
    "write-neighbour-by-descriptor": lambda: open_and_close(
        NEIGHBOUR.name, os.O_RDWR, directory=image.directory
    ),
    "make-neighbour-by-descriptor": lambda: open_and_close(
        "new.qcow2", os.O_RDWR | os.O_CREAT, directory=image.directory
    ),
    "cut-neighbour": lambda: os.truncate(NEIGHBOUR, 0),
    "open-neighbour-to-all": lambda: NEIGHBOUR.chmod(0o666),
    "give-neighbour-away": lambda: os.chown(NEIGHBOUR, -1, os.getgid()),
    "label-neighbour": lambda: os.setxattr(NEIGHBOUR, "user.instarfs", b"was here"),
    "change-times-of-neighbour": lambda: os.utime(NEIGHBOUR, (1, 1)),
    "rename-neighbour": lambda: NEIGHBOUR.rename(NEIGHBOUR.with_suffix(".old")),
    "remove-neighbour": NEIGHBOUR.unlink,
    "replace-neighbour": lambda: IMAGE.rename(NEIGHBOUR),
    "make-neighbour": lambda: NEIGHBOUR.with_suffix(".new").touch(),
    "take-neighbour-for-undo-file": lambda: UNDO.hardlink_to(NEIGHBOUR),
    "link-neighbour-for-undo-file": lambda: UNDO.symlink_to(NEIGHBOUR),
    "list-followed": lambda: list(FOLLOWED.parent.iterdir()),
    "write-its-own-memory": lambda: open_and_close("/proc/self/mem", os.O_RDWR),
    "read-environment-of-its-parent": Path(f"/proc/{os.getppid()}/environ").read_bytes,
    "open-what-its-parent-has-open": lambda: open_and_close(
        Path(f"/proc/{os.getppid()}/fd/0"), os.O_RDONLY
    ),
    "enter-root-of-its-parent": lambda: list(Path(f"/proc/{os.getppid()}/root").iterdir()),
    "write-followed": lambda: open_and_close(FOLLOWED, os.O_RDWR),
    "empty-followed": lambda: open_and_close(FOLLOWED, os.O_TRUNC),
    "connect-to-a-listener": lambda: DATAGRAMS.connect(LISTENER),
    "send-a-descriptor": lambda: socket.send_fds(
        DATAGRAMS, [b"?"], [image.fileno()], address=LISTENER
    ),
    "have-core-dumps-collected": lambda: limit(resource.RLIMIT_CORE, to=0),
    "have-more-descriptors": lambda: limit(resource.RLIMIT_NOFILE, to=4096),
    "read-followed": FOLLOWED.read_bytes,
    "read-modules": Path(os.__file__).read_bytes,
    "read-what-its-parent-was-started-with": Path(f"/proc/{os.getppid()}/cmdline").read_bytes,
    "read-what-is-mounted-for-its-parent": Path(f"/proc/{os.getppid()}/mountinfo").read_bytes,
    "read-connections-of-its-parent": Path(f"/proc/{os.getppid()}/net/tcp").read_bytes,
    "read-its-own-environment": Path("/proc/self/environ").read_bytes,
    "what-is-said-of-any-file": lambda: is_mounted(os.open("/etc/passwd", os.O_PATH)),
    "read-a-pipe-that-it-writes-to": read_a_pipe_that_it_writes_to,
    "look-at-any-file": lambda: Path("/etc/passwd").stat(),
    "may-it-write-any-file": lambda: os.access("/etc/passwd", os.W_OK),
    "where-any-link-leads": lambda: Path("/proc/self").readlink(),
    "how-full-any-disk-is": find_out_how_full_a_disk_is,
    "lock-followed": lambda: lock(os.open(FOLLOWED, os.O_RDONLY)),
    "lock-image": lambda: lock(image.hands.open(Opening.IMAGE, image.directory, image.name)),
    "lock-a-module": lambda: lock(os.open(os.__file__, os.O_RDONLY)),
    "write-image": write_the_image,
    "have-memory-that-could-be-shared": lambda: mmap.mmap(-1, 4096).close(),
    "have-a-stack-of-3-gibibytes": have_a_stack_of_3_gibibytes,
    "fill-a-file-in-memory": fill_a_file_in_memory,
    "have-a-pipe": os.pipe,
    "cut-what-is-its-stderr": lambda: os.ftruncate(2, os.fstat(2).st_size),
    "start-a-thread": lambda: threading.Thread(target=os.getpid).start(),
    "send-a-datagram": lambda: DATAGRAMS.sendto(b"from inside", LISTENER),
    "have-another-name": lambda: call_itself(b"another"),
    "signal-itself": lambda: signal.raise_signal(signal.SIGURG),
    "have-image-opened": lambda: image.reopen().close(),
    "have-image-opened-to-write": lambda: os.close(have_the_image_opened_for_writing()),
    "have-undo-file-made": have_an_undo_file_made,
    "fill-the-disk-with-an-undo-file": fill_the_disk_with_an_undo_file,
    "fill-the-disk-with-what-has-no-name": fill_the_disk_with_what_has_no_name,
    "have-followed-flushed": have_followed_flushed,
    "choose-how-far-is-read-ahead": lambda: open_and_close(ReadAhead.chosen, os.O_WRONLY),
}


EARLY: dict[str, Callable[[], object]] = {
    "fill-the-disk-with-the-image": fill_the_disk_with_the_image,
}
"""What is tried before it answers: what comes after would find that the image was written to."""


def check(source: Source, *, progress: Progress) -> Report:
    """`check_image`, after all attempts."""
    try_all(ATTEMPTS)
    return check_image(source, progress=progress)


def try_all(attempts: dict[str, Callable[[], object]]) -> None:
    for name, attempt in attempts.items():
        try:
            attempt()
            outcome = "done"
        except OSError as failed:
            outcome = errno.errorcode[failed.errno or 0]
        except MemoryError:
            outcome = "ENOMEM"
        session.log.info("%s %s", name, outcome)


vars(process)["ReadAhead"] = ReadAhead
log_to_stderr()
image = Image.open(str(IMAGE))
if UID:
    # Which the user may not be able to read afterwards.
    codecs.lookup("ascii")
    importlib.import_module("planner.guestfs.search")
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
follow = Follow([str(FOLLOWED.parent)], serving=True)
with broker.separated(image):
    code = session.serve(image, DIRECTORY, MountOptions(), nobody_waits, follow=follow, check=check)
sys.exit(code)
