"""Every error that instarfs can explain. What is not here, nor in `planner.errors`, is a bug.

The docstring of a class is its message: what, where, and the way out, with the fields of the
instance filled in. ``exit_code`` is what a command ends with, ``errno`` what a read in the mount
answers. Nothing here is raised here, and nothing here knows how an error is shown.
"""

from __future__ import annotations

import errno as _errno
from string import Formatter
from typing import Any, ClassVar, dataclass_transform

from instarfs.text import shell_path
from planner.errors import PlannerError, ReadFailed


@dataclass_transform(eq_default=False)
class InstarfsError(Exception):
    """Base of the errors of this package; a subclass lists its fields as a dataclass does.

    It is none: every command loads all of these, and of the time that the shortest take, an eighth
    went into compiling what dataclasses generate.
    """

    exit_code: ClassVar[int] = 1
    errno: ClassVar[int] = _errno.EIO
    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        own = [
            name for name, kind in cls.__annotations__.items() if not kind.startswith("ClassVar")
        ]
        cls._fields = (*cls._fields, *own)

    def __init__(self, *values: object, **named: object) -> None:
        fields = {name: getattr(self, name) for name in self._fields if hasattr(self, name)}
        fields |= dict(zip(self._fields, values, strict=False)) | named
        if len(values) > len(self._fields) or fields.keys() != set(self._fields):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self._fields) or 'nothing'}")
        super().__init__(*(fields[name] for name in self._fields))
        vars(self).update(fields)

    def __str__(self) -> str:
        # Joined before the fields come in, so that a long message may be wrapped in the source.
        sentence = " ".join((self.__doc__ or type(self).__name__).split())
        return _Sentences().vformat(sentence, (), vars(self))


class _Sentences(Formatter):
    """``{path!q}`` is a path as a word of a command for bash."""

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        return shell_path(value) if conversion == "q" else super().convert_field(value, conversion)


DOMAIN_ERRORS = (InstarfsError, PlannerError)
"""What is shown in one line, or as an errno, wherever it ends up: each has both as attributes."""


WORST_FIRST = (1, 2, 63, 3, 0)
"""Exit codes, of which that of several images is the first: what is not known may be worse than
corruption, and an image of another format hides none.
"""

NO_SPACE = frozenset({_errno.ENOSPC, _errno.EDQUOT})
"""The errno of a disk that is full."""


def reason_of(error: OSError) -> str:
    """The system's own words for what failed, without the path that Python adds."""
    hint = " (ulimit -f)" if error.errno == _errno.EFBIG else ""
    return (error.strerror or str(error)) + hint


def is_shortage(error: BaseException) -> bool:
    """Whether there was no memory for something, or for the stack of a thread that was to do it.

    Of the latter Python has no error of its own.
    """
    if isinstance(error, RuntimeError):
        return "can't start new thread" in str(error)
    return isinstance(error, MemoryError)


# ---- the command ----


class OutputFailed(InstarfsError):
    """what was to be printed cannot be written to standard output: {reason}"""

    reason: str


# ---- a scan ----


class StateInUse(InstarfsError):
    """{path}: another scan is using this state; wait for it, or name another (--state)"""

    path: str
    errno: ClassVar[int] = _errno.EBUSY


class StateMissing(InstarfsError):
    """{path}: there is no state of a scan; scan with --state {path!q} first"""

    path: str
    errno: ClassVar[int] = _errno.ENOENT


class StateTooNew(InstarfsError):
    """{path}: is the state of a newer instarfs (version {version}); use that, or name another file
    (--state)
    """

    path: str
    version: int


class StateFailed(InstarfsError):
    """{path}: cannot be used as the state of a scan: {reason}; name another file (--state), or put
    this one aside: the next scan begins a new one
    """

    path: str
    reason: str


class StateFull(StateFailed):
    """{path}: the state of the scan cannot be written: {reason}; make space (df): the next scan
    goes on with it
    """

    errno: ClassVar[int] = _errno.ENOSPC


