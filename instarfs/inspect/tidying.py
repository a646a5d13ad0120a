"""Gives back what computations needed and need no more, after their answers were given.

It takes as long as looking through all that a mount holds: who waits for a value is not to wait
for that too, and where there is one value after the other, it is done for many together.
"""

from __future__ import annotations

import trio

from instarfs.errors import is_shortage
from instarfs.image import memory

SOON_SECONDS = 0.05
"""After a computation: by then its value has mostly been read."""

REST = 10
"""So many times as long as it took it is then left alone."""


class Tidier:
    """Tidies up in *nursery*, in a thread, some time after it was asked to."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._is_wanted = self._is_running = False

    def soon(self) -> None:
        """Have it done, once for all who ask before it is."""
        self._is_wanted = True
        if not self._is_running:
            self._is_running = True
            self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        while self._is_wanted:
            await trio.sleep(SOON_SECONDS)
            self._is_wanted = False
            begin = trio.current_time()
            try:
                await trio.to_thread.run_sync(memory.give_back)
            except (MemoryError, RuntimeError) as error:
                if not is_shortage(error):
                    raise
                # There is no room for a thread: who asks next may have more.
            await trio.sleep(REST * (trio.current_time() - begin))
        self._is_running = False
