"""Images of every sort, and damage to them that hits what a check reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from planner.findings.grouped import FindingsBuilder
from planner.metadata.locate import take_survey
from planner.qcow2.layout import Layout
from planner.source import Bytes
from tests.images.builder import Image, ImageBuilder

ALL_BITS = (1 << 64) - 1


def rich() -> Image:
    """Small clusters, so that damage hits metadata: two snapshots, compression, zeros, a bitmap."""
    made = ImageBuilder(cluster_bits=9, size=1 << 17, refcount_order=3)
    made.write(0, b"a" * 512 * 5)
    made.write(70, b"b" * 512 * 3)
    made.write_compressed(6, b"c")
    made.write_compressed(7, b"d")
    made.write_zeros(8)
    made.write_zeros(9, allocated=True)
    made.take_snapshot("one")
    made.write(1, b"e")
    made.take_snapshot("two")
    made.write(71, b"f")
    made.skip(2)
    made.add_bitmap("bits", {0, 1}, granularity_bits=16)
    return made.build()


def filled() -> Image:
    """Full L2 tables of adjacent clusters, one of them shared with a snapshot."""
    made = ImageBuilder(cluster_bits=12, size=1 << 22)
    made.write(0, b"f" * (1 << 22))
    made.take_snapshot("full")
    made.write(5, b"g")
    return made.build()


def versioned() -> Image:
    """Four versions of the same L2 tables, each with clusters that the one before has not."""
    made = ImageBuilder(cluster_bits=9, size=1 << 16)
    made.write(0, b"v" * (1 << 16))
    made.take_snapshot("one")
    made.write(3, b"w" * 1024)
    made.take_snapshot("two")
    made.write(3, b"x")
    made.write(100, b"x")
    made.take_snapshot("three")
    made.write(7, b"y")
    return made.build()


def version_2() -> Image:
    """Of the old version, with compressed clusters and a disk that ends inside a cluster."""
    made = ImageBuilder(cluster_bits=12, size=(1 << 20) + 1536, version=2)
    made.write(0, b"o" * (1 << 15))
    made.write(256, b"o")
    for cluster in range(12, 16):
        made.write_compressed(cluster, bytes([cluster]) * 4096)
    return made.build()


def extended() -> Image:
    """Extended L2 entries, some of them with a few subclusters."""
    made = ImageBuilder(cluster_bits=14, size=1 << 20, extended_l2=True)
    made.write(0, b"s" * (1 << 16))
    made.write_subclusters(14, b"s" * (1 << 14), 0x0F0F, 0xF0F0)
    made.take_snapshot("one")
    made.write_compressed(20, b"c" * (1 << 14))
    made.write(1, b"t")
    return made.build()


def with_data_file() -> Image:
    """Its clusters are elsewhere."""
    made = ImageBuilder(cluster_bits=12, size=1 << 20, data_file=b"data.raw")
    made.write(0, b"d" * (1 << 16))
    made.write_zeros(20)
    made.write_zeros(21, allocated=True)
    return made.build()


IMAGES = {
    make.__name__: make() for make in (rich, filled, versioned, version_2, extended, with_data_file)
}


def l2_tables(image: Image) -> list[int]:
    """Host offsets of all L2 tables, each once."""
    survey = take_survey(image.source, Layout.read(image.source), FindingsBuilder())
    return list(map(int, survey.tables.offset))


def words_for(image: Image) -> st.SearchStrategy[int]:
    """Words to put in the place of others: what is special, what leads into the file, anything."""
    clusters = st.integers(0, image.host_clusters + 2)
    bits = image.geometry.cluster_bits
    return st.one_of(
        st.sampled_from([0, 1, 1 << 62, 1 << 63, ALL_BITS, 512, 1 << 61, 1 << 55, (1 << 63) - 512]),
        clusters.map(lambda cluster: cluster << bits | 1 << 63),
        clusters.map(lambda cluster: cluster << bits),
        clusters.map(lambda cluster: (cluster << bits) + 512 | 1 << 63),
        clusters.map(lambda cluster: cluster << bits | 1),
        clusters.map(lambda cluster: (cluster << bits) + 100 | 1 << 62),
        st.integers(0, ALL_BITS),
    )


def damaged(image: Image, changes: Sequence[tuple[int, int]], end: int | None = None) -> Bytes:
    """The words at offsets changed, and the file cut at *end*."""
    copy = Image(bytearray(image.data))
    for at, word in changes:
        copy.set_word(at, word)
    return Bytes(bytes(copy.data[:end]))


@dataclass(frozen=True)
class Damage:
    """Words at offsets, refcounts of clusters, and where the file is cut off."""

    words: list[tuple[int, int]]
    refcounts: list[tuple[int, int]]
    end: int | None

    def applied(self, image: Image) -> Bytes:
        copy = Image(bytearray(image.data))
        for cluster, refcount in self.refcounts:
            copy.set_refcount(cluster, refcount)
        return damaged(copy, self.words, self.end)


def damage_to_tables(image: Image) -> st.SearchStrategy[Damage]:
    """Other words in L2 tables, other refcounts, and perhaps a file that is cut off."""
    geometry, width = image.geometry, image.cluster_size // 8
    column = st.integers(0, width - 1) | st.integers(0, min(63, width - 1))
    at = st.builds(
        lambda table, column: table + column * 8, st.sampled_from(l2_tables(image)), column
    )
    cluster = st.integers(0, image.host_clusters - 1)
    refcount = st.integers(0, min(3, geometry.refcount_max))
    return st.builds(
        Damage,
        words=st.lists(st.tuples(at, words_for(image)), max_size=5),
        refcounts=st.lists(st.tuples(cluster, refcount), max_size=2),
        end=st.none() | st.integers(len(image.data) // 2, len(image.data)),
    )
