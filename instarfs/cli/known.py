"""``--header`` and ``--assume``, of every command that takes what somebody knows of a header."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from instarfs.image.file import Image
from instarfs.repair.known import Known

if TYPE_CHECKING:
    from planner.qcow2.header import Header


def known_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--header`` and ``--assume``, of which `known` makes one value."""
    header = click.option(
        "--header",
        "like",
        metavar="FROM",
        type=click.Path(readable=False),
        help="Begin with the header of an image that was made in the same way.",
    )
    assume = click.option(
        "--assume",
        "assumed",
        metavar="FIELD=VALUE",
        multiple=True,
        help="A field of the header that you know, by its name in the specification.",
    )
    return header(assume(command))


def known(like: str | None, assumed: tuple[str, ...]) -> Known:
    """What those options say. Raises `click.UsageError`, and what opening *like* raises."""
    return Known(like, assumed, _header_of(like), _fields_of(assumed) if assumed else {})


def require_rescue(knows: Known, preview: str | None) -> None:
    """Raise where they are given for anything but a rescue."""
    if knows.is_something and preview != "rescue":
        raise click.UsageError("--header and --assume are for --preview rescue: nothing else asks")


def _fields_of(words: Iterable[str]) -> dict[str, int]:
    from planner.qcow2.header import Header  # noqa: PLC0415 - all of the format, for few

    names = [name for name in Header.__slots__ if name != "additional"]
    fields = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in names:
            raise click.UsageError(f"--assume {word}: fields are {', '.join(names)}")
        try:
            fields[name] = int(value, 0)
        except ValueError:
            raise click.UsageError(f"--assume {word}: a field is a number") from None
    return fields


def _header_of(path: str | None) -> Header | None:
    if path is None:
        return None
    from planner.qcow2.header import read_header  # noqa: PLC0415 - the same

    with Image.open(path) as image:
        return read_header(image.source())
