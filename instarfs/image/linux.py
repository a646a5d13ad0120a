"""What of Linux and its C library the standard library does not have, each a function with types.

All that is called by `ctypes` is here, and nothing of what it is called for. What fails raises
OSError with the kernel's own number.

A name is looked at so that nobody is asked: what stands under it is not opened (O_PATH), no link is
followed, and where something is mounted on it that is told apart without a word to whoever serves
it, who need not answer, and may be the one who looks. What a process of a mount opens, it opens by
openat(2): the flags of openat2(2) are behind a pointer, where no filter of system calls sees them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Callable

# RESOLVE_NO_SYMLINKS of linux/openat2.h
_NO_SYMLINKS = 0x04

LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

# Of system calls, on every architecture but alpha; but seccomp(2), of which the caller knows it.
_OPENAT2, _MOUNT_SETATTR = 437, 442
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

# linux/fcntl.h, linux/mount.h
_AT_FDCWD, _NOSYMFOLLOW = -100, 0x0020_0000
# linux/fcntl.h: AT_EMPTY_PATH, AT_STATX_DONT_SYNC; linux/stat.h: STATX_ATTR_MOUNT_ROOT
_OF_DESCRIPTOR, _ASKING_NOBODY, _MOUNT_ROOT = 0x1000, 0x4000, 0x2000
# And AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC; STATX_BASIC_STATS
_AS_IT_STANDS, _ALL_OF_STAT = 0x100 | 0x800 | 0x4000, 0x7FF
_SECOND_NS = 10**9
# linux/falloc.h
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
# linux/prctl.h
_SET_PDEATHSIG, _SET_NAME, _SET_NO_NEW_PRIVS = 1, 15, 38
# linux/landlock.h
_VERSION_OF_LANDLOCK, _PATH_BENEATH = 1, 1
# linux/seccomp.h
_SET_MODE_FILTER = 1
# linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522
# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

# An older kernel, and what some containers say in its place.
_NOT_THERE = (errno.ENOSYS, errno.EPERM)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_int, _uint, _long, _ulong = ctypes.c_int, ctypes.c_uint, ctypes.c_long, ctypes.c_ulong
_bytes, _size = ctypes.c_char_p, ctypes.c_size_t

_libc = ctypes.CDLL(None, use_errno=True)


def _system_call(*arguments: type) -> Callable[..., int]:
    """syscall(2) for a call that takes these. Each has a function of its own."""
    function = _libc["syscall"]
    function.argtypes, function.restype = (_long, *arguments), _long
    return function


_openat2 = _system_call(_int, _bytes, ctypes.POINTER(_OpenHow), _size)
_mount_setattr = _system_call(_int, _bytes, _uint, _bytes, _size)
_seccomp = _system_call(_ulong, _ulong, _bytes)
_create_ruleset = _system_call(_bytes, _size, _uint)
_add_rule = _system_call(_int, _int, _bytes, _uint)
_restrict_self = _system_call(_int, _uint)


class _Statx(ctypes.Structure):
    _fields_ = (
        ("before", ctypes.c_uint64),
        ("attributes", ctypes.c_uint64),
        ("between", ctypes.c_uint64 * 5),
        ("known_attributes", ctypes.c_uint64),
        ("after", ctypes.c_uint64 * 24),
    )


# Of that: attributes, inode, size, known attributes; change and modification time in seconds and
# nanoseconds; major and minor number of the device.
_OF_STATX = struct.Struct("=8xQ16xQQ8xQ32xqI4xqI12xII")
_statx = getattr(_libc, "statx", None)
if _statx is not None:
    _statx.argtypes = (_int, _bytes, _int, _uint, ctypes.POINTER(_Statx))


def _checked(result: int) -> int:
    """What a call gave, or the error that it left."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# ---- files ----


def openat2(directory: int, name: str, flags: int, resolve: int) -> int:
    """A new descriptor. Raises OSError."""
    how, name_ = _OpenHow(flags, 0, resolve), os.fsencode(name)
    return _checked(_openat2(_OPENAT2, directory, name_, how, ctypes.sizeof(how)))


def open_without_links(path: bytes, flags: int) -> int:
    """A descriptor of *path*; raises OSError, with ELOOP where there is a link anywhere in it.

    Kernels without openat2 see a link in its last part alone.
    """
    try:
        return openat2(_AT_FDCWD, os.fsdecode(path), flags, _NO_SYMLINKS)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    return os.open(path, flags | os.O_NOFOLLOW)


