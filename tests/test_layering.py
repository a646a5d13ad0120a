"""The arrows between modules: read off their imports, so that no module is run for it.

Which room may know which is declared in `pyproject.toml`, from the command line down to the bytes;
here it is kept to, and what a declaration cannot say is here too: that the planner is pure, that
`render` takes values, and that every module says what it is for.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("planner", "instarfs")
    for path in sorted((ROOT / package).rglob("*.py"))
}
PLANNER = [name for name in MODULES if name.startswith("planner")]
INSTARFS = [name for name in MODULES if name.startswith("instarfs")]

PURE = {
    "__future__", "bisect", "collections", "contextlib", "copy", "dataclasses", "enum", "errno",
    "functools", "hashlib", "heapq", "itertools", "math", "operator", "re", "struct", "types",
    "typing", "zlib",
    "construct", "numpy",
}  # fmt: skip
"""What the planner may use besides itself: nothing that reaches a file, a clock or a process."""

IMPURE_BUILTINS = {"open", "print", "input", "exec", "eval", "compile", "__import__", "breakpoint"}
IMPURE_METHODS = {"fromfile", "tofile", "memmap", "load", "loadtxt", "genfromtxt", "save", "savez"}


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_of(module: str) -> set[str]:
    """Absolute names of what a module imports: of ours the module, of others as it stands there."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            name = node.module or ""
            inside = {f"{name}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inside or {name}
    return found


def ours(module: str) -> set[str]:
    return {name for name in imports_of(module) if name.split(".")[0] in ("planner", "instarfs")}


def unit_of(module: str) -> str:
    """The part of instarfs that a module belongs to: ``instarfs.mount.tree`` to ``mount``."""
    return [*module.split("."), ""][1]


def impure_calls_of(module: str) -> Iterator[str]:
    for node in ast.walk(tree_of(module)):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in IMPURE_BUILTINS:
                yield name
            case ast.Call(func=ast.Attribute(attr=name)) if name in IMPURE_METHODS:
                yield name


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_for(module) -> None:
    assert ast.get_docstring(tree_of(module))


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_ours_exist(module) -> None:
    assert ours(module) <= MODULES.keys()


@pytest.mark.parametrize("module", PLANNER)
def test_planner_imports_only_what_is_pure(module) -> None:
    outside = {name.split(".")[0] for name in imports_of(module)} - {"planner"}
    # The package itself loads its modules when they are asked for.
    assert outside <= PURE | ({"importlib"} if module == "planner" else set())


@pytest.mark.parametrize("module", PLANNER)
def test_planner_calls_nothing_that_reads_or_writes_the_world(module) -> None:
    assert not list(impure_calls_of(module))


@pytest.mark.parametrize("module", [name for name in PLANNER if name.startswith("planner.qcow2")])
def test_format_knows_only_itself_and_what_it_reads_from(module) -> None:
    base = {"planner.errors", "planner.arrays", "planner.qcow2.names", "planner.source"}
    assert {name for name in ours(module) if not name.startswith("planner.qcow2")} <= base


def test_arrows_point_one_way() -> None:
    program = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_module_calls_c() -> None:
    assert [name for name in MODULES if "ctypes" in imports_of(name)] == ["instarfs.image.linux"]


VALUES = {
    "instarfs.image.surroundings",
    "instarfs.repair.known",
    "instarfs.repair.outcome",
    "instarfs.scan.values",
}
"""What `render` takes beside what the planner returns."""


@pytest.mark.parametrize("module", [name for name in INSTARFS if unit_of(name) == "render"])
def test_render_takes_values(module) -> None:
    known = {name for name in ours(module) if name.startswith("instarfs")} - VALUES
    assert {unit_of(name) for name in known} <= {"render", "text", "errors"}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_what_else_is_rendered_is_a_value_too(name) -> None:
    known = {other for other in ours(name) if other.startswith("instarfs")}
    assert known <= {"instarfs.errors"}


def test_no_two_modules_import_each_other() -> None:
    known = {module: ours(module) - {module} for module in MODULES}
    while leaves := [module for module, others in known.items() if not others]:
        for leaf in leaves:
            del known[leaf]
        for others in known.values():
            others.difference_update(leaves)
    assert not known, f"import each other, directly or not: {sorted(known)}"
