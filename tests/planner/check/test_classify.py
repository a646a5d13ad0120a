"""What clusters look like by their content alone."""

import random

import numpy as np
import pytest

from planner.arrays import U8, U64, Mask
from planner.check.check import check_image
from planner.check.classify import MAX_REFCOUNT, SAMPLED_WORDS, Look, Looker
from planner.check.signatures import NAMES, REACH
from planner.qcow2 import entries
from planner.qcow2.refcounts import pack_refcounts
from planner.source import HOLE, Filled
from planner.triage.triage import looker_of
from tests.images.builder import MIB, Image, ImageBuilder


def build(**options: object) -> Image:
    builder = ImageBuilder(size=16 * MIB, **options)  # type: ignore[arg-type]
    builder.write(0, random.Random(1).randbytes(3 * builder.geometry.cluster_size))
    builder.write_compressed(5, b"compressed")
    builder.take_snapshot("one")
    return builder.build()


def rows_of(image: Image, *contents: bytes) -> U8:
    size = image.cluster_size
    whole = b"".join(content[:size].ljust(size, b"\0") for content in contents)
    return np.frombuffer(whole, dtype=np.uint8).reshape(-1, size)


def looks(image: Image, *contents: bytes) -> list[Look]:
    looker = looker_of(image.source, check_image(image.source))
    return [Look(code) for code in looker.look(rows_of(image, *contents))[0].tolist()]


def cluster_at(image: Image, offset: int) -> bytes:
    return bytes(image.data[offset : offset + image.cluster_size])