class MetricsFailed(InstarfsError):
    """{path}: the metrics cannot be written there: {reason}"""

    path: str
    reason: str


class ClusterLibraryMissing(InstarfsError):
    """--dask takes what is not installed: pip install 'instarfs[dask]', of the cluster's version"""


class ClusterFailed(InstarfsError):
    """{address}: the Dask cluster cannot be used: {reason}; what was checked is in the state, and
    the same command goes on
    """

    address: str
    reason: str


class ScanCrippled(InstarfsError):
    """no process can be started that checks images: {reason}"""

    reason: str


# ---- the image ----


class ImageMissing(InstarfsError):
    """{path}: no such file; check the path"""

    path: str
    errno: ClassVar[int] = _errno.ENOENT


class ImageDeleted(InstarfsError):
    """{path}: was deleted since it was opened; bring it back first: check/report.txt says how"""

    path: str
    errno: ClassVar[int] = _errno.ENOENT


class ImageMoved(InstarfsError):
    """{path}: was renamed or moved since it was opened; put it back, or use the name it has now"""

    path: str
    errno: ClassVar[int] = _errno.ENOENT


class ImageForbidden(InstarfsError):
    """{path}: no permission to read it; run as its owner, or as root"""

    path: str
    errno: ClassVar[int] = _errno.EACCES


class ImageIsDirectory(InstarfsError):
    """{path}: is a directory; name the image file in it"""

    path: str
    errno: ClassVar[int] = _errno.EISDIR


class ImageIsNoFile(InstarfsError):
    """{path}: is a {kind}; an image is a regular file or a block device"""

    path: str
    kind: str
    errno: ClassVar[int] = _errno.EINVAL


class ImageNotFollowed(InstarfsError):
    """{path}: what is there now is {kind}, and not opened: only a regular file of the same owner
    can take the place of an image that is mounted; put one there, or unmount, and mount again
    """

    path: str
    kind: str
    errno: ClassVar[int] = _errno.EACCES


class ImageOpenFailed(InstarfsError):
    """{path}: cannot be opened: {reason}"""

    path: str
    reason: str


class ImageReadFailed(InstarfsError, ReadFailed):
    """{path}: reading at offset {offset} failed: {reason}; look at the disk beneath it (dmesg)"""

    path: str
    offset: int
    reason: str


class ImageSilent(InstarfsError):
    """{path}: the file system that it is on does not answer; try again once it does"""

    path: str
    errno: ClassVar[int] = _errno.EIO


class ImageInUse(InstarfsError):
    """{path}: Failed to get {lock} lock: another process has the image open; {wayout}"""

    path: str
    lock: str
    wayout: str = "stop it first"
    errno: ClassVar[int] = _errno.EBUSY


class ImageNotLocked(InstarfsError):
    """{path}: whether another process has the image open is not known, since locks fail: {reason};
    look at the file system that it is on
    """

    path: str
    reason: str


class ReadCancelled(InstarfsError):
    """cancelled before it was done; read again to start over"""

    errno: ClassVar[int] = _errno.ECANCELED


class NotEnoughMemory(InstarfsError):
    """{path}: what its tables hold takes more memory than instarfs may use (`ulimit -d`,
    `ulimit -v`, or its own bound); allow it more, or export the disk (instarfs export)
    """

    path: str
    errno: ClassVar[int] = _errno.ENOMEM


class ImageUnreadable(InstarfsError):
    """{path}: {reason}"""

    path: str
    reason: str


class ImageNotQcow2(ImageUnreadable):
    """{path}: {reason}"""

    exit_code: ClassVar[int] = 63


class ImageTorn(InstarfsError):
    """{path}: {what}: check again"""

    path: str
    what: str


class ImageUnsettled(InstarfsError):
    """{path}: too much of it is in motion ({in_motion} changes at the last look): check again, or \
    with a longer --settle"""

    path: str
    in_motion: int


