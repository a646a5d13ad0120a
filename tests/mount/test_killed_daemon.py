"""The daemon of a mount, killed at any moment of a repair; `--cases 12000`: 200 times."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest

from tests.images.damage import DAMAGES
from tests.images.sample import sample
from tests.mount.mounts import INSTARFS, instarfs, mounted_type, until

CASES_A_KILL = 60
LONGEST = 0.5
"""Seconds after which a repair of the sample has ended, on an idle machine."""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image whose repair has every stage: a lost refcount block makes it rebuild."""
    image = sample().build()
    for name in ("lost-refblock", "wrong-copied"):
        DAMAGES[name](image, random.Random(1))
    path = tmp_path_factory.mktemp("killed") / "damaged.qcow2"
    path.write_bytes(image.data)
    return path


def kill_during_repair(image: Path, directory: Path, delay: float) -> None:
    """Mount, write `all`, and kill the daemon *delay* seconds later."""
    directory.mkdir(exist_ok=True)
    command = [*INSTARFS, "mount", "-f", image, directory]
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(
            subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL)
        )
        unmount: list[str | Path] = ["fusermount3", "-q", "-u", "-z", directory]
        stack.callback(partial(subprocess.run, unmount, check=False))
        stack.callback(daemon.kill)
        until(lambda: mounted_type(directory) is not None, "it was mounted")
        control = os.open(directory / "repair" / "tier", os.O_WRONLY)
        killer = threading.Timer(delay, daemon.send_signal, [signal.SIGKILL])
        killer.start()
        # Killed before the answer, writing fails, and so does closing.
        with contextlib.suppress(OSError):
            os.write(control, b"all")
        killer.join()
        daemon.wait()
        with contextlib.suppress(OSError):
            os.close(control)


@pytest.fixture(scope="module")
def repaired(damaged: Path) -> bytes:
    """What an undisturbed repair of it gives."""
    reference = Path(shutil.copy(damaged, damaged.with_name("reference.qcow2")))
    assert instarfs("check", "-r", "all", reference).returncode == 0
    return reference.read_bytes()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a kill: each has the time limit of a test, and a failure names its moment."""
    if "kill" in metafunc.fixturenames:
        kills = max(5, metafunc.config.getoption("--cases") // CASES_A_KILL)
        metafunc.parametrize("kill", range(kills))


def test_a_killed_daemon_leaves_what_can_be_put_back(
    kill, damaged, repaired, seed, tmp_path
) -> None:
    original = damaged.read_bytes()
    image = Path(shutil.copy(damaged, tmp_path / "image.qcow2"))
    undo = image.with_name(f"{image.name}.instarfs-undo")
    delay = random.Random(f"{seed}/{kill}").uniform(0, LONGEST)
    kill_during_repair(image, tmp_path / "mnt", delay)
    found = image.read_bytes()
    assert found == original or undo.exists()
    if undo.exists():
        instarfs("undo", image)
        assert image.read_bytes() == original
    assert instarfs("check", "-r", "all", image).returncode == 0
    assert image.read_bytes() == repaired
