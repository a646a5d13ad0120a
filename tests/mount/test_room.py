"""Commands in whatever room their caller leaves them: they work, or end with one line.

Limits of every kind, from what is too little for Python itself to no limit; environments, signals,
descriptors, folders. In the short form each room has a command or two; with more `--cases` each has
all of them, and there are more rooms, and more values of each limit.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from instarfs.cli.room import NO_TIME
from instarfs.image.directory import SUFFIX
from tests.advice import damaged
from tests.conftest import CASES
from tests.mount.mounts import DEADLINE, INSTARFS, PROJECT, daemon_of, mounted_type, run, until

MIB = 1 << 20
CONTENT = damaged("wrong-copied")
STATE = ("state", "state-wal", "state-shm", "state.prom")
MADE = {"x.qcow2", f"x.qcow2{SUFFIX}", "out.raw", "out.raw.map", "out.qcow2", "mnt", *STATE}
LONG = 3 * DEADLINE

COMMANDS = {
    "check": ("check", "x.qcow2"),
    "repair": ("check", "-r", "all", "x.qcow2"),
    "report": ("report", "x.qcow2"),
    "plan": ("plan", "all", "x.qcow2"),
    "export": ("export", "x.qcow2", "out.raw"),
    "info": ("info", "x.qcow2"),
    "map": ("map", "--output", "json", "x.qcow2"),
    "files": ("files", "x.qcow2"),
    "rescue": ("rescue", "-o", "out.qcow2", "x.qcow2"),
    "scan": ("scan", "--jobs", "2", "--state", "state", "--metrics", "state.prom", "x.qcow2"),
    "schema": ("schema", "scan"),
    "preview": ("mount", "--preview", "all", "x.qcow2", "mnt"),
    "mount": ("mount", "x.qcow2", "mnt"),
}
CODES = {"check": 2, "report": 2, "files": 2, "scan": 2}
"""What they end with where they work; the others with 0."""

CONTENTS = {"rescue": bytes(4096) + CONTENT[4096:]}
"""What they are given; the others `CONTENT`."""

READ = "cat mnt/check/result.json mnt/check/report.txt mnt/image/map.svg mnt/explain/guest/0"


@dataclass(frozen=True)
class Room:
    """What is so in the new process and its environment; what a shell does first; as whom."""

    before: Callable[[], object] = lambda: None
    environment: dict[str, str | None] = field(default_factory=dict)
    shell: str = ""
    user: tuple[str, ...] = ()


def start(room: Room, folder: Path, *command: str | Path) -> subprocess.CompletedProcess[bytes]:
    words = ("sh", "-c", f'{room.shell}; exec "$@"', "sh") if room.shell else ()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), **room.environment}
    return subprocess.run(
        [*room.user, *words, *command],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env={name: value for name, value in environment.items() if value is not None},
        preexec_fn=room.before,
        timeout=LONG,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "mnt").mkdir()
    yield tmp_path
    if mounted_type(tmp_path / "mnt"):
        subprocess.run(["fusermount3", "-u", "-z", tmp_path / "mnt"], check=True)


@pytest.fixture
def is_long(cases: int) -> bool:
    return cases > CASES


def processes_of(folder: Path) -> list[str]:
    """Those that are in *folder*, or have it in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.name != str(os.getpid()) and (
                (process / "cwd").readlink() == folder
                or os.fsencode(folder) in (process / "cmdline").read_bytes()
            ):
                found.append(process.name)
        except OSError:
            continue
    return found


def require_in_order(name: str, room: Room, folder: Path, *, must_work: bool = False) -> None:
    image = folder / "x.qcow2"
    for left in folder.iterdir():
        if left.name != "mnt":
            left.unlink()
    content = CONTENTS.get(name, CONTENT)
    image.write_bytes(content)
    image.chmod(0o666)
    done = start(room, folder, *INSTARFS, *COMMANDS[name])
    said = done.stderr.decode()
    works = done.returncode == CODES.get(name, 0)
    what = (name, done.returncode, said)
    assert "Traceback" not in said, what
    if not works:
        assert not must_work, what
        assert done.returncode == 1, what
        assert said.startswith("instarfs: "), what
        assert said.count("\n") == 1, what
    if works and COMMANDS[name][0] == "mount":
        words = [*room.user, "sh", "-c", READ]
        read = subprocess.run(words, check=False, cwd=folder, capture_output=True, timeout=LONG)
        assert not must_work or not read.returncode, read.stderr
        run(*INSTARFS, "umount", folder / "mnt", timeout=LONG)
    assert mounted_type(folder / "mnt") is None
    assert {path.name for path in folder.iterdir()} <= MADE, what
    if name != "repair" or not works:
        assert image.read_bytes() == content, what
    until(lambda: not processes_of(folder), "all processes had ended")


