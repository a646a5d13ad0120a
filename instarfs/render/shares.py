"""Who had a cluster in common, and where each is after a repair: as JSON values and as lines.

At least one of them reads wrong bytes, and afterwards nothing else tells of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from instarfs.render.check import owner_phrase, owner_value
from instarfs.text import printable
from planner.check.report import Report
from planner.findings.kinds import NONE, Owner
from planner.findings.wording import plural
from planner.repair.split import GONE, Shares

LISTED_CLUSTERS = 1 << 12
"""Clusters that are listed; all of them are counted."""


def shares_value(report: Report, shares: Shares) -> dict[str, object]:
    """As values: the clusters, and of each who was there. *report*: before the repair."""
    return {
        "shared-clusters": [
            {
                "offset": cluster << report.geometry.cluster_bits,
                "owners": [
                    owner_value(report, owner) | {"offset-after": _place(report, cluster, new)}
                    for owner, new in owners
                ],
            }
            for cluster, owners in _clusters(shares, LISTED_CLUSTERS)
        ],
        "shared-cluster-count": len(shares.clusters),
    }


def _place(report: Report, cluster: int, new: int) -> int | None:
    """Where an owner's bytes are afterwards, a host offset; None where it has none any more."""
    at = cluster if new == NONE else new
    return None if new == GONE else at << report.geometry.cluster_bits


def shares_lines(report: Report, shares: Shares, most: int) -> list[str]:
    """A line a cluster, of *most* at most. *report*: before the repair."""
    number = len(shares.clusters)
    lines = [_line(report, cluster, owners) for cluster, owners in _clusters(shares, most)]
    if number > most:
        lines.append(f"... and {plural(number - most, 'cluster')} more: --output json")
    return lines


def _line(report: Report, cluster: int, owners: list[tuple[Owner, int]]) -> str:
    geometry, snapshots = report.geometry, report.snapshots
    bits, parts = geometry.cluster_bits, []
    for owner, new in owners:
        what = {NONE: "stays there", GONE: "goes from there"}.get(new, f"gets {new << bits}")
        parts.append(f"{owner_phrase(owner, geometry, snapshots)} {what}")
    return printable(f"host cluster at {cluster << bits}: {'; '.join(parts)}")


def _clusters(shares: Shares, most: int) -> Iterator[tuple[int, list[tuple[Owner, int]]]]:
    """The first *most* clusters: each with its first owners, and where these are by then."""
    owners, first = shares.owners, shares.clusters[:most]
    for cluster in first.tolist():
        start = int(np.searchsorted(owners.cluster, cluster))
        listed = owners.of(cluster)
        new = shares.new[start : start + len(listed)]
        yield cluster, list(zip(listed, new.tolist(), strict=True))
