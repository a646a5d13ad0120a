"""The file for Prometheus, as its own parser and, where it is installed, `promtool` read it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_client.values import MultiProcessValue

from instarfs.errors import MetricsFailed
from instarfs.scan import metrics
from instarfs.scan.state import State
from instarfs.scan.values import VERDICTS, Row, Run, Skipped, Stamp

NAMES = [
    *(b"/srv/plain", b"/srv/\xff", b"/srv/\\xff", b"/srv/\n\r\t\x1b[31m", b'/srv/"', b"/srv/\\"),
    *(
        b"/srv/\\\\",
        b"/srv/\\n",
        "/srv/é\u2028\u202e".encode(),
        b'/srv/"} 1\nup 0',
        b"/" + b"x" * 4000,
    ),
]


def row(path: bytes, verdict: str = "corrupt") -> Row:
    return Row(
        path, 1, Stamp(1, 2, 3, 4), b"", verdict, 2 if verdict == "corrupt" else 0, as_of=5.5
    )


@pytest.fixture
def state():
    with State.none() as made:
        made.begin("1", 1.0)
        for name in NAMES:
            made.record(row(name), "1")
        made.record(row(b"/srv/clean", "clean"), "1")
        made.skip(Skipped(b"/srv/secret", "Permission denied", is_failure=True))
        made.end(Run(1.0, 3.5, 12, 0, 1, 4096, complete=True))
        yield made


def written(path: Path, state: State) -> dict[tuple[str, ...], float]:
    metrics.write_metrics(str(path), state)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse(path.read_text())
        for sample in family.samples
    }


@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("/dev/null"),
        lambda path: path.symlink_to("another"),
        lambda path: path.symlink_to("nothing"),
    ],
    ids=["folder", "FIFO", "link to a device", "link to a file", "link to nothing"],
)
def test_what_is_no_file_is_not_replaced(
    tmp_path: Path, state: State, make: Callable[[Path], None]
) -> None:
    """/dev/null is a name that others use, and /dev/stdout a link."""
    (tmp_path / "another").touch()
    make(path := tmp_path / "x.prom")
    before = path.lstat()
    with pytest.raises(MetricsFailed, match="something is there that is no file"):
        metrics.write_metrics(str(path), state)
    assert path.lstat() == before
    assert {each.name for each in tmp_path.iterdir()} == {"another", "x.prom"}
    assert not (tmp_path / "another").read_bytes()


def test_it_is_the_only_file_that_is_written(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where servers in many processes keep their values, and when the client looks for that."""
    (shared := tmp_path / "shared").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(shared))
    monkeypatch.setattr("prometheus_client.metrics.values.ValueClass", MultiProcessValue())
    assert written(tmp_path / "x.prom", state)
    assert not list(shared.iterdir())


def test_what_a_scan_that_was_killed_left_is_cleared_away(tmp_path: Path, state: State) -> None:
    path, left = tmp_path / "x.prom", tmp_path / "x.prom.instarfs-new"
    left.write_bytes(b"half of it " * 10_000)
    assert written(path, state)
    assert list(tmp_path.iterdir()) == [path]
    # Nor is anything written to where a link leads.
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    left.symlink_to(other)
    with pytest.raises(MetricsFailed):
        metrics.write_metrics(str(path), state)
    assert other.read_bytes() == b"precious"
    assert written(path, state)
    assert not left.is_symlink()


def test_it_has_each_verdict_and_each_image_that_is_not_clean(tmp_path: Path, state: State) -> None:
    found = written(tmp_path / "x.prom", state)
    assert {key[1] for key in found if key[0] == "instarfs_scan_images"} == set(VERDICTS)
    assert found["instarfs_scan_images", "corrupt"] == len(NAMES)
    assert found["instarfs_scan_images", "clean"] == 1
    images = {key[1] for key in found if key[0] == "instarfs_scan_image_exit_code"}
    # Names that look alike stay apart, and no name begins a line of its own.
    assert images == {metrics.image_label(name) for name in NAMES}
    assert len(images) == len(NAMES)
    assert all(image.isprintable() for image in images)
    assert ("up",) not in found
    assert found["instarfs_scan_oldest_check_timestamp_seconds",] == 5.5
    assert found["instarfs_scan_duration_seconds",] == 2.5
    assert found["instarfs_scan_read_bytes",] == 4096
    assert found["instarfs_scan_unseen_paths",] == 1


def test_no_more_series_than_somebody_can_keep(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "LISTED", 3)
    found = written(tmp_path / "x.prom", state)
    assert sum(key[0] == "instarfs_scan_image_exit_code" for key in found) == 3
    assert found["instarfs_scan_unlisted_images",] == len(NAMES) - 3


def test_nobody_reads_half_of_it_and_nothing_is_left(tmp_path: Path, state: State) -> None:
    path = tmp_path / "x.prom"
    path.write_text("old")
    with path.open() as before:
        written(path, state)
        assert before.read() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_it_cannot_be_written_it_is_said(tmp_path: Path, state: State) -> None:
    with pytest.raises(MetricsFailed) as raised:
        metrics.write_metrics(str(tmp_path / "no" / "where.prom"), state)
    assert "No such file" in str(raised.value)


def test_promtool_has_nothing_to_complain_of(tmp_path: Path, state: State) -> None:
    promtool = shutil.which("promtool")
    assert promtool is not None, "apt-get install prometheus"
    metrics.write_metrics(str(tmp_path / "x.prom"), state)
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=(tmp_path / "x.prom").read_bytes(),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
