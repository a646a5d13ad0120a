"""How a line of the log looks, wherever it goes: nothing in it that a terminal obeys.

A message is one line, whatever names are in it; a traceback is as many as it has.
"""

from __future__ import annotations

import logging
from types import TracebackType

from instarfs.text import printable

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class Lines(logging.Formatter):
    """Makes records printable."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - logging's name
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def log_to(handler: logging.Handler, line: str) -> None:
    """Have everything logged by *handler* alone, each record as *line*."""
    handler.setFormatter(Lines(line))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def log_to_stderr() -> None:
    """For a mount in the foreground."""
    log_to(logging.StreamHandler(), "instarfs: %(message)s")


def warn_on_stderr() -> None:
    """For a command: warnings alone, by what Python has where no log is kept."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Lines("instarfs: %(message)s"))
