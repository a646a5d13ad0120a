"""A header that is gone, or of which a field makes no sense: found by what the rest looks like.

Every hypothesis is a header; laid over the file, the check of it is its score. Which is believed is
said in `planner.rescue.hypotheses`, how tables are found in `planner.rescue.agreeing_tables`. What
a header held of names (backing file, data file, extensions) is where it was, or gone.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np

from planner.arrays import I64, distinct, expand_ranges
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import ImageError
from planner.findings.kinds import FindingKind, Structure
from planner.guestfs.work import Work
from planner.metadata.work_limits import LIMITS, Limits
from planner.progress import Progress, tell_nobody
from planner.qcow2.extensions import (
    CRYPTO_HEADER,
    CRYPTO_POINTER,
    EXTENSION_BYTES,
    read_extensions,
    refusable,
)
from planner.qcow2.header import (
    CLUSTER_BITS,
    COMPRESSION_ZSTD,
    CRYPT_LUKS,
    CRYPT_NAMES,
    KNOWN_INCOMPATIBLE,
    MAGIC,
    MAX_BACKING_NAME,
    MAX_REFCOUNT_ORDER,
    SIGNED_MAX,
    V3_LENGTH,
    Header,
    Incompatible,
    decode_header,
    encode_header,
)
from planner.qcow2.layout import MAX_L1_BYTES
from planner.qcow2.luks import LUKS_BYTES, decode_luks
from planner.qcow2.luks import MAGIC as LUKS_MAGIC
from planner.qcow2.snapshots import read_snapshots
from planner.rescue.agreeing_tables import (
    MAX_CANDIDATES,
    HeaderTables,
    agreeing_tables,
    leads_to_data,
    longer_tables,
)
from planner.rescue.disk_size import DiskSize, disk_size, is_zstd
from planner.rescue.hypotheses import (
    STANDS_OUT,
    Found,
    Hypothesis,
    WithSnapshots,
    explains_less,
    tables_of,
)
from planner.rescue.leftovers import Left, count_left, is_same_disk
from planner.rescue.scan import Scan, Sectors, scan_once
from planner.source import (
    SECTOR,
    Patched,
    Source,
    nonzero_words,
    present_bytes,
    present_tables,
    read_bytes,
)

MAX_CHECKS = 400
"""Hypotheses that are checked, at most."""

SMALL_CHECKS, BYTES_A_CHECK, REGIONS_A_CHECK, SNAPSHOTS_A_CHECK = 100, 64 << 10, 1000, 100
CORRUPTIONS_A_CHECK = 100_000
"""Of a small file so many; one more for so much that there is of it; one that finds so many
structures, or so much wrong, is counted as one more, for it takes as long.
"""

TABLE_BYTES_A_CHECK = 4 << 20
"""So is one that walks so much of tables, holes in them included."""

CLUSTERS_A_CHECK = 1 << 20
"""So is one that counts so many."""

EXTENSIONS_A_CHECK = 1000
"""So is one behind whose header so many extensions are read, several times."""

LEAKS_A_CHECK = 16 << 10
"""As long as a check takes it to look for lost snapshots among so many leaked clusters, or less."""

MAX_LUKS = 64
"""Runs of leaked clusters that are looked at for a LUKS header: QEMU makes it first."""

MOST_BESIDE = 2
"""So many times what its tables take is in a file the data of which is in another."""

_COUNTED = replace(LIMITS, owners=0, past_end=False, overwritten=False, beyond_disk=False)
"""A score counts. Who owns what is in none of the counters, nor what a table holds that is none,
what is mapped behind the end of the disk, or counted past that of the file; and each may take most
of the time.
"""

_BEYOND_DISK = replace(_COUNTED, beyond_disk=True)
"""Where it is to be known whether the disk was larger."""

_STATE = Incompatible.DIRTY | Incompatible.CORRUPT


def find_headers(
    source: Source,
    *,
    assumed: Mapping[str, int] | None = None,
    like: Header | None = None,
    scan: Scan | None = None,
    progress: Progress = tell_nobody,
) -> Found:
    """What the header of *source* may have been.

    *assumed*: fields that somebody knows. *like*: the header of an image that was made in the same
    way. *scan*: of the file, where others ask for it too. Nothing is found where there is no
    refcount table that makes sense.
    """
    search = _Search(source, assumed or {})
    if like is not None:
        search.try_like(like)
    if search.given is None:
        search.try_fields()
        search.try_luks()
    if not search.is_settled and search.given is None:
        if not search.is_tired:
            search.try_tables((scan or scan_once(source, progress))())
        search.list_snapshots(progress)
        search.try_rest()
    hypotheses, size = search.best(), search.size
    is_it = size is not None and bool(hypotheses) and hypotheses[0].header.size == size.size
    size = size if is_it else None
    complete = not search.is_tired
    return Found(search.now, hypotheses, size, search.with_snapshots, complete, search.given)


def find_moved_l1(source: Source, report: Report, offsets: Iterable[int]) -> Found | None:
    """The header of *source* as it is, but for where its L1 table lies: at one of *offsets*, or up
    to its length before it, and nothing at all is wrong then. None where that is not so, or of two.

    *report*: the check of it as it is.
    """
    if report.layout is None:
        return None
    now, size = report.layout.header, report.geometry.cluster_size
    before = range(min(max(1, -(-now.l1_size * 8 // size)), MAX_CANDIDATES))
    starts = (offset - ahead * size for offset in offsets for ahead in before)
    found = []
    for start in itertools.islice(dict.fromkeys(starts), MAX_CANDIDATES):
        header = replace(now, l1_table_offset=start)
        content = encode_header(header)
        counters = check_image(Patched(source, 0, content), limits=_COUNTED).counters
        hypothesis = Hypothesis(header, content, counters, ("l1_table_offset",))
        if not any(hypothesis.score):
            found.append(hypothesis)
    if len(found) != 1:
        return None
    return Found(now, [*found, Hypothesis(now, b"", report.counters, ())])


def _table_bytes(source: Source, report: Report) -> int:
    """How much of L2 tables a check has walked."""
    if report.layout is None:
        return 0
    is_table = report.regions.structure == Structure.L2_TABLE
    size, offset = report.layout.geometry.cluster_size, distinct(report.regions.offset[is_table])
    return int(np.count_nonzero(present_tables(source, offset, size, anyway=0))) * size


class _Search:
    """Tries headers, each once, and keeps what the check says of each."""

    def __init__(self, source: Source, assumed: Mapping[str, int]) -> None:
        self._source, self._assumed = source, assumed
        self.present = present_bytes(source)
        self._left = self._most = SMALL_CHECKS + self.present // BYTES_A_CHECK
        self._work = Work(self.present)
        self.now = decode_header(read_bytes(source, 0, V3_LENGTH))
        self.size: DiskSize | None = None
        self.with_snapshots: WithSnapshots | None = None
        self.given: Hypothesis | None = None
        self._first: Header | None = None
        # Headers that are made up: those that somebody had are believed first.
        self._made_up: set[Header] = set()
        self._tried: dict[Header, Hypothesis | None] = {}
        # The report of the last that was tried, while it is asked for what leaks under each.
        self._asks_for_leaks = False
        self._latest: tuple[Hypothesis, Report] | None = None

    @property
    def is_settled(self) -> bool:
        """Whether one of those that were tried leaves nothing to be wished for."""
        return any(each is not None and not any(each.score) for each in self._tried.values())

    @property
    def _is_plausible(self) -> bool:
        """Whether nothing contradicts one of them, but that something leaks."""
        return any(each is not None and not any(each.score[:2]) for each in self._tried.values())

    def best(self) -> list[Hypothesis]:
        """The hypotheses, the best first."""
        found = [each for each in self._tried.values() if each is not None]
        stands = next((each for each in found if not each.changed and not each.score[0]), None)
        return sorted(
            [each for each in found if stands is None or not explains_less(each, stands)],
            key=lambda it: (
                it.header != self._first,
                it.score,
                it.header in self._made_up,
                len(it.changed),
            ),
        )

    def attempt(
        self, header: Header, extensions: bytes = b"", *, anyway: bool = False
    ) -> Hypothesis | None:
        """What the check says under *header*; None where it makes no sense.

        *extensions*: what is to stand behind its fields; otherwise what does. *anyway*: even if
        as many were tried as may be.
        """
        header = with_fields(header, self._assumed)
        known = self._tried.get(header)
        if (header in self._tried and not extensions) or (self.is_tired and not anyway):
            return known
        self._tried[header] = known
        if header.cluster_bits not in CLUSTER_BITS:
            return None
        fields = encode_header(header)
        if extensions:
            more = max(0, min(header.header_length, 1 << header.cluster_bits) - len(fields))
            fields += read_bytes(self._source, len(fields), more) + extensions
        for end, content in self._contents(header, fields):
            limits = _COUNTED if header.size else _BEYOND_DISK
            report = self._check(Patched(self._source, 0, content), limits)
            if report.error is None:
                if self._makes_sense(header, report):
                    others = ("extensions",) if end is not None or extensions else ()
                    changed = self._changes(header) + others
                    found = Hypothesis(header, content, report.counters, changed, end)
                    self._tried[header] = found
                    if self._asks_for_leaks and limits is _COUNTED:
                        self._latest = found, report
                break
        return self._tried[header]

    def _contents(self, header: Header, fields: bytes) -> Iterator[tuple[int | None, bytes]]:
        """What could begin the file under *header*, and where its extensions end if not by itself.

        What stands behind the fields may be garbage, too: then as much of it stays as can.
        """
        size = 1 << header.cluster_bits
        whole = fields + read_bytes(self._source, 0, size)[len(fields) :]
        start = min(max(len(fields), header.header_length), size)
        room = max((header.backing_file_offset or size) - start, 0)
        ends, count = refusable(whole[start:][:room], room)
        self._left -= count // EXTENSIONS_A_CHECK
        ends = [start + at for at in ends[-MAX_CANDIDATES:]]
        ended = [(end, whole[:end] + bytes(EXTENSION_BYTES)) for end in reversed(ends)]
        may_be = [(None, fields), *ended]
        yield from itertools.islice((it for it in may_be if self._extends(header, it[1])), 1)
        if any(whole[len(fields) :]):
            yield len(fields), fields + bytes(size - len(fields))

    def _extends(self, header: Header, content: bytes) -> bool:
        """Whether extensions are read behind *header* where the file begins with *content*."""
        try:
            read_extensions(Patched(self._source, 0, content), header)
        except ImageError:
            return False
        return True

    def _makes_sense(self, header: Header, report: Report) -> bool:
        """Whether there is a disk under *header*, of which something may be in the file."""
        if header.size == 0 and FindingKind.BEYOND_DISK_END in report.counts():
            return False
        if self._moves_data(header, report):
            return False
        is_there = header.l1_table_offset < self._source.size or not header.l1_size
        return is_there or not self._changes(header)

    def _moves_data(self, header: Header, report: Report) -> bool:
        """Whether only under *header* all data is in another file, though this one is full of it.

        Where refcounts are gone, less is wrong the less is led to.
        """
        added = header.incompatible_features & ~self.now.incompatible_features
        if not added & Incompatible.DATA_FILE or report.mismatches is None:
            return False
        clusters = int(np.count_nonzero(report.mismatches.counted))
        return self.present > MOST_BESIDE * clusters << header.cluster_bits

    @property
    def is_tired(self) -> bool:
        """Whether as many were tried as may be."""
        return self._left <= 0 or len(self._tried) >= MAX_CHECKS

    def _check(self, source: Source, limits: Limits = _COUNTED) -> Report:
        self._latest = None  # two of them would be twice the memory
        report = check_image(source, limits=limits)
        self._charge(source, report)
        return report

    def _charge(self, source: Source, report: Report) -> None:
        """As many checks fewer are left as that one took."""
        self._left -= 1 + len(report.regions.structure) // REGIONS_A_CHECK
        self._left -= report.counters.corruptions // CORRUPTIONS_A_CHECK
        self._left -= len(report.snapshots) // SNAPSHOTS_A_CHECK
        if report.mismatches is not None:
            self._left -= report.mismatches.index.slots // CLUSTERS_A_CHECK
        self._left -= _table_bytes(source, report) // TABLE_BYTES_A_CHECK

    def _changes(self, header: Header) -> tuple[str, ...]:
        names = header.__slots__
        return tuple(n for n in names if getattr(header, n) != getattr(self.now, n))

    # ---- the header of another image ----

    def try_like(self, like: Header) -> None:
        """That of an image made in the same way, with the snapshots that it lists and without.

        One is believed by what does not depend on how much is lost: where it has the tables, the
        refcounts count them. What stood behind its fields is not in this file.
        """
        like = replace(
            like,
            incompatible_features=like.incompatible_features & ~int(_STATE),
            autoclear_features=0,
        )
        if not self._has_name(like):
            like = replace(like, backing_file_offset=0, backing_file_size=0)
        self.attempt(self.now)
        for header in (like, replace(like, nb_snapshots=0, snapshots_offset=0)):
            found = self.attempt(header, anyway=True)
            if found is None or not self._counts_tables(found):
                continue
            if self.given is None or found.score < self.given.score:
                self.given = found
        if self.given is not None:
            self._try_given_sizes(self.given)

    def _has_name(self, header: Header) -> bool:
        """Whether the name of a backing file stands where *header* says."""
        length = min(header.backing_file_size, MAX_BACKING_NAME)
        name = read_bytes(self._source, header.backing_file_offset, length)
        return bool(name) and name.decode(errors="replace").isprintable()

    def _counts_tables(self, found: Hypothesis) -> bool:
        """Whether under it header, L1 table and refcount table are counted, once each."""
        mismatches = self._check(found.laid_over(self._source)).mismatches
        if mismatches is None:
            return False
        header, size = found.header, found.header.geometry.cluster_size
        first = np.array([0, header.l1_table_offset, header.refcount_table_offset]) // size
        count = [1, -(-header.l1_size * 8 // size), header.refcount_table_clusters]
        clusters = distinct(expand_ranges(first, first + np.array(count) - 1))
        slots, known = mismatches.index.find(clusters)
        return bool(known.all() and (mismatches.stored[slots] == 1).all())

    def _try_given_sizes(self, given: Hypothesis) -> None:
        """The same for a larger disk, where more is mapped than that of the other image has."""
        counts = self._check(given.laid_over(self._source), _BEYOND_DISK).counts()
        if FindingKind.BEYOND_DISK_END not in counts:
            return
        self._try_sizes(given.header)
        tried = (each for each in self._tried.values() if each is not None)
        larger = [each for each in tried if _is_larger(each.header, given.header)]
        self.given = min(larger, key=lambda each: each.score, default=given)

    # ---- one field of a header that is there ----

    def try_fields(self) -> None:
        """The header as it stands, but for one field, with each value that it could have."""
        found = self.now
        self.attempt(found)
        if self.is_settled:
            return
        if not found.size:
            self._try_sizes(found)
        # First: under version 2 what says too many snapshots would be right, and they are none.
        counted = self._without_empty_snapshots(found)
        if counted != found and self.attempt(counted) is not None:
            found = counted
        for name, values in _values_of(found):
            for value in values:
                self.attempt(with_fields(found, {name: value}))
        self._try_sizes(found)
        # Last: in version 2 most of what may be wrong in version 3 is not said at all.
        for version in (3, 2):
            self.attempt(decode_header(encode_header(replace(found, version=version))))

    def _without_empty_snapshots(self, header: Header) -> Header:
        """*header* without the entries of zeros at the end of its snapshot table."""
        if header.cluster_bits not in CLUSTER_BITS:
            return header
        try:
            listed = read_snapshots(self._source, header, header.geometry).snapshots
        except ImageError:
            return header
        return replace(header, nb_snapshots=listed.used)

    def _try_sizes(self, header: Header) -> None:
        """*header* with the size that its disk says of itself, or of which one bit is another."""
        if header.cluster_bits not in CLUSTER_BITS or "size" in self._assumed:
            return
        whole = mapping_all(header)
        if whole == header or self.attempt(whole) is None:
            return
        size = disk_size(self._source, whole, self._work)
        flipped = [header.size ^ 1 << bit for bit in range(64)]
        near = [each for each in flipped if size.size <= each <= whole.size and each % SECTOR == 0]
        if len(near) == 1 and not size.is_exact:
            size = DiskSize(near[0], "one bit is another in what stands there", False)
        better = replace(header, size=size.size)
        if self.attempt(better) is not None:
            self.size = size
            if better != whole:
                # What was right but for the size is no rival of it.
                del self._tried[whole]

    # ---- a header of which nothing is left ----

    def try_tables(self, sectors: Sectors) -> None:
        """Headers that lead to tables which agree with each other, cluster size by cluster size."""
        likely = sectors.cluster_bits
        rest = [bits for bits in reversed(CLUSTER_BITS) if bits != likely]
        for bits in [likely, *rest] if likely is not None else rest:
            for tables in agreeing_tables(self._source, sectors, bits):
                self._asks_for_leaks = True
                self._try(tables)
                self._asks_for_leaks, self._latest = False, None
                if self.is_tired:
                    return
            # Of what its own tables are multiples, nothing contradicts that.
            if self.is_settled or (bits == likely and self._is_plausible):
                return

    def try_rest(self) -> None:
        """Of the best, the size that its disk says of itself, and how its clusters are packed."""
        best = next(iter(self.best()), None)
        if best is None or best.header not in self._made_up:
            return
        header = best.header
        size = disk_size(self._source, header, self._work)
        index, _ = nonzero_words(self._source, header.l1_table_offset, header.l1_size)
        better = sized(header, size.size, int(index[-1]) + 1 if len(index) else 0)
        if is_zstd(self._source, header):
            better = _with_zstd(better)
        luks = self._luks(best)
        if luks:
            better = replace(better, crypt_method=CRYPT_LUKS)
        found = self.attempt(better, luks, anyway=True)
        if found is None:
            return
        self.size = size
        self._made_up.add(found.header)
        if header == self._first:
            self._first = found.header
        if found.header != header:
            # What was right but for these is no rival of it.
            del self._tried[header]

    def try_luks(self) -> None:
        """The best of a disk that is said to be encrypted, with a LUKS header that leaked.

        Without one it would be read as what it was encrypted to.
        """
        best = next(iter(self.best()), None)
        is_luks = self.now.magic == MAGIC and self.now.crypt_method == CRYPT_LUKS
        if best is None or not is_luks or not best.counters.leaks:
            return
        luks = self._luks(best)
        if luks:
            self.attempt(replace(best.header, crypt_method=CRYPT_LUKS), luks, anyway=True)

    def list_snapshots(self, progress: Progress) -> None:
        """Where what is leaked of snapshots may decide: which hypothesis leaves least once they are
        listed again.
        """
        found = Found(self.now, self.best())
        likely: dict[tuple[int, ...], Hypothesis] = {}
        for each in found.hypotheses:
            # What contradicts it does not go when more is listed.
            is_rival = each.score[1] < STANDS_OUT * found.hypotheses[0].wrong
            if is_rival and not each.score[0] and len(likely) < MAX_CANDIDATES:
                likely.setdefault(tables_of(each.header), each)
        # One that can be read is not changed to please what more is listed.
        stands = any(not each.changed and not each.score[0] for each in found.hypotheses)
        if self.is_settled or stands or len(likely) < 2:
            return
        leaks = sum(each.counters.leaks for each in likely.values())
        if leaks > self._most * LEAKS_A_CHECK:
            self._left = 0
            return
        left = {
            key: counted
            for key, each in likely.items()
            if (counted := count_left(each.laid_over(self._source), progress)) is not None
        }
        best = found.best
        if not left or (best is not None and not _lists(left.get(tables_of(best.header)))):
            # It leaves nothing that could be one.
            return
        ranked = sorted(left, key=lambda key: left[key].total)
        first = likely[ranked[0]]
        others = [
            key
            for key in ranked[1:]
            if not is_same_disk(self._source, first.header, likely[key].header)
        ]
        self._first = first.header
        rival = left[others[0]] if others else None
        self.with_snapshots = WithSnapshots(left[ranked[0]], rival)

    def _luks(self, best: Hypothesis) -> bytes:
        """The extension that leads to a LUKS header, if one is among what nothing leads to."""
        leaked = self._leaked(best)
        first = leaked[np.diff(leaked, prepend=-2) != 1][:MAX_LUKS]
        for offset in (first << best.header.cluster_bits).tolist():
            raw = read_bytes(self._source, offset, LUKS_BYTES)
            if raw.startswith(LUKS_MAGIC):
                length = decode_luks(raw).payload_offset * SECTOR
                pointer: bytes = CRYPTO_POINTER.build({"offset": offset, "length": length})
                return struct.pack(">II", CRYPTO_HEADER, len(pointer)) + pointer + bytes(8)
        return b""

    def _try(self, tables: HeaderTables) -> None:
        """Under *tables*, longer ones where what follows them is counted and nobody's."""
        for _ in range(MAX_CANDIDATES):
            if leads_to_data(self._source, tables):
                return
            for extended in (False, True) if tables.bits >= 14 else (False,):
                self._try_fully(tables, extended)
            longer = self._longer(tables)
            if longer is None:
                return
            tables = longer

    def _try_fully(self, tables: HeaderTables, extended: bool) -> None:
        header = tables.header(extended)
        hypothesis = self.attempt(header)
        if "size" not in self._assumed:
            self._made_up.add(with_fields(header, self._assumed))
        if hypothesis is None:
            return
        # What of the old header says the same may well be right in the rest.
        if self.now.magic == MAGIC and self.now.cluster_bits == tables.bits:
            for name in self._changes(header):
                self.attempt(with_fields(self.now, {name: getattr(header, name)}))
            self.attempt(_led_to(self.now, tables))

    def _longer(self, tables: HeaderTables) -> HeaderTables | None:
        header = with_fields(tables.header(extended=False), self._assumed)
        hypothesis = self._tried.get(header)
        if hypothesis is None or not hypothesis.counters.leaks:
            return None
        return longer_tables(self._source, tables, self._leaked(hypothesis))

    def _leaked(self, hypothesis: Hypothesis) -> I64:
        """Leaked clusters under it, ascending: of hundreds not all their reports are kept.

        It leaves as many checks whether it was the last and its report is there, or not.
        """
        image = hypothesis.laid_over(self._source)
        if self._latest is not None and self._latest[0] is hypothesis:
            report, self._latest = self._latest[1], None
            self._charge(image, report)
        else:
            report = self._check(image)
        if report.mismatches is None:
            return np.zeros(0, dtype=np.int64)
        return report.mismatches.clusters(FindingKind.LEAK, report.totals[FindingKind.LEAK])


