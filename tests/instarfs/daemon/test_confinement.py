"""instarfs.daemon.confinement where the kernel can do less: as much as it can, and the rest is
said.

The filter of system calls, which would refuse more, is switched off but where it is what is tested;
what it refuses is in test_calls.py. What is given up never comes back, so each test is a process of
its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from instarfs.daemon.seccomp import MACHINES
from instarfs.image.linux import landlock_version
from tests.block_devices import attached, require_loop_devices
from tests.mount.mounts import environment

PROGRAM = """
import errno, logging, os, sys
from pathlib import Path
from instarfs.image.file import Image
from instarfs.daemon import confinement

logging.basicConfig(format="%(message)s", stream=sys.stdout)
image, other, version, who = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
confinement.landlock_version = lambda: version
def refuse(calls):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

confinement.seccomp.deny_all_but = refuse
opened, whose = Image.open(str(image)), confinement.Confinement
if who == "daemon":
    whose.of_daemon(opened).enforce()
else:
    whose.of_broker(opened, read_only=who == "reading broker").enforce()

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
attempt("cut", lambda: os.close(os.open(image, os.O_RDONLY | os.O_TRUNC)))
attempt("move-elsewhere", lambda: image.rename(other.with_name("new")))
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image").write_bytes(b"image")
    return tmp_path / "here/image"


