"""The man pages say what the program has: every option, file, verdict and kind of finding."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from instarfs.cli.main import commands
from instarfs.mount import tree
from instarfs.render.schemas import SUBJECTS, schema
from planner.check.report import EXIT_CODES
from planner.check.wire import RESULT
from planner.findings.kinds import FindingKind
from tests.packaging.keys import keys_of

MAN = Path(__file__).parents[2] / "packaging/man"
CONTEXT = click.Context(commands, info_name="instarfs")
NAMES = commands.list_commands(CONTEXT)


def text_of(page: str) -> str:
    """As a reader sees it, in one line."""
    shown = subprocess.run(
        ["man", "-l", "--encoding=ascii", "--no-hyphenation", MAN / page],
        check=True,
        capture_output=True,
        text=True,
        env={"MANWIDTH": "1000", "PATH": "/usr/bin:/bin", "MAN_KEEP_FORMATTING": ""},
    )
    return re.sub(r"\x1b\[[\d;]*m", "", shown.stdout)


def command(name: str) -> click.Command:
    found = commands.get_command(CONTEXT, name)
    assert found is not None
    return found


def options_of(text: str) -> set[str]:
    """Those that the section OPTIONS lists, each in a paragraph of its own."""
    section = text.partition("\nOPTIONS\n")[2].partition("\nEXIT STATUS\n")[0]
    tags = [line.strip() for line in section.splitlines() if re.match(r" {7}-", line)]
    return {word for tag in tags for word in re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", head(tag))}


def head(tag: str) -> str:
    """Of a paragraph its tag, where what it says begins in the same line."""
    return re.split(r" {2,}", tag)[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_a_page_with_its_options_and_no_others(name: str) -> None:
    parameters = command(name).get_params(click.Context(command(name), info_name=name))
    options = {o for p in parameters if isinstance(p, click.Option) for o in p.opts}
    # Which of the two is the flag for help, click says only of a whole command line.
    assert options_of(text_of(f"instarfs-{name}.1")) == options | {"-h", "--help"}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_all_names_every_command(name: str) -> None:
    assert f"instarfs-{name}(1)" in text_of("instarfs.1")


@pytest.mark.parametrize("page", sorted(path.name for path in MAN.iterdir()))
def test_troff_has_nothing_to_complain_of(page: str) -> None:
    warned = subprocess.run(
        ["man", "--warnings", "-l", MAN / page], check=True, capture_output=True, text=True
    )
    assert warned.stderr == ""


def test_every_file_of_the_tree_has_a_place() -> None:
    text = text_of("instarfs-tree.5")
    readme = Path(tree.__file__).read_text()
    names = set(re.findall(r'_Entry\(\s*f?"([\w./-]+)"', readme))
    assert len(names) > 15
    for name in names | {"check/result.json", "check/result.bin", "check/leaks", "lost/OFFSET"}:
        assert f"       {name}" in text, name


@pytest.mark.parametrize("word", [*EXIT_CODES, *(kind.label for kind in FindingKind)])
def test_every_verdict_and_every_kind_of_finding_is_explained(word: str) -> None:
    assert re.search(rf"^ {{7}}{word}\b", text_of_tree(), re.MULTILINE)


def text_of_tree() -> str:
    if not _TREE:
        _TREE.append(text_of("instarfs-tree.5"))
    return _TREE[0]


_TREE: list[str] = []


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_key_of_json_is_listed_and_no_other(name: str) -> None:
    listed = text_of_tree().partition("\nJSON KEYS\n")[2].partition("\nVERDICTS\n")[0]
    tag, end = rf"^ {{7}}{name}\s+{re.escape(SUBJECTS[name])}:", r"^ {7}\S|\Z"
    found = re.search(rf"{tag}(.*?)(?={end})", listed, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert set(re.split(r",\s+", found[1].strip())) == keys_of(schema(name)).keys()


def test_the_fields_of_result_bin_are_where_the_page_says() -> None:
    at = 0
    for field in RESULT.subcons:
        name = field.name or "zeros"
        assert re.search(rf"^ +{at} +{name} +{field.sizeof()} bytes", text_of_tree(), re.MULTILINE)
        at += field.sizeof()
    assert at == 80
