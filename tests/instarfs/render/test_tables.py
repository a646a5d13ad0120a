"""``tables/l1.tsv`` and ``tables/l2/N.tsv``: every entry once, as it stands, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from instarfs.render import tables as render
from instarfs.render.clusters import findings_label
from instarfs.render.tables import L1_HEADER, L2_HEADER, l1_tsv, l2_tsv
from planner.errors import ImageError
from planner.qcow2.layout import Layout
from planner.views.table_view import read_l1_page, read_l2_page
from tests.images.corpus import RULES
from tests.images.corpus.rule import COVERAGE, SIZE, WIDTH, builder, extended, fill, plain


def rows_of(content: Iterable[bytes], header: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows, by heading; remarks are not among them."""
    first, *lines = b"".join(content).decode().splitlines()
    assert first == "#" + "\t".join(header)
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [dict(zip(header, row, strict=True)) for row in rows]


def remarks_of(content: Iterable[bytes]) -> list[str]:
    lines = b"".join(content).decode().splitlines()[1:]
    return [line[2:] for line in lines if line.startswith("# ")]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of fewer rows than a full table has."""
    monkeypatch.setattr(render, "BATCH_ROWS", 50)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("name", RULES)
def test_the_rows_are_the_words_of_the_tables(name: str) -> None:
    image = RULES[name]().image
    try:
        layout = Layout.read(image.source)
    except ImageError:
        return
    page = read_l1_page(image.source)
    words = np.zeros(layout.header.l1_size, dtype=np.uint64)
    for row in rows_of(l1_tsv(page), L1_HEADER):
        first, count = int(row["l1_index"]), int(row["count"])
        assert int(row["guest_offset"]) == first * layout.geometry.l2_coverage
        assert not words[first : first + count].any()
        words[first : first + count] = int(row["word"], 16)
    assert words.tolist() == [image.word(image.l1_at(index)) for index in range(len(words))]
    for index in page.in_use.tolist():
        table = read_l2_page(image.source, index)
        position = 0
        for row in rows_of(l2_tsv(table), L2_HEADER):
            first, count = int(row["l2_index"]), int(row["count"])
            assert first == position
            assert (table.words[first : first + count] == int(row["word"], 16)).all()
            assert row["finding"] == findings_label(int(table.findings[first]))
            if table.bitmaps is not None:
                assert (table.bitmaps[first : first + count] == int(row["subclusters"], 16)).all()
            position += count
        assert position == layout.geometry.l2_entries


def test_an_l1_table() -> None:
    image = fill(builder(size=5 * COVERAGE)).build()
    first, second, rest = rows_of(l1_tsv(read_l1_page(image.source)), L1_HEADER)
    assert first == {
        "l1_index": "0",
        "count": "1",
        "guest_offset": "0",
        "guest_length": str(COVERAGE),
        "l2_offset": str(image.l2_table(0)),
        "copied": "1",
        "word": f"{image.word(image.l1_at(0)):#018x}",
        "finding": "-",
    }
    assert second["l2_offset"] == str(image.l2_table(1))
    assert (rest["l1_index"], rest["count"], rest["l2_offset"]) == ("2", "3", "-")


def test_every_type_of_l2_entry() -> None:
    made = fill(builder())
    made.write_zeros(7)
    made.write_zeros(8, allocated=True)
    made.write_compressed(9, b"c" * SIZE)
    image = made.build()
    rows = rows_of(l2_tsv(read_l2_page(image.source, 0)), L2_HEADER)
    by_index = {int(row["l2_index"]): row for row in rows}
    types = {index: by_index[index]["type"] for index in (0, 3, 7, 8, 9, 10)}
    assert types == {
        0: "normal",
        3: "unallocated",
        7: "zero",
        8: "zero-allocated",
        9: "compressed",
        10: "unallocated",
    }
    assert by_index[0]["host_offset"] == str(image.host_offset(0))
    assert by_index[7]["host_offset"] == by_index[7]["host_length"] == "-"
    assert int(by_index[9]["host_length"]) % 512 == 0
    assert (by_index[9]["copied"], by_index[8]["copied"]) == ("0", "1")
    assert by_index[10]["count"] == str(WIDTH - 10)
    assert by_index[0]["subclusters"] == "-"


def test_a_bitmap_without_a_word_is_a_row() -> None:
    made = fill(extended())
    made.write_zeros(9)
    rows = rows_of(l2_tsv(read_l2_page(made.build().source, 0)), L2_HEADER)
    (row,) = [row for row in rows if row["l2_index"] == "9"]
    assert (row["count"], row["subclusters"]) == ("1", "0xffffffff00000000")


def test_what_is_wrong_with_the_way_to_a_table_stands_above_it() -> None:
    image = plain()
    image.set_bits(image.l1_at(0), 512)
    (remark,) = remarks_of(l2_tsv(read_l2_page(image.source, 0)))
    assert remark.startswith("L1 entry 0: l2-table-misaligned: ")
    image.set_word(image.l1_at(0), 0)
    assert remarks_of(l2_tsv(read_l2_page(image.source, 0))) == ["L1 entry 0 leads to no L2 table"]


def test_without_a_layout_the_reason_stands_in_place_of_the_rows() -> None:
    error = ImageError("cluster_bits", 63, "must be 9 to 21")
    assert remarks_of(l1_tsv(error)) == remarks_of(l2_tsv(error)) == [str(error)]
