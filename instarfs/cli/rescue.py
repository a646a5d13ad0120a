"""`instarfs rescue`: what an image lost, and a new file that has it again."""

from __future__ import annotations

from collections.abc import Iterable

import click

from instarfs.cli.grammar import ImageName
from instarfs.cli.options import share_option
from instarfs.cli.progress import progress_bar
from instarfs.errors import NothingStandsOut
from instarfs.image.file import Image
from instarfs.render.rescue import rescue_json, rescue_txt
from instarfs.repair.rescue import write_copy
from planner.qcow2.header import Header, read_header
from planner.rescue.headers import Found, find_headers

_FIELDS = tuple(name for name in Header.__slots__ if name != "additional")


@click.command(name="rescue")
@click.option("-o", "out", metavar="OUT", type=click.Path(), help="Write the rebuilt image to OUT.")
@click.option(
    "--header",
    "like",
    metavar="FROM",
    type=click.Path(readable=False),
    help="Begin with the header of an image that was made in the same way.",
)
@click.option(
    "--assume",
    "words",
    metavar="FIELD=VALUE",
    multiple=True,
    help="A field of the header that you know, by its name in the specification.",
)
@click.option(
    "--output",
    type=click.Choice(["human", "json"]),
    default="human",
    help="Text for a reader (the default), or JSON.",
)
@click.option("-p", "--progress", is_flag=True, help="Show progress on stderr.")
@share_option
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(
    path: str,
    out: str | None,
    like: str | None,
    words: tuple[str, ...],
    output: str,
    *,
    progress: bool,
    force_share: bool,
) -> None:
    """Find the header of the qcow2 image IMAGE, which is gone or makes no sense.

    Every hypothesis is laid over the image in memory and checked; one is believed if what it says
    agrees with the rest of the file and nothing else does. IMAGE is never written to: -o writes a
    new file, shared with IMAGE or sparse where the disk can do that.
    """
    assumed, known = _assumed(words), _header_of(like)
    name = ImageName(path, force_share=force_share)
    with name.opened() as image, progress_bar(shown=progress) as tell:
        found = find_headers(image.source(), assumed=assumed, like=known, progress=tell)
        best = found.best
        if best is None:
            raise NothingStandsOut(path, _why(found))
        if not best.changed:
            wrong = "what is wrong: instarfs report" if any(best.score) else "nothing is wrong"
            click.echo(f"{path}: its header makes sense; {wrong}")
            return
        if out is not None:
            write_copy(image, best.content, out, tell)
    if output == "json":
        click.echo(rescue_json(found, best, path, out), nl=False)
    else:
        click.echo(rescue_txt(found, best, path, out), nl=False)


def _assumed(words: Iterable[str]) -> dict[str, int]:
    assumed = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _FIELDS:
            raise click.UsageError(f"--assume {word}: fields are {', '.join(_FIELDS)}")
        try:
            assumed[name] = int(value, 0)
        except ValueError:
            raise click.UsageError(f"--assume {word}: a field is a number") from None
    return assumed


def _header_of(path: str | None) -> Header | None:
    if path is None:
        return None
    with Image.open(path) as image:
        return read_header(image.source())


def _why(found: Found) -> str:
    if not found.hypotheses:
        return "no header was found under which its tables make sense"
    best, rival = found.hypotheses[0], found.rival
    if rival is None or best.score[0]:
        return "under no header that was tried its tables can all be read"
    return f"several headers are as likely: the best two leave {best.wrong} and {rival.wrong} wrong"
