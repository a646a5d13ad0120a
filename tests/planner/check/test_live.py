"""planner.check.live and planner.check.confirm: what is said of an image that is written to."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from planner.check.check import check_image
from planner.check.confirm import confirm, has_suspects
from planner.check.live import check_live
from planner.check.report import Report
from planner.errors import ReadFailed
from planner.findings.kinds import KINDS, Finding, FindingKind, Severity, Structure
from planner.qcow2 import entries
from planner.qcow2.header import Incompatible
from tests.images.builder import Image
from tests.images.corpus import RULES
from tests.images.corpus.rule import SIZE, Rule, builder
from tests.planner.answers import answers, singles
from tests.planner.changing import Changing, Hourglass, in_turn

COPIED = (FindingKind.L1_COPIED, FindingKind.L2_COPIED)


def healthy() -> Image:
    """Two guest clusters, a snapshot of them, and a third that was written since."""
    made = builder()
    made.write(0, bytes([1]) * SIZE)
    made.write(1, bytes([2]) * SIZE)
    made.take_snapshot("one")
    made.write(2, bytes([3]) * SIZE)
    made.skip(6)
    return made.build()


def live(image: Changing, settle: float = 5.0, glass: Hourglass | None = None) -> Report:
    return check_live(image.look, (glass or Hourglass()).clock, settle=settle)


def told(report: Report) -> list[Finding]:
    return [single for row in report.rows() for single in singles(row, report)]


def is_believed(row: Finding) -> bool:
    """Whether such a finding can be confirmed while a program writes."""
    if KINDS[row.kind].severity < Severity.CORRUPTION:
        return True
    if row.kind in COPIED:
        return False  # not each; what of them is, has tests of its own
    if row.kind is FindingKind.PAST_END and row.structure.is_guest:
        return False
    return row.kind is not FindingKind.COMPRESSED_UNREADABLE


# ---- nobody writes ----


def test_an_image_that_is_left_alone_takes_two_looks() -> None:
    image, glass = Changing(bytearray(healthy().data)), Hourglass()
    report = live(image, glass=glass)
    assert report.verdict == "clean"
    assert report.live is not None
    assert report.live.as_of == pytest.approx(0.002, abs=0.002)
    assert (report.live.confirmed, report.live.in_motion) == (0, 0)
    assert glass.pauses == []
    assert answers(report) == answers(check_image(healthy().source))


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_damage_that_stays_is_found_as_without_a_writer(make: Callable[[], Rule]) -> None:
    data = bytearray(make().image.data)
    plain = check_image(Changing(data).look())
    if plain.layout is not None and plain.layout.header.dirty:
        pytest.skip("of refcounts that are out of date another test tells")
    report = live(Changing(data), settle=0.02)
    assert report.live is not None
    if report.live.as_of is not None:
        assert answers(report) == answers(plain)
        assert report.verdict == plain.verdict
    else:
        left = [row for row in told(plain) if row not in told(report)]
        assert left
        assert report.verdict in ("corrupt", "unsettled", "incomplete")
        assert report.verdict != "unsettled" or not has_suspects(report)
        for row in left:
            assert not is_believed(row)


def test_each_finding_of_many_is_confirmed() -> None:
    made = healthy()
    for cluster in range(3):
        made.set_refcount(made.host_offset(cluster) // made.cluster_size, 0)
    made.set_bits(made.l2_at(1), 1 << 56)
    image = Changing(bytearray(made.data))
    plain = check_image(image.look())
    report = confirm(image.look, plain)
    assert answers(report) == answers(plain)
    assert report.live is not None
    grave = [row.count for row in plain.rows() if row.info.severity >= Severity.CORRUPTION]
    assert (report.live.confirmed, report.live.in_motion) == (sum(grave), 0)


# ---- somebody does ----


def alternate(made: Image) -> Callable[[], None]:
    """Have guest cluster 9 allocated and discarded, a write at each read: in QEMU's order."""
    free = healthy().refcounts().index(0)
    entry, offset = made.l2_at(9), free * made.cluster_size

    def refcount(value: int) -> Callable[[], None]:
        return lambda: made.set_refcount(free, value)

    def lead(word: int) -> Callable[[], None]:
        return lambda: made.set_word(entry, word)

    return in_turn(refcount(1), lead(offset | entries.COPIED), lead(0), refcount(0))


