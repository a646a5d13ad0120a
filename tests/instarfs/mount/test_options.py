"""instarfs.mount.options: what -o understands, and how libfuse is told."""

import pytest

from instarfs.errors import UnknownMountOption
from instarfs.mount.options import MountOptions


def test_passes_on_what_fuse_knows_and_drops_what_is_for_others() -> None:
    options = MountOptions.parse(["allow_other,rw,nosuid", "", "_netdev,x-systemd.automount,,ro"])
    assert options.passed_on == {"allow_other", "nosuid", "ro"}
    assert options.for_others


@pytest.mark.parametrize("option", ["dev", "suid", "exec", "defaults", "comment=x", "user=me"])
def test_some_mean_nothing_here(option: str) -> None:
    assert MountOptions.parse([option]) == MountOptions()


@pytest.mark.parametrize("option", ["bogus", "fsname=x", "subtype=y", "uid=0", "allow_other=1"])
def test_an_unknown_one_is_named(option: str) -> None:
    with pytest.raises(UnknownMountOption, match=f"^-o {option}: "):
        MountOptions.parse([f"ro,{option}"])


def test_read_only_is_an_option() -> None:
    assert MountOptions.parse([], read_only=True) == MountOptions.parse(["ro"])
    assert MountOptions.parse(["ro"]).read_only
    assert not MountOptions.parse(["rw"]).read_only


def test_an_fstab_can_say_what_the_command_line_can() -> None:
    options = MountOptions.parse(["follow=/a,ro,follow=/b\\,c", "no_undo,undo_file=/u/x"])
    assert options.follow == ("/a", "/b,c")
    assert options.undo_file == "/u/x"
    assert not options.keep_undo
    assert options.passed_on == {"ro"}


def test_unless_it_says_otherwise_nothing_is_followed_and_undo_is_kept() -> None:
    assert MountOptions.parse(["ro"]).follow == ()
    assert MountOptions.parse(["ro"]).undo_file is None
    assert MountOptions.parse(["ro"]).keep_undo


@pytest.mark.parametrize("option", ["follow=", "undo_file=", "follow", "no_undo=1"])
def test_an_option_needs_its_value_and_no_other(option: str) -> None:
    with pytest.raises(UnknownMountOption, match=f"^-o {option}: "):
        MountOptions.parse([option])


def test_others_are_kept_out_unless_invited() -> None:
    assert not MountOptions.parse(["allow_root"]).for_others


@pytest.mark.parametrize(
    ("path", "escaped"),
    [
        ("/a/b.qcow2", "/a/b.qcow2"),
        ("/a,b", "/a\\,b"),
        ("/a\\b", "/a\\\\b"),
        ("/a b", "/a\\040b"),
        ("/ä", "/\\303\\244"),
        ("/\udcff", "/\\377"),
        ("/a\nb", "/a\\012b"),
    ],
)
def test_a_path_survives_libfuses_option_parser(path: str, escaped: str) -> None:
    assert MountOptions().for_fuse(path) == {
        "noexec",
        f"fsname={escaped}",
        "subtype=instarfs",
    }
