"""How callers of `qemu-img` name an image to `check`, `info` and `map`.

An image is a path, or with ``--image-opts`` the options that lead to one local qcow2 file. Beside
it stand options that choose how QEMU reads (``-T``) or what decrypts a guest's data (``--object``):
they are looked at as by QEMU, and change nothing here. Whatever would make QEMU read other bytes,
or is not known, is refused by its name. Source: docs/tools/qemu-img.rst, QEMU 7.2 to 10.2;
opts_do_parse for the grammar of options.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import click

from instarfs.cli.naming import named
from instarfs.cli.options import share_option
from instarfs.errors import FormatNotRead, ImageNotQcow2, ImageUnreadable, InstarfsError
from instarfs.image import locks
from instarfs.image.file import Image
from instarfs.image.opening import opened
from planner.errors import PlannerError

FORMAT = "qcow2"

CACHE_MODES = ("none", "off", "writeback", "writethrough", "directsync", "unsafe")
"""As bdrv_parse_cache_mode takes them."""

_KEY_VALUE = re.compile(r"([^=,]+)=((?:[^,]|,,)*)(?:,|$)", re.DOTALL)

_SWITCH = {"on": True, "yes": True, "true": True, "y": True}
_SWITCH |= {"off": False, "no": False, "false": False, "n": False}

_PROTOCOL = re.compile(
    r"(json|file|host_device|nbd|https?|ftps?|ssh|iscsi|rbd|nfs|nvme|gluster|blkdebug|blkverify|fat)"
    r"(\+\w+)?:"
)
"""How names begin that mean something to QEMU, and here are files of that name if there are any."""

_PATH_KEY = "file.filename"
# What changes nothing about the metadata that is read. None: any value.
_UNUSED: Mapping[str, Sequence[str] | None] = {
    "file.driver": ("file", "host_device"),
    "file.locking": ("auto", "on"),
    "encrypt.format": ("aes", "luks"),
    **dict.fromkeys(
        (
            "node-name",
            "auto-read-only",
            "discard",
            "detect-zeroes",
            "cache.direct",
            "cache.no-flush",
            "cache-size",
            "l2-cache-size",
            "l2-cache-entry-size",
            "refcount-cache-size",
            "cache-clean-interval",
            "lazy-refcounts",
            "discard-no-unref",
            "overlap-check",
            "overlap-check.template",
            "pass-discard-other",
            "pass-discard-request",
            "pass-discard-snapshot",
            "encrypt.key-secret",
            "file.node-name",
            "file.read-only",
            "file.auto-read-only",
            "file.discard",
            "file.detect-zeroes",
            "file.cache.direct",
            "file.cache.no-flush",
            "file.aio",
        )
    ),
}


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image as the caller named it. ``format``: as said, empty where it was not said.

    ``undo_file``: where its undo file is, if that was said.
    """

    path: str
    format: str = ""
    force_share: bool = False
    read_only: bool = False
    undo_file: str | None = None

    @contextmanager
    def opened(self) -> Iterator[Image]:
        """The image, under QEMU's locks of a reader, and within the bound of memory."""
        access = locks.FORCE_SHARE if self.force_share else locks.READ_UNLESS_SHARED
        with opened(self.path, self.undo_file, access=access) as image:
            self.require_qcow2()
            yield image

    def require_qcow2(self) -> None:
        """Raise what is to be said of any other format, an image of which is never looked at."""
        if self.format not in ("", FORMAT):
            raise FormatNotRead(self.path, self.format)

    def failed(self, error: InstarfsError | PlannerError) -> InstarfsError | PlannerError:
        """*error* with the name in it. An image said to be qcow2 that is not is no other format."""
        error = named(error, self.path)
        if isinstance(error, ImageNotQcow2) and self.format:
            return ImageUnreadable(error.path, error.reason)
        return error


def image_name(word: str, image_format: str, *, image_opts: bool, force_share: bool) -> ImageName:
    """The image that an argument means. Raises `click.UsageError`."""
    if not image_opts:
        protocol = _PROTOCOL.match(word)
        if protocol and not os.path.lexists(word):
            raise click.UsageError(f"'{protocol[0]}' is not understood: name a local file")
        return ImageName(word, image_format, force_share)
    if image_format:
        raise click.UsageError("--image-opts and --format are mutually exclusive")
    return _of_options(key_values("--image-opts", word), force_share=force_share)


