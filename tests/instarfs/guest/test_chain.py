"""Which of the files that an image names are opened: none that the user did not allow."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from instarfs.errors import FollowImpossible, GuestElsewhere
from instarfs.guest.follow import FILESYSTEM_TYPE, Follow, NotOpened, beside
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image, mount_id
from planner.guest.chain import Member
from tests.images.builder import ImageBuilder

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an image had better not name, below and above a directory that is followed."""
    followed = tmp_path / "followed"
    followed.mkdir()
    (tmp_path / "outside").write_bytes(b"secret" * 1000)
    (followed / "inside").write_bytes(b"public" * 1000)
    (followed / "link").symlink_to("inside")
    (followed / "escape").symlink_to("../outside")
    (followed / "linked").symlink_to("..")
    (followed / "folder").mkdir()
    (followed / "folder/deep").write_bytes(b"deep" * 1000)
    os.mkfifo(followed / "fifo")
    os.mknod(followed / "device", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    return followed


def guest_of(image: Path, *followed: Path) -> Guest:
    return Guest(Image.open(str(image)), Follow([str(each) for each in followed]))


def overlay(image: Path, name: bytes, form: bytes | None = b"raw", bits: int = 16) -> Path:
    builder = ImageBuilder(cluster_bits=bits, size=MIB, backing_file=name, backing_format=form)
    image.write_bytes(builder.build().data)
    return image


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def read(guest: Guest) -> bytes:
    return bytes(guest.find(Place(Part.DISK)).read(0, 6))


def refused(guest: Guest) -> Member:
    """The one file that is named, which must not be read."""
    with pytest.raises(GuestElsewhere) as caught:
        read(guest)
    assert caught.value.errno == errno.EACCES
    (member,) = guest.members
    assert member.refusal is not None
    assert member.refusal in str(caught.value)
    return member


REFUSED = {
    b"missing": "no such file",
    b"/etc/passwd": "in none of the followed directories",
    b"../outside": "in none of the followed directories",
    b"folder/../../outside": "out of the followed directory",
    b"folder/../..": "out of the followed directory",
    b"inside/../inside": "no such file",
    b"missing/../inside": "no such file",
    b"link": "symbolic link",
    b"escape": "symbolic link",
    b"linked/outside": "symbolic link",
    b"fifo": "not a regular file",
    b"device": "not a regular file",
    b"folder": "not a regular file",
    b"nbd://localhost/disk": "protocol",
    b'json:{"driver":"raw"}': "protocol",
    b"file:inside": "protocol",
    b"inside\0": "zero byte",
    b"image.qcow2": "in the chain already",
}


@pytest.mark.parametrize("name", REFUSED, ids=repr)
def test_what_is_not_opened(name: bytes, folder: Path) -> None:
    guest = guest_of(overlay(folder / "image.qcow2", name), folder)
    assert REFUSED[name] in str(refused(guest).refusal)


@pytest.mark.parametrize(
    "name",
    [
        b"inside",
        b"./inside",
        b"folder/../inside",
        b"folder/./..//folder/../inside",
    ],
)
def test_what_is_below_is_opened(name: bytes, folder: Path) -> None:
    assert read(guest_of(overlay(folder / "image.qcow2", name), folder)) == b"public"


def test_a_process_that_serves_a_mount_follows_into_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own or another one of instarfs; here a file system of the kernel passes for that."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    number = mount_id(os.open("/proc", os.O_PATH))
    for table, kind in ((mine, FILESYSTEM_TYPE), (other, "fuse.sshfs")):
        table.write_text(f"9999 1 0:9 / /p rw - x x rw\n{number} 1 0:5 / /proc rw - {kind} x rw\n")
    follow = Follow(["/"], serving=True)
    for table in (mine, tmp_path / "missing"):
        monkeypatch.setattr("instarfs.guest.follow.MOUNT_TABLE", table)
        for name in ("/proc/version", "/proc/nothing", "/proc/sys/../version", "/etc/../proc/x"):
            with pytest.raises(NotOpened, match="in a mount of instarfs"):
                follow.open(name)
    Follow(["/"]).open("/proc/version").close()
    monkeypatch.setattr("instarfs.guest.follow.MOUNT_TABLE", other)
    follow.open("/proc/version").close()


def test_an_image_may_be_elsewhere(folder: Path) -> None:
    image = overlay(folder.parent / "image.qcow2", b"followed/inside")
    assert read(guest_of(image, folder)) == b"public"
    absolute = overlay(folder.parent / "absolute.qcow2", os.fsencode(folder / "folder/deep"))
    assert read(guest_of(absolute, folder / "folder")) == b"deepde"
    assert read(guest_of(absolute, Path("/usr"), folder / "folder")) == b"deepde"


def test_names_count_from_where_the_image_really_is(folder: Path) -> None:
    """As for QEMU, which leaves the links in the path of the image to the kernel."""
    image = overlay(folder / "folder/image.qcow2", b"../inside")
    (folder.parent / "elsewhere").mkdir()
    way = folder.parent / "elsewhere/way"
    way.symlink_to(folder / "folder")
    assert read(guest_of(way / image.name, folder)) == b"public"


@pytest.mark.parametrize("form", [None, b"", b"vmdk"])
def test_no_format_is_guessed(form: bytes | None, folder: Path) -> None:
    guest = guest_of(overlay(folder / "image.qcow2", b"inside", form), folder)
    assert "format" in str(refused(guest).refusal)


def test_without_a_followed_directory_nothing_is_opened(folder: Path) -> None:
    guest = guest_of(overlay(folder / "image.qcow2", b"inside"))
    assert "no directory is followed" in str(refused(guest).refusal)


def test_a_member_that_is_not_what_it_is_said_to_be(folder: Path) -> None:
    guest = guest_of(overlay(folder / "image.qcow2", b"inside", b"qcow2"), folder)
    assert "not a qcow2 image" in str(refused(guest).refusal)
    builder = ImageBuilder(size=MIB, crypt_method=1)
    (folder / "secret").write_bytes(builder.build().data)
    guest = guest_of(overlay(folder / "image.qcow2", b"secret", b"qcow2"), folder)
    assert "encrypted (aes)" in str(refused(guest).refusal)


def test_a_loop_ends(folder: Path) -> None:
    overlay(folder / "a", b"b", b"qcow2")
    guest = guest_of(overlay(folder / "b", b"a", b"qcow2"), folder)
    assert [member.refusal for member in guest.members] == [None, "it is in the chain already"]
    with pytest.raises(GuestElsewhere):
        read(guest)


def test_a_chain_has_an_end(folder: Path) -> None:
    for number in range(70):
        overlay(folder / str(number), str(number + 1).encode(), b"qcow2", bits=9)
    guest = guest_of(folder / "0", folder)
    assert [member.refusal is None for member in guest.members] == [True] * 64 + [False]
    assert "64 members" in str(guest.members[-1].refusal)
    with pytest.raises(GuestElsewhere):
        read(guest)


def test_a_fifo_is_not_even_opened(folder: Path) -> None:
    """Whoever waits for a reader of it goes on waiting."""
    writer = subprocess.Popen(["sh", "-c", f"exec 3> '{folder}/fifo'"])
    try:
        refused(guest_of(overlay(folder / "image.qcow2", b"fifo"), folder))
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()


def test_the_image_names_no_data_file(folder: Path) -> None:
    builder = ImageBuilder(size=MIB, data_file=b"")
    builder.write(0, b"data")
    (folder / "image.qcow2").write_bytes(builder.build().data)
    assert "does not name it" in str(refused(guest_of(folder / "image.qcow2", folder)).refusal)


def test_a_guest_holds_its_files_only_as_long_as_it_lives(folder: Path) -> None:
    before = descriptors()
    guest = guest_of(overlay(folder / "image.qcow2", b"inside"), folder)
    assert descriptors() > before
    del guest
    assert descriptors() == before


@pytest.mark.parametrize("directory", ["missing", "inside"])
def test_only_directories_are_followed(directory: str, folder: Path) -> None:
    with pytest.raises(FollowImpossible):
        Follow([str(folder / directory)])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/x/y", "/x/y"),
        ("x", "/a/b/x"),
        ("../x", "/a/x"),
        ("./../x", "/a/x"),
        ("../../../x", "/x"),
        ("x/../y", "/a/b/x/../y"),
        ("..", "/a/b/.."),
    ],
)
def test_a_name_leads_to_a_path(name: str, path: str) -> None:
    assert beside("/a/b/image", name) == path