class LeaksInMotion(InstarfsError):
    """they may be in the caches of the program that writes to the image: look again when it has \
    ended"""


class FormatNotRead(InstarfsError):
    """{path}: format {format}: instarfs reads no images but qcow2"""

    path: str
    format: str


class FormatHasNoChecks(FormatNotRead):
    """{path}: format {format}: such an image has no metadata that could be checked"""

    exit_code: ClassVar[int] = 63


# ---- the guest's bytes ----


class GuestDamaged(InstarfsError):
    """{path}: the guest's bytes at offset {offset} cannot be read: {reason}; see image/map.json"""

    path: str
    offset: int
    reason: str


class GuestElsewhere(InstarfsError):
    """{path}: the guest's bytes at offset {offset} are in another file, {name}, which is not read:
    {reason}; see image/chain.json"""

    path: str
    offset: int
    name: str
    reason: str
    errno: ClassVar[int] = _errno.EACCES


class GuestEncrypted(InstarfsError):
    """{path}: the guest's disk is encrypted ({method}), and no key is ever asked for"""

    path: str
    method: str
    errno: ClassVar[int] = _errno.EACCES


class FileOutdated(InstarfsError):
    """the image has changed, and another content stands under that name by now"""

    errno: ClassVar[int] = _errno.ESTALE


class SnapshotMissing(InstarfsError):
    """{path}: there is no snapshot {index} any more"""

    path: str
    index: int
    errno: ClassVar[int] = _errno.ESTALE


class FollowImpossible(InstarfsError):
    """{directory}: cannot be followed: {reason}; name a directory with the files that the image
    names"""

    directory: str
    reason: str


# ---- the export ----


class ExportEncrypted(InstarfsError):
    """{path}: its disk is encrypted ({method}), and no key is ever asked for: what can be read is
    not the disk; copy the image as it is (cp --sparse=always), and decrypt the copy with qemu-img
    convert --object secret,...
    """

    path: str
    method: str


class SnapshotUnknown(InstarfsError):
    """{path}: no snapshot {word}, by its number in snapshots/ of a mount, or by its name; see:
    instarfs info
    """

    path: str
    word: str


class OutOccupied(InstarfsError):
    """{out}: is there, and {why}; nothing is written over it: name another file"""

    out: str
    why: str


class RescueStateFailed(InstarfsError):
    """{path}: cannot be used as the state of this rescue: {reason}; name another file (--state), or
    put this one aside: the next rescue begins a new one
    """

    path: str
    reason: str


class RescueStopped(InstarfsError):
    """{path}: stopped; {state} keeps how far it was: start the same command again to go on"""

    path: str
    state: str


class RescueNotWritten(InstarfsError):
    """{out}: cannot be written: {reason}; nothing is left there: name a file on another disk"""

    out: str
    reason: str


class RescueUnquoted(InstarfsError):
    """{path}: nothing was written: read what would be done (without --in-place), and if that is to
    be done, quote its plan's id: --in-place --plan {plan_id}
    """

    path: str
    plan_id: str
    errno: ClassVar[int] = _errno.EUCLEAN


class RescueNeedsUndo(InstarfsError):
    """{undo_file}: the undo file cannot be made: {reason}; nothing was written; name another place
    with --undo-file: in place nothing is rescued without
    """

    undo_file: str
    reason: str
    errno: ClassVar[int] = _errno.EUCLEAN


class OutMissing(InstarfsError):
    """{out}: is not there, though {map_file} lists what it holds; remove the list to begin anew"""

    out: str
    map_file: str


class OutOfSomethingElse(InstarfsError):
    """{out}: {what}; name another file, or remove {out} and {map_file} to begin anew"""

    out: str
    what: str
    map_file: str


class OutBusy(InstarfsError):
    """{out}: another export is writing to it; wait for its end"""

    out: str


class OutFailed(InstarfsError):
    """{out}: {what} failed: {reason}; what was copied is kept: {wayout}, and start the same command
    again
    """

    out: str
    what: str
    reason: str
    wayout: str = "look at the disk beneath it (dmesg)"


