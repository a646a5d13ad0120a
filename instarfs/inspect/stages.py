"""How far something is that takes its time, in the words that people and programs are shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

IDLE = "idle"


def percentage(stage: str, done: int, total: int) -> str:
    """How far a stage is."""
    return f"{stage} {100 * done // total if total else 0}%"


class Stages:
    """What several threads compute, one of which may wait for another: the stage told last.

    ``shown``: `IDLE` only while none of them runs. Usable from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self.shown = IDLE

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """While something is computed; *stage* is shown where nothing else was computed already."""
        with self._lock:
            if not self._running:
                self.shown = percentage(stage, 0, 0)
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self.shown = IDLE

    def tell(self, stage: str, done: int, total: int) -> None:
        """That it has come so far."""
        self.shown = percentage(stage, done, total)
