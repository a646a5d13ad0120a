"""instarfs.mount.interrupts: pending signals of real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from instarfs.mount.interrupts import is_interrupted


@pytest.fixture
def stopped() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands still, so that signals stay pending."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    yield process
    process.kill()
    process.wait()


def test_nothing_pending(stopped: subprocess.Popen[bytes]) -> None:
    assert not is_interrupted(stopped.pid)
    assert not is_interrupted(os.getpid())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_is_seen(
    stopped: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    stopped.send_signal(number)
    assert is_interrupted(stopped.pid)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTSTP, signal.SIGWINCH])
def test_other_signals_do_not_count(
    stopped: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    stopped.send_signal(number)
    assert not is_interrupted(stopped.pid)


def test_a_blocked_signal_does_not_count() -> None:
    program = (
        "import os, signal, sys, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert not is_interrupted(process.pid)
        process.kill()


@pytest.mark.parametrize("pid", [0, 1 << 22])
def test_a_process_that_cannot_be_seen_is_not_interrupted(pid: int) -> None:
    assert not is_interrupted(pid)


def test_a_process_cannot_name_itself_so_that_it_is_misread() -> None:
    name = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'a\\r\\x0bSigPnd:zz')\n"
    program = name + "print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        assert not is_interrupted(process.pid)
        process.communicate()
