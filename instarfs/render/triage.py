"""What leaked clusters look like, as JSON and in words: ``lost/triage.json``, reports, dry runs.

Numbers are decimal, offsets and lengths in bytes. Whatever comes from the image is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import numpy as np

from instarfs.render.limits import LISTED_RUNS
from instarfs.text import json_bytes, printable
from planner.arrays import I64
from planner.check.classify import Look
from planner.check.report import Report
from planner.findings.kinds import ACTIVE, NONE, UNLISTED
from planner.qcow2.names import brief_name, decode_name
from planner.qcow2.snapshots import Snapshot
from planner.triage.l1_holes import Place
from planner.triage.triage import Suspect, Triage, adjacent, looks_of, names_of

LISTED_TABLES = 10
"""Former tables that a text for reading lists."""

_TABLES_OF_A_RUN = 8


# ---- JSON ----


def triage_json(triage: Triage, report: Report, filename: str) -> bytes:
    """Everything that is known of the leaked clusters; of very many the first."""
    size = report.geometry.cluster_size if report.layout else 0
    first, count = adjacent(triage.clusters)
    return json_bytes(
        {
            "filename": filename,
            "torn": report.torn,
            **triage_value(triage),
            "leaked-bytes": triage.leaked * size,
            "in-words": triage_lines(triage),
            "tables": [_table_value(table, report) for table in triage.tables],
            "run-count": len(first),
            "runs": [
                _run_value(triage, size, *span)
                for span in zip(*_slots(first, count, LISTED_RUNS), strict=True)
            ],
        }
    )


def triage_value(triage: Triage) -> dict[str, object]:
    """The numbers of a triage, under the keys that say so everywhere."""
    return {
        "leaked-clusters": triage.leaked,
        "leaked-clusters-looked-at": triage.looked_at,
        "looks-like": _looks_value(triage.looks()),
        "starts-with": dict(triage.starts_with().most_common()),
        "suspect-count": triage.suspect_count,
        "leaked-clusters-with-data": triage.losses.data,
        "may-have-come-from": [cause.kind.value for cause in triage.losses.causes],
        "missing-bytes-at-most": triage.losses.missing,
        "clusters-without-refcounts": len(triage.uncounted),
        "lost-snapshots": [_snapshot_value(snapshot) for snapshot in triage.snapshots],
    }


def _slots(first: I64, count: I64, limit: int) -> tuple[list[int], list[int], list[int]]:
    """Of the first runs: cluster, number, and where they stand among the leaked clusters."""
    start = np.cumsum(count[:limit]) - count[:limit]
    return first[:limit].tolist(), count[:limit].tolist(), start.tolist()


def _run_value(
    triage: Triage, cluster_size: int, first: int, count: int, start: int
) -> dict[str, object]:
    part = slice(start, start + count)
    groups = np.unique(triage.group[part])
    known = groups[(groups != NONE) & (groups < len(triage.tables))][:_TABLES_OF_A_RUN]
    return {
        "file": f"lost/{first * cluster_size}",
        "offset": first * cluster_size,
        "length": count * cluster_size,
        "looks-like": _looks_value(looks_of(triage.look[part])),
        "starts-with": dict(names_of(triage.signature[part]).most_common()),
        "mapped-by": [triage.tables[number].offset for number in known.tolist()],
    }


def _table_value(table: Suspect, report: Report) -> dict[str, object]:
    """A former table, and the group of leaked clusters that it points at."""
    return {
        "offset": table.offset,
        "looks-like": (Look.L1_TABLE if table.is_l1 else Look.L2_TABLE).label,
        "looks-lost": table.looks_lost,
        "message": printable(table.sentence),
        "entries": table.words,
        "plausible-entries": table.plausible,
        "targets": table.targets,
        "leaked-targets": table.leaked_targets,
        "maps": {
            "looks-like": _looks_value(table.mapped),
            "starts-with": dict(table.starts_with.most_common()),
        },
        "may-have-stood": [_place_value(place, report) for place in table.places],
        "may-have-stood-count": table.place_count,
        "snapshot": _snapshot_value(table.snapshot) if table.snapshot else None,
    }


def _place_value(place: Place, report: Report) -> dict[str, object]:
    length = place.count * place.coverage
    if place.snapshot == ACTIVE:
        length = min(length, max(0, report.geometry.virtual_size - place.guest_offset))
    return {
        "l1-entry": place.kind.value,
        "snapshot": None if place.snapshot in (ACTIVE, UNLISTED) else place.snapshot,
        "l1-index": place.l1_index,
        "count": place.count,
        "guest-offset": place.guest_offset,
        "guest-length": length,
    }


def _snapshot_value(snapshot: Snapshot) -> dict[str, object]:
    return {
        "id": decode_name(snapshot.id_str),
        "name": decode_name(snapshot.name),
        "date-sec": snapshot.date_sec,
        "vm-state-size": snapshot.vm_state_size,
        "l1-table-offset": snapshot.l1_table_offset,
        "l1-entries": snapshot.l1_size,
    }


def _looks_value(looks: Counter[Look]) -> dict[str, int]:
    return {look.label: number for look, number in looks.most_common()}


# ---- words ----


def triage_lines(triage: Triage, way_to_the_rest: str = "lost/triage.json") -> list[str]:
    """The triage for a reader: first a line on all of it, then what looks lost, a line each."""
    if not triage.leaked:
        return []
    lines = [_summary(triage)]
    suspects = triage.suspects
    lines += [f"{table.sentence}{_content(table)}" for table in suspects[:LISTED_TABLES]]
    more = triage.suspect_count - min(len(suspects), LISTED_TABLES)
    if more > 0:
        lines.append(f"... and {more} more that look lost: {way_to_the_rest}")
    lines += [
        f"the snapshot table still names a snapshot that the header does not count:"
        f" '{brief_name(snapshot.name)}', ID {brief_name(snapshot.id_str)}, taken {_date(snapshot)}"
        for snapshot in triage.snapshots[:LISTED_TABLES]
    ]
    lines += triage.losses.sentences
    if len(triage.uncounted) == 1:
        lines.append(
            "one of them looks free: its refcount is lost, nothing refers to it, and it holds data"
        )
    elif len(triage.uncounted):
        lines.append(
            f"{len(triage.uncounted)} of them look free: their refcounts are lost, nothing refers"
            " to them, and they hold data"
        )
    if not triage.suspect_count and not triage.snapshots and not triage.losses.causes:
        lines.append("nothing among them looks like a lost table")
    return [printable(line) for line in lines]


def _summary(triage: Triage) -> str:
    """What the leaked clusters look like, all together."""
    looked = f"{triage.looked_at} of {triage.leaked} leaked clusters were looked at"
    if triage.looked_at == triage.leaked:
        looked = f"all {triage.leaked} leaked clusters were looked at"
    if triage.looked_at == triage.leaked == 1:
        looked = "the leaked cluster was looked at"
    looks = triage.looks()
    del looks[Look.UNREAD]
    return f"{looked}: {_listed(_looks(looks))}" + (_beginning(triage.starts_with()))


def _content(table: Suspect) -> str:
    """What is known of the clusters that a table maps."""
    looks = Counter(table.mapped)
    del looks[Look.UNREAD]
    if not looks or table.is_l1:
        return ""
    return f"; they look like: {_listed(_looks(looks))}" + (_beginning(table.starts_with))


def _beginning(names: Counter[str]) -> str:
    found = _listed(names.most_common(LISTED_TABLES))
    return f" (recognised by how they begin: {found})" if found else ""


def _looks(looks: Counter[Look]) -> Iterator[tuple[str, int]]:
    for look, number in looks.most_common():
        is_countable = look not in (Look.ZEROS, Look.DATA, Look.IN_USE)
        yield f"{look.label}s" if is_countable and number > 1 else look.label, number


def _listed(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{number} {name}" for name, number in items)


def _date(snapshot: Snapshot) -> str:
    return datetime.fromtimestamp(snapshot.date_sec, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
