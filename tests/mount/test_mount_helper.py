"""mount(8), fstab, findmnt and umount(8) with the type ``fuse.instarfs``.

In a mount namespace of its own, where the helper lies in /sbin and fstab is the test's.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.instarfs.cli.test_repair import LEAKY, content

HELPER = Path(sys.prefix, "bin/mount.fuse.instarfs")

# /sbin is a link to /usr/sbin, or not; an overlay over it adds a file and changes nothing.
PREPARE = """
set -eu
mkdir upper work
sbin=$(readlink -f /sbin)
mount -t tmpfs none work
mkdir work/upper work/work
ln -s {helper} work/upper/mount.fuse.instarfs
mount -t overlay none -o lowerdir=$sbin,upperdir=work/upper,workdir=work/work $sbin
mount --bind fstab /etc/fstab
"""


def run(folder: Path, script: str, fstab: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "mnt").mkdir()
    (folder / "fstab").write_text(fstab)
    whole = PREPARE.format(helper=shlex.quote(str(HELPER))) + script
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", whole],
        check=False,
        capture_output=True,
        cwd=folder,
        text=True,
        timeout=60,
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(content(*LEAKY))
    return path


def test_mount_by_type(tmp_path: Path, image: Path) -> None:
    done = run(
        tmp_path,
        """
mount -t fuse.instarfs -o ro,nosuid disk.qcow2 mnt
findmnt -n -o FSTYPE,SOURCE mnt
grep -q . mnt/check/report.txt
umount mnt
findmnt -n mnt || echo gone
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    kind, source, *_, last = done.stdout.split()
    assert (kind, source, last) == ("fuse.instarfs", str(image), "gone")


def test_mount_by_fstab(tmp_path: Path, image: Path) -> None:
    undo = tmp_path / "elsewhere.undo"
    options = f"noauto,nofail,x-systemd.automount,undo_file={undo},follow={tmp_path}"
    done = run(
        tmp_path,
        """
mount mnt
echo leaks > mnt/repair/tier
umount mnt
mount -o remount mnt 2>/dev/null || echo not mounted
""",
        fstab=f"{image} {tmp_path}/mnt fuse.instarfs {options} 0 0\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "not mounted\n", "")
    assert undo.exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [("bogus", "-o bogus"), ("follow=/nowhere", "/nowhere"), ("follow=", "-o follow=")],
)
def test_what_is_refused_is_said_in_one_line(
    tmp_path: Path, image: Path, options: str, why: str
) -> None:
    done = run(tmp_path, f"mount -t fuse.instarfs -o {options} disk.qcow2 mnt")
    assert done.returncode != 0
    assert done.stderr.startswith("instarfs: ")
    assert done.stderr.count("\n") == 1
    assert why in done.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("image",), ("a", "b", "c"), ("-x", "a", "b"), ("a", "b", "-o")]
)
def test_the_helper_says_how_it_is_called(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([HELPER, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("instarfs: ")
    assert "usage: mount.fuse.instarfs IMAGE DIR" in done.stderr


def test_a_mount_that_is_only_rehearsed_is_none(tmp_path: Path, image: Path) -> None:
    done = run(tmp_path, "mount -f -t fuse.instarfs disk.qcow2 mnt; ls mnt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