SHAPES = [
    {"cluster_bits": 9},
    {"cluster_bits": 16},
    {"cluster_bits": 21},
    {"cluster_bits": 16, "extended_l2": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_structures_of_an_image_are_recognised(shape: dict[str, object]) -> None:
    image = build(**shape)
    assert looks(
        image,
        cluster_at(image, image.l2_table(0)),
        cluster_at(image, image.header.l1_table_offset),
        cluster_at(image, image.refblock(0)),
        cluster_at(image, image.header.snapshots_offset),
        cluster_at(image, image.host_offset(0)),
        b"",
    ) == [
        Look.L2_TABLE,
        Look.L2_TABLE,
        Look.REFBLOCK,
        Look.SNAPSHOT_TABLE,
        Look.DATA,
        Look.ZEROS,
    ]


@pytest.mark.parametrize("order", range(3, 7))
def test_refcounts_of_a_byte_and_more_are_recognised(order: int) -> None:
    image = build(refcount_order=order)
    content = cluster_at(image, image.refblock(0))
    large = np.full(image.geometry.refblock_entries, MAX_REFCOUNT + 2, dtype=np.uint64)
    assert looks(image, content, pack_refcounts(large, order).tobytes()) == [
        Look.REFBLOCK,
        Look.DATA,
    ]


def table_with(image: Image, *words: int) -> bytes:
    return np.array(words, dtype=">u8").tobytes()


def test_a_table_leads_into_the_file() -> None:
    image = build()
    inside = (image.host_clusters - 1) * image.cluster_size
    outside = image.host_clusters * image.cluster_size
    assert looks(
        image,
        table_with(image, inside | entries.COPIED),
        table_with(image, outside | entries.COPIED),
        table_with(image, entries.ZERO, entries.COPIED | entries.ZERO),
    ) == [Look.L2_TABLE, Look.DATA, Look.DATA]


def test_of_a_table_that_is_mostly_zeros_only_what_is_filled_is_weighed(monkeypatch) -> None:
    image, weighed = build(cluster_bits=21), []

    def plausible(self: Looker, words: U64) -> Mask:
        weighed.append(words.size)
        return whole(self, words)

    whole = Looker.plausible
    monkeypatch.setattr(Looker, "plausible", plausible)
    word = entries.COPIED | 5 * image.cluster_size
    table = bytes(image.cluster_size // 2) + word.to_bytes(8, "big") * 3
    assert looks(image, table, cluster_at(image, image.l2_table(0))) == [Look.L2_TABLE] * 2
    assert max(weighed) <= 2 * SAMPLED_WORDS


def test_of_a_table_that_is_mostly_holes_what_is_there_is_decoded(monkeypatch) -> None:
    image = build(cluster_bits=21, backing_file=b"below")
    looker = looker_of(image.source, check_image(image.source))
    decoded, whole = [], entries.decode_words

    def decode_words(rows):
        decoded.append(rows.nbytes)
        return whole(rows)

    monkeypatch.setattr(entries, "decode_words", decode_words)
    inside = (image.host_clusters - 1) * image.cluster_size
    rows = rows_of(image, table_with(image, *[inside | entries.COPIED] * 512))
    assert looker.look(rows)[0].tolist() == [Look.L2_TABLE]
    assert sum(decoded) <= 16 << 10


@pytest.mark.parametrize("backing", [b"", b"below"])
@pytest.mark.parametrize("seed", range(8))
def test_clusters_look_the_same_without_their_holes(seed: int, backing: bytes) -> None:
    image = build(cluster_bits=21, extended_l2=seed % 2, backing_file=backing)
    rng, size = random.Random(seed), image.cluster_size
    looker = looker_of(image.source, check_image(image.source))
    inside = (image.host_clusters - 1) * size
    contents = (
        rng.randbytes(HOLE),
        (inside | entries.COPIED).to_bytes(8, "big") * (HOLE // 8),
        entries.ZERO.to_bytes(8, "big") * (HOLE // 8),
        bytes(7) + b"\1" + bytes(HOLE - 8),
        b"some text " * (HOLE // 10),
        bytes(HOLE),
    )
    first = np.arange(-(-REACH // HOLE))
    blocks = np.union1d(first, rng.sample(range(size // HOLE), rng.choice((1, 8, 100))))
    rows = np.zeros((8, size // HOLE, HOLE), dtype=np.uint8)
    for row in rows:
        likely = [rng.choice(contents), rng.choice(contents), contents[-1], contents[-1]]
        for at in blocks.tolist():
            content = rng.choice(likely)
            row[at, : len(content)] = np.frombuffer(content, dtype=np.uint8)
    kept = np.ascontiguousarray(rows[:, blocks]).reshape(8, -1)
    filled = Filled(slice(0, 8), blocks, kept)
    whole = looker.look(rows.reshape(8, -1))
    for found, wanted in zip(looker.look(kept, filled.words()), whole, strict=True):
        assert found.tolist() == wanted.tolist()


def test_a_table_may_be_overwritten_in_part() -> None:
    image = build()
    inside = (image.host_clusters - 1) * image.cluster_size
    whole = table_with(image, *[inside | entries.COPIED] * (image.cluster_size // 8))
    sector = random.Random(1).randbytes(512)
    assert looks(
        image,
        whole[:1024] + sector + whole[1536:],
        sector + whole[512:],
        sector * 64 + whole[64 * 512 :],
    ) == [Look.L2_TABLE, Look.L2_TABLE, Look.DATA]


def test_an_l1_table_has_no_subcluster_bitmaps() -> None:
    image = build(cluster_bits=16, extended_l2=True)
    inside = (image.host_clusters - 1) * image.cluster_size
    looker = looker_of(image.source, check_image(image.source))
    l1 = rows_of(image, table_with(image, 0, inside))
    l2 = rows_of(image, table_with(image, inside, entries.SUBCLUSTERS_ALLOCATED))
    for rows, targets in (
        (l1, [0, image.host_clusters - 1]),
        (l2, [image.host_clusters - 1, 0]),
    ):
        words = looker.table_words(rows)
        assert looker.targets(words, looker.plausible(words))[0, :2].tolist() == targets


def test_data_says_what_it_begins_with() -> None:
    image = build()
    looker = looker_of(image.source, check_image(image.source))
    contents = (cluster_at(image, image.l2_table(0)), b"%PDF-1.7 and so on", b"\x93\x01\x02" * 999)
    look, signature = looker.look(rows_of(image, *contents))
    assert look.tolist() == [Look.L2_TABLE, Look.DATA, Look.DATA]
    assert [NAMES[code] for code in signature.tolist()] == ["", "PDF document", ""]


def test_the_first_sector_shows_what_is_worth_reading() -> None:
    image = build()
    looker = looker_of(image.source, check_image(image.source))
    sectors = [cluster_at(image, image.l2_table(0)), cluster_at(image, image.host_offset(0)), b""]
    rows = rows_of(image, *sectors)[:, :512]
    assert looker.may_be_tables(np.ascontiguousarray(rows)).tolist() == [True, False, False]


def test_parts_of_a_cluster_say_together_what_it_is() -> None:
    image = build(cluster_bits=16)
    looker = looker_of(image.source, check_image(image.source))
    rng, size = random.Random(2), image.cluster_size
    word = entries.COPIED | 5 * size
    entry = table_with(image, word)
    contents = [bytes(size), rng.randbytes(size), entry]
    for at in range(0, size, size // 4):
        contents += [bytes(at) + entry, (entry * (at // 8)).ljust(size, b"\x13")]
    for bad in (40, 90, 150):  # one in ten is the most
        contents.append(table_with(image, *[word] * 900, *range(3, 3 + bad)))
    whole = rows_of(image, *contents)
    wanted = looker.parts(whole).are_tables()
    assert wanted[2:4].all()
    assert wanted[-3:].tolist() == [True, True, False]
    for pieces in (2, 16):
        of = np.repeat(np.arange(len(whole)), pieces)
        parts = looker.parts(whole.reshape(len(whole) * pieces, -1))
        assert parts.joined(of, len(whole)).are_tables().tolist() == wanted.tolist()