def _lists(left: Left | None) -> bool:
    return left is not None and left.snapshots > 0


def with_fields(header: Header, fields: Mapping[str, int]) -> Header:
    """*header* with other values of those."""
    return Header(**(asdict(header) | dict(fields)))


def sized(header: Header, size: int, used: int) -> Header:
    """*header* for a disk of so many bytes, with an L1 table over the same clusters.

    *used*: entries up to its last.
    """
    whole = replace(header, size=size)
    a_cluster = 1 << header.cluster_bits >> 3
    least = (header.l1_size - 1) // a_cluster * a_cluster + 1
    # What the table maps behind the end of the disk, a machine's state, is mapped all the same.
    return replace(whole, l1_size=max(least, used, whole.geometry.l1_entries_needed))


def _is_larger(header: Header, than: Header) -> bool:
    """Whether it is the same for a larger disk."""
    return header.size > than.size and header == replace(than, size=header.size)


def _led_to(header: Header, tables: HeaderTables) -> Header:
    """*header*, which knows what no table tells, such as its backing file, but for its tables."""
    least = max(tables.l1_used, min(header.geometry.l1_entries_needed, MAX_L1_BYTES // 8))
    is_known = least <= header.l1_size <= tables.l1_clusters << tables.bits >> 3
    return replace(
        header,
        l1_table_offset=tables.l1_offset,
        l1_size=header.l1_size if is_known else least,
        refcount_table_offset=tables.reftable_offset,
        refcount_table_clusters=tables.reftable_clusters,
        refcount_order=tables.order,
        nb_snapshots=tables.snapshots,
        snapshots_offset=tables.snapshots_offset,
    )


def mapping_all(header: Header) -> Header:
    """*header* for a disk of all that its L1 table can map."""
    most = min(header.l1_size * header.geometry.l2_coverage, SIGNED_MAX // SECTOR * SECTOR)
    return replace(header, size=most)


def _with_zstd(header: Header) -> Header:
    return replace(
        header,
        incompatible_features=header.incompatible_features | Incompatible.COMPRESSION,
        header_length=V3_LENGTH + 8,
        additional=bytes([COMPRESSION_ZSTD]) + bytes(7),
    )


def _values_of(header: Header) -> Iterator[tuple[str, list[int]]]:
    """Of the fields whose values are few, those that each could have."""
    yield "magic", [MAGIC]
    yield "cluster_bits", list(CLUSTER_BITS)
    yield "refcount_order", list(range(MAX_REFCOUNT_ORDER + 1))
    # Under the longer one the shorter makes no sense where anything follows; not so vice versa.
    yield "header_length", [V3_LENGTH + 8, V3_LENGTH]
    yield "crypt_method", list(CRYPT_NAMES)
    known = header.incompatible_features & KNOWN_INCOMPATIBLE
    yield (
        "incompatible_features",
        [known, 0, known ^ Incompatible.EXTENDED_L2, known ^ Incompatible.DATA_FILE],
    )
    yield "compatible_features", [0]
    yield "autoclear_features", [0]
    yield "refcount_table_clusters", [1, 2, 4]
    yield "backing_file_offset", [0]
    if header.cluster_bits in CLUSTER_BITS:
        yield "l1_size", [min(header.geometry.l1_entries_needed, MAX_L1_BYTES // 8)]