def test_an_image_that_is_allocated_and_discarded_in_is_not_corrupt() -> None:
    """At each read one write: a plain check sees references without refcounts."""
    seen = set()
    for skipped in range(0, 64, 7):
        made = healthy()
        image = Changing(made.data, alternate(made))
        for _ in range(skipped):
            image.meanwhile()
        seen.add(check_image(image.look()).verdict)
        assert live(image, settle=0.02).verdict in ("unsettled", "leaks", "clean")
    assert "corrupt" in seen


def test_it_settles_when_the_writes_pause() -> None:
    made = healthy()
    write, left = alternate(made), iter(range(400))
    image, glass = Changing(made.data, lambda: next(left, None) and write()), Hourglass()
    report = live(image, glass=glass)
    assert report.live is not None
    assert report.live.as_of is not None
    assert report.verdict in ("clean", "leaks")
    assert glass.pauses


def test_damage_is_confirmed_while_the_image_never_holds_still() -> None:
    made = healthy()
    made.set_refcount(made.host_offset(2) // made.cluster_size, 0)
    made.set_bits(made.l2_at(1), 1 << 56)
    report = live(Changing(made.data, alternate(made)), settle=0.05)
    assert (report.verdict, report.exit_code) == ("corrupt", 2)
    assert report.live is not None
    assert report.live.as_of is None
    assert report.live.in_motion > 0
    kinds = {kind for kind in report.counts() if KINDS[kind].severity >= Severity.CORRUPTION}
    damage = {FindingKind.REFCOUNT_MISSING, FindingKind.L2_ENTRY_RESERVED}
    assert kinds == {*damage, FindingKind.L2_COPIED}  # set, of a cluster with the refcount 0
    missing = [row.host_offset for row in report.rows(FindingKind.REFCOUNT_MISSING)]
    assert missing == [made.host_offset(2)]


def test_never_still_and_nothing_confirmed_is_unsettled_within_its_time() -> None:
    made, glass = healthy(), Hourglass()
    report = live(Changing(made.data, alternate(made)), settle=2.0, glass=glass)
    assert (report.verdict, report.exit_code) == ("unsettled", 1)
    assert report.live is not None
    assert report.live.in_motion > 0
    assert 2.0 <= glass.time < 2.2


def test_a_finding_that_another_place_has_next_time_is_not_confirmed() -> None:
    """A missing refcount, of another cluster at each look."""
    made = healthy()
    clusters = [made.host_offset(guest) // made.cluster_size for guest in (0, 1, 2)]
    counts = [made.refcount(cluster) for cluster in clusters]

    def move(at: int) -> Callable[[], None]:
        def step() -> None:
            for cluster, count in zip(clusters, counts, strict=True):
                made.set_refcount(cluster, count)
            made.set_refcount(clusters[at], 0)

        return step

    image = Changing(made.data)
    move(0)()
    report = check_image(image.look())
    assert FindingKind.REFCOUNT_MISSING in report.counts()
    steps = in_turn(*(move(at) for at in (1, 2, 0)))
    look = image.look

    def look_later() -> object:
        steps()
        return look()

    after = confirm(look_later, report)  # type: ignore[arg-type]
    assert not has_suspects(after)
    assert after.live is not None
    assert after.live.confirmed == 0


# ---- what a healthy image looks like for a while ----


def copied_flags(*, is_set: bool, stored: int) -> Image:
    """Of a cluster with one reference: its flag, and its refcount."""
    made = builder()
    made.write(0, bytes([1]) * SIZE)
    image = made.build()
    (image.set_bits if is_set else image.clear_bits)(image.l2_at(0), entries.COPIED)
    image.set_refcount(image.host_offset(0) // image.cluster_size, stored)
    return image


@pytest.mark.parametrize(
    ("is_set", "stored"), [(True, 2), (False, 1)], ids=["snapshot-made", "snapshot-deleted"]
)
def test_copied_flags_as_a_snapshot_leaves_them_for_a_while(is_set: bool, stored: int) -> None:
    data = copied_flags(is_set=is_set, stored=stored).data
    assert check_image(Changing(data).look()).verdict == "corrupt"
    report = live(Changing(data))
    assert report.verdict == "unsettled"
    assert report.live is not None
    assert report.live.in_motion == 1


def test_a_copied_flag_on_what_a_snapshot_has_too_is_damage() -> None:
    made = healthy()
    made.set_bits(made.l2_at(0), entries.COPIED)
    report = live(Changing(made.data))
    assert (report.verdict, dict(report.counts())) == ("corrupt", {FindingKind.L2_COPIED: 1})
    assert report.live is not None
    assert report.live.as_of is not None


def test_entries_past_the_end_of_a_file_that_shrinks_with_its_disk() -> None:
    """What is discarded at the end is cut off, and its entry and its refcount are written later."""
    made = healthy()
    beyond = made.host_clusters + 9
    made.set_word(made.l2_at(5), beyond * made.cluster_size | entries.COPIED)
    assert live(Changing(made.data)).verdict == "corrupt"
    made.set_refcount(beyond, 1)
    report = live(Changing(made.data), settle=0.02)
    assert FindingKind.PAST_END not in report.counts()
    assert report.verdict == "unsettled"
    del made.data[-512:]
    assert live(Changing(made.data)).verdict == "corrupt"


def test_of_lazy_refcounts_only_what_does_not_follow_from_them_is_judged() -> None:
    made = healthy()
    made.change_header(incompatible_features=int(Incompatible.DIRTY))
    made.set_refcount(made.host_offset(2) // made.cluster_size, 0)
    made.set_refcount(made.host_clusters - 1, 3)
    report = live(Changing(made.data))
    assert (report.verdict, report.exit_code) == ("dirty", 3)
    assert set(report.counts()) == {FindingKind.DIRTY_BIT}
    made.set_word(made.l2_at(2), made.l2_table(0) | entries.COPIED)
    report = live(Changing(made.data))
    assert report.verdict == "corrupt"
    assert FindingKind.MULTIPLE_OWNERS in report.counts()
    # What was discarded by one table and taken by another, as long as only the other is written.
    made.set_word(made.l2_at(2), made.word(made.l2_at(0)))
    report = live(Changing(made.data), settle=0.02)
    assert report.verdict == "unsettled"
    assert FindingKind.MULTIPLE_OWNERS not in report.counts()


# ---- headers, tables and errors ----


def test_a_table_that_is_new_is_held_too() -> None:
    """An L1 entry appears after the metadata was located: its table is held before it counts."""
    made = healthy()
    table = made.refcounts().index(0)
    l1_at = made.l1_at(1)
    image = Changing(made.data)

    def grow() -> None:
        if len(image.reads) == 12:
            made.set_refcount(table, 1)
            made.set_word(l1_at, table * made.cluster_size | entries.COPIED)

    image.meanwhile = grow
    report = live(image)
    assert (report.verdict, report.live is not None) == ("clean", True)
    tables = report.regions.offset[report.regions.structure == Structure.L2_TABLE]
    assert table * made.cluster_size in tables


def test_a_header_that_makes_no_sense_twice_makes_none() -> None:
    made = healthy()
    made.data[0:4] = b"none"
    report = live(Changing(made.data))
    assert (report.verdict, report.exit_code) == ("unreadable", 63)


def test_a_header_that_is_being_written_is_looked_at_again() -> None:
    made = healthy()
    whole = bytes(made.data[:104])
    image = Changing(made.data)
    made.data[8:104] = bytes(96)

    def write() -> None:
        if len(image.reads) > 6:
            made.data[:104] = whole

    image.meanwhile = write
    assert live(image).verdict == "clean"


def test_what_cannot_be_read_is_an_error() -> None:
    def fail() -> None:
        raise ReadFailed

    with pytest.raises(ReadFailed):
        live(Changing(healthy().data, fail))


# ---- any interleaving ----


@pytest.mark.parametrize("seed", range(3))
def test_a_writer_that_keeps_the_order_is_never_called_corrupt(seed: int) -> None:
    """Several entries and few clusters, so that these come back: between any two reads, any number
    of writes.
    """
    rng, made = random.Random(seed), healthy()
    free = [cluster for cluster, count in enumerate(made.refcounts()) if not count]
    slots = [made.l2_at(guest) for guest in range(8, 12)]

    def writes() -> object:
        while True:
            entry = rng.choice(slots)
            word = made.word(entry)
            if word:
                made.set_word(entry, 0)
                yield
                made.set_refcount((word & entries.L2_OFFSET) // made.cluster_size, 0)
            else:
                cluster = rng.choice([each for each in free if not made.refcount(each)])
                made.set_refcount(cluster, 1)
                yield
                made.set_word(entry, cluster * made.cluster_size | entries.COPIED)
            yield

    script = writes()

    def meanwhile() -> None:
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            next(script)  # type: ignore[call-overload]

    for _ in range(3):
        report = live(Changing(made.data, meanwhile), settle=0.02)
        assert report.verdict in ("clean", "leaks", "unsettled")
