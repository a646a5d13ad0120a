"""What is known of all images, for Prometheus: a file that its node exporter collects.

One series a verdict, and one for each image that is not clean; names of files are no text to rely
on, so of each what does not print is escaped, in a way that keeps any two apart.
"""

from __future__ import annotations

import contextlib
import os
import stat
from itertools import islice
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from instarfs.errors import MetricsFailed, reason_of
from instarfs.scan.state import State
from instarfs.scan.values import VERDICTS, path_text
from instarfs.text import printable

_NEW = ".instarfs-new"

LISTED = 1000
"""Images that have a series of their own, the worst first: who collects them keeps every one."""


def write_metrics(path: str, state: State) -> None:
    """Put what *state* knows into the file *path*: all at once. Raises `MetricsFailed`.

    What stands there and is no file stays: the name of a device, or of the link /dev/stdout, is not
    taken from those who use it.
    """
    registry = CollectorRegistry()
    _of_images(registry, state)
    _of_the_scan(registry, state)
    # Not by `write_to_textfile`: what that leaves behind where it is killed has another name each
    # time, and nobody removes it.
    new = path + _NEW
    _require_file(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, 0o666), "wb") as file:
            file.write(generate_latest(registry))
        Path(new).replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(new).unlink()
        raise MetricsFailed(path, reason_of(error)) from error


def _require_file(path: str) -> None:
    """Unless nothing is there; what cannot be looked at fails as it is written."""
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(Path(path).lstat().st_mode):
            raise MetricsFailed(path, "something is there that is no file")


def image_label(path: bytes) -> str:
    """The name of an image as a label: what prints, and every other byte escaped."""
    return printable(path_text(path).replace("\\", "\\\\"))


def _of_images(registry: CollectorRegistry, state: State) -> None:
    counts = state.counts()
    images = Gauge("instarfs_scan_images", "Images by verdict.", ["verdict"], registry=registry)
    for verdict in VERDICTS:
        images.labels(verdict).set(counts.get(verdict, 0))
    exit_code = Gauge(
        "instarfs_scan_image_exit_code",
        "What a check of this image ends with, where it is not clean.",
        ["image", "verdict"],
        registry=registry,
    )
    bad = [verdict for verdict in counts if verdict != "clean"]
    rows = (row for verdict in bad for row in state.rows(verdict))
    for row in islice(rows, LISTED):
        exit_code.labels(image_label(row.path), row.verdict).set(row.exit_code)
    _gauge(
        registry,
        "unlisted_images",
        "Images that are not clean and have no series of their own.",
        max(0, sum(counts[verdict] for verdict in bad) - LISTED),
    )
    oldest = state.oldest()
    if oldest is not None:
        _gauge(
            registry,
            "oldest_check_timestamp_seconds",
            "When the image was checked that was checked longest ago.",
            oldest,
        )


def _of_the_scan(registry: CollectorRegistry, state: State) -> None:
    run = state.last_run()
    if run is None or run.ended is None:
        return
    for name, text, value in (
        ("end_timestamp_seconds", "When the last scan ended.", run.ended),
        ("duration_seconds", "How long the last scan took.", run.ended - run.began),
        ("read_bytes", "What the last scan read of images.", run.bytes_read),
        ("checked_images", "Images that the last scan checked.", run.checked),
        ("unchanged_images", "Images that it did not read again.", run.unchanged),
        ("complete", "Whether every image has a verdict that is up to date.", run.complete),
        (
            "unseen_paths",
            "What the last scan could not look at.",
            sum(1 for _ in state.unseen()),
        ),
    ):
        _gauge(registry, name, text, value)


def _gauge(registry: CollectorRegistry, name: str, text: str, value: float) -> None:
    Gauge(f"instarfs_scan_{name}", text, registry=registry).set(value)
