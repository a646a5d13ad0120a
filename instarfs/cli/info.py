"""`instarfs info`: what an image says of itself, in the words of `qemu-img info`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from instarfs.cli.complaints import remark_interrupted
from instarfs.cli.grammar import image_name, image_options
from instarfs.errors import ImageUnreadable
from instarfs.guest.chain import backing_files
from instarfs.guest.disk import Missing
from instarfs.guest.follow import Follow
from instarfs.image.file import Image
from instarfs.render.info import ImageFacts, info_human, info_json, raw_human, raw_json
from instarfs.repair.interrupted import pending
from instarfs.text import json_array
from planner.errors import ImageError
from planner.guest.chain import Named, full_name
from planner.qcow2.contents import Contents

if TYPE_CHECKING:
    from instarfs.repair.outcome import Pending


@click.command(name="info")
@image_options("-t", "--cache")
@click.option(
    "--backing-chain",
    is_flag=True,
    help="Also of its backing file, and of that one's, as far as --follow opens them.",
)
@click.option(
    "--follow",
    "directories",
    multiple=True,
    metavar="DIR",
    help="With --backing-chain: open backing files that are below DIR.",
)
@click.argument("word", metavar="IMAGE", type=click.Path(readable=False))
def command(
    output: str,
    image_format: str,
    directories: tuple[str, ...],
    word: str,
    *,
    image_opts: bool,
    force_share: bool,
    backing_chain: bool,
) -> None:
    """Show what the qcow2 image IMAGE says of itself: sizes, features, snapshots, bitmaps.

    Backing and data files are named, and not opened without --follow. Where a part of the image,
    or a file of the chain that is asked for, cannot be read, the rest is shown, and the exit code
    is 1.
    """
    name = image_name(word, image_format, image_opts=image_opts, force_share=force_share)
    if directories and not backing_chain:
        raise click.UsageError("--follow is for --backing-chain")
    follow = Follow(directories) if backing_chain else None
    problems: list[ImageUnreadable] = []
    with name.opened() as image:
        left_over = pending(image)
        remark_interrupted(left_over)
        documents = _documents(
            name.path, image, follow, problems, left_over, as_json=output == "json"
        )
        for part in _joined(documents, as_json=output == "json", as_list=backing_chain):
            click.echo(part, nl=False)
    if problems:
        raise problems[0]


def _documents(
    path: str,
    image: Image,
    follow: Follow | None,
    problems: list[ImageUnreadable],
    left_over: Pending | None,
    *,
    as_json: bool,
) -> Iterator[Iterable[bytes]]:
    """What there is to say of the image, and with *follow* of each of its backing files.

    *problems* gets an error for whatever could not be read. *left_over*: a repair of the image that
    was interrupted.
    """
    contents = _contents(path, image)
    links: Iterator[tuple[Named, Image | Missing]] = iter(())
    if follow is not None:
        links = backing_files(image, contents.layout, follow)
    while True:
        named, below = next(links, (None, None))
        unread = ""
        if isinstance(below, Missing):
            unread = f"the backing file {below.name} is not opened: {below.refusal}"
        reasons = [str(error) for _, error in contents.errors]
        reasons += [unread] if unread else []
        problems += [ImageUnreadable(path, reason) for reason in reasons]
        facts = _facts(path, image)
        if as_json:
            yield info_json(contents, facts, unread, left_over)
        else:
            yield info_human(contents, facts, unread)
        left_over = None  # of those beneath it nothing is asked
        if named is None or not isinstance(below, Image):
            return
        path, image = os.fsdecode(full_name(os.fsencode(path), named.name)), below
        if named.format == b"raw":
            yield [raw_json(_facts(path, image)) if as_json else raw_human(_facts(path, image))]
            return
        try:
            contents = _contents(path, image)
        except ImageUnreadable as error:
            problems.append(error)
            return


def _contents(path: str, image: Image) -> Contents:
    try:
        return Contents.read(image.source())
    except ImageError as error:
        raise ImageUnreadable(path, str(error)) from error


def _facts(path: str, image: Image) -> ImageFacts:
    return ImageFacts(path, image.generation().size, image.allocated_size())


def _joined(
    documents: Iterator[Iterable[bytes]], *, as_json: bool, as_list: bool
) -> Iterator[bytes]:
    """In parts. A list, as JSON, is an array, also of one; as text an empty line is between."""
    if as_json and as_list:
        yield from json_array(documents)
        return
    for number, document in enumerate(documents):
        if number:
            yield b"\n"
        yield from document