class ExportTorn(InstarfsError):
    """{path}: it was written to during the export, and {out} has parts of several moments; stop
    what writes to it, remove {out} and {map_file}, and export it again
    """

    path: str
    out: str
    map_file: str


class ExportStopped(InstarfsError):
    """{out}: stopped after {done} of {size} bytes; start the same command again to go on"""

    out: str
    done: int
    size: int


class ExportIncomplete(InstarfsError):
    """{out}: {unread} of {size} bytes could not be read{hint}; they are holes, listed in
    {map_file}
    """

    out: str
    unread: int
    size: int
    hint: str
    map_file: str


# ---- the mount ----


class RepairNotOffered(InstarfsError):
    """this mount is read-only; to repair, mount without --read-only"""

    errno: ClassVar[int] = _errno.EROFS


class RepairRunning(InstarfsError):
    """{path}: a repair is running; see repair/progress, and try again when it has ended"""

    path: str
    errno: ClassVar[int] = _errno.EBUSY


class NoSuchCommand(InstarfsError):
    """'{command}' means nothing here; write {grammar}"""

    command: str
    grammar: str
    errno: ClassVar[int] = _errno.EINVAL


class FuseMissing(InstarfsError):
    """FUSE is not usable here: {reason}; load its module with: modprobe fuse; a container must be
    given the device
    """

    reason: str


class FuseForbidden(InstarfsError):
    """FUSE is not usable here: {reason}; see who may with: ls -l /dev/fuse; a container must be
    allowed the device
    """

    reason: str


class FuseNotInstalled(InstarfsError):
    """a mount needs what is not installed: {reason}; all other commands work without. Install it:
    apt install gcc pkg-config fuse3 libfuse3-dev python3-dev (or dnf install gcc pkgconf fuse3
    fuse3-devel python3-devel), then pip install 'instarfs[mount]'
    """

    reason: str


class MountTableMissing(InstarfsError):
    """{directory}: what is mounted there is not known: {reason}; mount /proc with: mount -t proc
    proc /proc
    """

    directory: str
    reason: str


class FusermountMissing(InstarfsError):
    """{directory}: fusermount3 is not installed, and without it only root may mount; install
    fuse3
    """

    directory: str


class UnknownMountOption(InstarfsError):
    """-o {option}: not an option of this mount; see: instarfs mount --help"""

    option: str


class MountpointMissing(InstarfsError):
    """{directory}: no such directory; make it with: mkdir {directory!q}"""

    directory: str


class MountpointForbidden(InstarfsError):
    """{directory}: no permission to mount there; mount on a directory of your own"""

    directory: str


class MountpointIsNoDirectory(InstarfsError):
    """{directory}: not a directory; mount on an empty directory"""

    directory: str


class MountpointNotEmpty(InstarfsError):
    """{directory}: not empty; mount on an empty directory"""

    directory: str


class MountpointBusy(InstarfsError):
    """{directory}: something is mounted there already; unmount it, or mount elsewhere"""

    directory: str


class MountpointDead(InstarfsError):
    """{directory}: a mount whose process has died is still there; clear it with: instarfs
    umount {directory!q}
    """

    directory: str


class MountFailed(InstarfsError):
    """{directory}: cannot be mounted: {reason}"""

    directory: str
    reason: str


class NotMounted(InstarfsError):
    """{directory}: no instarfs mount is there; see: findmnt -t fuse.instarfs"""

    directory: str


class UnmountBusy(InstarfsError):
    """{directory}: in use{loops}; leave the directory and close its files (fuser -vm
    {directory!q}), then unmount again
    """

    directory: str
    loops: str = ""


class UnmountFailed(InstarfsError):
    """{directory}: cannot be unmounted: {reason}"""

    directory: str
    reason: str


# ---- the repair ----


class ImageReadOnly(InstarfsError):
    """{path}: cannot be opened for writing: {reason}; check its permissions, chattr, and whether
    its file system is mounted read-only
    """

    path: str
    reason: str
    errno: ClassVar[int] = _errno.EROFS


