"""Draws the sample image of `make_image.py`, as ``image/map.svg`` in a mount of it shows it.

Without a mount and without a file. The picture that the README shows is made by
``python -m examples.draw_map``.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from instarfs.render.map import map_svg
from planner.check.check import check_image
from planner.views.host_map import draw_atlas
from tests.images.damage import DAMAGES, TELLING
from tests.images.sample import sample

DEFAULT = Path(__file__).with_name("map.svg")


def draw_sample(seed: int = 1) -> bytes:
    """The picture of the damaged sample image."""
    image, rng = sample(seed).build(), random.Random(seed)  # noqa: S311 - repeatable, not secret
    for name in TELLING:
        DAMAGES[name](image, rng)
    source = image.source
    atlas = draw_atlas(source, check_image(source))
    return map_svg(atlas, "damaged.qcow2")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw the damaged sample image.")
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT, metavar="OUT.svg")
    options = parser.parse_args(arguments)
    options.output.write_bytes(draw_sample())
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
