"""The control files of ``repair/``: what they accept, what they answer, what they show.

As in sysfs each write is one command: a word that comes in several writes is several wrong ones,
and where in the file a write goes means nothing. What a command does is the inspector's business.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from instarfs import render
from instarfs.errors import DOMAIN_ERRORS, NoSuchCommand, RepairNotOffered, RepairRunning
from instarfs.inspect.inspector import Inspector
from instarfs.mount.nodes import ControlFile
from instarfs.text import printable
from planner.errors import as_value
from planner.repair.plan import ID_LENGTH, SHORTEST_QUOTE, RepairTier

if TYPE_CHECKING:
    from instarfs.inspect.repair_queue import Repairs
    from instarfs.repair.outcome import RepairOutcome

log = logging.getLogger(__name__)

_TIER = re.compile(
    rb"[ \t]*(%s)(?:[ \t]+([0-9a-fA-F]{%d,%d}))?[ \t]*\n?"
    % ("|".join(RepairTier).encode(), SHORTEST_QUOTE, ID_LENGTH)
)
_TIER_GRAMMAR = "`leaks` or `all`, or a tier with the id of a plan"

_INTERRUPTED_LINE = "a repair was interrupted: write `undo` to take it back"
_UNDO_LINE = "write `undo` to take the last repair back"
_SEALED_LINE = "nothing to take back: the last repair was made with --no-undo\n"
_TRIM_LINE = (
    "write `trim` to give the disk space of all free clusters back, if a fresh check is clean;"
    " what they held is gone then, also for undo\n"
)


_SHOWN_BYTES = 60
"""Of a command that means nothing: so many are told."""


def parse_tier(command: bytes) -> tuple[RepairTier, str]:
    """The tier, and the quoted plan id or nothing. Raises `NoSuchCommand`."""
    match = _TIER.fullmatch(command)
    if match is None:
        raise NoSuchCommand(_shortened(command), _TIER_GRAMMAR + _elsewhere(command))
    return RepairTier(match[1].decode()), (match[2] or b"").decode()


def parse_word(command: bytes, word: str) -> None:
    """Raise `NoSuchCommand` unless *command* is *word*."""
    if command.removesuffix(b"\n").strip(b" \t") != word.encode():
        raise NoSuchCommand(_shortened(command), f"`{word}`{_elsewhere(command)}")


def _elsewhere(command: bytes) -> str:
    """Where a word belongs that means something in another control file."""
    word = command.strip().partition(b" ")[0].decode(errors="replace")
    files: dict[str, str] = {"undo": "undo", "trim": "trim"} | dict.fromkeys(RepairTier, "tier")
    file = files.get(word)
    return f"; `{word}` is for repair/{file}" if file else ""


def _shortened(command: bytes) -> str:
    shown = command if len(command) <= _SHOWN_BYTES else command[:_SHOWN_BYTES] + b"..."
    return shown.decode(errors="surrogateescape")


class Controls:
    """The control files of one mount."""

    def __init__(self, inspector: Inspector, *, read_only: bool) -> None:
        self._inspector, self._subject = inspector, inspector.subject
        self._read_only = read_only

    @property
    def _repairs(self) -> Repairs:
        return self._inspector.repairs

    def tier_file(self) -> ControlFile:
        """``repair/tier``"""
        return self._file(self._show_tiers, self._repair)

    def undo_file(self) -> ControlFile:
        """``repair/undo``"""
        return self._file(self._show_undo, self._undo)

    def trim_file(self) -> ControlFile:
        """``repair/trim``"""
        return self._file(_TRIM_LINE.encode, self._trim)

    def _file(
        self, show: Callable[[], bytes], act: Callable[[bytes], Awaitable[RepairOutcome]]
    ) -> ControlFile:
        async def obey(command: bytes) -> None:
            self._require_free()
            try:
                outcome = await act(command)
            except DOMAIN_ERRORS as error:
                self._repairs.refuse(as_value(error))
                log.info("%s: nothing was begun: %s", _shortened(command.strip()), error)
                raise
            # Not another await: when the mount ends, this is all that there is still time for.
            log.info("%s: %s", _shortened(command.strip()), render.repair.outcome_line(outcome))
            if outcome.error is not None:
                raise outcome.error.with_traceback(None)  # or it grows each time

        return ControlFile(show, obey, self._require_free)

    def _require_free(self) -> None:
        """Raise the error of whoever wants to write and cannot."""
        if self._read_only:
            raise RepairNotOffered
        if self._repairs.is_running:
            raise RepairRunning(self._subject.path)

    # ---- commands ----

    async def _repair(self, command: bytes) -> RepairOutcome:
        tier, quote = parse_tier(command)
        return await self._repairs.repair(tier, quote)

    async def _undo(self, command: bytes) -> RepairOutcome:
        parse_word(command, "undo")
        return await self._repairs.undo()

    async def _trim(self, command: bytes) -> RepairOutcome:
        parse_word(command, "trim")
        return await self._repairs.trim()

    # ---- what they show ----

    def _show_tiers(self) -> bytes:
        applied = self._repairs.applied
        words = ["none", *RepairTier]
        current = applied or "none"
        return (" ".join(f"[{w}]" if w == current else w for w in words) + "\n").encode()

    def _show_undo(self) -> bytes:
        from instarfs.repair.journal import State, Summary  # noqa: PLC0415

        if self._repairs.is_running:
            return b"a repair is running\n"
        last = self._subject.last_repair()
        if last is None:
            return b"nothing to take back\n"
        if not isinstance(last, Summary):
            return f"{printable(str(last))}\n".encode()
        lines = {State.APPLYING: _INTERRUPTED_LINE, State.APPLIED: _UNDO_LINE}
        if last.status.state not in lines:
            return _SEALED_LINE.encode()
        plan = f" (tier {last.tier}, plan {last.plan_id})"
        more = last.status.depth - 1
        rest = f"; {more} more before it" if more else ""
        if self._subject.is_touched(last):
            rest = ", if it still fits: the image may have been written to after it"
        elif last.stale_count:
            rest = f"; {render.repair.stale_sentence(last.stale_count)}"
        return f"{lines[last.status.state]}{plan}{rest}\n".encode()
