"""While modules are loaded: interrupts, and garbage. Importing this loads nothing else.

Half of the time that a small check takes, modules are loaded: there is nothing yet to put in
order, and an interrupt ends the process as it ends any other, without a traceback of imports.
"""

from __future__ import annotations

import gc
import signal


class Kept:
    """While it lasts nobody looks for garbage, and what was loaded is never looked through.

    To look for some meanwhile takes a tenth of the time, and to look through it again and again
    later a tenth of a check's; and what a fork shares stays shared.
    """

    def __enter__(self) -> None:
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.freeze()
        gc.enable()


class Loading:
    """While it lasts SIGINT ends the process, unless whoever started that has it ignored."""

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)
