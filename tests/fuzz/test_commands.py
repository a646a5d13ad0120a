"""The generator of costs runs all that the program has: what is new is either run or named."""

from __future__ import annotations

import click
import pytest

from instarfs.cli.main import commands
from planner.repair.plan import RepairTier
from tests.fuzz.commands import COMMANDS, MOUNTS, NOT_RUN, TIER, WORDS

CONTEXT = click.Context(commands, info_name="instarfs")
NAMES = commands.list_commands(CONTEXT)
RUN = [command.removeprefix("then ").split() for command in (*COMMANDS, *MOUNTS)]
IN_THE_FOREGROUND = ("mount", "-f")
"""What `Costs` adds to each of `MOUNTS`."""


def command(name: str) -> click.Command:
    found = commands.get_command(CONTEXT, name)
    assert found is not None
    return found


def values_run(name: str) -> dict[str, set[object]]:
    """Of each parameter of a command by its name, with what it is run."""
    found: dict[str, set[object]] = {}
    parser = command(name).make_parser(click.Context(command(name)))
    for words in RUN:
        if words[0] != name:
            continue
        # What click itself makes of it, before a value is looked at.
        values, _, _ = parser.parse_args([*words[1:], "IMAGE"])
        for parameter, value in values.items():
            each = value if isinstance(value, list | tuple) else [value]
            found.setdefault(parameter, set()).update(each)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_each_of_its_options_is_run(name: str) -> None:
    ran = values_run(name)
    assert any(words[0] == name for words in RUN)
    for parameter in command(name).params:
        assert parameter.name is not None
        if not isinstance(parameter, click.Option):
            continue
        options = {(name, option) for option in parameter.opts}
        if options & NOT_RUN.keys():
            assert parameter.name not in ran
        elif IN_THE_FOREGROUND not in options:
            assert ran.get(parameter.name), f"{name} {parameter.opts[0]}"


@pytest.mark.parametrize("name", NAMES)
def test_every_word_that_an_option_or_an_operand_can_be_is_run(name: str) -> None:
    ran = values_run(name)
    for parameter in command(name).params:
        if isinstance(parameter.type, click.Choice) and name != "schema":
            assert parameter.name is not None
            missed = set(parameter.type.choices) - ran[parameter.name] - {parameter.default}
            assert not missed, f"{name} {parameter.opts[0]}"


def test_every_tier_is_written_to_a_mount_and_taken_back() -> None:
    words = list(WORDS)
    for tier in RepairTier:
        at = next(
            n for n, (name, word) in enumerate(words) if (name, word.split()[0]) == (TIER, tier)
        )
        assert words[at + 1] == ("repair/undo", "undo")


def test_every_exception_is_of_something_that_there_is() -> None:
    for name, option in NOT_RUN:
        assert any(option in parameter.opts for parameter in command(name).params)
