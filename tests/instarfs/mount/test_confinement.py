"""instarfs.mount.confinement where the kernel can do less: as much as it can, and the rest is said.

What is given up never comes back, so each test is a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from instarfs.mount.confinement import landlock_version
from tests.mount.mounts import environment

PROGRAM = """
import errno, logging, os, sys
from pathlib import Path
from instarfs.image import Image
from instarfs.mount import confinement

logging.basicConfig(format="%(message)s", stream=sys.stdout)
image, other, version = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
confinement.landlock_version = lambda: version
confinement.Confinement(Image.open(str(image)), read_only=bool(sys.argv[4:])).enforce()

def attempt(name, act):
    try:
        act()
        print(name, "done")
    except OSError as failed:
        print(name, errno.errorcode[failed.errno])

undo = image.with_name("undo")
attempt("read", image.read_bytes)
attempt("write", lambda: os.close(os.open(image, os.O_RDWR)))
attempt("make", undo.touch)
attempt("rename", lambda: undo.rename(undo.with_suffix(".old")))
attempt("remove", undo.with_suffix(".old").unlink)
attempt("read-elsewhere", other.read_bytes)
attempt("write-elsewhere", lambda: os.close(os.open(other, os.O_WRONLY)))
attempt("make-elsewhere", other.with_name("new").touch)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image").write_bytes(b"image")
    return tmp_path / "here/image"


def confined(image: Path, version: int, *read_only: str) -> dict[str, str]:
    other = image.parents[1] / "elsewhere/image"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, image, other, str(version), *read_only],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.stderr == ""
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


SAID = "not confined: files are not given up:"
HERE, ELSEWHERE = ("write", "make", "rename", "remove"), ("read", "write", "make")


@pytest.mark.parametrize("version", range(1, landlock_version() + 1))
def test_every_version_of_landlock_keeps_to_the_images_directory(image: Path, version: int) -> None:
    outcomes = confined(image, version)
    assert outcomes == {
        "read": "done",
        **dict.fromkeys(HERE, "done"),
        **{f"{name}-elsewhere": "EACCES" for name in ELSEWHERE},
    }


def test_read_only_nothing_can_be_written(image: Path) -> None:
    outcomes = confined(image, landlock_version(), "read-only")
    assert outcomes["read"] == "done"
    assert {outcomes[name] for name in ("write", "make")} == {"EACCES"}


def test_without_landlock_that_is_said_once_and_all_goes_on(image: Path) -> None:
    outcomes = confined(image, -1)
    assert outcomes.pop(f"{SAID} this kernel has no") == "Landlock"
    assert set(outcomes.values()) == {"done"}
