"""instarfs.cli.main: what it loads, and how a command line ends that goes wrong."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from instarfs.cli.main import COMMANDS
from tests.images.builder import ImageBuilder

INSTARFS = (sys.executable, "-m", "instarfs")
PROJECT = Path(__file__).resolve().parents[3]
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


@pytest.fixture(scope="module")
def serving() -> list[dict[str, str]]:
    """The modules of a mount, each with its file: of what serves it, and of what it loads late."""
    program = """
import json, sys
from instarfs.daemon.serve import load_late
files = lambda: {name: str(getattr(it, "__file__", "")) for name, it in [*sys.modules.items()]}
first = files()
load_late()
print(json.dumps([first, {name: file for name, file in files().items() if name not in first}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    modules: list[dict[str, str]] = json.loads(done.stdout)
    return modules


def test_a_mount_loads_nothing_that_no_mount_needs(serving: list[dict[str, str]]) -> None:
    """It stays in the memory of every mount."""
    loaded = {*serving[0], *serving[1]}
    assert not {name.partition(".")[0] for name in loaded} & {"http", "xml", "html", "asyncio"}
    unwanted = {"urllib.request", "instarfs.guest.export", "instarfs.scan", "rich"}
    unwanted |= {"planner.rescue.rescue", "planner.rescue.headers", "planner.rescue.placing"}
    assert not loaded & unwanted


def test_a_mount_answers_before_what_reads_checks_and_repairs_is_loaded(
    serving: list[dict[str, str]],
) -> None:
    late = {"instarfs.guest.guest", "planner.guest", "planner.guestfs", "planner.qcow2.contents"}
    late |= {"planner.check", "planner.triage", "planner.repair.tiers", "planner.views"}
    late |= {"planner.guestfs.known", "planner.findings", "instarfs.repair.run"}
    late |= {"instarfs.render.report"}
    assert not late & serving[0].keys()
    assert late <= serving[1].keys()


BEYOND_A_CHECK = {
    "instarfs.guest.guest",
    "instarfs.repair.journal",
    "instarfs.repair.outcome",
    "planner.repair.tiers",
    "planner.triage",
}


def test_the_first_check_of_a_mount_loads_nothing_of_the_guest_and_of_repairs(plain: Path) -> None:
    program = """
import sys, trio
from instarfs.daemon.serve import inspecting, tree
from instarfs.image.file import Image

async def check():
    async with inspecting(Image.open(sys.argv[1])) as inspector:
        directory = await tree.build_tree(inspector).child("check")
        await (await directory.child("result.json")).open()

trio.run(check)
print(*sys.modules)
"""
    command = [sys.executable, "-c", program, str(plain)]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert {"instarfs.inspect.checker", "instarfs.render.check"} <= set(loaded)
    assert not BEYOND_A_CHECK & set(loaded)


def test_while_a_mount_checks_it_loads_nothing_else() -> None:
    program = """
import sys
from instarfs.daemon.serve import load_late
looks = []
def is_idle():
    looks.append(set(sys.modules))
    return len(looks) > 3
load_late(is_idle)
print(*looks[0])
print(*looks[3] - looks[0])
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    before, meanwhile, after = (set(line.split()) for line in done.stdout.splitlines())
    assert {"instarfs.inspect.checker", "instarfs.render.check"} <= before
    assert not BEYOND_A_CHECK & (before | meanwhile)
    assert after >= BEYOND_A_CHECK


def test_what_is_loaded_late_is_what_a_confined_process_can_load(
    serving: list[dict[str, str]],
) -> None:
    """No library can be mapped by then, neither of ours nor of others."""
    assert {Path(file).suffix for file in serving[1].values()} == {".py"}


def test_nothing_is_left_that_a_mount_would_load_when_it_is_first_used(
    serving: list[dict[str, str]],
) -> None:
    """The package may have been replaced by then. What is left other commands use, or a preview."""
    here = {
        ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
        for room in (
            "instarfs/guest",
            "instarfs/inspect",
            "instarfs/mount",
            "instarfs/render",
            "planner",
        )
        for path in (PROJECT / room).rglob("*.py")
    }
    left = {name for name in here if name not in serving[0] | serving[1]}
    assert {
        name for name in left if not name.startswith(("planner.rescue", "instarfs.render.schemas"))
    } == {
        "instarfs.guest.compressed",
        "instarfs.guest.export",
        "instarfs.guest.outfile",
        "instarfs.render.rescue",
        "instarfs.render.scan",
        "planner.check.compressed",
        "planner.guest.mapfile",
    }


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
