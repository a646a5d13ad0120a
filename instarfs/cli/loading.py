"""Interrupts while modules are loaded. Importing this loads nothing else.

Half of the time that a small check takes, modules are loaded: there is nothing yet to put in
order, and an interrupt ends the process as it ends any other, without a traceback of imports.
"""

from __future__ import annotations

import signal


class Loading:
    """While it lasts SIGINT ends the process, unless whoever started that has it ignored."""

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)
