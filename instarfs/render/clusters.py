"""``tables/clusters.tsv``: every run of the host file, in file order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from instarfs.render.columns import decimals, either, labels, remark, same, tsv, tsv_lines
from planner.arrays import U8, U64
from planner.errors import ImageError
from planner.findings.kinds import BATCH_ROWS, FindingKind
from planner.views.host_map import Atlas, Runs, kinds_in, owner_label

HEADER = ("offset", "length", "owner", "refcount", "references", "finding")

TORN = "the image was written to while it was read: this belongs to no single moment"

_UNREADABLE = np.uint64(1 << FindingKind.REFCOUNT_UNREADABLE)


def clusters_tsv(atlas: Atlas | ImageError) -> Iterator[bytes]:
    """Offset, length, owner, stored refcount, references, and the kinds of what a check found.

    Owners that are not the same are joined by ``+``, and so are kinds of findings.
    """
    if isinstance(atlas, ImageError):
        return tsv(HEADER, [remark(str(atlas))])
    torn = [remark(TORN)] if atlas.torn else []
    return tsv(HEADER, chain(torn, map(_lines, _batches(atlas))))


def findings_label(findings: int) -> str:
    """The kinds of findings in a set of bits; a dash where there are none."""
    return "+".join(kind.label for kind in kinds_in(findings)) or "-"


def _batches(atlas: Atlas) -> Iterator[Runs]:
    """Few enough at a time to be made into text together."""
    for runs in atlas.runs():
        for start in range(0, len(runs), BATCH_ROWS):
            yield runs.select(slice(start, start + BATCH_ROWS))


def _lines(runs: Runs) -> bytes:
    uses, owner = np.unique(runs.uses, return_inverse=True)
    kinds, finding = np.unique(runs.findings, return_inverse=True)
    return tsv_lines(
        decimals(runs.offset),
        decimals(runs.length),
        labels([owner_label(bits) for bits in uses.tolist()], owner),
        _refcounts(runs.refcount, runs.findings),
        decimals(runs.references),
        labels([findings_label(bits) for bits in kinds.tolist()], finding),
    )


def _refcounts(refcount: U64, findings: U64) -> U8:
    return either((findings & _UNREADABLE) != 0, same(b"-"), decimals(refcount))
