"""The units that packages bring: they call a command that there is, with options that it has."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import click
import pytest

from instarfs.cli.main import commands

UNITS = Path(__file__).parents[2] / "packaging/systemd"


def unit(name: str) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None, strict=False)
    # systemd's keys may come twice, and their case matters.
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string((UNITS / name).read_text())
    return parsed


def test_the_service_calls_scan_as_it_is() -> None:
    words = shlex.split(unit("instarfs-scan.service")["Service"]["ExecStart"])
    assert words[:2] == ["/usr/bin/instarfs", "scan"]
    scan = commands.get_command(click.Context(commands), "scan")
    assert scan is not None
    parsed = scan.make_context("scan", words[2:])
    assert any(str(value).endswith("scan.state") for value in parsed.params.values())


def test_what_the_readme_sets_is_what_the_service_takes() -> None:
    section = (UNITS / "instarfs-scan.service").read_text()
    taken = set(re.findall(r"\$(INSTARFS_\w+)", section))
    assert taken == set(re.findall(r'^Environment="(\w+)=', section, re.MULTILINE))
    readme = (UNITS.parents[1] / "README.md").read_text()
    assert set(re.findall(r'^ +Environment="(\w+)=', readme, re.MULTILINE)) == taken


def test_the_timer_is_of_the_service() -> None:
    assert (UNITS / "instarfs-scan.service").exists()
    assert unit("instarfs-scan.timer")["Timer"]["Persistent"] == "true"


@pytest.mark.parametrize("path", sorted(UNITS.iterdir()), ids=lambda path: path.name)
def test_every_unit_has_a_description_and_a_page(path: Path) -> None:
    section = unit(path.name)["Unit"]
    assert section["Description"]
    assert section["Documentation"] == "man:instarfs-scan(1)"
