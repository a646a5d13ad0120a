"""What is known of all images, for Prometheus: a file that its node exporter collects.

One series a verdict, and one for each image that is not clean; names of files are no text to rely
on, so of each what does not print is escaped, in a way that keeps any two apart.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from prometheus_client import Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

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
    # Not by `write_to_textfile`: what that leaves behind where it is killed has another name each
    # time, and nobody removes it.
    new = path + _NEW
    _require_file(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, 0o666), "wb") as file:
            file.write(generate_latest(_OfState(state)))
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


class _OfState(Collector):
    """Families of values that are made when they are told.

    Not the client's gauges: where the environment says so (PROMETHEUS_MULTIPROC_DIR, of servers in
    many processes) it keeps the values of those in files.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        yield from _of_images(self._state)
        yield from _of_the_scan(self._state)


def _of_images(state: State) -> Iterator[Metric]:
    counts = state.counts()
    images = _family("images", "Images by verdict.", ["verdict"])
    for verdict in VERDICTS:
        images.add_metric([verdict], counts.get(verdict, 0))
    yield images
    exit_code = _family(
        "image_exit_code",
        "What a check of this image ends with, where it is not clean.",
        ["image", "verdict"],
    )
    bad = [verdict for verdict in counts if verdict != "clean"]
    rows = (row for verdict in bad for row in state.rows(verdict))
    for row in islice(rows, LISTED):
        exit_code.add_metric([image_label(row.path), row.verdict], row.exit_code)
    yield exit_code
    yield _gauge(
        "unlisted_images",
        "Images that are not clean and have no series of their own.",
        max(0, sum(counts[verdict] for verdict in bad) - LISTED),
    )
    oldest = state.oldest()
    if oldest is not None:
        yield _gauge(
            "oldest_check_timestamp_seconds",
            "When the image was checked that was checked longest ago.",
            oldest,
        )


def _of_the_scan(state: State) -> Iterator[Metric]:
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
        yield _gauge(name, text, value)


def _gauge(name: str, text: str, value: float) -> Metric:
    family = _family(name, text, [])
    family.add_metric([], value)
    return family


def _family(name: str, text: str, labels: list[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"instarfs_scan_{name}", text, labels=labels)