# ---- limits ----

MEANINGLESS = ("CORE", "NICE", "SIGPENDING", "MEMLOCK", "RSS", "MSGQUEUE", "RTPRIO", "RTTIME")
"""Of these nothing is needed."""

RLIMIT_LOCKS = 10
"""getrlimit(2): means nothing since Linux 2.4.25, and Python has no name for it."""

LIMITS: dict[str, tuple[int, ...]] = {
    "FSIZE": (0, 4096, 65536),
    "NOFILE": (8, 13, 24),
    "STACK": (128 << 10,),
    "DATA": (8 * MIB, 32 * MIB, 100 * MIB),
    "AS": (40 * MIB, 92 * MIB, 260 * MIB),
}
MORE: dict[str, tuple[int, ...]] = {
    "FSIZE": (1, 512, 1024, 2048, 8192, MIB, 4 * MIB, 64 * MIB),
    "NOFILE": (4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 18, 20, 22, 26, 28, 32, 40, 64),
    "STACK": tuple(range(96 << 10, 1 << 20, 96 << 10)),
    "DATA": tuple(range(2 * MIB, 160 * MIB, 6 * MIB)),
    "AS": tuple(range(16 * MIB, 400 * MIB, 12 * MIB)),
}
BEGUN = ("-c", "import re, os, signal, resource, functools, typing")
"""What Python does on its own account, or nearly: below that nothing of ours is reached."""


def limited(limit: str, value: int, user: tuple[str, ...] = ()) -> Room:
    number = getattr(resource, f"RLIMIT_{limit}")
    return Room(lambda: resource.setrlimit(number, (value, value)), user=user)


@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit: str, folder: Path, *, is_long: bool) -> None:
    names = itertools.cycle(COMMANDS)
    for value in (*LIMITS[limit], *(MORE[limit] if is_long else ())):
        room = limited(limit, value)
        begun = start(room, folder, sys.executable, *BEGUN)
        if begun.returncode or begun.stderr:
            continue
        for name in COMMANDS if is_long else (next(names),):
            require_in_order(name, room, folder)


def test_limits_that_mean_nothing(folder: Path, *, is_long: bool) -> None:
    numbers = [RLIMIT_LOCKS, *(getattr(resource, f"RLIMIT_{limit}") for limit in MEANINGLESS)]

    def be_limited() -> None:
        for number in numbers:
            resource.setrlimit(number, (0, 0))

    for name in COMMANDS if is_long else ("repair", "scan", "mount"):
        require_in_order(name, Room(be_limited), folder, must_work=True)


@pytest.mark.parametrize(("limit", "least"), [("DATA", 96 * MIB), ("AS", 256 * MIB)])
def test_what_is_least_is_enough(limit: str, least: int, folder: Path) -> None:
    for name in ("repair", "mount"):
        require_in_order(name, limited(limit, least), folder, must_work=True)
    refused = start(limited(limit, least - 4096), folder, *INSTARFS, "check", "x.qcow2")
    assert (refused.returncode, refused.stderr.count(b"\n")) == (1, 1)
    assert b"the least it takes" in refused.stderr


KEPT = "-all,+dac_read_search,+dac_override"
SOMEBODY = (
    *("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"),
    *(f"--inh-caps={KEPT}", f"--ambient-caps={KEPT}"),
)
"""Runs a program as a user who can read everything: Python may be in root's own folder."""


@pytest.mark.skipif(os.geteuid() != 0, reason="of this user there are processes already")
def test_no_more_processes(folder: Path, *, is_long: bool) -> None:
    folder.chmod(0o777)
    for value in (1, 2, 3, 4, 6) if is_long else (1,):
        for name in [*COMMANDS][:-1] if is_long else ("check", "scan"):
            require_in_order(name, limited("NPROC", value, SOMEBODY), folder)


