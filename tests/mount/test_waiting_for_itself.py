"""A mount that is led to itself, or to one that is led back: nobody waits, and it ends when told.

Whatever goes wrong here hangs processes for good: every mount is cut off by its connection
(/sys/fs/fuse/connections) at the end, also when it has hung.
"""

import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instarfs.image.directory import SUFFIX
from tests.mount.mounts import (
    INSTARFS,
    MakeMount,
    Mount,
    environment,
    make_image,
    mounted,
    run,
)

SECONDS = 10.0
"""In which everything here must have been answered, and every mount have ended."""

FILES = (
    "README.txt",
    "disk.raw",
    "image/chain.json",
    "image/info.json",
    "check/report.txt",
    "image/map.json",
)


def abort(number: int) -> None:
    """Have the kernel answer all that waits for the mount of this device number with an error."""
    control = Path(f"/sys/fs/fuse/connections/{number}/abort")
    with contextlib.suppress(OSError):
        if not control.parent.parent.is_mount():
            subprocess.run(["mount", "-t", "fusectl", "none", control.parents[1]], check=False)
        control.write_text("1")


def connections() -> list[tuple[int, str]]:
    """Of every mount the number of its connection, from the mount table, and where it is: a mount
    that hangs tells nothing itself.
    """
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [(int(words[2].partition(":")[2]), words[4]) for words in lines if words[2][:2] == "0:"]


def number_of(directory: Path) -> int:
    return [number for number, where in connections() if where == str(directory)][-1]


@contextlib.contextmanager
def cut_off(mount: Mount) -> Iterator[Mount]:
    """Whatever has become of *mount*, nobody waits for it afterwards."""
    number = number_of(mount.path)
    try:
        yield mount
    except BaseException:
        mount.process.kill()
        # The number of a mount that has ended may be that of another by now, of somebody else.
        if all(where == str(mount.path) for known, where in connections() if known == number):
            abort(number)
        raise


@pytest.fixture
def hangable(tmp_path: Path) -> Iterator[MakeMount]:
    """As `mount`; the directory is named too."""
    with contextlib.ExitStack() as stack:

        def make(image: Path, directory: Path, *arguments: str | Path) -> Mount:
            command = [*INSTARFS, "mount", "-f", *arguments, image, directory]
            made = stack.enter_context(mounted(command, image, directory))
            return stack.enter_context(cut_off(made))

        yield make


