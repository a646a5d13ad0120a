"""``tables/clusters.tsv``: a row a run, its owners and findings in words."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from instarfs.render import clusters as render
from instarfs.render.clusters import HEADER, TORN, clusters_tsv, clusters_tsv_length
from planner.check.check import check_image
from planner.errors import ImageError
from planner.views.host_map import Atlas, draw_atlas, kinds_in, owner_label
from tests.images.corpus import RULES
from tests.images.damage import DAMAGES, TELLING
from tests.images.sample import sample


def atlas_of(name: str) -> Atlas:
    source = RULES[name]().image.source
    return draw_atlas(source, check_image(source))


def rows_of(atlas: Atlas | ImageError) -> list[list[str]]:
    """The rows, which are as long as they are said to be."""
    content = b"".join(clusters_tsv(atlas))
    assert clusters_tsv_length(atlas) == len(content)
    header, *lines = content.decode().splitlines()
    assert header == "#" + "\t".join(HEADER)
    return [line.split("\t") for line in lines]


@pytest.mark.parametrize("name", RULES)
def test_every_run_is_a_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "BATCH_ROWS", 3)
    atlas = atlas_of(name)
    expected = []
    for runs in atlas.runs():
        columns = [getattr(runs, column).tolist() for column in runs.__slots__]
        for offset, length, uses, findings, refcount, references in zip(*columns, strict=True):
            kinds = [kind.label for kind in kinds_in(findings)]
            stored = "-" if "refcount-unreadable" in kinds else str(refcount)
            found = "+".join(kinds) or "-"
            numbers = [str(offset), str(length)]
            expected.append([*numbers, owner_label(uses), stored, str(references), found])
    assert rows_of(atlas) == expected


def test_the_sample_image_line_by_line() -> None:
    image, rng = sample().build(), random.Random(1)
    for name in TELLING:
        DAMAGES[name](image, rng)
    atlas = draw_atlas(image.source, check_image(image.source))
    rows = rows_of(atlas)
    assert sum(int(row[1]) for row in rows) == len(image.data)
    assert ["3014656", "65536", "data", "1", "2", "multiple-owners+refcount-low"] in rows
    assert ["3473408", "1114112", "leaked", "1", "0", "leak"] in rows
    assert ["0", "65536", "header", "1", "1", "-"] in rows


def test_a_torn_atlas_says_so_before_its_rows() -> None:
    atlas = replace(atlas_of("leaked_cluster"), torn=True)
    first, *rest = rows_of(atlas)
    assert first == [f"# {TORN}"]
    assert all(len(row) == len(HEADER) for row in rest)


def test_without_a_layout_the_reason_stands_in_place_of_the_rows() -> None:
    error = ImageError("cluster_bits", 63, "must be 9 to 21")
    assert rows_of(error) == [["# cluster_bits is 63: must be 9 to 21"]]
