"""Where the machine gives a command less than it is used to: one line, and no traceback."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instarfs.cli.main import main
from instarfs.image import locks
from tests.images.builder import ImageBuilder

INSTARFS = (sys.executable, "-m", "instarfs")
PROJECT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT)}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "x.qcow2"
    path.write_bytes(ImageBuilder().build().data)
    return path


def shell(before: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`instarfs`, in a shell that did something *before*."""
    return subprocess.run(
        ["sh", "-c", f'{before}; exec "$@"', "sh", *INSTARFS, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )


SHARING = (("check",), ("info",), ("map",), ("report",), ("plan", "all"))
COMMANDS = (*SHARING, ("check", "-r", "all"), ("trim",))
ALL = (*COMMANDS, ("files",), ("rescue",))


# ---- a directory that is gone ----


@pytest.fixture
def gone(tmp_path: Path) -> str:
    directory = tmp_path / "gone"
    directory.mkdir()
    return f"cd {directory} && rmdir {directory}"


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_in_a_directory_that_is_gone(command: tuple[str, ...], gone: str, image: Path) -> None:
    assert shell(gone, *command, image).returncode == 0
    image.parent.joinpath("gone").mkdir()
    done = shell(gone, *command, "x.qcow2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "instarfs: x.qcow2: no such file; check the path\n"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("umount", "."), ".: no instarfs mount is there"),
        (("umount", "mnt"), "mnt: no instarfs mount is there"),
        (("mount", "{image}", "."), ".: no such directory"),
        (("mount", "{image}", "mnt"), "mnt: no such directory"),
        (("map", "--follow", ".", "{image}"), ".: cannot be followed"),
        (("info", "--backing-chain", "--follow", ".", "{image}"), ".: cannot be followed"),
        (("export", "{image}", "out"), "out: "),
        (("scan", "{image}", "--state", "state"), "state: "),
        (("scan", "{image}", "--metrics", "x.prom"), "x.prom: "),
        (("mount", "--preview", "rescue", "{image}", "mnt"), "mnt: no such directory"),
    ],
)
def test_names_in_a_directory_that_is_gone(
    command: tuple[str, ...], line: str, gone: str, image: Path
) -> None:
    done = shell(gone, *(word.format(image=image) for word in command))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"instarfs: {line}")


@pytest.mark.parametrize(
    "command",
    [
        ("scan", "{image}"),
        ("scan", "."),
        ("schema", "check"),
        ("report", "--undo-file", "undo", "{image}"),
    ],
    ids=" ".join,
)
def test_what_names_nothing_there_works(command: tuple[str, ...], gone: str, image: Path) -> None:
    done = shell(gone, *(word.format(image=image) for word in command))
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_scan_does_not_find_there_is_named(gone: str) -> None:
    done = shell(gone, "scan", "a/../b")
    assert (done.returncode, done.stderr) == (1, "instarfs: a/../b: it is not there any more\n")


# ---- without /proc ----