def run_program(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, which must succeed."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    )


def confined(image: Path, version: int, who: str) -> dict[str, str]:
    other = image.parents[1] / "elsewhere/image"
    done = run_program(PROGRAM, image, other, str(version), who)
    assert done.stderr == ""
    outcomes = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert outcomes.pop(f"{NOT_GIVEN_UP} Function not") == "implemented"
    return outcomes


NOT_GIVEN_UP = "not confined: system calls are not given up:"
SAID = "not confined: files are not given up:"
NO_RULE = (
    "not confined: openings that empty a file are not given up:"
    " this kernel's Landlock has no rule on"
)
ELSEWHERE = ("read-elsewhere", "write-elsewhere", "make-elsewhere", "move-elsewhere")
every_version = pytest.mark.parametrize("version", range(1, landlock_version() + 1))


@every_version
def test_every_version_of_landlock_keeps_a_broker_to_the_images_directory(
    image: Path, version: int
) -> None:
    outcomes = confined(image, version, "broker")
    refused = {name: outcomes.pop(name) for name in ELSEWHERE}
    # Which errno a move gets depends on what else would hinder it.
    assert set(refused.values()) <= {"EACCES", "EXDEV"}
    outcomes.pop(NO_RULE, None)
    assert outcomes == dict.fromkeys(("read", "write", "make", "rename", "remove", "cut"), "done")


@every_version
def test_every_version_of_landlock_keeps_a_daemon_out_of_it(image: Path, version: int) -> None:
    outcomes = confined(image, version, "daemon")
    refused = {name: outcomes[name] for name in ("read", "write", "make", *ELSEWHERE)}
    assert set(refused.values()) <= {"EACCES", "EXDEV"}
    assert image.read_bytes() == b"image"


@every_version
def test_the_broker_of_a_mount_that_only_reads_can_write_nothing(image: Path, version: int) -> None:
    """Nor cut what it reads; where Landlock has no rule on that, it is said."""
    outcomes = confined(image, version, "reading broker")
    assert outcomes["read"] == "done"
    assert {outcomes[name] for name in ("write", "make")} == {"EACCES"}
    is_refused = version >= 3
    assert outcomes["cut"] == ("EACCES" if is_refused else "done")
    assert image.read_bytes() == (b"image" if is_refused else b"")
    assert outcomes.get(NO_RULE) == (None if is_refused else "them")


def test_without_landlock_that_is_said_once_and_all_goes_on(image: Path) -> None:
    outcomes = confined(image, -1, "daemon")
    assert outcomes.pop(f"{SAID} this kernel has no") == "Landlock"
    assert set(outcomes.values()) == {"done"}


OF_A_DEVICE = """
import errno, os, sys
from pathlib import Path
from instarfs.daemon.confinement import Confinement
from instarfs.image.file import Image

image = Image.open(sys.argv[1])
number = os.fstat(image.fileno()).st_rdev
told = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
assert (told / "uevent").read_bytes()
Confinement.of_daemon(image).enforce()
image.generation()
for name in ("stat", "uevent", "loop/backing_file"):
    try:
        (told / name).read_bytes()
        print(name, "done")
    except OSError as failed:
        print(name, errno.errorcode[failed.errno])
"""


@pytest.mark.skipif(landlock_version() < 1, reason="this kernel has no Landlock")
def test_of_a_block_device_a_daemon_reads_what_is_counted_of_it_alone(image: Path) -> None:
    require_loop_devices()
    image.write_bytes(bytes(1 << 20))
    with attached(image) as device:
        done = run_program(OF_A_DEVICE, device)
    said = ["stat done", "uevent EACCES", "loop/backing_file EACCES"]
    assert (done.stdout.splitlines(), done.stderr) == (said, "")


WITH_A_THREAD = """
import logging, sys, threading
from instarfs.image.file import Image
from instarfs.daemon import confinement

logging.basicConfig(format="%(message)s", stream=sys.stdout)
confinement._ENDING_SECONDS = 0.01
threading.Thread(target=threading.Event().wait, daemon=True).start()
confinement.Confinement.of_daemon(Image.open(sys.argv[1])).enforce()
"""


def test_of_a_thread_that_was_there_before_it_is_said_that_it_keeps_everything(image: Path) -> None:
    done = run_program(WITH_A_THREAD, image)
    said = "not confined: other threads are not given up: they were there before\n"
    assert (done.stdout, done.stderr) == (said, "")


# ---- what a broker that was taken over can do ----

AS_BROKER = """
import errno, os, socket, sys
from pathlib import Path
from instarfs.daemon.confinement import Confinement
from instarfs.image.file import Image

image, other, who = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
below = image.with_name("below")
opened, elsewhere = Image.open(str(image)), os.open(other.parent, os.O_PATH)
writable, listed = os.open(image, os.O_RDWR), os.open(image.parent, os.O_RDONLY)

def opening(path, flags, mode=0o600):
    return lambda: os.close(os.open(path, flags, mode))

MAKE = os.O_RDWR | os.O_CREAT
attempts = {
    "open": opening(image, os.O_RDONLY),
    "open-neighbour": opening(below / "neighbour", os.O_RDONLY),
    "look-elsewhere": lambda: other.stat(),
    "open-to-write": opening(below / "neighbour", os.O_RDWR),
    "empty": opening(below / "neighbour", os.O_RDONLY | os.O_TRUNC),
    "make-below": opening(below / "new", MAKE),
    "make-a-thousand": lambda: [opening(below / f"{n}", MAKE)() for n in range(1000)],
    "make-set-user-id": opening(below / "program", MAKE, 0o4755),
    "make-without-a-name": opening(below, os.O_RDWR | os.O_TMPFILE, 0o600),
    "open-to-list": opening(below, os.O_RDONLY | os.O_DIRECTORY),
    "remove-below": lambda: os.unlink("below/neighbour", dir_fd=listed),
    "read": lambda: os.pread(writable, 1, 0),
    "write": lambda: os.pwrite(writable, b"", 0),
    "lengthen": lambda: os.ftruncate(writable, 1 << 20),
    "set-space-aside": lambda: os.posix_fallocate(writable, 0, 1 << 20),
    "list": lambda: os.listdir(listed),
    "open-elsewhere": opening(other, os.O_RDONLY),
    "open-a-device-for-neither": opening("/dev/null", os.O_ACCMODE),
    "make-elsewhere": opening(other.with_name("new"), MAKE, 0o600),
    "remove-elsewhere": lambda: os.unlink(other.name, dir_fd=elsewhere),
    "link": lambda: os.link(image, below / "link"),
    "rename": lambda: image.rename(below / "image"),
}
ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if not os.fork():
    Confinement.of_broker(opened, read_only=who == "reading broker").enforce()
    said = []
    for name, attempt in attempts.items():
        try:
            attempt()
            said.append(f"{name} done")
        except OSError as failed:
            said.append(f"{name} {errno.errorcode[failed.errno]}")
    its.sendmsg(["\\n".join(said).encode()])
    os._exit(0)
its.close()
print(ours.recv(1 << 16).decode())
os.wait()
"""
TO_READ = {"open", "open-neighbour", "look-elsewhere"}
TO_WRITE = {
    "open-to-write", "make-below", "make-a-thousand", "open-to-list", "remove-below",
}  # fmt: skip


@pytest.mark.skipif(os.uname().machine not in MACHINES, reason="its calls are not known")
@pytest.mark.skipif(landlock_version() < 3, reason="this kernel's Landlock rules out less")
@pytest.mark.parametrize("who", ["broker", "reading broker"])
def test_a_broker_reaches_its_directory_and_what_is_below_and_reads_and_writes_nothing(
    image: Path, who: str
) -> None:
    below, other = image.with_name("below"), image.parents[1] / "elsewhere/image"
    below.mkdir()
    (below / "neighbour").write_bytes(b"neighbour")
    done = run_program(AS_BROKER, image, other, who)
    outcomes = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    could = {name for name, outcome in outcomes.items() if outcome == "done"}
    assert could == (TO_READ if who == "reading broker" else TO_READ | TO_WRITE)
    assert {outcomes[name] for name in set(outcomes) - could} <= {"EACCES", "EPERM"}
    assert image.read_bytes() == other.read_bytes() == b"image"
    assert (below / "neighbour").exists() == (who == "reading broker")


# ---- where it cannot filter system calls ----

OF_KERNELS = """
import errno, logging, os, sys
from instarfs.image.file import Image
from instarfs.daemon import confinement, seccomp
from instarfs.daemon.calls import Call, Only

logging.basicConfig(format="%(message)s", stream=sys.stdout)
image, kernel = Image.open(sys.argv[1]), sys.argv[2]
confinement.rule_out_new_privileges()
answers = {
    "without seccomp": (Call("seccomp", 317, 277), errno.ENOSYS),
    "before 4.14": (Call("seccomp", 317, 277, (Only(1, (2,)),)), errno.EINVAL),
}
if kernel in answers:
    call, code = answers[kernel]
    machine, answered = seccomp.this_machine(), [(call, seccomp.ERRNO | code)]
    program = seccomp.compile_filter(answered, machine, otherwise=seccomp.ALLOW)
    seccomp._install(program, machine, 0)
else:
    seccomp.MACHINES.clear()
confinement.Confinement.of_daemon(image).enforce()
try:
    os.chmod(sys.argv[1], 0o600)
except OSError as failed:
    print(errno.errorcode[failed.errno])
"""


@pytest.mark.skipif(os.uname().machine not in MACHINES, reason="its calls are not known")
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("without seccomp", [f"{NOT_GIVEN_UP} Function not implemented"]),
        ("before 4.14", ["EPERM"]),
        ("another machine", [f"{NOT_GIVEN_UP} it is not known how on {os.uname().machine}"]),
    ],
)
def test_system_calls_are_filtered_or_it_is_said_that_they_are_not(
    image: Path, kernel: str, said: list[str]
) -> None:
    done = run_program(OF_KERNELS, image, kernel)
    assert (done.stdout.splitlines(), done.stderr) == (said, "")
