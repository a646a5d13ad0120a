"""What a scan found: rows as JSON, and a state as a text that is read, worst first."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from instarfs.render.check import keyed_counters
from instarfs.scan.values import Change, Row, Run, Skipped, exact_path, path_text
from instarfs.text import json_text, printable, text_lines
from planner.findings.wording import plural

LISTED = 100
"""Images of a verdict that the text lists: of all there are JSON lines."""


def moment(seconds: float) -> str:
    """RFC 3339, to the second."""
    when = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


# ---- JSON lines ----


def row_line(row: Row, unchanged: bool | None = None) -> str:
    """A row; *unchanged*: whether it is as it was at the scan before, where that is known."""
    value: dict[str, object] = {
        **_path_value(row.path),
        "verdict": row.verdict,
        "exit-code": row.exit_code,
        **keyed_counters(row.counters),
        "as-of": moment(row.as_of),
        "in-use": row.in_use,
        "confirmed": row.confirmed,
        "in-motion": row.in_motion,
        "seconds": round(row.seconds, 6),
        "bytes-read": row.bytes_read,
        "device": row.device,
        "inode": row.stamp.inode,
        "size": row.stamp.size,
        "mtime-ns": row.stamp.mtime_ns,
        "header-sha256": row.header.hex(),
    }
    if unchanged is not None:
        value["unchanged"] = unchanged
    if row.error:
        value["error"] = row.error
    if row.interrupted:
        value["interrupted"] = row.interrupted
    return json_text(value) + "\n"


def skipped_line(skipped: Skipped) -> str:
    """What was not looked at."""
    value = {"skipped": skipped.reason, "is-failure": skipped.is_failure}
    return json_text({**_path_value(skipped.path), **value}) + "\n"


def run_line(run: Run, counts: Mapping[str, int], code: int) -> str:
    """The last line: the scan as a whole."""
    value = {
        "images": sum(counts.values()),
        "verdicts": dict(counts),
        "began": moment(run.began),
        "ended": None if run.ended is None else moment(run.ended),
        "checked": run.checked,
        "unchanged": run.unchanged,
        "skipped": run.skipped,
        "bytes-read": run.bytes_read,
        "complete": run.complete,
        "exit-code": code,
    }
    return json_text({"scan": value}) + "\n"


def change_line(change: Change) -> str:
    """That a verdict is another than it was."""
    value = {"before": change.before, "verdict": change.verdict}
    return json_text({**_path_value(change.path), "changed": value}) + "\n"


def _path_value(path: bytes) -> dict[str, object]:
    value: dict[str, object] = {"path": path_text(path)}
    exact = exact_path(path)
    return value if exact is None else {**value, "path-base64": exact}


# ---- text ----


def report_text(
    run: Run | None,
    counts: Mapping[str, int],
    worst: Iterable[tuple[str, Iterator[Row]]],
    unseen: Iterator[Skipped],
    changes: Sequence[Change],
) -> Iterator[str]:
    """What is known, worst first. *worst*: by verdict, but for ``clean``."""
    yield text_lines(_head(run, counts))
    for verdict, rows in worst:
        lines = (f"  {path_text(row.path)}{_detail(row)}" for row in rows)
        yield _part(f"{verdict} ({counts[verdict]}):", lines, counts[verdict])
    failures = list(unseen)
    if failures:
        lines = (f"  {path_text(each.path)}: {each.reason}" for each in failures)
        yield _part(f"Not looked at ({len(failures)}):", lines, len(failures))
    if changes:
        lines = (f"  {path_text(each.path)}: {each.before} -> {each.verdict}" for each in changes)
        yield _part(f"Changed since the scan before ({len(changes)}):", lines, len(changes))


def _part(title: str, lines: Iterator[str], count: int) -> str:
    more = [f"  and {count - LISTED} more: --output jsonl"] if count > LISTED else []
    return text_lines(["", title, *islice(lines, LISTED), *more])


def _head(run: Run | None, counts: Mapping[str, int]) -> Iterator[str]:
    total = sum(counts.values())
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    yield f"{plural(total, 'image')}: {shown}" if total else "no images"
    if run is None:
        yield "There was no scan yet."
        return
    looked = f"{run.checked} checked, {run.unchanged} unchanged, {run.skipped} other files"
    if run.ended is None:
        yield f"The scan that began {moment(run.began)} goes on, or was killed."
        return
    seconds = run.ended - run.began
    whole = "" if run.complete else "; not completed: the next scan goes on"
    took = f"{run.bytes_read} bytes read in {seconds:.1f} s"
    yield f"Scan of {moment(run.began)}: {looked}, {took}{whole}"


def _detail(row: Row) -> str:
    """After the path: what is wrong, in a few words."""
    counters = row.counters
    numbers = [
        (counters.check_errors, "check error"),
        (counters.corruptions, "corruption"),
        (counters.leaks, "leaked cluster"),
    ]
    words = [plural(number, word) for number, word in numbers if number]
    if row.error:
        words.insert(0, row.error)
    if row.interrupted:
        words.append("a repair of it was interrupted")
    if row.in_use:
        words.append(f"in use, as of {moment(row.as_of)}")
    return f": {', '.join(words)}" if words else ""


def interrupted_text(row: Row) -> str:
    """That a repair of an image was interrupted, in a line."""
    return printable(f"{path_text(row.path)}: NOTE {row.interrupted}")


def skipped_text(skipped: Skipped) -> str:
    """What could not be looked at, in a line."""
    return printable(f"{path_text(skipped.path)}: {skipped.reason}")
