"""Where the command begins, and where it ends.

Importing this loads next to nothing: until `main` is called a ^C ends in a traceback of Python's.
"""

from __future__ import annotations

import signal

from instarfs.cli.loading import Kept, Loading


def main() -> None:
    """Run the command line of this process. Never returns."""
    with Loading():
        from instarfs.cli.room import end_if_short, settle  # noqa: PLC0415

        settle()
        try:
            with Kept():
                _require_own_planner()
                from instarfs.cli.main import main as run  # noqa: PLC0415
                from instarfs.cli.stopping import PROCESS  # noqa: PLC0415
        except BaseException as error:
            end_if_short(error)
            raise
    try:
        run(PROCESS)
    finally:
        # What was done is done, and the exit code says it, whatever comes while Python ends.
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN)


def _require_own_planner() -> None:
    from instarfs import require_own_planner  # noqa: PLC0415

    try:
        require_own_planner()
    except ImportError as error:
        from instarfs.cli.room import end  # noqa: PLC0415
        from instarfs.text import printable  # noqa: PLC0415

        end(printable(str(error)))
