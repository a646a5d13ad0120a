"""A process that confines itself as one of a mount does, and then tries: trying.py WHO

WHO is a key of `CONFINED`. What came of each attempt is printed as JSON: "done" or the errno. What
would do harm, should it not be refused, is asked for in a way that does none: it changes nothing,
or is asked of nobody, and then succeeds or fails with another errno than EPERM.
"""

import ctypes
import errno
import fcntl
import json
import logging
import mmap
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from instarfs.daemon import calls, confinement
from instarfs.daemon.confinement import Confinement
from instarfs.image.file import Image
from instarfs.image.linux import is_mounted

WHO = sys.argv[1]
MACHINE = os.uname().machine

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

# Everything that the attempts are made with is made before.
folder = Path(tempfile.mkdtemp())
target, undo = folder / "image", folder / "undo"
target.write_bytes(b"image" * 1000)
folder_fd = os.open(folder, os.O_PATH)
image = Image.open(str(target))
writable = os.open(target, os.O_RDWR)
ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
reader, writer = os.pipe()
page = mmap.mmap(-1, mmap.PAGESIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
NOTHING = ctypes.create_string_buffer(4096)
name, there = os.fsencode(target), os.fsencode(folder / "there")

# A process of others: nothing is done to it, since what is asked for is no change.
stranger = os.fork()
if not stranger:
    os.close(writer)
    os.read(reader, 1)
    os._exit(0)

SIGNALLED = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: SIGNALLED.set())
AT_FDCWD = -100


def number_of(x86_64: int, aarch64: int) -> int:
    return {"x86_64": x86_64, "aarch64": aarch64}[MACHINE]


def call(x86_64: int, aarch64: int, *arguments: object) -> Callable[[], object]:
    """A system call by its number; integers are as long as the kernel takes them."""
    return lambda: raw(number_of(x86_64, aarch64), *arguments)


def raw(number: int, *arguments: object) -> int:
    longs = [ctypes.c_long(it) if isinstance(it, int) else it for it in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *longs)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def openat(flags: int, mode: int = 0, path: bytes = name) -> Callable[[], object]:
    return lambda: os.close(raw(number_of(257, 56), AT_FDCWD, path, flags, mode))


def in_a_thread() -> None:
    thread = threading.Thread(target=SIGNALLED.is_set)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EPERM, str(error)) from error
    thread.join()


def get_memory() -> None:
    bytearray(8 << 20)


def limit_itself() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, resource.getrlimit(resource.RLIMIT_DATA))


def own_signal() -> None:
    signal.raise_signal(signal.SIGUSR1)
    assert SIGNALLED.wait(5)