def key_values(option: str, text: str) -> dict[str, str]:
    """QEMU's ``key=value,key=value``; a comma in a value is doubled, the last of a key counts.

    Raises `click.UsageError` for a word without a value: *option* is whose it is.
    """
    found, at = {}, 0
    while at < len(text):
        pair = _KEY_VALUE.match(text, at)
        if pair is None:
            word = text[at:].partition(",")[0]
            raise click.UsageError(f"{option}: '{word}' is not of the form key=value")
        found[pair[1]] = pair[2].replace(",,", ",")
        at = pair.end()
    return found


def _of_options(options: dict[str, str], *, force_share: bool) -> ImageName:
    path = options.pop(_PATH_KEY, "")
    image_format = options.pop("driver", "")
    share = _switch(options, "force-share") or force_share
    read_only = _switch(options, "read-only")
    for key, value in options.items():
        if key not in _UNUSED:
            raise click.UsageError(f"--image-opts: '{key}' is not understood")
        allowed = _UNUSED[key]
        if allowed is not None and value not in allowed:
            raise click.UsageError(f"--image-opts: {key}='{value}' is not understood")
    if not path:
        raise click.UsageError(f"--image-opts: {_PATH_KEY}=IMAGE is missing")
    return ImageName(path, image_format, share, read_only)


def _switch(options: dict[str, str], key: str) -> bool:
    value = options.pop(key, "off")
    if value not in _SWITCH:
        raise click.UsageError(f"--image-opts: {key}='{value}' is neither 'on' nor 'off'")
    return _SWITCH[value]


# ---- the options ----


class _CacheMode(click.ParamType[str]):
    name = "cache mode"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in CACHE_MODES:
            self.fail(f"'{value}' is not one of {', '.join(CACHE_MODES)}.", param, ctx)
        return value


class _SecretObject(click.ParamType[str]):
    """An object of type ``secret``, in either of QEMU's two forms. What it holds is not shown."""

    name = "object"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, identity = self._type_and_id(value, param, ctx)
        if kind != "secret":
            self.fail(f"objects of type '{kind}' are not understood, only secrets", param, ctx)
        if not identity:
            self.fail("the object has no id", param, ctx)
        return value

    def _type_and_id(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if value.startswith("{"):
            try:
                properties = json.loads(value)
            except ValueError:
                self.fail("it begins with '{' and is not JSON", param, ctx)
        else:
            kind, _, rest = value.partition(",")
            first = kind if "=" in kind else f"qom-type={kind}"
            properties = key_values("--object", f"{first},{rest}")
        return str(properties.get("qom-type", "")), str(properties.get("id", ""))


Command = TypeVar("Command", bound=Callable[..., None])


def image_options(*cache: str) -> Callable[[Command], Command]:
    """The options with which `qemu-img` is told of an image, for a command.

    Handed to it: ``output``, ``image_format``, ``image_opts``, ``force_share``. *cache*: the names
    of its option for the cache mode, if it has one.
    """
    options = [
        click.option(
            "--output",
            type=click.Choice(["human", "json"]),
            default="human",
            help="Text for a reader (the default), or the JSON of qemu-img.",
        ),
        click.option(
            "-f",
            "--format",
            "image_format",
            metavar="FMT",
            default="",
            help="The format of the image: qcow2. It is never guessed to be another.",
        ),
        click.option(
            "--image-opts",
            is_flag=True,
            help="IMAGE is driver=qcow2,file.driver=file,file.filename=PATH and the like.",
        ),
        click.option(
            "--object",
            type=_SecretObject(),
            multiple=True,
            expose_value=False,
            metavar="OBJECTDEF",
            help="A secret, as qemu-img takes it: not used, since metadata is not encrypted.",
        ),
        share_option,
    ]
    if cache:
        taken = click.option(
            *cache,
            type=_CacheMode(),
            expose_value=False,
            metavar="CACHE",
            help="A cache mode, as qemu-img takes it: not used.",
        )
        options.append(taken)
    return lambda command: reduce(lambda made, add: add(made), reversed(options), command)