class ImageReplaced(InstarfsError):
    """{path}: another file has taken its place; look at the new one, then try again"""

    path: str
    errno: ClassVar[int] = _errno.ESTALE


class PreviewOutdated(InstarfsError):
    """{path}: it was written to since this preview was made; mount the preview anew"""

    path: str
    errno: ClassVar[int] = _errno.ESTALE


class ImageChanged(InstarfsError):
    """{path}: {what}; nothing was written; check it again"""

    path: str
    what: str
    errno: ClassVar[int] = _errno.ESTALE


class PlanStale(InstarfsError):
    """{path}: plan {quote} is not what would be done now, that is {plan_id}; review that one"""

    path: str
    quote: str
    plan_id: str
    errno: ClassVar[int] = _errno.ESTALE


class RepairWriteFailed(InstarfsError):
    """{path}: writing failed: {reason}; the image has been put back as it was; look at the disk
    beneath it (dmesg)
    """

    path: str
    reason: str


class RepairNoSpace(InstarfsError):
    """{path}: writing failed: {reason}; the image has been put back as it was; make space, then
    try again
    """

    path: str
    reason: str
    errno: ClassVar[int] = _errno.ENOSPC


class RepairUnproven(InstarfsError):
    """{path}: after the repair the image was not what had been proven; it has been put back as it
    was; look at the disk beneath it (dmesg)
    """

    path: str


class RepairCancelled(InstarfsError):
    """{path}: the repair was cancelled; the image is as it was before"""

    path: str
    errno: ClassVar[int] = _errno.ECANCELED


class RepairIncomplete(InstarfsError):
    """{path}: findings that are left: {left} of {found}; see repair/result.json, or the output of
    check -r
    """

    path: str
    found: int
    left: int
    errno: ClassVar[int] = _errno.EUCLEAN


class PutBackFailed(InstarfsError):
    """{path}: the repair ended early ({reason}), and putting the image back failed
    ({put_back_reason}): it is half-repaired; do not use it; {wayout}
    """

    path: str
    reason: str
    put_back_reason: str
    wayout: str = "its undo file is kept: when the disk works again, run instarfs undo"


class PutBackNoSpace(PutBackFailed):
    """{path}: the repair ended early ({reason}), and putting the image back failed
    ({put_back_reason}): it is half-repaired; do not use it; {wayout}
    """

    wayout = "its undo file is kept: make space (df), then run instarfs undo"
    errno: ClassVar[int] = _errno.ENOSPC


class TrimUnsupported(InstarfsError):
    """{path}: cannot be trimmed: {reason}"""

    path: str
    reason: str
    errno: ClassVar[int] = _errno.EOPNOTSUPP


class TrimRefused(InstarfsError):
    """{path}: not trimmed, for its check is not clean: {verdict}; repair it first"""

    path: str
    verdict: str
    errno: ClassVar[int] = _errno.EUCLEAN


class TrimWouldBury(InstarfsError):
    """{path}: not trimmed: {count} free clusters look like L2 tables of the disk, the first at
    {offset}, and lead to free clusters with data: its metadata may have been written over; keep a
    copy of the image, and if all that may go: instarfs trim --plan {id}
    """

    path: str
    count: int
    offset: int
    id: str
    errno: ClassVar[int] = _errno.EUCLEAN


class TrimFailed(InstarfsError):
    """{path}: trimming failed: {reason}; only free clusters were touched"""

    path: str
    reason: str


class TrimCancelled(InstarfsError):
    """{path}: cancelled before everything was trimmed; only free clusters were touched"""

    path: str
    errno: ClassVar[int] = _errno.ECANCELED


class RepairInterrupted(InstarfsError):
    """{path}: a repair of it was interrupted; take it back first: instarfs undo{option} {path!q}"""

    path: str
    option: str = ""
    errno: ClassVar[int] = _errno.EUCLEAN