BUSY = """
import time
from instarfs.image import locks
from instarfs.cli import start
def wait(*_):
    while time.process_time() < 60:
        pass
locks.is_written = wait
start.main()
"""


@pytest.mark.parametrize("seconds", [1, 2])
def test_processor_time(seconds: int, folder: Path) -> None:
    """A limit that kills without a word is preceded by one that is told."""
    (folder / "x.qcow2").write_bytes(CONTENT)
    done = start(limited("CPU", seconds), folder, sys.executable, "-c", BUSY, "check", "x.qcow2")
    assert (done.returncode, done.stderr.decode()) == (1, f"instarfs: {NO_TIME}\n")


def test_a_mount_without_processor_time_is_taken_off(folder: Path) -> None:
    """What the limit would send: to wait for it takes long."""
    (folder / "x.qcow2").write_bytes(CONTENT)
    assert start(Room(), folder, *INSTARFS, *COMMANDS["mount"]).returncode == 0
    os.kill(daemon_of(folder / "mnt"), signal.SIGXCPU)
    until(lambda: mounted_type(folder / "mnt") is None, "it was taken off")
    until(lambda: not processes_of(folder), "all processes had ended")


def test_a_mount_that_has_a_second_of_processor_time_is_taken_off(folder: Path) -> None:
    image = folder / "x.qcow2"
    image.write_bytes(CONTENT)
    assert start(limited("CPU", 1), folder, *INSTARFS, *COMMANDS["mount"]).returncode == 0

    def is_taken_off() -> bool:
        os.utime(image)  # so that it is checked anew
        with contextlib.suppress(OSError):
            (folder / "mnt/check/report.txt").read_bytes()
        return mounted_type(folder / "mnt") is None

    until(is_taken_off, "it was taken off")
    until(lambda: not processes_of(folder), "all processes had ended")


# ---- all else ----


POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
"""Runs a program as root without capabilities, whom modes keep out like anybody."""


@pytest.mark.parametrize("mask", [0, 0o777])
def test_what_is_made_is_its_owners_whatever_the_umask(mask: int, folder: Path) -> None:
    room = Room(lambda: os.umask(mask), user=POWERLESS)
    for name in ("repair", "export", "rescue", "scan"):
        (folder / "x.qcow2").write_bytes(CONTENTS.get(name, CONTENT))
        # Again: what was made is found, and can be read.
        for _ in range(1 if name in ("repair", "rescue") else 2):
            done = start(room, folder, *INSTARFS, *COMMANDS[name])
            assert done.returncode == CODES.get(name, 0), (name, done.stderr)
    for path in folder.iterdir():
        if path.name in MADE - {"x.qcow2", "mnt", "state.prom"}:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    # Metrics are for who collects them: as the umask says.
    assert stat.S_IMODE((folder / "state.prom").stat().st_mode) == 0o666 & ~mask


def ignored(*numbers: signal.Signals) -> Room:
    return Room(lambda: [signal.signal(number, signal.SIG_IGN) for number in numbers])


def after(command: str) -> Room:
    return Room(lambda: None, {}, command)


def without(*descriptors: int) -> Room:
    return after("exec " + " ".join(f"{fd}<&-" for fd in descriptors))


def having(**changes: str | None) -> Room:
    return Room(environment=changes)


ROOMS = {
    "umask 0777": after("umask 0777"),
    "bare": having(**dict.fromkeys(("HOME", "PATH", "TMPDIR", "LANG", "LC_ALL", "TERM", "USER"))),
    "warnings": having(PYTHONWARNINGS="error", PYTHONIOENCODING="ascii:strict"),
    "development": having(PYTHONDEVMODE="1", PYTHONMALLOC="debug", PYTHONOPTIMIZE="1"),
    "ascii": having(LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PATH=""),
    "SIGCHLD ignored": ignored(signal.SIGCHLD),
    "blocked": Room(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())),
}
WITH_A_MOUNT = ("SIGCHLD ignored", "blocked")
MORE_ROOMS = {
    "umask 0": after("umask 000"),
    "umask 077": after("umask 077"),
    "HOME nowhere": having(HOME="/nowhere", XDG_CACHE_HOME="/nowhere", TMPDIR="/nowhere"),
    "unknown locale": having(LC_ALL="xx_YY.ISO-8859-15"),
    "LANG=C": having(LANG="C", LC_ALL="C"),
    "TERM=dumb": having(TERM="dumb", COLUMNS="1", LINES="x"),
    "PYTHONSAFEPATH": having(PYTHONSAFEPATH="1", PYTHONUNBUFFERED="1"),
    "PYTHONASYNCIODEBUG": having(PYTHONASYNCIODEBUG="1", PYTHONDONTWRITEBYTECODE="1"),
    "SIGPIPE ignored": ignored(signal.SIGPIPE),
    "all ignored": ignored(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1),
    "a group of its own": Room(os.setpgrp),
}


