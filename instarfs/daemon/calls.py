"""The system calls that the processes of a mount may make. What is not here they may not.

To be read by whoever wants to know what is left to a process that was taken over: the tables below
are all of it, and `instarfs.daemon.seccomp` makes filters of them and knows no call by name. They
were measured, under all tests with mounts; what other versions of glibc and Python do instead is
there too. Where the number of a call says too little, its arguments are judged: an argument is an
int of the kernel's, or flags within its lower half. What a pointer leads to no filter can see, so
no call is here of which that says how a file is opened, as of openat2(2).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
from dataclasses import dataclass

ANY_BIT = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Only:
    """A call is meant only where what *mask* leaves of *argument* (from 0) is one of *values*."""

    argument: int
    values: tuple[int, ...]
    mask: int = ANY_BIT


@dataclass(frozen=True, slots=True)
class Call:
    """A system call and its numbers, by what uname(2) calls the machine; None: not there.

    It is meant only where all of ``only`` hold.
    """

    name: str
    x86_64: int | None
    aarch64: int | None
    only: tuple[Only, ...] = ()

    def number_on(self, machine: str) -> int | None:
        return {"x86_64": self.x86_64, "aarch64": self.aarch64}[machine]


def _call(name: str, x86_64: int | None, aarch64: int | None, *only: Only) -> Call:
    return Call(name, x86_64, aarch64, only)


# linux/futex.h: WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET
_FUTEXES, _FUTEX_FLAGS = (0, 1, 3, 4, 5, 9, 10), 128 | 256
# linux/sched.h, as glibc and, with one more bit, musl start a thread
_THREAD = (0x3D0F00, 0x7D0F00)
# asm-generic/mman-common.h: DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE, GUARD_INSTALL, GUARD_REMOVE
_ADVICE = (4, 8, 14, 15, 102, 103)
# asm-generic/mman.h: PRIVATE, ANONYMOUS; and of what there is besides MAP_TYPE, GROWSDOWN, LOCKED,
# HUGETLB
_OF_ITS_OWN, _KIND_OF_MEMORY = 0x02 | 0x20, 0x0F | 0x20 | 0x100 | 0x2000 | 0x40000
# asm-generic/ioctls.h: what isatty asks, in two ways; FIOCLEX
_IOCTLS = (0x5401, 0x802C542A, 0x5451)
# linux/falloc.h: PUNCH_HOLE | KEEP_SIZE
_PUNCH = 0x3
# linux/prctl.h: PR_SET_NAME, PR_SET_VMA (a name, too)
_NAMES = (15, 0x53564D41)
# linux/fcntl.h: AT_EMPTY_PATH | AT_STATX_DONT_SYNC; AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT and that
_STATX_FLAGS, _STATX_NAME_FLAGS = 0x1000 | 0x4000, 0x100 | 0x800 | 0x4000
# linux/stat.h: STATX_BASIC_STATS
_STATX_ALL = 0x7FF
_O_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY

_READING = Only(2, (os.O_RDONLY,), os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | _O_TMPFILE)
"""Of openat(2)."""
_WRITING = Only(2, (os.O_RDONLY, os.O_RDWR), os.O_ACCMODE | os.O_TRUNC | _O_TMPFILE)
"""Not the fourth way (O_ACCMODE), by which devices are opened and Landlock asks for no right."""
_OWN_MEMORY = (Only(0, (0,)), Only(1, (resource.RLIMIT_DATA,)))
"""Of prlimit64(2). With another limit on core dumps it could have itself collected."""


_TO_RUN = (
    # Memory: of no file, and never executable.
    _call("brk", 12, 214),
    # Nor of the huge pages that a host sets aside for its virtual machines, nor kept from swap, nor
    # what its limit does not count: shared, or a stack.
    _call("mmap", 9, 222, Only(2, (0,), mmap.PROT_EXEC), Only(3, (_OF_ITS_OWN,), _KIND_OF_MEMORY)),
    _call("mprotect", 10, 226, Only(2, (0,), mmap.PROT_EXEC)),
    _call("mremap", 25, 216),
    _call("munmap", 11, 215),
    _call("madvise", 28, 233, Only(2, _ADVICE)),
    # Threads of this process, and their locks; no process, no namespace.
    _call("clone", 56, 220, Only(0, _THREAD)),
    _call("exit", 60, 93),
    _call("exit_group", 231, 94),
    _call("futex", 202, 98, Only(1, _FUTEXES, ANY_BIT & ~_FUTEX_FLAGS)),
    _call("set_robust_list", 273, 99),
    _call("rseq", 334, 293),
    _call("sched_yield", 24, 124),
    _call("prctl", 157, 167, Only(0, _NAMES)),
    # Who and where it is; how much of the machine there is.
    _call("getpid", 39, 172),
    _call("gettid", 186, 178),
    _call("getppid", 110, 173),
    _call("getuid", 102, 174),
    _call("geteuid", 107, 175),
    _call("getgid", 104, 176),
    _call("getegid", 108, 177),
    _call("sched_getaffinity", 204, 123),
    _call("sysinfo", 99, 179),
    _call("getrandom", 318, 278),
    # Time: where the kernel's own page does not tell it.
    _call("clock_gettime", 228, 113),
    _call("gettimeofday", 96, 169),
    _call("time", 201, None),
    _call("clock_nanosleep", 230, 115),
    _call("nanosleep", 35, 101),
    # Signals: to be received. None is sent but by abort(3), see `_abort`.
    _call("rt_sigaction", 13, 134),
    _call("rt_sigprocmask", 14, 135),
    _call("rt_sigreturn", 15, 139),
    _call("restart_syscall", 219, 128),
    # Descriptors and what files are. A path can be looked at wherever it leads.
    _call("close", 3, 57),
    _call("dup", 32, 23),
    _call("newfstatat", 262, 79),
    _call("fstat", 5, 80),
    _call("readlink", 89, None),
    _call("readlinkat", 267, 78),
    # Whether something is mounted on a name, of what was looked at; nobody is asked.
    _call("statx", 332, 291, Only(2, (_STATX_FLAGS,)), Only(3, (0,))),
)
"""What both do."""

_OF_DAEMON = (
    # Reading: the image, what is followed, modules, /proc. What may be opened Landlock says.
    _call("openat", 257, 56, _READING),
    _call("read", 0, 63),
    # What stands under the image's name, for each answer; nobody is asked.
    _call("statx", 332, 291, Only(2, (_STATX_NAME_FLAGS,)), Only(3, (_STATX_ALL,))),
    _call("pread64", 17, 67),
    _call("preadv", 295, 69),
    _call("preadv2", 327, 286),
    _call("lseek", 8, 62),
    _call("getdents64", 217, 61),
    # Repairing: the image and its undo file. Whether they can be written, and what is beneath.
    _call("pwrite64", 18, 68),
    _call("fsync", 74, 82),
    _call("fdatasync", 75, 83),
    _call("ftruncate", 77, 46),
    _call("fallocate", 285, 47, Only(1, (_PUNCH,))),
    _call("access", 21, None),
    _call("faccessat", 269, 48),
    _call("faccessat2", 439, 439),
    _call("fstatfs", 138, 44),
    # Locks of the image, which QEMU sees; no owner to be signalled, no lease.
    _call(
        "fcntl",
        72,
        25,
        Only(
            1,
            (
                fcntl.F_DUPFD_CLOEXEC,
                fcntl.F_GETFD,
                fcntl.F_SETFD,
                fcntl.F_GETFL,
                fcntl.F_OFD_GETLK,
                fcntl.F_OFD_SETLK,
            ),
        ),
    ),
    _call("ioctl", 16, 29, Only(1, _IOCTLS)),
    # /dev/fuse: requests are read and answered.
    _call("write", 1, 64),
    _call("writev", 20, 66),
    # Waiting: for the kernel, for the broker, for the helper that unmounts.
    _call("poll", 7, None),
    _call("ppoll", 271, 73),
    _call("epoll_wait", 232, None),
    _call("epoll_pwait", 281, 22),
    _call("epoll_ctl", 233, 21),
    _call("wait4", 61, 260),
    # Sockets that are there: to the broker, for syslog, and one that wakes the event loop.
    _call("sendto", 44, 206),
    _call("recvfrom", 45, 207),
    _call("recvmsg", 47, 212),
    # The memory that a check may take is measured by its image. No other limit, nor anybody else's.
    _call("prlimit64", 302, 261, *_OWN_MEMORY),
    # Into the background: the session of the caller, and its standard files, are left behind.
    _call("setsid", 112, 157),
    _call("dup2", 33, None),
    _call("dup3", 292, 24),
)

_OF_BROKER = (
    # What it is asked and what it answers, with a descriptor. It reads and writes no file.
    _call("recvfrom", 45, 207),
    _call("sendmsg", 46, 211),
    _call("fcntl", 72, 25, Only(1, (fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD))),
)

_OF_READING_BROKER = (_call("openat", 257, 56, _READING),)

_OF_WRITING_BROKER = (
    # An undo file is made with mode 0600, and nothing is cut. Files go, directories do not.
    _call("openat", 257, 56, _WRITING, Only(3, (0, 0o600))),
    _call("unlinkat", 263, 35, Only(2, (0,))),
    _call("fsync", 74, 82),
)


def of_daemon(pid: int) -> tuple[Call, ...]:
    """Of the process that serves a mount."""
    return _TO_RUN + _OF_DAEMON + _abort(pid)


def of_broker(pid: int, *, read_only: bool) -> tuple[Call, ...]:
    """Of the process that opens the image's files for it."""
    return (
        _TO_RUN
        + _OF_BROKER
        + _abort(pid)
        + (_OF_READING_BROKER if read_only else _OF_WRITING_BROKER)
    )


def _abort(pid: int) -> tuple[Call, ...]:
    """A process whose libraries give up ends as it should; it can signal nobody else."""
    return (_call("tgkill", 234, 131, Only(0, (pid,))),)


EXPECTED: tuple[tuple[Call, int], ...] = (
    # glibc starts a thread with clone then; what it wants of this one is behind a pointer.
    (_call("clone3", 435, 435), errno.ENOSYS),
    # libfuse would read requests through a pipe.
    (_call("pipe2", 293, 59), errno.EPERM),
)
"""What libraries try, do without, and what is not worth a line in the log: and its errno."""
