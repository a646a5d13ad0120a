"""What a rescue found, for a reader and as JSON."""

from __future__ import annotations

from collections.abc import Iterator

from instarfs.text import json_bytes, shell_path, text_lines
from planner.findings.wording import plural
from planner.qcow2.header import MAGIC, Header
from planner.rescue.headers import Found, Hypothesis

_NAMES = (
    "The names of a backing file and of a data file, bitmaps and what else stands behind the fields"
    " of a header go with its cluster. Where the disk had a backing file, what it did not write"
    " itself reads as zeros now."
)


def rescue_txt(found: Found, best: Hypothesis, filename: str, out: str | None) -> str:
    """The report: what the header was, why that is believed, and what to do."""
    is_gone = found.now.magic != MAGIC
    lines = [f"{filename}: {'its header is gone' if is_gone else 'its header makes no sense'}", ""]
    lines += [
        f"  {name}: {_shown(name, getattr(found.now, name))} -> {_shown(name, value)}"
        for name, value in _changes(found.now, best.header)
    ]
    lines += ["", "Why that is believed:", f"  under it the check finds {_score(best)}"]
    if found.rival is not None:
        lines.append(f"  the next best leads to other tables, and leaves {_score(found.rival)}")
    if found.size is not None:
        more = "" if found.size.is_exact else "; the disk may have been larger"
        lines.append(f"  the disk has {found.size.size} bytes: {found.size.evidence}{more}")
    if is_gone:
        lines += ["", _NAMES]
    name = shell_path(filename)
    if out is None:
        lines += [
            "",
            "Nothing has been written. To have the rebuilt image as a new file:",
            f"      instarfs rescue -o RESCUED.qcow2 -- {name}",
        ]
    else:
        lines += ["", f"{shell_path(out)} is the rebuilt image; {name} is as it was. Look at it:"]
        lines.append(f"      instarfs report -- {shell_path(out)}")
    return text_lines(lines)


def rescue_json(found: Found, best: Hypothesis, filename: str, out: str | None) -> bytes:
    """The same as JSON."""
    return json_bytes(
        {
            "filename": filename,
            "header": {
                name: getattr(best.header, name)
                for name in Header.__slots__
                if name != "additional"
            },
            "changed": [name for name, _ in _changes(found.now, best.header)],
            "verdict": best.report.verdict,
            **_counters(best),
            "next-best": _counters(found.rival) if found.rival else None,
            "size-evidence": found.size.evidence if found.size else None,
            "size-is-exact": found.size.is_exact if found.size else True,
            "written-to": out,
        }
    )


def _changes(now: Header, header: Header) -> Iterator[tuple[str, object]]:
    for name in Header.__slots__:
        if getattr(now, name) != getattr(header, name):
            yield name, getattr(header, name)


def _shown(name: str, value: object) -> str:
    if isinstance(value, bytes):
        return value.hex() or "none"
    return f"{value:#x}" if name == "magic" or name.endswith("_features") else str(value)


def _score(hypothesis: Hypothesis) -> str:
    counters = hypothesis.report.counters
    return (
        f"{plural(counters.corruptions, 'corruption')},"
        f" {plural(counters.leaks, 'leaked cluster')},"
        f" {plural(counters.check_errors, 'check error')}"
    )


def _counters(hypothesis: Hypothesis) -> dict[str, int]:
    errors, corruptions, leaks = hypothesis.score
    return {"check-errors": errors, "corruptions": corruptions, "leaks": leaks}
