"""``image/map.svg``: one picture of the host file, as a reader would draw it.

Reads an `Atlas` and draws a cell for each stretch of the file: its uses side by side, the rare ones
at least wide enough to be seen, and marks over it where anything is leaked or damaged. Numbers are
not read off the picture: its metadata has them, equal to ``tables/clusters.tsv`` added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from instarfs.render.clusters import TORN, findings_label
from instarfs.render.info import size_text
from instarfs.text import markup, printable
from planner.arrays import I64, Mask
from planner.errors import ImageError
from planner.findings.kinds import FindingKind
from planner.findings.wording import plural
from planner.views.host_map import DAMAGE, Atlas, Runs, Use, bits_of, kinds_in, owner_label, uses_in

SVG = "http://www.w3.org/2000/svg"
NAMESPACE = "urn:instarfs:atlas"

LEAK = bits_of(FindingKind.LEAK)

NAME_LENGTH = 64
"""Characters of a file's name that are shown."""


class Area(IntEnum):
    """What a reader tells apart at a glance, in the order in which a cell shows it."""

    HEADER = 0
    L1 = 1
    L2 = 2
    REFCOUNTS = 3
    SNAPSHOTS = 4
    BITMAPS = 5
    LUKS = 6
    SEVERAL = 7
    LEAKED = 8
    UNKNOWN = 9
    COMPRESSED = 10
    DATA = 11
    FREE = 12


# Okabe and Ito's colours, which the colour-blind tell apart, and darker or lighter kin of theirs.
_AREAS: dict[Area, tuple[str, str]] = {
    Area.HEADER: ("header", "#2b2b2b"),
    Area.L1: ("L1 table", "#00513b"),
    Area.L2: ("L2 tables", "#009e73"),
    Area.REFCOUNTS: ("refcount table and blocks", "#e3cf00"),
    Area.SNAPSHOTS: ("only in snapshots", "#cc79a7"),
    Area.BITMAPS: ("bitmaps", "#8a5a2b"),
    Area.LUKS: ("LUKS header", "#7f7f9f"),
    Area.SEVERAL: ("used for several things", "#d55e00"),
    Area.LEAKED: ("leaked", "url(#leaked)"),
    Area.UNKNOWN: ("unknown", "url(#unknown)"),
    Area.COMPRESSED: ("compressed data", "#0072b2"),
    Area.DATA: ("guest data", "#7cc4f0"),
    Area.FREE: ("free", "#e9e9e6"),
}

_MARK = "#b3001b"

_AREA_OF = {
    Use.HEADER: Area.HEADER,
    Use.L1_TABLE: Area.L1,
    Use.L2_TABLE: Area.L2,
    Use.DATA: Area.DATA,
    Use.COMPRESSED: Area.COMPRESSED,
    Use.REFTABLE: Area.REFCOUNTS,
    Use.REFBLOCK: Area.REFCOUNTS,
    Use.LUKS: Area.LUKS,
    Use.BITMAP_DIRECTORY: Area.BITMAPS,
    Use.BITMAP_TABLE: Area.BITMAPS,
    Use.BITMAP_DATA: Area.BITMAPS,
    Use.FREE: Area.FREE,
    Use.LEAKED: Area.LEAKED,
    Use.UNKNOWN: Area.UNKNOWN,
}
"""What is left out is only in snapshots."""


def area_of(uses: int) -> Area:
    """The area that a set of uses belongs to."""
    found = uses_in(uses)
    return _AREA_OF.get(found[0], Area.SNAPSHOTS) if len(found) == 1 else Area.SEVERAL


# ---- cells ----

MANY_COLUMNS, FEW_COLUMNS = 64, 32
MAX_ROWS, FEW_ROWS = 24, 8


