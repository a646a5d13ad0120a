"""What another check says once refcounts were corrected in their blocks, and nothing else changed.

Nothing refers to anything else by that: references, owners and what is wrong with entries are as
they were. Only refcounts are read anew, and the COPIED flags that are to say the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.check.check import concluded, judge_l1_tables
from planner.check.entry_findings import EntryFindings, EntryFindingsBuilder
from planner.check.entry_rules import contradicts_refcount
from planner.check.report import Report
from planner.findings.grouped import FindingsBuilder, GroupedFindings
from planner.findings.kinds import FindingKind
from planner.metadata.locate import Survey, take_survey
from planner.metadata.mapping_tables import TableParts
from planner.metadata.refcounts import StoredRefcounts
from planner.progress import Meter, Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.source import Source


def check_refcounts_again(
    source: Source, report: Report, *, progress: Progress = tell_nobody
) -> Report | None:
    """The check of *source*, which is the image of *report* but for refcounts in their blocks and
    what the header says of itself.

    It knows refcounts and flags, and of all else what *report* does: nothing is proven by it. None
    where that is not enough to go by.
    """
    mismatches, old, owners = report.mismatches, report.entries, report.owners
    if report.layout is None or mismatches is None or old is None or owners.truncated:
        return None
    layout = Layout.read(source)
    if mismatches.index.keys is not None or layout.geometry.external_data:
        return None
    meter = Meter(progress, "census", 1)
    survey = take_survey(source, layout, FindingsBuilder())
    # Of a table at several places it is for low refcounts that what it maps is found to be shared.
    if not np.array_equal(survey.tables.offset, old.tables.offset) or survey.repeats.any():
        return None
    stored = StoredRefcounts(source, layout, survey.reftable)
    stored.load_dense(mismatches.index.slots, meter)
    mismatches = replace(mismatches, stored=stored.values)
    return concluded(
        replace(
            report,
            layout=layout,
            findings=_with_flags_of_l1(report.findings, survey, stored),
            entries=old.with_flags(_flags_of_l2(source, survey, stored, old, meter)),
            mismatches=mismatches,
            totals=mismatches.totals(),
        )
    )


def _with_flags_of_l1(
    findings: GroupedFindings, survey: Survey, stored: StoredRefcounts
) -> GroupedFindings:
    """*findings* with the wrong flags of L1 entries as they are now."""
    builder = FindingsBuilder()
    judge_l1_tables(survey, stored, builder, FindingKind.L1_COPIED)
    groups = findings.groups.items()
    others = {key: rows for key, rows in groups if key[0] is not FindingKind.L1_COPIED}
    return GroupedFindings(others).joined(builder.build())


def _flags_of_l2(
    source: Source, survey: Survey, stored: StoredRefcounts, old: EntryFindings, meter: Meter
) -> EntryFindings:
    """The wrong flags of L2 entries, and nothing else."""
    geometry, tables = survey.layout.geometry, survey.tables
    found = EntryFindingsBuilder(geometry, tables, old.cut_at)
    present = survey.present[tables.copied[survey.present] != 0]
    meter.begin("census", len(present) * geometry.cluster_size)
    for group in tables.classes(present):
        parts = TableParts.of(source, tables.offset[group.ids], geometry.cluster_size)
        for part, rows in parts.read(source):
            words, _ = entries.split_entries(entries.decode_words(rows), geometry.extended_l2)
            flat = words.reshape(-1)
            positions = np.flatnonzero(
                ((flat & np.uint64(entries.L2_OFFSET)) != 0)
                & ((flat & np.uint64(entries.COMPRESSED)) == 0)
            )
            flat = flat[positions]
            clusters = entries.l2_offsets(flat) >> geometry.cluster_bits
            copied = flat >= np.uint64(entries.COPIED)
            wrong = contradicts_refcount(
                copied, stored.is_one(clusters), stored.unreadable(clusters)
            )
            at = parts.positions(part, positions[wrong], geometry)
            where = group.positions(at, geometry.l2_entries)
            found.add(FindingKind.L2_COPIED, where, copied[wrong])
            meter.advance(rows.size)
    return found.build()
