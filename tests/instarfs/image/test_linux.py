"""The calls that Python lacks: what they do to a file or a process, and the error when they cannot.

What confines a process is tried in processes of its own, in `tests.instarfs.daemon`.
"""

import errno
import os
import subprocess
import sys

import pytest

from instarfs.errors import reason_of
from instarfs.image import linux

MIB = 1 << 20


def run(program: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"from instarfs.image import linux\n{program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.strip()


def test_a_hole_reads_as_zeros_and_takes_no_space(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 4 * MIB)
    with file.open("r+b") as opened:
        linux.punch_hole(opened.fileno(), MIB, 2 * MIB)
        os.fsync(opened.fileno())
    assert file.read_bytes() == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB
    assert file.stat().st_blocks * 512 < 3 * MIB


def test_a_hole_far_out_is_not_cut_to_32_bits(tmp_path) -> None:
    file, far = tmp_path / "file", 5 << 30
    with file.open("w+b") as opened:
        os.pwrite(opened.fileno(), b"first", 0)
        os.pwrite(opened.fileno(), b"x" * MIB, far)
        linux.punch_hole(opened.fileno(), far, MIB)
        assert os.pread(opened.fileno(), MIB, far) == bytes(MIB)
        assert os.pread(opened.fileno(), 5, 0) == b"first"


def test_what_fails_has_the_number_of_the_kernel(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    said = os.strerror(errno.EBADF)
    with (tmp_path / "file").open("rb") as read_only, pytest.raises(OSError, match=said) as caught:
        linux.punch_hole(read_only.fileno(), 0, 1)
    assert caught.value.errno == errno.EBADF
    assert reason_of(caught.value) == said


def test_what_nothing_is_mounted_on_gets_no_rule_on_links(tmp_path) -> None:
    codes = (errno.EINVAL, errno.EPERM, errno.ENOSYS)
    with pytest.raises(OSError, match="|".join(map(os.strerror, codes))) as caught:
        linux.follow_no_links_in(str(tmp_path))
    assert caught.value.errno in codes


def test_a_process_has_the_name_that_it_is_given() -> None:
    shown = "print(open('/proc/self/comm').read())"
    assert run(f"linux.name_process(b'another')\n{shown}") == "another"


def test_no_capability_comes_back_and_no_privilege_is_new() -> None:
    program = """
linux.rule_out_new_privileges()
linux.keep_capabilities(1 << 2)
for line in open("/proc/self/status"):
    name, value = line.split(":", 1)
    if name in ("CapInh", "CapPrm", "CapEff"):
        assert int(value, 16) & ~(1 << 2) == 0, line
    if name == "NoNewPrivs":
        print(value)
"""
    assert run(program) == "1"


def test_what_ends_threads_is_there_once_loaded() -> None:
    program = """
try:
    linux.load_what_ends_threads()
except OSError:
    print("there is none")
else:
    print("libgcc_s" in open("/proc/self/maps").read())
"""
    assert run(program) in ("True", "there is none")