@pytest.mark.parametrize("name", ROOMS)
def test_rooms(name: str, folder: Path, *, is_long: bool) -> None:
    few = ("mount",) if name in WITH_A_MOUNT else ("repair",)
    for command in COMMANDS if is_long else few:
        require_in_order(command, ROOMS[name], folder, must_work=True)


def test_more_rooms(folder: Path, seed: int, *, is_long: bool) -> None:
    """One of them in turn, or all."""
    names = list(MORE_ROOMS)
    names = names if is_long else [names[seed % len(names)]]
    for name, command in itertools.product(names, COMMANDS if is_long else ("export",)):
        require_in_order(command, MORE_ROOMS[name], folder, must_work=True)


@pytest.mark.parametrize("fds", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_without_descriptors(fds: tuple[int, ...], folder: Path, *, is_long: bool) -> None:
    if is_long or len(fds) == 3:
        require_in_order("mount", without(*fds), folder, must_work=True)
    (folder / "x.qcow2").write_bytes(CONTENT)
    done = start(without(*fds), folder, *INSTARFS, "check", "-r", "all", "x.qcow2")
    # What cannot be printed is an error; what was done is done.
    assert done.returncode == (1 if 1 in fds else 0)
    assert (folder / "x.qcow2").read_bytes() != CONTENT


def test_without_docstrings_there_is_one_line(folder: Path) -> None:
    done = start(having(PYTHONOPTIMIZE="2"), folder, *INSTARFS, "check", "none")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"PYTHONOPTIMIZE" in done.stderr


def test_in_a_folder_that_cannot_be_listed(folder: Path) -> None:
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "x.qcow2").write_bytes(CONTENT)
    hidden.chmod(0o111)
    room = Room(lambda: os.chdir(hidden), user=POWERLESS)
    for path in ("x.qcow2", hidden / "x.qcow2"):
        assert start(room, folder, *INSTARFS, "check", path).returncode == 2
    hidden.chmod(0o700)


# ---- modules ----

PLANTED = "import os; os.write(2, b'TAKEN: ' + __name__.encode() + b'\\n')\n"
LISTED = "import sys; print(*{name.partition('.')[0] for name in sys.modules if name[0] != '_'})"
SCRIPT = Path(sys.executable).with_name("instarfs")


@pytest.mark.parametrize("command", [INSTARFS, (SCRIPT,)], ids=["module", "script"])
def test_nothing_is_taken_from_the_current_folder(
    command: tuple[str | Path, ...], folder: Path
) -> None:
    if not Path(command[0]).exists():
        pytest.skip("the project is not installed here")
    # What Python itself loads before it comes to us is not ours to choose.
    first = run(sys.executable, "-c", f"import runpy, importlib.util; {LISTED}").split()
    loaded = f"import instarfs.cli.check, instarfs.daemon.serve as it; it.load_late(); {LISTED}"
    names = {*run(sys.executable, "-c", loaded).split(), "planner"}
    for name in names - {"instarfs", *first}:
        (folder / f"{name}.py").write_text(PLANTED)
    assert {path.stem for path in folder.glob("*.py")} > {"numpy", "click", "json", "planner"}
    for name in ("check", "repair"):
        (folder / "x.qcow2").write_bytes(CONTENT)
        done = start(Room(), folder, *command, *COMMANDS[name])
        assert done.returncode == CODES.get(name, 0), done.stderr
        assert b"TAKEN" not in done.stderr
    assert not list(folder.rglob("*.pyc"))
