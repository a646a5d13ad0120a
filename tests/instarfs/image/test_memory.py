"""Memory: a command has what an image can need, and where that is too much, one line says so."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instarfs.errors import NotEnoughMemory
from instarfs.image import linux, memory
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from tests.images.builder import ImageBuilder

ALLOWED = 160 << 20
ENTRIES = 1 << 20


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A million L1 entries, each wrong in four ways: 300 MiB of findings."""
    path = tmp_path_factory.mktemp("damaged") / "damaged.qcow2"
    made = ImageBuilder().build()
    made.data += bytes(-len(made.data) % (1 << 16))
    at = len(made.data)
    words = (1 << 63 | 1 << 60 | 1 << 40) + 512 + (np.arange(ENTRIES, dtype=np.uint64) << 16)
    made.data += words.astype(">u8").tobytes()
    made.change_header(l1_table_offset=at, l1_size=ENTRIES)
    path.write_bytes(bytes(made.data))
    return path


@pytest.mark.parametrize("command", ["check", "plan all", "check -r all", "plan leaks"])
def test_a_command_that_may_not_have_enough_says_so_and_writes_nothing(
    damaged: Path, command: str
) -> None:
    before = damaged.read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "instarfs", *command.split(), damaged],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (ALLOWED, ALLOWED)),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"instarfs: {NotEnoughMemory(str(damaged))}\n"
    assert damaged.read_bytes() == before
    assert not damaged.with_name(damaged.name + SUFFIX).exists()


def test_a_command_that_cannot_even_begin_says_so(damaged: Path) -> None:
    program = (
        "import sys; from instarfs.cli.main import main; sys.argv[1:] = ['check', sys.argv[1]];"
        "sys.meta_path.insert(0, type('', (), {'find_spec': lambda *_: bytes(1 << 62)})); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, damaged], check=False, capture_output=True, text=True
    )
    message = "instarfs: there is not enough memory for that (ulimit -d, ulimit -v)\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_the_bound_is_that_of_a_mount_and_ends_with_the_work(damaged: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with Image.open(str(damaged)) as image, memory.limited(image):
        stored = image.source().stored_bytes()
        bound = resource.getrlimit(resource.RLIMIT_DATA)
    assert bound == ((2 << 30) + 8 * stored, before[1])
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_whatever_is_refused_is_that_error(damaged: Path, error: Exception) -> None:
    with (
        Image.open(str(damaged)) as image,
        pytest.raises(NotEnoughMemory, match="more memory than instarfs may use"),
        memory.limited(image),
    ):
        raise error


def test_a_bug_stays_a_bug(damaged: Path) -> None:
    with (
        Image.open(str(damaged)) as image,
        pytest.raises(RuntimeError, match="a bug"),
        memory.limited(image),
    ):
        raise RuntimeError("a bug")


_FAULTS = """
import resource
from instarfs.image.memory import keep_freed_memory

def faults(size, times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        bytearray(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults(2 << 20, 2)
print(faults(2 << 20, 50), faults(48 << 20, 3))
"""


def test_freed_batches_are_used_again_and_what_is_larger_goes_back() -> None:
    if not hasattr(linux._libc, "mallopt"):
        pytest.skip("the allocator is not glibc's")
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, check=True)
    again, anew = map(int, done.stdout.split())
    assert again < 100
    assert anew > 0


_RESIDENT = """
import os
from instarfs.image.memory import give_back, keep_freed_memory

class Held(Exception):
    pass

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def fail():
    plan = [b"x" * (64 << 10) for _ in range(640)]
    try:
        raise Held
    except Held as error:
        kept = error

keep_freed_memory()
fail()
between = bytearray(64 << 10)
before = resident()
give_back()
print(before - resident())
"""


def test_what_an_error_held_on_to_is_given_back() -> None:
    if not hasattr(linux._libc, "malloc_trim"):
        pytest.skip("the allocator is not glibc's")
    done = subprocess.run([sys.executable, "-c", _RESIDENT], capture_output=True, check=True)
    assert int(done.stdout) > 30 << 20