@dataclass(frozen=True, slots=True)
class Grid:
    """The file in equal cells. ``cell``: bytes, a power of two of clusters.

    ``amounts``: bytes, shape (cells, areas). ``damaged``, ``leaking``: which cells hold anything
    with a finding that is damage, or a leak.
    """

    cell: int
    columns: int
    amounts: I64
    damaged: Mask
    leaking: Mask

    @property
    def rows(self) -> int:
        return -(-len(self.amounts) // self.columns)


def make_grid(atlas: Atlas, size: int) -> Grid:
    """Sum the runs of an atlas up into cells; *size*: bytes of all its runs."""
    cluster = atlas.layout.geometry.cluster_size
    few = size <= FEW_COLUMNS * FEW_ROWS * cluster
    columns, rows = (FEW_COLUMNS, FEW_ROWS) if few else (MANY_COLUMNS, MAX_ROWS)
    cell = cluster
    while size > columns * rows * cell:
        cell *= 2
    cells = max(1, -(-size // cell))
    grid = Grid(
        cell,
        columns,
        np.zeros((cells, len(Area)), dtype=np.int64),
        np.zeros(cells, dtype=np.bool_),
        np.zeros(cells, dtype=np.bool_),
    )
    for runs in atlas.runs():
        _add_runs(grid, runs)
    return grid


def _add_runs(grid: Grid, runs: Runs) -> None:
    uses, which = np.unique(runs.uses, return_inverse=True)
    area = np.array([area_of(bits) for bits in uses.tolist()], dtype=np.int64)[which]
    first, last = runs.offset // grid.cell, (runs.offset + runs.length - 1) // grid.cell
    single = first == last
    place = first[single] * len(Area) + area[single]
    sums = np.bincount(place, weights=runs.length[single], minlength=grid.amounts.size)
    grid.amounts.reshape(-1)[:] += sums.astype(np.int64)
    marks = ((grid.damaged, np.uint64(DAMAGE)), (grid.leaking, np.uint64(LEAK)))
    for mark, kinds in marks:
        mark[first[single & ((runs.findings & kinds) != 0)]] = True
    # Few: no two runs cross the same border of cells.
    for at in np.flatnonzero(~single).tolist():
        low, high = int(first[at]), int(last[at])
        grid.amounts[low : high + 1, area[at]] += grid.cell
        grid.amounts[low, area[at]] -= int(runs.offset[at]) - low * grid.cell
        end = int(runs.offset[at] + runs.length[at])
        grid.amounts[high, area[at]] -= (high + 1) * grid.cell - end
        for mark, kinds in marks:
            mark[low : high + 1] |= bool(runs.findings[at] & kinds)


# ---- the picture ----

WIDTH, MARGIN, LABELS = 980, 28, 84
TOP = 108
LINE = 26

_STYLE = """\
text { font-family: "DejaVu Sans", Verdana, "Segoe UI", Helvetica, Arial, sans-serif;
       font-size: 13px; fill: #222 }
.title { font-size: 20px; font-weight: bold }
.soft { fill: #5a5a5a }
.scale { font-size: 11px; fill: #5a5a5a }
.right { text-anchor: end }
.middle { text-anchor: middle }"""

_PATTERNS = """\
<pattern id="leaked" width="6" height="6" patternUnits="userSpaceOnUse" \
patternTransform="rotate(45)"><rect width="6" height="6" fill="#fff3d6"/>\
<rect width="3.4" height="6" fill="#e69f00"/></pattern>
<pattern id="unknown" width="5" height="5" patternUnits="userSpaceOnUse">\
<rect width="5" height="5" fill="#f4f4f4"/><circle cx="2.5" cy="2.5" r="1.2" fill="#555"/>\
</pattern>"""


def map_svg(atlas: Atlas | ImageError, filename: str) -> bytes:
    """The picture. Of an image without a layout, one that says why there is none."""
    name = _shortened(filename.rsplit("/", 1)[-1])
    if isinstance(atlas, ImageError):
        lines = [_text(MARGIN, 76, f"Nothing can be drawn: {printable(str(atlas))}")]
        return _document(name, f"{name}: {atlas}", 112, lines)
    totals = atlas.totals()
    grid = make_grid(atlas, sum(totals.values()))
    pitch = (WIDTH - MARGIN - LABELS - MARGIN) // grid.columns
    bottom = TOP + grid.rows * pitch
    legend = _Legend.of(totals, torn=atlas.torn)
    lines = [
        _metadata(atlas, totals),
        *_headings(atlas, grid),
        *_scale(grid, pitch),
        *_cells(grid, pitch),
        *legend.draw(bottom + 34),
    ]
    described = "; ".join(legend.describe())
    return _document(name, f"{name}: {described}", bottom + 34 + legend.height + 12, lines)


def _shortened(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= NAME_LENGTH else f"{shown[: NAME_LENGTH - 1]}…"


def _document(name: str, description: str, height: int, lines: list[str]) -> bytes:
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    edge = f'width="{WIDTH - 2}" height="{height - 2}" rx="10" fill="#fdfdfb" stroke="#c9c9c4"'
    head = [
        f'<svg xmlns="{SVG}" {size} role="img" aria-labelledby="t d">',
        f'<title id="t">{markup(name)}</title>',
        f'<desc id="d">{markup(printable(description))}</desc>',
        f"<style>{_STYLE}</style>",
        f"<defs>{_PATTERNS}</defs>",
        f'<rect x="1" y="1" {edge}/>',
        _text(MARGIN, 42, name, "title"),
    ]
    return ("\n".join([*head, *lines, "</svg>"]) + "\n").encode()


def _text(x: float, y: float, content: str, style: str = "") -> str:
    chosen = f' class="{style}"' if style else ""
    return f'<text x="{x:g}" y="{y:g}"{chosen}>{markup(content)}</text>'


def _metadata(atlas: Atlas, totals: dict[tuple[int, int], int]) -> str:
    layout = atlas.layout
    sums: dict[tuple[str, str], int] = {}
    for (uses, findings), amount in totals.items():
        key = owner_label(uses), findings_label(findings)
        sums[key] = sums.get(key, 0) + amount
    rows = "".join(
        f'<total owner="{markup(owner)}" finding="{markup(finding)}" bytes=\'{amount}\'/>'
        for (owner, finding), amount in sorted(sums.items())
    )
    return (
        f'<metadata><atlas xmlns="{NAMESPACE}" file-size="{layout.file_size}"'
        f' cluster-size="{layout.geometry.cluster_size}">{rows}</atlas></metadata>'
    )


def _headings(atlas: Atlas, grid: Grid) -> Iterator[str]:
    geometry, clusters = atlas.layout.geometry, grid.cell // atlas.layout.geometry.cluster_size
    cell = plural(clusters, "cluster") + (f", {size_text(grid.cell)}" if clusters != 1 else "")
    file, disk = size_text(atlas.layout.file_size), size_text(geometry.virtual_size)
    facts = [
        f"{file} file for a disk of {disk}",
        f"{size_text(geometry.cluster_size)} clusters",
        f"a cell is {cell}",
    ]
    yield _text(MARGIN, 66, " · ".join(facts), "soft")


def _scale(grid: Grid, pitch: int) -> Iterator[str]:
    """Offsets: of each row at its left, within a row above it."""
    left, row = MARGIN + LABELS, grid.columns * grid.cell
    full = min(len(grid.amounts), grid.columns)
    for column in range(0, full + 1, grid.columns // 4):
        x = left + column * pitch
        label = f"+{size_text(column * grid.cell)}" if column else "0"
        yield f'<path d="M{x} {TOP - 8}v5" stroke="#9a9a95"/>'
        yield _text(x, TOP - 12, label, "scale middle")
    for number in range(grid.rows):
        y = TOP + number * pitch + pitch / 2 + 4
        yield _text(left - 10, y, size_text(number * row) if number else "0", "scale right")


def _cells(grid: Grid, pitch: int) -> Iterator[str]:
    """One path an area, then the marks."""
    paths: dict[Area, list[str]] = {}
    marks: list[str] = []
    side = pitch - (2 if pitch > 20 else 1)
    for number, amounts in enumerate(grid.amounts.tolist()):
        row, column = divmod(number, grid.columns)
        x, y = MARGIN + LABELS + column * pitch, TOP + row * pitch
        for area, start, width in _slices(amounts, side):
            paths.setdefault(area, []).append(f"M{x + start} {y}h{width}v{side}h-{width}z")
        if grid.damaged[number]:
            marks.append(_cross(x, y, side))
        elif grid.leaking[number] and not amounts[Area.LEAKED]:
            marks.append(f"M{x} {y + side}l{side}-{side}")
    for area in sorted(paths):
        label, colour = _AREAS[area]
        shape = "".join(paths[area])
        yield f'<path d="{shape}" fill="{colour}"><title>{markup(label)}</title></path>'
    if marks:
        shape = "".join(marks)
        yield f'<path d="{shape}" fill="none" stroke="#fff" stroke-width="4" opacity=".75"/>'
        yield f'<path d="{shape}" fill="none" stroke="{_MARK}" stroke-width="2"/>'


def _cross(x: float, y: float, side: float) -> str:
    inner = side - 2
    return f"M{x + 1} {y + 1}h{inner}v{inner}h-{inner}zl{inner} {inner}m0-{inner}l-{inner} {inner}"


def _slices(amounts: list[int], side: int) -> Iterator[tuple[Area, int, int]]:
    """The areas in a cell, each with where it starts and how wide it is drawn.

    None is so narrow that it is not seen; what is left of the cell is shared in proportion.
    """
    there = [area for area in Area if amounts[area]]
    if not there:
        return
    least = max(2, side // 6)
    room = side // least
    if len(there) > room:  # Data and free space give way to what is rare.
        there = [*there[: room - 1], max(there[room - 1 :], key=lambda area: amounts[area])]
    spare, whole = side - least * len(there), sum(amounts[area] for area in there)
    widths = {area: least + spare * amounts[area] // whole for area in there}
    widths[max(there, key=lambda area: amounts[area])] += side - sum(widths.values())
    start = 0
    for area in there:
        yield area, start, widths[area]
        start += widths[area]


# ---- the legend ----


@dataclass(frozen=True, slots=True)
class _Legend:
    """Bytes by area; of all that is damaged, with its kinds; and of refcounts that are too high.

    ``torn``: of an atlas that is.
    """

    areas: dict[Area, int]
    damaged: int
    kinds: list[FindingKind]
    excess: int
    torn: bool

    @classmethod
    def of(cls, totals: dict[tuple[int, int], int], *, torn: bool) -> _Legend:
        areas: dict[Area, int] = {}
        damaged, kinds, excess = 0, 0, 0
        for (uses, findings), amount in totals.items():
            area = area_of(uses)
            areas[area] = areas.get(area, 0) + amount
            kinds |= findings & DAMAGE
            damaged += amount if findings & DAMAGE else 0
            excess += amount if findings & LEAK and area is not Area.LEAKED else 0
        return cls(areas, damaged, kinds_in(kinds), excess, torn)

    def describe(self) -> list[str]:
        """All of it in words."""
        whole = sum(self.areas.values())
        shares = [f"{_AREAS[area][0]}: {_share(n, whole)}" for area, n in self.areas.items()]
        return [*shares, *(sentence for _, sentence in self.remarks())]

    def remarks(self) -> list[tuple[str, str]]:
        """What goes over the whole width: the path of a mark, and a sentence."""
        whole = sum(self.areas.values())
        found = []
        if self.damaged:
            names = [kind.label for kind in self.kinds]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            what = ", ".join(names[:5]) + more
            found.append((_cross(0, 0, 16), f"damage in {_share(self.damaged, whole)}: {what}"))
        if self.excess:
            what = f"refcounts that are too high: {_share(self.excess, whole)}"
            found.append(("M0 16l16-16", what))
        if self.torn:
            found.append(("", f"Torn: {TORN}."))
        elif not found and Area.LEAKED not in self.areas:
            found.append(("", "Nothing is damaged, and nothing is leaked."))
        return found

    @property
    def height(self) -> int:
        return (-(-len(self.areas) // 2) + len(self.remarks())) * LINE

    def draw(self, top: int) -> Iterator[str]:
        whole, half = sum(self.areas.values()), -(-len(self.areas) // 2)
        for number, area in enumerate(sorted(self.areas)):
            column, row = divmod(number, half)
            x, y = MARGIN + column * (WIDTH - 2 * MARGIN) // 2, top + row * LINE
            label, colour = _AREAS[area]
            yield f'<rect x="{x}" y="{y}" width="16" height="16" fill="{colour}"/>'
            yield _text(x + 26, y + 13, label)
            yield _text(x + 210, y + 13, _share(self.areas[area], whole), "soft")
        for row, (mark, sentence) in enumerate(self.remarks(), half):
            y = top + row * LINE
            if mark:
                shape = f'fill="none" stroke="{_MARK}" stroke-width="2"'
                yield f'<path transform="translate({MARGIN} {y})" d="{mark}" {shape}/>'
            yield _text(MARGIN + (26 if mark else 0), y + 13, sentence)


def _share(amount: int, whole: int) -> str:
    percent = 100 * amount / whole
    shown = f"{percent:.1f}" if percent >= 0.1 else "<0.1"
    shown = ">99.9" if shown == "100.0" and amount < whole else shown
    return f"{size_text(amount)} ({shown} %)"