def lock() -> None:
    taken = struct.pack("hhqqixxxx", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
    fcntl.fcntl(image.fileno(), fcntl.F_OFD_SETLK, taken)


def fork() -> None:
    if not os.fork():
        os._exit(0)


def set_capabilities() -> None:
    raw(number_of(126, 91), struct.pack("=Ii", 0x20080522, 0), bytes(24))


HOW_TO_READ = struct.pack("=QQQ", os.O_RDONLY, 0, 0)
PUNCH, RENAME_EXCHANGE = 3, 2
THREAD, NEW_USER, NEW_PID, NEW_NET = 0x3D0F00, 0x10000000, 0x20000000, 0x40000000
X32 = 0x40000000

WORKS: dict[str, Callable[[], object]] = {
    "open-to-read": openat(os.O_RDONLY),
    "stat": target.stat,
    "where-a-link-leads": Path("/proc/self/exe").readlink,
    "thread": in_a_thread,
    "memory": get_memory,
    "close": lambda: os.close(os.dup(image.fileno())),
    "wait-a-moment": lambda: time.sleep(0.001),
    "own-signal": own_signal,
    "read": lambda: os.pread(image.fileno(), 5, 0),
    "write-at": lambda: os.pwrite(writable, b"image", 0),
    "flush": lambda: os.fsync(writable),
    "flush-data": lambda: os.fdatasync(writable),
    "receive": lambda: its.recv(1),
    "cut-image": lambda: os.ftruncate(writable, 4096),
    "punch": call(285, 47, writable, PUNCH, 0, 4096),
    "lock": lock,
    "limit-itself": limit_itself,
    "leave-session": os.setsid,
    "may-it-write": call(439, 439, folder_fd, b"image", os.W_OK, 0),
    "what-file-system": lambda: os.statvfs(folder_fd),
    "change-its-name": call(157, 167, 15, b"another"),
    "open-to-write": openat(os.O_RDWR),
    "is-it-mounted": lambda: is_mounted(folder_fd),
    "look-at-image": call(332, 291, folder_fd, b"image", 0x4900, 0x7FF, NOTHING),
    "make-undo": openat(os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, os.fsencode(undo)),
    "remove-undo": lambda: os.unlink("undo", dir_fd=folder_fd),
    "send-descriptor": lambda: socket.send_fds(its, [b"?"], [image.fileno()]),
}
"""What one of them, or all, must be able to do."""

NEVER: dict[str, Callable[[], object]] = {
    # files of others
    "chmod": lambda: target.chmod(0o600),
    "fchmod": lambda: os.fchmod(writable, 0o600),
    "fchmodat2": call(452, 452, AT_FDCWD, name, 0o600, 0),
    "chown": lambda: os.chown(target, -1, -1),
    "fchown": lambda: os.fchown(writable, -1, -1),
    "lchown": lambda: os.lchown(target, -1, -1),
    "set-xattr": lambda: os.setxattr(target, "user.x", b""),
    "set-xattr-of-descriptor": lambda: os.setxattr(writable, "user.x", b""),
    "set-acl": lambda: os.setxattr(target, "system.posix_acl_access", b""),
    "get-xattr": lambda: os.getxattr(target, "user.x"),
    "list-xattrs": lambda: os.listxattr(target),
    "remove-xattr": lambda: os.removexattr(target, "user.x"),
    "set-times": lambda: os.utime(target, (1, 1)),
    "set-times-of-descriptor": lambda: os.utime(writable, (1, 1)),
    "truncate": lambda: os.truncate(target, 1),
    "open-to-cut": openat(os.O_WRONLY | os.O_TRUNC),
    "open-to-write-alone": openat(os.O_WRONLY),
    "open-for-neither": openat(os.O_ACCMODE),
    "open-as-is-said-elsewhere": call(437, 437, AT_FDCWD, name, HOW_TO_READ, len(HOW_TO_READ)),
    "look-and-have-somebody-asked": call(332, 291, folder_fd, b"", 0x1000, 0, NOTHING),
    "look-for-times": call(332, 291, folder_fd, b"", 0x5000, 0x7FF, NOTHING),
    "look-where-a-link-leads": call(332, 291, folder_fd, b"image", 0x4800, 0x7FF, NOTHING),
    "open-without-a-name": openat(os.O_RDWR | os.O_TMPFILE, 0o600, os.fsencode(folder)),
    "make-set-user-id": openat(os.O_WRONLY | os.O_CREAT, 0o4755, there),
    "make-for-all": openat(os.O_WRONLY | os.O_CREAT, 0o666, there),
    "link": lambda: os.link(target, there),
    "symlink": lambda: (folder / "there").symlink_to(target),
    "rename": lambda: target.rename(folder / "there"),
    "exchange": call(316, 276, AT_FDCWD, name, AT_FDCWD, name, RENAME_EXCHANGE),
    "make-directory": (folder / "there").mkdir,
    "remove-directory": lambda: os.rmdir("there", dir_fd=folder_fd),
    "make-fifo": lambda: os.mkfifo(there),
    "open-by-handle": call(304, 265, AT_FDCWD, NOTHING, 0),
    "handle-of-name": call(303, 264, AT_FDCWD, name, NOTHING, NOTHING, 0),
    "watch-names": call(294, 26, 0),
    "watch-names-of-all": call(300, 262, 0, 0),
    "watch-a-directory": lambda: fcntl.fcntl(image.fileno(), fcntl.F_NOTIFY, 0),
    "have-a-lease": lambda: fcntl.fcntl(image.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK),
    "flush-all": call(162, 81),
    "allocate": call(285, 47, writable, 0, 0, 1),
    "copy-file-range": call(326, 285, image.fileno(), None, writable, None, 1, 0),
    "sendfile": call(40, 71, writable, image.fileno(), None, 1),
    "splice": call(275, 76, image.fileno(), None, writer, None, 1, 0),
    "change-directory": lambda: os.chdir(folder),
    "change-mask": lambda: raw(number_of(95, 166), 0o022),
    # programs, and memory that could be one
    "execve": lambda: os.execve("/nowhere/program", ["program"], {}),  # noqa: S606
    "execveat": call(322, 281, AT_FDCWD, b"/nowhere/program", None, None, 0),
    "fork": fork,
    "spawn": lambda: os.posix_spawn("/nowhere/program", ["program"], {}),
    "file-in-memory": call(319, 279, b"x", 0),
    "secret-memory": call(447, 447, 0),
    "executable-memory": call(9, 222, 0, 4096, mmap.PROT_READ | mmap.PROT_EXEC, 0x22, -1, 0),
    "make-memory-executable": call(10, 226, address, 4096, mmap.PROT_READ | mmap.PROT_EXEC),
    "make-memory-executable-by-key": call(329, 288, address, 4096, mmap.PROT_EXEC, 0),
    "map-a-file": call(9, 222, 0, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, image.fileno(), 0),
    "personality": call(135, 92, 0xFFFFFFFF),
    "huge-pages": call(9, 222, 0, 2 << 20, mmap.PROT_READ, 0x22 | 0x40000, -1, 0),
    "memory-kept-from-swap": call(9, 222, 0, 4096, mmap.PROT_READ, 0x22 | 0x2000, -1, 0),
    "memory-to-be-shared": call(9, 222, 0, 4096, mmap.PROT_READ, 0x21, -1, 0),
    "memory-to-be-shared-for-sure": call(9, 222, 0, 4096, mmap.PROT_READ, 0x23, -1, 0),
    "memory-as-a-stack": call(9, 222, 0, 4096, mmap.PROT_READ, 0x122, -1, 0),
    "poison-memory": call(28, 233, address, 0, 100),
    # other processes
    "signal": lambda: os.kill(stranger, 0),
    "signal-a-thread": call(234, 131, stranger, stranger, 0),
    "signal-any-thread": call(200, 130, stranger, 0),
    "signal-with-data": call(129, 138, stranger, 0, NOTHING),
    "have-it-signalled": lambda: fcntl.fcntl(reader, fcntl.F_SETOWN, 0),
    "have-it-signalled-by-device": call(16, 29, reader, 0x8901, NOTHING),
    "pidfd": call(434, 434, stranger, 0),
    "descriptor-of": call(438, 438, -1, 0, 0),
    "limits-of": call(302, 261, stranger, resource.RLIMIT_CPU, None, NOTHING),
    # With 0 for a limit, a program that collects core dumps would get its own.
    "limits-of-its-own-core-dumps": call(302, 261, 0, resource.RLIMIT_CORE, None, NOTHING),
    "limits-of-its-own-descriptors": call(302, 261, 0, resource.RLIMIT_NOFILE, None, NOTHING),
    "limits-of-its-own-threads": call(302, 261, 0, resource.RLIMIT_NPROC, None, NOTHING),
    "priority-of": lambda: os.setpriority(os.PRIO_PROCESS, stranger, 0),
    "processors-of": lambda: os.sched_setaffinity(stranger, {0}),
    "scheduling-of": call(144, 119, stranger, 0, NOTHING),
    "disk-priority-of": call(251, 30, 1, stranger, 0),
    "session-of": lambda: os.getsid(stranger),
    "group-of": lambda: os.setpgid(stranger, stranger),
    "ptrace": call(101, 117, 0x4206, stranger, 0, 0),
    "read-memory-of": call(310, 270, stranger, NOTHING, 0, NOTHING, 0, 0),
    "write-memory-of": call(311, 271, stranger, NOTHING, 0, NOTHING, 0, 0),
    "advise-memory-of": call(440, 440, -1, NOTHING, 0, 0, 0),
    "compare": call(312, 272, stranger, stranger, 0, 0, 0),
    # what processes share
    "socket": lambda: socket.socket(socket.AF_UNIX),
    "pair-of-sockets": socket.socketpair,
    "connect": call(42, 203, ours.fileno(), NOTHING, 2),
    "bind": call(49, 200, ours.fileno(), NOTHING, 2),
    "accept": call(288, 242, ours.fileno(), None, None, 0),
    "set-socket-option": call(54, 208, ours.fileno(), 1, 1, NOTHING, 4),
    "shared-memory": call(29, 194, 0x1234, 4096, 0o1600),
    "semaphores": call(64, 190, 0x1234, 1, 0o1600),
    "messages": call(68, 186, 0x1234, 0o1600),
    "named-queue": call(240, 180, b"x", 0, 0, None),
    "add-key": call(248, 217, b"user", b"x", b"x", 1, -4),
    "keyring": call(250, 219, 0, -4, 0),
    "request-key": call(249, 218, b"user", b"x", None, -4),
    # namespaces, mounts, the machine
    "unshare": call(272, 97, NEW_USER),
    "clone-into-user-namespace": call(56, 220, NEW_USER | signal.SIGCHLD, 0, 0, 0, 0),
    "clone-thread-into-namespace": call(56, 220, THREAD | NEW_NET, 0, 0, 0, 0),
    "clone-into-process-namespace": call(56, 220, THREAD | NEW_PID, 0, 0, 0, 0),
    "clone3": call(435, 435, NOTHING, 0),
    "enter-namespace": call(308, 268, -1, 0),
    "mount": call(165, 40, b"none", there, b"tmpfs", 0, None),
    "unmount": call(166, 39, there, 2),
    "mount-by-descriptor": call(430, 430, b"tmpfs", 0),
    "move-mount": call(429, 429, -1, b"", -1, b"", 0),
    "open-tree": call(428, 428, AT_FDCWD, name, 0),
    "set-mount": call(442, 442, AT_FDCWD, name, 0, NOTHING, 32),
    "pivot-root": call(155, 41, there, there),
    "change-root": lambda: os.chroot("/"),
    "swap": call(167, 224, there, 0),
    "kernel-log": call(103, 116, 10, None, 0),
    "host-name": call(170, 161, b"", -1),
    "reboot": call(169, 142, 0, 0, 0, None),
    "quotas": call(179, 60, 0, None, 0, None),
    # what it gave up
    "set-user": call(105, 146, os.getuid()),
    "set-groups": call(116, 159, 0, None),
    "set-capabilities": set_capabilities,
    "be-dumped": call(157, 167, 4, 1, 0, 0, 0),
    "be-traced-by-all": call(157, 167, 0x59616D61, -1, 0, 0, 0),
    "another-filter": call(317, 277, 1, 0, NOTHING),
    "another-ruleset": call(444, 444, None, 0, 1),
    # what is there for the kernel to be attacked by
    "bpf": call(321, 280, 0, None, 0),
    "io-uring": call(425, 425, 1, NOTHING),
    "asynchronous-io": call(206, 0, 1, NOTHING),
    "userfaultfd": call(323, 282, 0),
    "perf-events": call(298, 241, NOTHING, 0, -1, -1, 0),
    "lock-with-priority": call(202, 98, address, 6, 0, None, None, 0),
    "grow-a-pipe": lambda: fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096),
    "tell-a-terminal": call(16, 29, 2, 0x5412, NOTHING),
    "pipe": os.pipe,
    "pipe-of-notifications": call(293, 59, NOTHING, os.O_EXCL),
    "event-descriptor": call(290, 19, 0, 0),
    "timer-descriptor": call(283, 85, 1, 0),
    "signal-descriptor": call(289, 74, -1, NOTHING, 8, 0),
    "lock-memory": call(151, 230, 0),
    "set-clock": call(227, 112, 0, None),
    "module": call(175, 105, None, 0, b""),
    "no-such-call": call(400, 400),
}
"""What none may do."""

