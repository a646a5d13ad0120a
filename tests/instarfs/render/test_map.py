"""``image/map.svg``: valid, equal in numbers to the list of clusters, and nothing averaged away."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instarfs.render import map as render
from instarfs.render.clusters import clusters_tsv
from instarfs.render.map import NAMESPACE, SVG, Area, area_of, make_grid, map_svg
from planner.check.check import check_image
from planner.errors import ImageError
from planner.findings.kinds import FindingKind
from planner.source import Source
from planner.views.host_map import DAMAGE, Atlas, Use, draw_atlas
from tests.images.builder import Image
from tests.images.corpus import RULES
from tests.images.corpus.rule import plain
from tests.images.damage import DAMAGES, TELLING
from tests.images.sample import sample
from tests.planner.sources import Sparse


def atlas_of(source: Source) -> Atlas:
    return draw_atlas(source, check_image(source))


def damaged_sample() -> Image:
    image, rng = sample().build(), random.Random(1)
    for name in TELLING:
        DAMAGES[name](image, rng)
    return image


def drawn(atlas: Atlas | ImageError, name: str = "/x/image.qcow2") -> ET.Element:
    return ET.fromstring(map_svg(atlas, name))  # noqa: S314 - our own


def sums_of(picture: ET.Element) -> dict[tuple[str | None, str | None], int]:
    totals = picture.iter(f"{{{NAMESPACE}}}total")
    return {(t.get("owner"), t.get("finding")): int(t.get("bytes") or "") for t in totals}


def texts_of(picture: ET.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{{{SVG}}}text")]


@pytest.mark.parametrize("name", [*RULES, "sample"])
def test_its_numbers_are_those_of_the_list_of_clusters(name: str) -> None:
    image = damaged_sample() if name == "sample" else RULES[name]().image
    atlas = atlas_of(image.source)
    listed: Counter[tuple[str, str]] = Counter()
    for line in b"".join(clusters_tsv(atlas)).decode().splitlines()[1:]:
        _, length, owner, _, _, finding = line.split("\t")
        listed[owner, finding] += int(length)
    assert sums_of(drawn(atlas)) == listed


@pytest.fixture
def few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few cells that each stands for many clusters."""
    for name in ("MANY_COLUMNS", "FEW_COLUMNS"):
        monkeypatch.setattr(render, name, 3)
    for name in ("MAX_ROWS", "FEW_ROWS"):
        monkeypatch.setattr(render, name, 1)


@pytest.mark.usefixtures("few_cells")
@pytest.mark.parametrize("name", RULES)
def test_cells_add_up_and_lose_no_damage(name: str) -> None:
    atlas = atlas_of(RULES[name]().image.source)
    totals = atlas.totals()
    grid = make_grid(atlas, sum(totals.values()))
    by_area: Counter[Area] = Counter()
    for (uses, _), amount in totals.items():
        by_area[area_of(uses)] += amount
    assert {Area(n): int(a) for n, a in enumerate(grid.amounts.sum(axis=0)) if a} == by_area
    assert (grid.amounts.sum(axis=1)[:-1] == grid.cell).all()
    damaged, leaking = np.zeros((2, len(grid.amounts)), dtype=bool)
    for runs in atlas.runs():
        for offset, length, kinds in zip(runs.offset, runs.length, runs.findings, strict=True):
            cells = slice(int(offset // grid.cell), int((offset + length - 1) // grid.cell) + 1)
            damaged[cells] |= bool(int(kinds) & DAMAGE)
            leaking[cells] |= bool(int(kinds) >> FindingKind.LEAK & 1)
    assert grid.damaged.tolist() == damaged.tolist()
    assert grid.leaking.tolist() == leaking.tolist()


def test_one_damaged_cluster_of_very_many_is_marked() -> None:
    image = plain()
    image.set_word(image.l2_at(1), image.word(image.l2_at(0)))
    far = Sparse.of(bytes(image.data), 1 << 50)
    atlas = atlas_of(far)
    picture = drawn(atlas)
    grid = make_grid(atlas, 1 << 50)
    assert grid.damaged.tolist() == [True, *[False] * (len(grid.amounts) - 1)]
    assert any(text.startswith("damage in ") for text in texts_of(picture))
    fills = [path.get("fill") or "" for path in picture.iter(f"{{{SVG}}}path")]
    for area in (Area.HEADER, Area.L1, Area.L2, Area.REFCOUNTS, Area.LEAKED, Area.FREE):
        assert render._AREAS[area][1] in fills
    assert len(map_svg(atlas, "x")) < 200_000


def test_a_healthy_image_says_that_it_is() -> None:
    assert "Nothing is damaged, and nothing is leaked." in texts_of(drawn(atlas_of(plain().source)))


def test_a_torn_picture_says_so_and_calls_nothing_healthy() -> None:
    told = texts_of(drawn(replace(atlas_of(plain().source), torn=True)))
    assert any(text.startswith("Torn: ") for text in told)
    assert not any(text.startswith("Nothing is damaged") for text in told)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/x/<&>\"'.qcow2", "<&>\"'.qcow2"),
        ("/x/\x1b[31m\n\udcff", "\\x1b[31m\\n\\xff"),
        ("/x/" + "long" * 50, "long" * 15 + "lon…"),
    ],
)
def test_names_are_shown_as_text(name: str, shown: str) -> None:
    picture = drawn(atlas_of(plain().source), name)
    assert texts_of(picture)[0] == shown
    assert picture.findtext(f"{{{SVG}}}title") == shown


def test_without_a_layout_the_picture_says_why() -> None:
    picture = drawn(ImageError("cluster_bits", 63, "must be <9 to 21>"))
    assert "Nothing can be drawn: cluster_bits is 63: must be <9 to 21>" in texts_of(picture)


def test_every_use_belongs_to_an_area() -> None:
    assert {area_of(use.bit) for use in Use} == set(Area) - {Area.SEVERAL}
    assert area_of(Use.DATA.bit | Use.L2_TABLE.bit) is Area.SEVERAL
    assert area_of(Use.DATA.bit | Use.SNAPSHOT_DATA.bit) is Area.DATA


@given(
    st.lists(st.integers(0, 1 << 40), min_size=len(Area), max_size=len(Area)),
    st.sampled_from([12, 24]),
)
def test_the_slices_of_a_cell_fill_it_and_show_what_is_rare(amounts: list[int], side: int) -> None:
    slices = list(render._slices(amounts, side))
    there = [area for area in Area if amounts[area]]
    assert bool(slices) == bool(there)
    position = 0
    for _, start, width in slices:
        assert start == position
        assert width >= 1
        position += width
    if there:
        assert position == side
        assert len(slices) == min(len(there), side // max(2, side // 6))
    for area in (Area.SEVERAL, Area.LEAKED):
        if amounts[area] and len(there) <= 6:
            assert area in [shown for shown, *_ in slices]


def test_it_needs_nothing_from_elsewhere() -> None:
    content = map_svg(atlas_of(plain().source), "x").decode()
    links = re.findall(r"https?://[^\"' ]+", content)
    assert set(links) == {SVG}
    assert "<script" not in content
