"""A pass over clusters that nothing leads to, or that wait: one that was stopped goes on.

Where the whole file was scanned before, nothing of them is read but what that has named.
"""

from __future__ import annotations

import hashlib

import numpy as np

from planner.arrays import I64, distinct, expand_ranges, is_among
from planner.progress import Meter
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import Header, encode_header
from planner.rescue.placing.claims import Collector
from planner.rescue.placing.tables import Finder, read_pieces
from planner.rescue.scanned import PIECE_BYTES, Said, Scanned, Section
from planner.source import SECTOR, Source, present_tables, read_tables

BEHIND_BYTES = 4096
"""What a piece of a file says may go on so far behind it, where clusters are small."""


class Pass:
    """Shows the clusters of an image with that *header* to a *collector*, and to a *finder*."""

    def __init__(
        self, source: Source, header: Header, collector: Collector, finder: Finder | None = None
    ) -> None:
        self._source, self._header = source, header
        self._geometry: Geometry = header.geometry
        self._collector, self._finder = collector, finder
        self._done = 0
        self._again, self._ends, self._filled = ([np.zeros(0, dtype=np.int64)] for _ in range(3))

    def look(self, clusters: I64, scanned: Scanned, meter: Meter) -> None:
        """Show them all *clusters*, ascending. *scanned*: those of them that were looked at.

        Of these only what is needed is read again.
        """
        size = self._geometry.cluster_size
        inside = int(np.searchsorted(clusters, -(-self._source.size // size)))
        end = int(clusters[inside - 1] + 1) * size if inside else 0
        reach = self._finder.reach + size if self._finder is not None else 0
        whole = scanned.whole(self._source.size, end, reach)
        if whole is not None:
            self._show_named(clusters, *whole, scanned.said)
            meter.advance(len(clusters) * size)
            return
        bits, name = self._geometry.cluster_bits, self._name(clusters)
        known = scanned.known(name, self._source.size, self._geometry.cluster_size)
        again = known.again[is_among(known.again >> bits, clusters)]
        self._show(again, Meter())
        cluster = known.ends >> bits
        elsewhere = is_among(cluster, clusters) & ~is_among(cluster, again >> bits)
        begun = self._collector.parts
        self._collector.add_ends(known.ends[elsewhere], known.filled[elsewhere])
        self._note_since(begun)
        self._done = known.done
        behind = int(np.searchsorted(clusters, known.done >> bits))
        meter.advance(behind << bits)
        self._show(clusters[behind:] << bits, meter, scanned, name)

    def _show_named(
        self, clusters: I64, tables: Section, claims: Section, said: Said | None
    ) -> None:
        """Of *clusters* those that may be tables, and the pieces that claim something.

        What these *said* when they were scanned they would say again, unless clusters are smaller.
        """
        bits = self._geometry.cluster_bits
        if self._finder is not None:
            likely = distinct(tables.again >> bits)
            likely = likely[is_among(likely, clusters)]
            for pieces, rows in read_pieces(self._source, likely << bits, self._geometry):
                self._finder.look(pieces, rows)
        size = min(PIECE_BYTES, self._geometry.cluster_size)
        place = distinct(claims.again // PIECE_BYTES * PIECE_BYTES)
        if said is not None and size == PIECE_BYTES:
            place = place[place < said.start]
            mine = said.select(is_among(said.place >> bits, clusters))
            self._collector.add(mine.sort, mine.place, mine.key, mine.aux)
        # Of small clusters those around it, too.
        behind = BEHIND_BYTES if size < PIECE_BYTES else 0
        number = expand_ranges(place // size, (place + PIECE_BYTES + behind - 1) // size)
        shown = distinct(number) * size
        shown = shown[is_among(shown >> bits, clusters)]
        shown = shown[present_tables(self._source, shown, size, anyway=0)]
        for part, rows in read_tables(self._source, shown, size):
            self._collector.look(shown[part], rows)
        if size >= 2 * SECTOR:
            elsewhere = is_among(claims.ends >> bits, clusters)
            elsewhere &= ~is_among(claims.ends // size * size, shown)
            self._collector.add_ends(claims.ends[elsewhere], claims.filled[elsewhere])

    def _show(
        self, offsets: I64, meter: Meter, scanned: Scanned | None = None, name: str = ""
    ) -> None:
        size = self._geometry.cluster_size
        for pieces, rows in read_pieces(self._source, offsets, self._geometry):
            begun, tables = self._collector.parts, self._finder.parts if self._finder else 0
            self._collector.look(pieces, rows)
            if self._finder is not None:
                self._finder.look(pieces, rows)
                self._again.append(self._finder.since(tables))
            self._note_since(begun)
            if scanned is not None:
                self._done = (int(pieces[-1]) + rows.shape[1]) // size * size
                scanned.keep(name, self.section)
            meter.advance(rows.size)

    def _note_since(self, parts: int) -> None:
        claims, ends, filled = self._collector.since(parts)
        for column, new in ((self._again, claims), (self._ends, ends), (self._filled, filled)):
            column.append(new)

    def section(self) -> Section:
        """How far this is."""
        size = self._geometry.cluster_size
        again, ends, filled = map(np.concatenate, (self._again, self._ends, self._filled))
        self._again, self._ends, self._filled = [again], [ends], [filled]
        clusters = distinct(again[again < self._done] // size * size)
        kept, first = np.unique(ends, return_index=True)
        inside = kept < self._done
        return Section(self._done, clusters, kept[inside], filled[first[inside]])

    def _name(self, clusters: I64) -> str:
        """Of this pass: another header, or other clusters, make another."""
        digest = hashlib.sha256(encode_header(self._header))
        digest.update(np.ascontiguousarray(clusters).data)
        return f"{'tables' if self._finder is not None else 'claims'}-{digest.hexdigest()}"
