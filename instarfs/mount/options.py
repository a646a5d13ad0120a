"""The options behind ``-o``: which there are, which the kernel gets, which mean nothing here.

Everything about their spelling lives here, that of what libfuse is handed included. An fstab has no
other place for what the command line has options of its own for: ``follow=DIR``, ``no_undo``,
``undo_file=PATH`` and ``preview=TIER`` are those.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from instarfs.errors import UnknownMountOption
from instarfs.repair.words import PREVIEWS

_PASSED_ON = frozenset(
    "allow_other allow_root auto_unmount default_permissions"  # noqa: SIM905
    " ro nosuid nodev noexec noatime nodiratime sync dirsync".split()
)

# What mount(8) and fstab hand to every filesystem: meant for others, or the default here. `dev`,
# `suid` and `exec` too: there is no device and no program in the tree, and none shall ever matter.
_IGNORED = frozenset(
    "defaults rw suid dev exec async atime diratime relatime norelatime strictatime"  # noqa: SIM905
    " nostrictatime lazytime nolazytime auto noauto user nouser users owner group nofail"
    " _netdev".split()
)
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=")

_NO_UNDO, _FOLLOW, _UNDO_FILE, _PREVIEW = "no_undo", "follow=", "undo_file=", "preview="

# As in libfuse: a comma that is part of a path has a backslash before it.
_COMMA = re.compile(r"(?<!\\),")


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What was asked for with ``-o``, sorted and judged.

    ``follow``, ``undo_file``, ``preview`` and ``keep_undo`` are those of the command line, under
    other names.
    """

    passed_on: frozenset[str] = frozenset()
    follow: tuple[str, ...] = ()
    undo_file: str | None = None
    keep_undo: bool = True
    preview: str | None = None

    @classmethod
    def parse(
        cls, words: Iterable[str], *, read_only: bool = False, preview: str | None = None
    ) -> MountOptions:
        """From the values of all ``-o``, each a comma-separated list, which say it last.

        Raises `UnknownMountOption`.
        """
        options = [option for word in words for option in _COMMA.split(word) if option]
        known = _PASSED_ON | _IGNORED | {_NO_UNDO, *(_PREVIEW + tier for tier in PREVIEWS)}
        prefixes = (*_IGNORED_PREFIXES, _FOLLOW, _UNDO_FILE)
        for option in options:
            is_empty = option in (_FOLLOW, _UNDO_FILE)
            if is_empty or (option not in known and not option.startswith(prefixes)):
                raise UnknownMountOption(option)
        preview = next(reversed(_values(options, _PREVIEW)), preview)
        is_read_only = read_only or preview is not None
        return cls(
            frozenset((_PASSED_ON.intersection(options)) | ({"ro"} if is_read_only else set())),
            follow=tuple(_values(options, _FOLLOW)),
            undo_file=next(reversed(_values(options, _UNDO_FILE)), None),
            keep_undo=_NO_UNDO not in options,
            preview=preview,
        )

    @property
    def read_only(self) -> bool:
        """Whether control files refuse to be written to."""
        return "ro" in self.passed_on

    @property
    def for_others(self) -> bool:
        """Whether other users may read the mount."""
        return "allow_other" in self.passed_on

    def for_fuse(self, source: str) -> set[str]:
        """As libfuse takes them; *source* is the path that `df` and `findmnt` show.

        There is no program in the tree, and none can be put there by whoever takes its daemon over.
        """
        return {*self.passed_on, "noexec", f"fsname={_escaped(source)}", "subtype=instarfs"}


def _values(options: Iterable[str], key: str) -> list[str]:
    """The values of the option *key*, in order."""
    return [o[len(key) :].replace("\\,", ",") for o in options if o.startswith(key)]


def _escaped(path: str) -> str:
    """In ASCII, as libfuse's option parser reads it back: commas and backslashes are its own."""
    return "".join(
        f"\\{character}"
        if character in b",\\".decode()
        else character
        if "!" <= character <= "~"
        else f"\\{ord(character):03o}"
        for character in os.fsencode(path).decode("latin-1")
    )