def answers(path: Path) -> int:
    """The exit code of a process that reads *path*, which must end in time."""
    reader = subprocess.Popen(
        ["head", "-c", "100000", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        return reader.wait(SECONDS)
    except subprocess.TimeoutExpired:
        reader.kill()
        pytest.fail(f"reading {path} hangs")


def require_answers(mount: Mount, *, refused: tuple[str, ...] = ()) -> None:
    for name in FILES:
        assert answers(mount / name) == (name in refused), name
    commands: list[list[str | Path]] = [["ls", "-lR", mount.path], ["stat", mount / "README.txt"]]
    for command in commands:
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=SECONDS)


def end_by_signal(mount: Mount) -> None:
    mount.process.send_signal(signal.SIGTERM)


def end_by_umount(mount: Mount) -> None:
    subprocess.run(
        [*INSTARFS, "umount", mount.path], check=True, env=environment(), timeout=SECONDS
    )


@pytest.fixture(params=[end_by_signal, end_by_umount])
def end(request: pytest.FixtureRequest) -> Callable[[Mount], None]:
    """Ends a mount, in time."""

    def ended(mount: Mount) -> None:
        begun = time.monotonic()
        request.param(mount)
        assert mount.process.wait(SECONDS) == 0
        assert time.monotonic() - begun < SECONDS
        assert not mount.is_mounted()

    return ended


def overlay(path: Path, backing: str) -> Path:
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", path, "1M")
    return path


@pytest.mark.parametrize("name", ["disk.raw", "check/result.json", "nothing", "repair/tier"])
def test_a_backing_name_that_leads_into_its_own_mount(
    hangable: MakeMount, tmp_path: Path, name: str, end: Callable[[Mount], None]
) -> None:
    image = overlay(tmp_path / "image", f"mnt/{name}")
    mount = hangable(image, tmp_path / "mnt", "--follow", tmp_path)
    require_answers(mount, refused=("disk.raw",))
    assert "it is in a mount of instarfs, which a mount does not follow" in mount.read(
        "image/chain.json"
    )
    end(mount)


@pytest.mark.parametrize("target", ["mnt/disk.raw", "mnt", "mnt/check", "mnt/../image"])
def test_a_link_into_its_own_mount_in_the_place_of_the_image(
    hangable: MakeMount, tmp_path: Path, target: str, end: Callable[[Mount], None]
) -> None:
    image = make_image(tmp_path / "image", "1M")
    mount = hangable(image, tmp_path / "mnt")
    require_answers(mount)
    image.rename(tmp_path / "away")
    image.symlink_to(tmp_path / target)
    require_answers(mount, refused=tuple(FILES[1:]))
    with pytest.raises(PermissionError):
        (mount / "repair/tier").write_text("leaks")
    end(mount)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file")
def test_its_own_mount_mounted_on_the_image(
    hangable: MakeMount, tmp_path: Path, end: Callable[[Mount], None]
) -> None:
    image = make_image(tmp_path / "image", "1M")
    mount = hangable(image, tmp_path / "mnt")
    run("mount", "--bind", mount / "disk.raw", image)
    try:
        require_answers(mount, refused=tuple(FILES[1:]))
    finally:
        run("umount", image)
    require_answers(mount)
    end(mount)


@contextlib.contextmanager
def silent_file(path: Path) -> Iterator[None]:
    """A file of a FUSE file system that answers nothing, mounted on that of *path*."""
    library, device = ctypes.CDLL(None, use_errno=True), os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode={stat.S_IFREG:o},user_id=0,group_id=0"
    try:
        done = library.mount(b"silent", os.fsencode(path), b"fuse", 0, options.encode())
        assert done == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            library.umount2(os.fsencode(path), 2)
    finally:
        os.close(device)  # which ends whoever waits


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file")
@pytest.mark.parametrize("is_undo_file", [False, True])
def test_a_file_that_answers_nothing_mounted_on_the_image_or_its_undo_file(
    hangable: MakeMount, tmp_path: Path, end: Callable[[Mount], None], *, is_undo_file: bool
) -> None:
    image = make_image(tmp_path / "image", "1M")
    undo = image.with_name(f"image{SUFFIX}")
    mount = hangable(image, tmp_path / "mnt")
    require_answers(mount)
    if is_undo_file:
        undo.touch()
    with silent_file(undo if is_undo_file else image):
        os.utime(tmp_path)
        require_answers(mount, refused=() if is_undo_file else tuple(FILES[1:]))
        # An image there is never asked for; an undo file is, by a process that is not waited for.
        errno_says = "Input/output error" if is_undo_file else "Permission denied"
        with (
            (mount / "repair/tier").open("wb", buffering=0) as control,
            pytest.raises(OSError, match=errno_says),
        ):
            control.write(b"leaks")
        end(mount)


@contextlib.contextmanager
def overlaid(mount: Mount, folder: Path) -> Iterator[None]:
    """What *mount* shows, shown again on *folder* by a file system that does not say so."""
    folder.mkdir()
    (empty := folder.with_name("empty")).mkdir()
    lower = f"lowerdir={mount.path}:{empty}"
    done = subprocess.run(["mount", "-t", "overlay", "none", "-o", lower, folder], check=False)
    if done.returncode:
        pytest.skip("no overlay can be mounted here")
    try:
        yield
    finally:
        run("umount", "-l", folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount an overlay")
def test_its_own_mount_behind_another_file_system(hangable: MakeMount, tmp_path: Path) -> None:
    """That cannot be seen: who reads the disk waits, and nobody else, until the mount is ended."""
    image = overlay(tmp_path / "image", "overlay/disk.raw")
    mount = hangable(image, tmp_path / "mnt", "--follow", tmp_path)
    with overlaid(mount, tmp_path / "overlay"):
        readers = [
            subprocess.Popen(["cat", mount / "disk.raw"], stderr=subprocess.DEVNULL)
            for _ in range(20)
        ]
        for _ in range(3):
            for name in ("README.txt", "image/info.json", "check/result.json"):
                assert answers(mount / name) == 0, name
        assert any(reader.poll() is None for reader in readers)
        end_by_signal(mount)
        assert mount.process.wait(SECONDS) == 0
        assert not mount.is_mounted()
        assert [reader.wait(SECONDS) for reader in readers] == [1] * len(readers)


def test_two_mounts_that_name_each_other(
    hangable: MakeMount, tmp_path: Path, end: Callable[[Mount], None]
) -> None:
    images = [overlay(tmp_path / f"image{n}", f"mnt{1 - n}/disk.raw") for n in (0, 1)]
    mounts = [
        hangable(image, tmp_path / f"mnt{n}", "--follow", tmp_path)
        for n, image in enumerate(images)
    ]
    for mount in mounts:
        require_answers(mount, refused=("disk.raw",))
    for mount in mounts:
        end(mount)


@pytest.mark.parametrize("is_inner_first", [True, False])
def test_a_mount_of_what_is_in_a_mount(
    hangable: MakeMount, tmp_path: Path, is_inner_first: bool
) -> None:
    """Its user named it, and it was there before: that is read, and waits for nobody in turn."""
    inner_image = make_image(tmp_path / "inner.qcow2", "1M")
    outer_image = tmp_path / "outer.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", inner_image, outer_image)
    outer = hangable(outer_image, tmp_path / "outer", "--follow", tmp_path)
    inner = hangable(outer / "disk.raw", tmp_path / "inner", "--follow", tmp_path)
    # What ends below it is an error, and said.
    inner.unexpected = ()
    require_answers(outer)
    require_answers(inner)
    for mount in (inner, outer) if is_inner_first else (outer, inner):
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(SECONDS) == 0
        assert not mount.is_mounted()


def test_a_mount_beside_the_image_under_the_name_that_is_advised(
    hangable: MakeMount, tmp_path: Path, end: Callable[[Mount], None]
) -> None:
    """Which names are free is looked at for every report: that of the mount itself is not."""
    image = make_image(tmp_path / "image", "1M")
    mount = hangable(image, tmp_path / "image.mnt")
    require_answers(mount)
    end(mount)
