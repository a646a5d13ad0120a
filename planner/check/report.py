"""The answer of a check, as a value: counters, findings, the verdict and its exit code.

Nothing is decided here but the verdict, and nothing is rendered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from planner.check.ending import CutOff
from planner.check.entry_findings import EntryFindings
from planner.check.refcount_comparison import Mismatches
from planner.errors import ImageError
from planner.findings.grouped import GroupedFindings
from planner.findings.kinds import (
    KINDS,
    Finding,
    FindingKind,
    Findings,
    Owners,
    Severity,
    no_owners,
)
from planner.metadata.regions import Regions, no_regions
from planner.qcow2.geometry import Geometry
from planner.qcow2.layout import Layout
from planner.qcow2.snapshots import Snapshots

EXIT_CODES = {
    "unreadable": 1,
    "torn": 1,
    "incomplete": 1,
    "corrupt": 2,
    "marked-corrupt": 2,
    "unsettled": 1,
    "leaks": 3,
    "dirty": 3,
    "clean": 0,
}
"""By verdict, in the codes of ``qemu-img check``: 3 is what nothing has come to harm by."""


@dataclass(frozen=True, slots=True)
class CheckCounters:
    """The counters of ``qemu-img check --output=json``."""

    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0


@dataclass(frozen=True, slots=True)
class RepairCounters:
    """What a repair mends: leaks, wrong refcounts, the rest; and whether anything is left."""

    leaks: int
    refcounts: int
    corruptions: int
    incomplete: bool


@dataclass(frozen=True, slots=True)
class Live:
    """How a report came about of an image that a program writes meanwhile.

    ``as_of``: the one moment that it is of, in the seconds of whoever checked; None where none was
    to be had, so that it tells only what held for longer. ``confirmed``: findings that were looked
    at again by their own words and held, as they count. ``in_motion``: words of metadata that
    changed between the last two looks, and findings that were gone when they were looked at again.
    """

    as_of: float | None
    confirmed: int = 0
    in_motion: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """The answer of a check.

    ``error``: the header cannot be read, and nothing else is known. ``stopped``: tables that could
    not be read, each with its reason; QEMU ends its check at the first. ``needs_rebuild``: the
    refcount structure itself is damaged. ``hidden``: the kinds of findings because of which a table
    that could hold references was not walked. ``regions``: where all metadata lies. ``luks_error``:
    why no password opens the disk. ``holds_compressed``, ``compressed_looked_at``: whether there
    are compressed clusters, and whether all were unpacked. ``cut_off``: that the file is too short,
    where something shows it. ``in_use``, ``changed``: a writer had the image, or it changed, while
    it was read. ``live``: what is to be believed all the same, where it was looked at again.
    ``entries``: what was found about L2 entries; ``mismatches``, ``totals``: stored against counted
    refcounts. `rows` and `counts` join them in.
    """

    layout: Layout | None
    error: ImageError | None = None
    counters: CheckCounters = field(default_factory=CheckCounters)
    findings: GroupedFindings = field(default_factory=GroupedFindings)
    entries: EntryFindings | None = None
    mismatches: Mismatches | None = None
    totals: dict[FindingKind, int] = field(default_factory=dict)
    owners: Owners = field(default_factory=no_owners)
    regions: Regions = field(default_factory=no_regions)
    snapshots: Snapshots = field(default_factory=Snapshots)
    stopped: tuple[ImageError, ...] = ()
    needs_rebuild: bool = False
    hidden: tuple[FindingKind, ...] = ()
    luks_error: ImageError | None = None
    cut_off: CutOff | None = None
    holds_compressed: bool = False
    compressed_looked_at: bool = False
    in_use: bool = False
    changed: bool = False
    live: Live | None = None

    @property
    def complete(self) -> bool:
        """Whether every table that could hold a reference was walked."""
        return self.error is None and not self.hidden

    def counts(self) -> dict[FindingKind, int]:
        """How often each kind that is there counts; for refcounts, clusters."""
        return count_findings(self.findings, self.entries, self.totals)

    def batches(self, *kinds: FindingKind) -> Iterator[Findings]:
        """All findings of these kinds (none given: of every kind), worst severity first.

        In columns, a bounded number of rows at a time: nothing is held of sixteen million leaks.
        """
        chosen = kinds or tuple(FindingKind)
        for severity in reversed(Severity):
            mine = [kind for kind in chosen if KINDS[kind].severity is severity]
            for kind in mine:
                yield from self.findings.batches(kind)
                if self.entries is not None:
                    yield from self.entries.batches(kind)
            of_clusters = [kind for kind in mine if self.totals.get(kind)]
            if of_clusters and self.mismatches is not None:
                for part in self.mismatches.runs(*of_clusters):
                    yield from part.batches()

    def rows(self, *kinds: FindingKind) -> Iterator[Finding]:
        """The same, one object a row."""
        for batch in self.batches(*kinds):
            yield from batch.rows()

    def in_brief(self) -> Report:
        """The same verdict, counters and counts, without what has a number for each cluster."""
        return replace(self, mismatches=None, owners=no_owners(), regions=no_regions())

    @property
    def geometry(self) -> Geometry:
        """The image's shape. Raises ``error`` where it is not known."""
        if self.layout is None:
            raise self.error or ImageError("header", "unknown", "it was not read")
        return self.layout.geometry

    @property
    def torn(self) -> bool:
        """Whether somebody wrote meanwhile: nothing may be planned from it."""
        return self.in_use or self.changed

    @property
    def verdict(self) -> str:
        """One word: what a person should believe of this image."""
        kinds = self.counts()
        corrupt = any(KINDS[kind].severity is Severity.CORRUPTION for kind in kinds)
        for applies, verdict in (
            (self.error is not None, "unreadable"),
            (self.torn and self.live is None, "torn"),
            (self.counters.check_errors, "incomplete"),
            (corrupt, "corrupt"),
            (FindingKind.CORRUPT_BIT in kinds, "marked-corrupt"),
            (self.live is not None and self.live.as_of is None, "unsettled"),
            (self.counters.leaks or FindingKind.LEAK_PAST_END in kinds, "leaks"),
            (FindingKind.DIRTY_BIT in kinds, "dirty"),
        ):
            if applies:
                return verdict
        return "clean"

    @property
    def exit_code(self) -> int:
        """What a check of it ends with: that of its verdict, 0 for nothing but ``clean``.

        Where ``qemu-img check`` says 0 and this does not: a cluster with two owners, a LUKS header
        that QEMU refuses, a last cluster that is cut off, a table without entries where clusters
        behind the end of the file are counted, the corrupt bit, the dirty bit.
        """
        if self.error is not None:
            return self.error.exit_code
        return EXIT_CODES[self.verdict]


def count_findings(
    findings: GroupedFindings, entries: EntryFindings | None, totals: dict[FindingKind, int]
) -> dict[FindingKind, int]:
    """How often each kind that is there counts, however it is held."""
    counts = Counter(findings.counts())
    counts.update(entries.counts() if entries else {})
    counts.update({kind: number for kind, number in totals.items() if number})
    return dict(counts)
