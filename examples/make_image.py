"""Writes the damaged sample image that ``make demo`` mounts.

Images are built and broken by `tests.images`, the kit that the tests use too.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from pathlib import Path

# A program finds what lies beside it, and the kit lies beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.images.builder import GIB, Image
from tests.images.damage import DAMAGES, TELLING, CannotDamageError
from tests.images.sample import sample


def _parse_size(text: str) -> int:
    """``512``, ``64K``, ``16M``, ``2G``, ``1T``, in bytes."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64K, 16M or 2G")
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a damaged qcow2 sample image.")
    parser.add_argument("output", nargs="?", type=Path, metavar="OUT.qcow2")
    parser.add_argument(
        "--damage",
        action="append",
        choices=[*DAMAGES, "none"],
        metavar="NAME",
        help=f"can be given several times; default: {', '.join(TELLING)}",
    )
    parser.add_argument(
        "--of", type=Path, metavar="IMAGE", help="damage a copy of this image, not the sample"
    )
    parser.add_argument("--list", action="store_true", help="list the damages and end")
    parser.add_argument("--seed", type=int, default=1, help="of contents and damages (default 1)")
    parser.add_argument(
        "--size", type=_parse_size, default=2 * GIB, help="of the guest's disk (default 2G)"
    )
    parser.add_argument(
        "--cluster-size", type=_parse_size, default=1 << 16, help="a power of two (default 64K)"
    )
    options = parser.parse_args(arguments)
    if not options.list and options.output is None:
        parser.error("the name of the image to write is missing")
    size = options.cluster_size
    if size & (size - 1) or not 1 << 9 <= size <= 1 << 21:
        parser.error("--cluster-size must be a power of two from 512 to 2M")
    return options


def _image(options: argparse.Namespace) -> Image:
    """What is to be damaged."""
    if options.of is not None:
        return Image(bytearray(options.of.read_bytes()))
    return sample(options.seed, options.size, options.cluster_size.bit_length() - 1).build()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse_arguments(arguments)
    if options.list:
        for name, function in DAMAGES.items():
            print(f"{name:24}{function.__doc__}")
        return 0
    names = options.damage or TELLING
    rng = random.Random(options.seed)  # noqa: S311 - repeatable, not secret
    try:
        image = _image(options)
        done = [f"  {name}: {DAMAGES[name](image, rng)}" for name in names if name != "none"]
        options.output.write_bytes(image.data)
    except (CannotDamageError, ValueError, OSError) as error:
        print(f"make_image: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.output}: {image.header.size} bytes of disk in {len(image.data)} bytes",
        *done,
        sep="\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
