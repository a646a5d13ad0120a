"""instarfs and planner as packages: what they offer other programs, and that they fit."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import instarfs
import planner
import planner.progress
from tests.images.builder import ImageBuilder

OFFERED = [(package, name) for package in (instarfs, planner) for name in package.__all__]


@pytest.mark.parametrize(("package", "name"), OFFERED)
def test_what_is_offered_is_there_and_documented(package, name: str) -> None:
    assert name in dir(package)
    # Of the name of a type the module says it, in the line behind it.
    behind = re.findall(
        rf'^{name} = .*\n"""(.*)', inspect.getsource(planner.progress), re.MULTILINE
    )
    said = getattr(package, name).__doc__ or "".join(behind)
    assert len(said) > 10


@pytest.mark.parametrize("package", [instarfs, planner])
def test_what_is_not_offered_is_not_there(package) -> None:
    with pytest.raises(
        AttributeError, match=f"module '{package.__name__}' has no attribute 'chek'"
    ):
        package.chek  # noqa: B018


def test_importing_a_package_loads_nothing_else_of_it() -> None:
    program = "import sys, instarfs, planner; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    heavy = {"numpy", "construct", "trio", "pyfuse3", "click", "rich"}
    assert not heavy & set(loaded)
    assert {name for name in loaded if name.startswith(("instarfs", "planner"))} == {
        "instarfs",
        "planner",
    }


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    path.write_bytes(bytes(ImageBuilder().build().data))
    return path


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


FOREIGN = ["planner.py", "planner/__init__.py", "planner \x1b[31m/planner/__init__.py"]


@pytest.mark.parametrize("name", FOREIGN)
def test_another_planner_is_not_run_and_ends_a_command_with_one_line(
    name: str, tmp_path: Path, image: Path
) -> None:
    foreign = tmp_path / "foreign" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("print('run')\n")
    folder = foreign.parent if name == "planner.py" else foreign.parents[1]
    done = run(folder, "-m", "instarfs", "check", image)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr[:-1].isprintable()
    assert done.stderr.startswith("instarfs: /")
    assert "planner" in done.stderr
    assert "is found in place of the planner in" in done.stderr
    program = f"import instarfs; instarfs.check({str(image)!r})"
    done = run(folder, "-c", program)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("ImportError: /")


def test_no_planner_at_all_is_one_line(tmp_path: Path, image: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "instarfs").symlink_to(Path(instarfs.__file__).parent)
    program = (
        "import sys; sys.path[:] = [p for p in sys.path if 'lib/python' in p or p == sys.argv[1]];"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        f"sys.path = [p for p in sys.path if p != {str(Path(planner.__file__).parents[1])!r}];"
        "from instarfs.cli.start import main; sys.argv[1:] = ['check', sys.argv[2]]; main()"
    )
    done = run(alone, "-c", program, alone, image)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"the package planner, which belongs into {alone}, is missing" in done.stderr