UNSEEN = {335, 336} if MACHINE == "x86_64" else set()
"""The kernel's own probes come and go by these: no filter sees them, and one ends the process."""
KNOWN = {
    it.number_on(MACHINE)
    for table in (calls.of_daemon(0), *(calls.of_broker(0, read_only=it) for it in (True, False)))
    for it in (*table, *(it for it, _ in calls.EXPECTED))
}
NUMBERS = set(range(600)) - KNOWN - UNSEEN
"""Of all calls that there are, and more, those that are in no table."""
NEVER |= {
    f"call-{number}-of-{argument}": call(number, number, *[argument] * 6)
    for number in NUMBERS
    for argument in (-1, 0, address)
}
if MACHINE == "x86_64":
    NEVER |= {f"call-{number}-as-x32": call(X32 | number, 0, *[-1] * 6) for number in range(600)}
    NEVER |= {
        "stat-as-x32": lambda: raw(X32 | 4, name, NOTHING),
        "getpid-as-x32": lambda: raw(X32 | 39),
        "open-as-of-old": lambda: raw(2, name, os.O_RDWR),
        "fork-as-of-old": lambda: raw(57),
        "ports": lambda: raw(172, 3),
    }


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as failed:
        return errno.errorcode[failed.errno or 0]
    return "done"


CONFINED: dict[str, Callable[[], Confinement]] = {
    "daemon": lambda: Confinement.of_daemon(image),
    "broker": lambda: Confinement.of_broker(image, read_only=False),
    "reading broker": lambda: Confinement.of_broker(image, read_only=True),
}


def try_all() -> None:
    """In a process of its own, which says what came of it by the one way that each of them has."""
    vars(confinement)["landlock_version"] = lambda: -1
    logging.disable(logging.WARNING)  # that there is no Landlock
    CONFINED[WHO]().enforce()
    said = json.dumps({each: outcome(it) for each, it in (WORKS | NEVER).items()}).encode()
    try:
        its.sendmsg([said])
    except PermissionError:
        its.send(said)


ours.send(b"?")
trying = os.fork()
if not trying:
    try:
        try_all()
    except BaseException:
        logging.getLogger(__name__).exception("not all was tried")
        raise
    finally:
        os._exit(0)
its.close()
ours.settimeout(30)
received = b"?"
while received == b"?":  # the descriptor that was sent
    received = ours.recv(1 << 20)
print(received.decode())
os.close(writer)
for child in (trying, stranger):
    os.waitpid(child, 0)
shutil.rmtree(folder)
