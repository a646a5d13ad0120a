"""The pages of the repository say what is there: each path that they name, each link, each room."""

import errno
import re
import tomllib
from pathlib import Path

import pytest

from instarfs.errors import InstarfsError
from planner.check.report import EXIT_CODES
from planner.errors import RepairError
from planner.triage.impact import Harm

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "planner/README.md",
    "instarfs/README.md",
    "tests/README.md",
]
PACKAGES = ["planner", "instarfs"]
ENDINGS = r"(?:py|md|toml|yaml|yml|sh|svg|txt)"

MOUNTED = {
    "README.txt",
    "report.txt",
    "check/report.txt",
    "rescue/report.txt",
    "map.svg",
    "image/map.svg",
}
"""Files of a mount, which are named as those of the repository are."""

QEMU = {"docs/interop/qcow2.txt"}


def text_of(page: str) -> str:
    """A page without its blocks of console output, which are run elsewhere."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def links_of(page: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text_of(page))


def anchor_of(heading: str) -> str:
    """What a heading is called in links to it, as hosts of repositories make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def paths_of(page: str) -> list[str]:
    """What stands in backquotes, or in a row of commands, and looks like a path of the project."""
    named = re.findall(rf"`((?:[\w.-]+/)*[\w.-]+\.{ENDINGS})(?:::\w+)?`", text_of(page))
    folders = re.findall(r"`((?:tests|examples|planner|instarfs)(?:/[\w.-]+)*)/?`", text_of(page))
    known = (*MOUNTED, *QEMU)
    return [name for name in [*named, *folders] if name not in known]


def located(page: str, name: str) -> Path | None:
    """The path *name*, seen from the page's folder or from the root, if there is one."""
    seen = ((ROOT / page).parent / name, ROOT / name)
    return next((path for path in seen if path.exists()), None)


def named_tests(page: str) -> list[tuple[str, str]]:
    """(file, function) of each test that is named; without a file it is in the one before."""
    named: list[tuple[str, str]] = []
    for file, function in re.findall(r"`([\w/]+\.py)?::(test_\w+)`", text_of(page)):
        named.append((file or named[-1][0], function))
    return named


def rooms_of(package: str) -> list[list[str]]:
    """The names in the first column of the table of rooms, row by row."""
    table = text_of(f"{package}/README.md").split("| room |", 1)[1].split("\n\n", 1)[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [re.findall(r"`([\w.]+)/?`", row) for row in rows]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links_of(page):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(anchor_of, headings), link


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_paths_that_are_named_exist(page: str) -> None:
    assert [name for name in paths_of(page) if located(page, name) is None] == []


def test_paths_are_seen() -> None:
    assert {"planner/check/entry_rules.py", "tests/oracle"} <= set(paths_of("CONTRIBUTING.md"))
    assert sum(len(paths_of(page)) for page in PAGES) > 100


@pytest.mark.parametrize(("page", "least"), [("tests/README.md", 15), ("SECURITY.md", 40)])
def test_every_test_that_backs_a_promise_exists(page: str, least: int) -> None:
    named = named_tests(page)
    assert len(named) > least
    for file, function in named:
        path = located(page, file)
        assert path is not None, file
        assert f"def {function}(" in path.read_text(), function


def test_every_folder_of_tests_is_in_their_table() -> None:
    table = text_of("tests/README.md").split("| folder |", 1)[1].split("\n\n", 1)[0]
    there = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    assert set(re.findall(r"`(\w+)/`", table)) == there


def names_of(page: str) -> list[tuple[str, str]]:
    """(name, file) where a page says that what has the name is in the file."""
    text, name, file = text_of(page), r"`@?([A-Za-z_]\w*)`", r"`((?:\w+/)*\w+\.py)`"
    said = re.findall(rf"((?:{name}(?:, | and )?)+) in {file}", text)
    pairs = [(one, path) for several, _, path in said for one in re.findall(name, several)]
    return pairs + [(one, path) for path, one in re.findall(rf"{file} \({name}\)", text)]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_names_are_where_they_are_said_to_be(page: str) -> None:
    for name, file in names_of(page):
        path = located(page, file)
        assert path is not None, file
        made = rf"^ *(?:async )?(?:def|class) {name}\b|^{name}\b[^\n]* = "
        assert re.search(made, path.read_text(), re.MULTILINE), (name, file)


def test_names_are_seen() -> None:
    assert ("_STEPS", "planner/repair/tiers.py") in names_of("CONTRIBUTING.md")
    assert sum(len(names_of(page)) for page in PAGES) > 10


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_and_folder_is_in_the_table_of_rooms(package: str) -> None:
    there = {path.parent.name for path in (ROOT / package).glob("*/*.py")}
    there |= {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert sorted(name for row in rooms_of(package) for name in row) == sorted(there)


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_stand_in_the_order_that_their_imports_keep_to(package: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(
        contract["layers"]
        for contract in contracts["contracts"]
        if contract["type"] == "layers" and contract["layers"][0].startswith(f"{package}.")
    )
    declared = [sorted(re.findall(r"\.(\w+)", layer)) for layer in reversed(layers)]
    shown = [sorted(name.removesuffix(".py") for name in row) for row in rooms_of(package)]
    assert shown == declared


def test_a_room_has_few_entries() -> None:
    most = {"planner": 14, "instarfs": 12}
    for package, limit in most.items():
        assert sum(map(len, rooms_of(package))) <= limit


def errors_below(kind: type[Exception]) -> set[type[Exception]]:
    below = set(kind.__subclasses__())
    return below.union(*map(errors_below, below))


def test_control_files_answer_with_no_errno_but_those_of_the_table() -> None:
    table = text_of("instarfs/README.md").split("| errno |", 1)[1].split("\n\n", 1)[0]
    named = re.findall(r"`(E\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:]))
    of_repairs = re.compile(r"(Repair|Plan|PutBack|Undo|Trim|NoSuchCommand)")
    numbers = {
        getattr(kind, "errno", None)
        for base in (InstarfsError, RepairError)
        for kind in errors_below(base)
        if of_repairs.match(kind.__name__) or base is RepairError
    }
    assert len(numbers) > 5
    assert numbers <= {getattr(errno, name) for name in named}


def test_verdicts_have_the_exit_codes_that_are_told() -> None:
    told = text_of("planner/README.md").split("**The verdict**", 1)[1].split("\n\n", 1)[0]
    assert {word: int(code) for word, code in re.findall(r"`([\w-]+)` \((\d)", told)} == EXIT_CODES


def test_the_glossary_has_the_words_for_harm() -> None:
    glossary = text_of("planner/README.md").split("## Glossary", 1)[1]
    assert all(harm.name.lower().replace("_", " ") in glossary for harm in Harm)
