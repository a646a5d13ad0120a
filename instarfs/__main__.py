"""`python -m instarfs`. It runs what is installed: nothing that lies in the current folder."""

import os
import sys


def _take_nothing_from_here() -> None:
    """Python looks into the current folder first, unless it is told not to (`python -P`)."""
    try:
        here = os.getcwd()  # noqa: PTH109 - pathlib would be looked for there
    except OSError:  # it is gone, and Python has not noted it
        return
    if not sys.flags.safe_path and sys.path[:1] == [here]:
        del sys.path[0]
        if os.path.dirname(os.path.dirname(__file__)) == here:  # noqa: PTH120
            sys.path.append(here)  # it is the project's own, which may be nowhere else


if __name__ == "__main__":
    _take_nothing_from_here()
    from instarfs.cli.start import main

    main()
