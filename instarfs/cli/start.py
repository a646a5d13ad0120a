"""Where the command begins."""

from __future__ import annotations

from instarfs.cli.loading import Loading


def main() -> None:
    """Run the command line of this process. Never returns."""
    with Loading():
        from instarfs.cli.main import main as run  # noqa: PLC0415
    run()
