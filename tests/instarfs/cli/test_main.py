"""instarfs.cli.main: what it loads, and how a command line ends that goes wrong."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from instarfs.cli.main import COMMANDS
from tests.images.builder import ImageBuilder

INSTARFS = (sys.executable, "-m", "instarfs")
HEAVY = ("numpy", "construct", "trio", "pyfuse3", "rich")


def instarfs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*INSTARFS, *arguments], check=False, capture_output=True, text=True, timeout=20
    )


@pytest.mark.parametrize(
    "module", ["instarfs.cli.main", "instarfs.cli.mount", "instarfs.cli.umount"]
)
def test_nothing_heavy_is_loaded_before_it_is_needed(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)


def loaded_by(*arguments: str | Path) -> set[str]:
    """The modules that are loaded when that command ends."""
    program = (
        "import sys, atexit; atexit.register(lambda: print('loaded', *sys.modules));"
        "from instarfs.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True
    )
    return set(done.stdout.partition("loaded ")[2].split())


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.qcow2"
    path.write_bytes(bytes(ImageBuilder().build().data))
    return path


REPAIRS = {
    "planner.repair",
    "planner.triage",
    "instarfs.repair.journal",
    "instarfs.repair.planning",
}
CHECKS = {"planner.check", "instarfs.repair.checking"}


def test_a_plain_check_loads_nothing_of_repairs(plain: Path) -> None:
    """Loading them, or numpy's masked arrays, takes longer than checking a small image."""
    loaded = loaded_by("check", plain)
    assert {"instarfs.cli.check", "planner.check.check", "numpy"} <= loaded
    assert not loaded & (REPAIRS | {"concurrent.futures", "numpy.ma", "rich", "trio"})


@pytest.mark.parametrize("command", ["info", "map", "export"])
def test_what_only_reads_loads_nothing_of_checks_and_repairs(command: str, plain: Path) -> None:
    out = [plain.with_suffix(".raw")] if command == "export" else []
    loaded = loaded_by(command, plain, *out)
    assert {f"instarfs.cli.{command}", "numpy"} <= loaded
    assert not loaded & (CHECKS | REPAIRS | {"numpy.ma", "rich", "trio"})


def test_help_loads_no_command() -> None:
    loaded = loaded_by("--help")
    assert "instarfs.cli.main" in loaded
    assert not loaded & {*(f"instarfs.cli.{name}" for name in COMMANDS), *HEAVY}


def test_what_serves_a_mount_loads_nothing_that_no_mount_needs() -> None:
    """It stays in the memory of every mount, and takes time until it answers."""
    program = "import sys, instarfs.daemon.serve; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "instarfs.render.map" in loaded
    assert not {name.partition(".")[0] for name in loaded} & {"http", "xml", "html", "asyncio"}
    unwanted = {"urllib.request", "instarfs.guest.export", "instarfs.scan", "rich"}
    unwanted |= {"planner.rescue.rescue", "planner.rescue.headers", "planner.rescue.placing"}
    assert not set(loaded) & unwanted


def test_version() -> None:
    done = instarfs("--version")
    assert (done.returncode, done.stdout) == (0, f"instarfs {version('instarfs')}\n")


def test_help_says_in_a_line_what_each_command_is_for() -> None:
    done = instarfs("--help")
    assert done.returncode == 0
    listed = [
        line.split(maxsplit=1) for line in done.stdout.partition("Commands:\n")[2].splitlines()
    ]
    assert listed == [list(command) for command in COMMANDS.items()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_helps(name: str) -> None:
    done = instarfs(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: instarfs {name} ")


def test_without_a_command_it_helps_and_fails() -> None:
    done = instarfs()
    assert done.returncode == 1
    assert "Usage: instarfs" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'. (see: instarfs --help)"),
        (["--frob"], "No such option '--frob'. (see: instarfs --help)"),
        (["mount"], "Missing argument 'IMAGE'. (see: instarfs mount --help)"),
        (["mount", "image"], "Missing argument 'DIR'. (see: instarfs mount --help)"),
        (["mount", "--frob"], "No such option '--frob'. (see: instarfs mount --help)"),
        (["umount"], "Missing argument 'DIR'. (see: instarfs umount --help)"),
    ],
)
def test_a_usage_error_is_one_line_and_not_the_exit_code_of_corruption(
    arguments: list[str], message: str
) -> None:
    done = instarfs(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"instarfs: {message}\n"


def test_a_domain_error_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    done = instarfs("mount", str(missing), str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"instarfs: {missing}: no such file; check the path\n"
