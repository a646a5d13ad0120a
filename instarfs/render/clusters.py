"""``tables/clusters.tsv``: every run of the host file, in file order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain

import numpy as np

from instarfs.render import columns, lengths
from instarfs.render.columns import Cells, T, remark, tsv
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
    lines = map(columns.content, map(partial(_rows, columns), _batches(atlas)))
    return tsv(HEADER, chain(_remarks(atlas), lines))


def clusters_tsv_length(atlas: Atlas | ImageError) -> int:
    """How many bytes `clusters_tsv` gives, in a fraction of the time."""
    if isinstance(atlas, ImageError):
        return sum(map(len, clusters_tsv(atlas)))
    lines = map(lengths.content, map(partial(_rows, lengths), _batches(atlas)))
    return lengths.tsv(HEADER, chain(map(len, _remarks(atlas)), lines))


def _remarks(atlas: Atlas) -> list[bytes]:
    return [remark(TORN)] if atlas.torn else []


def findings_label(findings: int) -> str:
    """The kinds of findings in a set of bits; a dash where there are none."""
    return "+".join(kind.label for kind in kinds_in(findings)) or "-"


def _batches(atlas: Atlas) -> Iterator[Runs]:
    """Few enough at a time to be made into text together."""
    for runs in atlas.runs():
        for start in range(0, len(runs), BATCH_ROWS):
            yield runs.select(slice(start, start + BATCH_ROWS))


def _rows(cells: Cells[T], runs: Runs) -> T:
    uses, owner = np.unique(runs.uses, return_inverse=True)
    kinds, finding = np.unique(runs.findings, return_inverse=True)
    unreadable = (runs.findings & _UNREADABLE) != 0
    return cells.tabbed(
        cells.decimals(runs.offset),
        cells.decimals(runs.length),
        cells.labels([owner_label(bits) for bits in uses.tolist()], owner),
        cells.either(unreadable, cells.same(b"-"), cells.decimals(runs.refcount)),
        cells.decimals(runs.references),
        cells.labels([findings_label(bits) for bits in kinds.tolist()], finding),
    )