def look(directory: int, name: str, *, across: bool = False) -> int:
    """An O_PATH descriptor of what stands under *name* in *directory*, be it a link.

    *name* is a name, no path. Raises OSError, with EXDEV where something is mounted there, unless
    *across* is said. Where that is not told (see `is_mounted`) it is looked at.
    """
    fd = os.open(name, LOOK, dir_fd=directory)
    try:
        if not across:
            _require_not_mounted(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_not_mounted(fd: int) -> None:
    if is_mounted(fd):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def is_mounted(fd: int) -> bool | None:
    """Whether what was looked at is mounted there, and not what is beneath: statx(2).

    None where that is not told: before Linux 5.8, or by an old C library. Raises OSError.
    """
    if _statx is None:
        return None
    told = _Statx()
    try:
        _checked(_statx(fd, b"", _OF_DESCRIPTOR | _ASKING_NOBODY, 0, told))
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    return bool(told.attributes & _MOUNT_ROOT) if told.known_attributes & _MOUNT_ROOT else None


def look_at(directory: int, name: str, *, across: bool = False) -> os.stat_result:
    """What it is. Raises as `look` does."""
    fd = look(directory, name, across=across)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def identity_at(
    directory: int, name: str, *, across: bool = False
) -> tuple[int, int, int, int, int] | None:
    """Device, inode, size in bytes, and times of modification and change in nanoseconds.

    Of the same, and raises the same, as `look_at`, by a single call; for what is on a disk of this
    machine, since a server would not be asked. None where it is not told whether it is mounted.
    """
    if _statx is None:
        return None
    told = _Statx()
    try:
        _checked(_statx(directory, os.fsencode(name), _AS_IT_STANDS, _ALL_OF_STAT, told))
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    attributes, inode, size, known, changed, changed_ns, modified, modified_ns, major, minor = (
        _OF_STATX.unpack_from(told)
    )
    if not known & _MOUNT_ROOT:
        return None
    if attributes & _MOUNT_ROOT and not across:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    times = modified * _SECOND_NS + modified_ns, changed * _SECOND_NS + changed_ns
    return os.makedev(major, minor), inode, size, *times


def open_looked_at(looked_at: int, flags: int, name: str, directory: int | None = None) -> int:
    """Open what was looked at under *name*: the same file, whatever its name leads to by now.

    Raises OSError, as opening its name would. Without /proc it is opened by name, and ESTALE where
    that is another by now.
    """
    try:
        return os.open(f"/proc/self/fd/{looked_at}", (flags & ~os.O_NOFOLLOW) | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        fd = os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    if not os.path.sameopenfile(fd, looked_at):
        os.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return fd


# off_t has 64 bits in the one wherever it exists, and in the other where the first does not.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (_int, _int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back what a file has there, in bytes; it reads as zeros then, and is as long as before.

    fallocate(2). Raises OSError; EOPNOTSUPP where the filesystem cannot.
    """
    _checked(_fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, offset, length))


def follow_no_links_in(mount: str) -> None:
    """Have the kernel follow no symbolic link in what is mounted on *mount*: mount_setattr(2).

    Raises OSError; ENOSYS before Linux 5.12, EINVAL before 5.14, EPERM where one is not root.
    """
    attributes = struct.pack("=QQQQ", _NOSYMFOLLOW, 0, 0, 0)
    size = len(attributes)
    _checked(_mount_setattr(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(mount), 0, attributes, size))


# ---- the process itself ----


_prctl = _libc["prctl"]
_prctl.argtypes = (_int, _ulong, _ulong, _ulong, _ulong)
_name_process = _libc["prctl"]
_name_process.argtypes = (_int, _bytes, _ulong, _ulong, _ulong)


def name_process(name: bytes) -> None:
    """What ps(1) calls it, up to 15 bytes: PR_SET_NAME of prctl(2)."""
    _checked(_name_process(_SET_NAME, name, 0, 0, 0))


def rule_out_new_privileges() -> None:
    """No program that this process runs gets more rights than it has: prctl(2). Raises OSError."""
    _checked(_prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends: prctl(2)."""
    _checked(_prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def keep_capabilities(kept: int) -> None:
    """Of those that are permitted keep these alone, and inherit none: capset(2).

    *kept*: a set of bits, 1 << CAP_*, below the 32nd. Raises OSError.
    """
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    current = ctypes.create_string_buffer(24)
    _checked(_libc.capget(header, current))
    permitted = struct.unpack("=6I", current.raw)[1]
    low = permitted & kept
    _checked(_libc.capset(header, struct.pack("=6I", low, low, 0, 0, 0, 0)))


def limit_arenas(number: int) -> None:
    """Have all threads take their memory from so many arenas: mallopt(3).

    Other allocators than glibc's are left alone.
    """
    _mallopt(_ARENA_MAX, number)


def keep_freed_blocks(largest: int, together: int) -> None:
    """Have freed blocks up to *largest* bytes kept for the next ones: mallopt(3).

    What is free at the end of the heap goes back to the kernel from *together* bytes on. Other
    allocators than glibc's are left alone.
    """
    _mallopt(_MMAP_THRESHOLD, largest)
    _mallopt(_TRIM_THRESHOLD, together)


def give_back_freed_pages() -> None:
    """Give whole pages that are free back to the kernel: malloc_trim(3), where there is one."""
    malloc_trim = getattr(_libc, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _mallopt(option: int, value: int) -> None:
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


def load_what_ends_threads() -> None:
    """What glibc would load only when a thread is ended from within. Raises OSError without it."""
    ctypes.CDLL("libgcc_s.so.1")


# ---- what it gives up ----


def install_filter(number: int, program: bytes, flags: int) -> None:
    """Have the kernel run *program* over every system call of this thread: seccomp(2).

    *number*: that of the call on this machine; *program*: instructions of classic BPF, 8 bytes
    each; *flags*: SECCOMP_FILTER_FLAG_*. Raises OSError; EINVAL for a flag that it does not know.
    """
    kept = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(kept))
    _checked(_seccomp(number, _SET_MODE_FILTER, flags, described))


def landlock_version() -> int:
    """The version of Landlock that this kernel has; below 1 where it has none, or it is off."""
    return _create_ruleset(_CREATE_RULESET, None, 0, _VERSION_OF_LANDLOCK)


def create_ruleset(attributes: bytes) -> int:
    """A descriptor of a ruleset of Landlock: struct landlock_ruleset_attr. Raises OSError."""
    return _checked(_create_ruleset(_CREATE_RULESET, attributes, len(attributes), 0))


def allow_beneath(ruleset: int, directory: int, rights: int) -> None:
    """Let *rights*, LANDLOCK_ACCESS_FS_*, be had on a descriptor and all beneath it.

    Raises OSError.
    """
    rule = struct.pack("=Qi", rights, directory)
    _checked(_add_rule(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))


def restrict_to(ruleset: int) -> None:
    """From now on this thread may do only what *ruleset* lets it. Raises OSError."""
    _checked(_restrict_self(_RESTRICT_SELF, ruleset, 0))
