"""What the header of a file may have been: hypotheses, and which of them is believed.

How they are come by is in `planner.rescue.headers` and `planner.rescue.bare`.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.check.report import CheckCounters
from planner.qcow2.header import Header
from planner.rescue.disk_size import DiskSize
from planner.rescue.leftovers import Left
from planner.source import Patched, Source

STANDS_OUT = 4
"""So many times more than the best must the next contradict the file, or none is believed."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A header, what the check of the file counts under it, and which fields it changes.

    ``content``: the first bytes of the file, with the header in them. ``extensions_end``: where the
    header extensions end, of which what stood there makes no sense; None where they stay.
    """

    header: Header
    content: bytes
    counters: CheckCounters
    changed: tuple[str, ...]
    extensions_end: int | None = None

    def laid_over(self, source: Source) -> Patched:
        """The file as it is with that header."""
        return Patched(source, 0, self.content)

    @property
    def score(self) -> tuple[int, int, int]:
        """The lower, the better: what the check could not look at, found wrong, found leaked."""
        counters = self.counters
        return counters.check_errors, counters.corruptions, counters.leaks

    @property
    def wrong(self) -> int:
        """How much contradicts it, at least 1."""
        return max(1, sum(self.score))


@dataclass(frozen=True, slots=True)
class WithSnapshots:
    """What is left once the snapshots that were lost are listed again: under the ``best``
    hypothesis, and under the best one that leads to another disk, ``rival``, if one does.
    """

    best: Left
    rival: Left | None

    @property
    def stands_out(self) -> bool:
        """Whether the best is to be believed: where as much leaks, by what contradicts it."""
        best, rival = self.best, self.rival
        if rival is None:
            return True
        pairs = [(best.total, rival.total)]
        if best.leaks <= rival.leaks:
            pairs.append((best.contradictions, rival.contradictions))
        return any(mine * STANDS_OUT <= other and mine < other for mine, other in pairs)


@dataclass(frozen=True, slots=True)
class Found:
    """What the header of a file may have been: ``hypotheses``, the best first.

    ``now``: the fields as they stand. ``size``: of the best, and what tells it, where it had to be
    found. ``with_snapshots``: where it took that to tell the best. ``is_complete``: whether all
    that could be were tried. None is believed unless it stands out, or is ``given``: that of an
    image made in the same way, by which the refcounts of this one count its tables.
    """

    now: Header
    hypotheses: list[Hypothesis]
    size: DiskSize | None = None
    with_snapshots: WithSnapshots | None = None
    is_complete: bool = True
    given: Hypothesis | None = None

    @property
    def best(self) -> Hypothesis | None:
        """The hypothesis that stands out; None where nothing does."""
        if not self.hypotheses:
            return None
        if self.given is not None:
            stands = next((each for each in self.hypotheses if not each.changed), self.given)
            return stands if stands.score <= self.given.score else self.given
        if self.with_snapshots is not None:
            return self.hypotheses[0] if self.with_snapshots.stands_out else None
        best, rival = self.hypotheses[0], self.rival
        errors, corruptions, leaks = best.score
        if corruptions and not self.is_complete and "magic" in best.changed:
            # What is not contradicted may be among those that were not tried.
            return None
        wrong = corruptions + leaks
        if errors or (rival is not None and wrong * STANDS_OUT > rival.wrong):
            return self._that_is_there()
        # A header that can be read is not changed to please the count of what is wrong elsewhere.
        stands = next((each for each in self.hypotheses if not each.changed), best)
        return stands if wrong and not stands.score[0] else best

    def _that_is_there(self) -> Hypothesis | None:
        """The header as it is, where it can be read and no other leaves far less wrong; or None."""
        can_be = [each for each in self.hypotheses if not each.score[0]]
        most = STANDS_OUT * min((each.wrong for each in can_be), default=0)
        return next((each for each in can_be if not each.changed and each.wrong < most), None)

    @property
    def rival(self) -> Hypothesis | None:
        """The best of those that lead to other tables than the best; None where none does."""
        tables = [tables_of(each.header) for each in self.hypotheses]
        pairs = zip(self.hypotheses, tables, strict=True)
        return next((each for each, own in pairs if own != tables[0]), None)


def explains_less(one: Hypothesis, stands: Hypothesis) -> bool:
    """Whether more of what is counted is nobody's under *one* than under *stands*.

    Tables of which nothing is wrong, since they lead nowhere, are no better than those that lead to
    all that is counted, and to some garbage.
    """
    is_comparable = _counts_of(one.header) == _counts_of(stands.header)
    return is_comparable and one.counters.leaks > stands.counters.leaks


def _counts_of(header: Header) -> tuple[int, ...]:
    """What says what is counted: under other refcounts other clusters leak."""
    return header.cluster_bits, header.refcount_table_offset, header.refcount_order


def tables_of(header: Header) -> tuple[int, ...]:
    """What says where the tables are: headers that differ in none of it lead to the same disk."""
    return (
        header.cluster_bits,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_order,
        header.snapshots_offset * bool(header.nb_snapshots),
        int(header.extended_l2),
    )
