"""instarfs.guest.unpack: what a compressed cluster may cost, whatever it claims to hold."""

import random
import sys
import time
import tracemalloc
import zlib
from functools import cache

import pytest
from zlib_ng import zlib_ng

from instarfs.guest import unpack as unpacking
from instarfs.guest.unpack import MAX_FRAMES, NotUnpacked, unpack
from planner.qcow2.header import COMPRESSION_ZLIB, COMPRESSION_ZSTD

if sys.version_info >= (3, 14):
    from compression.zstd import compress
else:
    from backports.zstd import compress

CLUSTER = 1 << 16


def deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-12)
    return packer.compress(content) + packer.flush()


@cache
def deflated_bomb() -> bytes:
    return deflated(bytes(200 << 20))


@pytest.fixture(params=[True, False], ids=["fast", "documented"])
def inflates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both ways, whichever is taken here."""
    inflate = unpacking.inflate_by(zlib_ng._ZlibDecompressor if request.param else None)
    assert (inflate is unpacking.inflate_as_documented) is not request.param
    monkeypatch.setattr(unpacking, "_inflate", inflate)


@pytest.mark.usefixtures("inflates")
def test_a_bomb_gives_a_cluster_and_no_more() -> None:
    bomb = deflated_bomb()
    tracemalloc.start()
    assert unpack(bomb, CLUSTER, COMPRESSION_ZLIB) == bytes(CLUSTER)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_a_zstandard_bomb_is_refused() -> None:
    bomb = compress(bytes(200 << 20))
    tracemalloc.start()
    with pytest.raises(NotUnpacked, match="does not end where the cluster does"):
        unpack(bomb, CLUSTER, COMPRESSION_ZSTD)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_frames_may_share_a_cluster() -> None:
    half = bytes(range(256)) * (CLUSTER // 512)
    assert unpack(compress(half) * 2, CLUSTER, COMPRESSION_ZSTD) == half * 2


def test_frames_with_nothing_in_them_take_no_time() -> None:
    start = time.process_time()
    with pytest.raises(NotUnpacked, match=f"more than {MAX_FRAMES} pieces"):
        unpack(compress(b"") * 400_000, CLUSTER, COMPRESSION_ZSTD)
    assert time.process_time() - start < 2.0


def inflated(stored: bytes, size: int) -> bytes | None:
    """What zlib itself makes of it, as QEMU calls it."""
    try:
        content = zlib.decompressobj(-15).decompress(stored, size)
    except zlib.error:
        return None
    return content if len(content) == size else None


@pytest.mark.usefixtures("inflates")
def test_a_damaged_stream_is_accepted_where_zlib_accepts_it() -> None:
    rng, size, accepted = random.Random(5), 512, 0
    contents = rng.randbytes(size), bytes(rng.choices(b"abcdef ", k=size)), bytes(size)
    whole = [bytearray(deflated(content) + rng.randbytes(40)) for content in contents]
    for _ in range(4000):
        damaged = bytearray(rng.choice(whole))
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(min(len(damaged), 100))] ^= 1 << rng.randrange(8)
        stored = bytes(damaged)
        expected = inflated(stored, size)
        accepted += expected is not None
        try:
            assert unpack(stored, size, COMPRESSION_ZLIB) == expected
        except NotUnpacked:
            assert expected is None
    assert 300 < accepted < 3700


class _Other:
    """An inflater that gives *content* whatever it is given, or raises."""

    content = b""

    def __init__(self, *, wbits: int) -> None:
        pass

    def decompress(self, stored: bytes, size: int) -> bytes:
        return self.content[:size]


class _Lying(_Other):
    content = bytes(range(256)) * 4


class _Moved:
    """One that is made in another way."""


@pytest.mark.parametrize("inflater", [None, _Other, _Lying, _Moved, dict])
def test_what_is_not_as_expected_is_not_relied_on(inflater: object) -> None:
    assert unpacking.inflate_by(inflater) is unpacking.inflate_as_documented
