"""Where the command begins, and where it ends."""

from __future__ import annotations

import signal

from instarfs.cli.loading import Loading


def main() -> None:
    """Run the command line of this process. Never returns."""
    with Loading():
        from instarfs.cli.main import main as run  # noqa: PLC0415
    try:
        run()
    finally:
        # What was done is done, and the exit code says it, whatever comes while Python ends.
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
