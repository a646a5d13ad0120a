"""Compressed clusters: what is stored in, a cluster out, or the reason why not.

Accepts what QEMU accepts: qcow2_zlib_decompress and qcow2_zstd_decompress in qcow2-threads.c. What
a cluster costs is bounded by its size, whatever the data claims.

By zlib-ng, which is zlib but for its speed: it refuses the same streams, as others do not. Its
fastest call is one that it does not document: this module relies on that, and no other does. Where
it does not do what is expected of it, the documented one is taken, which is slower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from zlib_ng import zlib_ng

from planner.qcow2.header import COMPRESSION_ZSTD

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdDecompressor, ZstdError
else:
    from backports.zstd import ZstdDecompressor, ZstdError

# The specification wants a window of 4 KiB. QEMU inflates in one call, which makes no use of a
# window: it accepts whatever distance leads to what is there already.
_WINDOW_BITS = -15


Inflate = Callable[[bytes | memoryview, int], bytes]
"""Of a stored stream no more than so many bytes; fewer where it ends. Raises `zlib_ng.error`."""


def inflate_as_documented(stored: bytes | memoryview, size: int) -> bytes:
    """By a decompressobj. What it gives comes in pieces, and for each of them threads wait for
    the interpreter.
    """
    return zlib_ng.decompressobj(wbits=_WINDOW_BITS).decompress(stored, size)


def inflate_by(inflater: Any) -> Inflate:
    """By *inflater*, a class such as Python's own zlib has for gzip, if it does what it must."""

    def inflate(stored: bytes | memoryview, size: int) -> bytes:
        content: bytes = inflater(wbits=_WINDOW_BITS).decompress(stored, size)
        return content

    return inflate if _is_sound(inflate) else inflate_as_documented


def _is_sound(inflate: Inflate) -> bool:
    """Whether it inflates, no further than it is told, and refuses what is no such stream."""
    content = bytes(range(256)) * 4
    packer = zlib_ng.compressobj(wbits=_WINDOW_BITS)
    stored = memoryview(packer.compress(content) + packer.flush())
    try:
        return (
            inflate(bytes(stored) + b"behind it", len(content)) == content
            and inflate(stored, 700) == content[:700]
            and len(inflate(stored[:-40], len(content))) < len(content)
            and _refuses(inflate, b"\x07" * 40)  # a block of a type that there is not
        )
    except Exception:  # noqa: BLE001 - whatever it is: it is not what it was
        return False


def _refuses(inflate: Inflate, stored: bytes) -> bool:
    try:
        inflate(stored, 100)
    except zlib_ng.error:  # type: ignore[misc]  # its stub
        return True
    return False


_inflate = inflate_by(getattr(zlib_ng, "_ZlibDecompressor", None))

MAX_FRAMES = 64
"""Zstandard frames of a cluster; QEMU writes one. Each is cut off the rest, which is copied."""


class NotUnpacked(Exception):
    """The stored data does not give a whole cluster."""


def unpack(stored: bytes | memoryview, size: int, compression_type: int) -> bytes:
    """The *size* bytes that *stored* begins with, decompressed.

    What follows the compressed data in *stored* is left alone. Raises `NotUnpacked`.
    """
    try:
        if compression_type == COMPRESSION_ZSTD:
            return _unpack_zstd(stored, size)
        content = _inflate(stored, size)
    except (zlib_ng.error, ZstdError, MemoryError) as error:  # type: ignore[misc]  # its stub
        raise NotUnpacked(str(error)) from error
    if len(content) < size:
        raise NotUnpacked(f"the compressed data ends after {len(content)} bytes")
    return content


def _unpack_zstd(stored: bytes | memoryview, size: int) -> bytes:
    """Frame after frame until there are *size* bytes; the last must end there."""
    content = b""
    rest: bytes | memoryview = stored
    for _ in range(MAX_FRAMES):
        frame = ZstdDecompressor()
        content += frame.decompress(rest, size - len(content))
        if not frame.eof:
            raise NotUnpacked("the compressed data does not end where the cluster does")
        if len(content) == size:
            return content
        rest = frame.unused_data
        if not rest:
            raise NotUnpacked(f"the compressed data ends after {len(content)} bytes")
    raise NotUnpacked(f"the compressed data is in more than {MAX_FRAMES} pieces")