def without(
    folder: str, *command: str | Path, redirected: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command of instarfs where *folder* is empty."""
    shell = f'mount -t tmpfs none {folder} && exec "$@" {redirected}'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", shell, "sh", *INSTARFS, *command],
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide /proc")
@pytest.mark.parametrize("command", [*ALL, ("scan",)], ids=" ".join)
def test_without_proc(command: tuple[str, ...], image: Path) -> None:
    done = without("/proc", *command, image)
    assert (done.returncode, done.stderr) == (0, "")


# ---- without /dev ----


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide /dev")
@pytest.mark.parametrize("closed", ["", "<&-"])
@pytest.mark.parametrize("command", [*ALL, ("--help",)], ids=" ".join)
def test_without_dev(command: tuple[str, ...], closed: str, image: Path) -> None:
    """As in a system that is looked after from another: there is no /dev/null to stand in."""
    done = without("/dev", *command, image, redirected=closed)
    assert (done.returncode, done.stderr) == (0, "")


# ---- too little of something ----


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("descriptors", [8, 16, 24])
def test_few_descriptors(descriptors: int, command: tuple[str, ...], image: Path) -> None:
    done = shell(f"ulimit -n {descriptors}", *command, image)
    assert (done.returncode, done.stderr.count("\n")) in ((0, 0), (1, 1))
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kib", range(40_000, 200_000, 40_000))
def test_little_memory(kib: int, image: Path) -> None:
    done = shell(f"ulimit -v {kib}", "check", image)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "(ulimit -v" in done.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "(ulimit -n)"),
        (OSError(errno.ENFILE, "Too many open files in system"), "no file descriptor left"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "(ulimit -d, ulimit -v)"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "(ulimit -u)"),
        (MemoryError(), "(ulimit -d, ulimit -v)"),
        (ImportError("x.so: failed to map segment from shared object"), "(ulimit -d, ulimit -v)"),
    ],
    ids=["descriptors", "of-all", "ENOMEM", "processes", "memory", "library"],
)
def test_a_shortage_is_one_line(
    error: Exception,
    line: str,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> bool:
        raise error

    monkeypatch.setattr(locks, "is_written", fail)
    monkeypatch.setattr("sys.argv", ["instarfs", "check", str(image)])
    with pytest.raises(SystemExit) as exited:
        main()
    out, err = capfd.readouterr()
    assert (exited.value.code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("instarfs: ")
    if not isinstance(error, MemoryError):  # of which the image is known
        assert line in err


def test_what_is_no_shortage_is_a_bug(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(locks, "is_written", fail)
    monkeypatch.setattr("sys.argv", ["instarfs", "check", str(image)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        main()


# ---- an image that is in use ----


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_option_is_offered_that_a_command_does_not_have(
    command: tuple[str, ...],
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with image.open("rb") as file, locks.held(file.fileno(), str(image), locks.READ_WRITE):
        monkeypatch.setattr("sys.argv", ["instarfs", *command, str(image)])
        with pytest.raises(SystemExit) as exited:
            main()
        err = capfd.readouterr().err
        assert (exited.value.code, err.count("\n")) == (1, 1)
        assert ("-U" in err) == (command in SHARING)


# ---- signals while a bar is shown ----

HIDDEN, SHOWN = b"\x1b[?25l", b"\x1b[?25h"

# A signal that comes just before a call that waits does not end it: it waits a little at a time.
PROGRAM = """
import select, signal, sys
from instarfs.cli.progress import progress_bar
{before}
with progress_bar(shown=True) as tell:
    tell("stage", 1, 2)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        pass
"""


@pytest.fixture
def run_on_a_terminal() -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], int]]]:
    opened: list[subprocess.Popen[bytes]] = []
    terminals: list[int] = []

    def run(before: str) -> tuple[subprocess.Popen[bytes], int]:
        ours, its = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(before=before)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=its,
            env={**ENVIRONMENT, "TERM": "xterm"},
        )
        os.close(its)
        opened.append(process)
        terminals.append(ours)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process, ours

    yield run
    for process in opened:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
    for terminal in terminals:
        os.close(terminal)


def shown_on(terminal: int) -> bytes:
    text = b""
    while True:
        try:
            text += os.read(terminal, 65536)
        except OSError as error:  # nobody has the other side any more
            if error.errno != errno.EIO:
                raise
            return text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_the_cursor_back(number: signal.Signals, run_on_a_terminal) -> None:
    process, terminal = run_on_a_terminal("")
    process.send_signal(number)
    text = shown_on(terminal)
    assert process.wait(20) == -number
    assert text.count(HIDDEN) == 1
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)
    assert b"Traceback" not in text


def test_a_signal_that_is_ignored_stays_so(run_on_a_terminal) -> None:
    process, terminal = run_on_a_terminal(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))"
    )
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"asked\n"
    process.stdin.close()
    shown_on(terminal)
    assert process.wait(20) == 0


# ---- an interrupt while it works ----


def run_program(program: str, *, ignoring: bool = False) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, *ignoring* interrupts from its beginning or not."""
    return subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignoring else None,
    )


INTERRUPTED = """
import os, signal, sys
from instarfs.cli.start import main
from instarfs.image.file import Image

Image.open = lambda *_: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["instarfs", *{arguments!r}]
main()
"""


@pytest.mark.parametrize("command", [*SHARING, ("files",), ("rescue",), ("export",)], ids=" ".join)
def test_an_interrupt_while_it_works_ends_it_without_a_word(
    command: tuple[str, ...], image: Path
) -> None:
    out = [str(image.with_name("out"))] if command == ("export",) else []
    done = run_program(INTERRUPTED.format(arguments=[*command, str(image), *out]))
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


# ---- an interrupt while modules are loaded ----

INTERRUPTED_AT = """
import builtins, os, signal, sys
from instarfs.cli.start import main

load = builtins.__import__

def interrupted(name, *rest):
    if name == {name!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *rest)

builtins.__import__ = interrupted
sys.argv = ["instarfs", "check", {image!r}]
main()
"""


@pytest.mark.parametrize("name", ["click", "instarfs.text", "numpy", "planner.check.report"])
def test_an_interrupt_while_modules_are_loaded_ends_it_silently(name: str, image: Path) -> None:
    program = INTERRUPTED_AT.format(name=name, image=str(image))
    for ignored in (False, True):
        done = run_program(program, ignoring=ignored)
        assert (done.returncode, done.stderr) == (0 if ignored else -signal.SIGINT, "")