class RepairPending(InstarfsError):
    """{path}: {sentence}"""

    path: str
    sentence: str
    errno: ClassVar[int] = _errno.EUCLEAN


# ---- the undo file ----


class UndoFileMissing(InstarfsError):
    """{path}: there is nothing to undo: no file {undo_file}{hint}"""

    path: str
    undo_file: str
    hint: str = ""
    errno: ClassVar[int] = _errno.ENODATA


class UndoEmpty(InstarfsError):
    """{path}: there is nothing to undo: {undo_file} holds no repair"""

    path: str
    undo_file: str
    errno: ClassVar[int] = _errno.ENODATA


class UndoSealed(InstarfsError):
    """{path}: its last repair was made with --no-undo: neither that one can be taken back byte for
    byte, nor those before it, which {undo_file} keeps; nothing was written
    """

    path: str
    undo_file: str
    errno: ClassVar[int] = _errno.ESTALE


class UndoFileDamaged(InstarfsError):
    """{undo_file}: {problem}; move it away if it is of no use to you"""

    undo_file: str
    problem: str
    errno: ClassVar[int] = _errno.EUCLEAN


class UndoFileUnreachable(UndoFileDamaged):
    """{undo_file}: the undo file cannot be opened: {problem}"""

    errno: ClassVar[int] = _errno.EIO


class UndoFileForbidden(UndoFileDamaged):
    """{undo_file}: the undo file may not be opened, and may be needed: {problem}; run as its owner,
    or as root
    """

    errno: ClassVar[int] = _errno.EACCES


class UndoFileForeign(UndoFileDamaged):
    """{undo_file}: {problem}; if it belongs to this image, name it with --undo-file, else move it
    away
    """

    errno: ClassVar[int] = _errno.ESTALE


class UndoFileTaken(UndoFileDamaged):
    """{undo_file}: {problem}; nothing was written; move it away, or name another place with
    --undo-file
    """

    errno: ClassVar[int] = _errno.ESTALE


class UndoFileElsewhere(InstarfsError):
    """{path}: it has an undo file already, {beside}: go on with that one, without --undo-file, or
    move it to {undo_file}
    """

    path: str
    beside: str
    undo_file: str
    errno: ClassVar[int] = _errno.EUCLEAN


class ImageNameless(InstarfsError):
    """{path}: this is not the name of a file, or of one that was deleted: an undo file beside it
    would never be found; nothing was written; use its own name, or say where with --undo-file
    """

    path: str
    errno: ClassVar[int] = _errno.ESTALE


class UndoFileImpossible(InstarfsError):
    """{undo_file}: the undo file cannot be made: {reason}; nothing was written; name another place
    with --undo-file, or repair with --no-undo
    """

    undo_file: str
    reason: str
    errno: ClassVar[int] = _errno.EUCLEAN


class UndoFileAmbiguous(UndoFileImpossible):
    """{undo_file}: {reason}; nothing was written; say where it is to be, with --undo-file"""


class UndoFileNoSpace(UndoFileImpossible):
    """{undo_file}: there is no space for the undo file: {reason}; nothing was written; make space
    (df, df -i), name another place with --undo-file, or repair with --no-undo
    """

    errno: ClassVar[int] = _errno.ENOSPC


class UndoFileFailed(InstarfsError):
    """{undo_file}: the undo file cannot be brought up to date: {reason}; {done}look at the disk
    beneath it (dmesg)
    """

    undo_file: str
    reason: str
    done: str = ""


class UndoFileFull(UndoFileFailed):
    """{undo_file}: the undo file cannot be brought up to date: {reason}; {done}make space (df),
    then try again
    """

    errno: ClassVar[int] = _errno.ENOSPC


class UndoStale(InstarfsError):
    """{path}: {what}, so that {undo_file} no longer fits it; nothing was written; move that file
    away to go on without it
    """

    path: str
    what: str
    undo_file: str
    errno: ClassVar[int] = _errno.ESTALE
