"""Compressed clusters: what is stored in, a cluster out, or the reason why not.

Accepts what QEMU accepts: qcow2_zlib_decompress and qcow2_zstd_decompress in qcow2-threads.c. What
a cluster costs is bounded by its size, whatever the data claims.

By zlib-ng, which is zlib but for its speed: it refuses the same streams, as others do not.
"""

from __future__ import annotations

import sys

from zlib_ng import zlib_ng

from planner.qcow2.header import COMPRESSION_ZSTD

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdDecompressor, ZstdError
else:
    from backports.zstd import ZstdDecompressor, ZstdError

# As Python's own zlib has one for gzip, and neither documents it. What a decompressobj gives comes
# in more pieces, and for each of them threads wait for the interpreter.
_Inflater = zlib_ng._ZlibDecompressor  # noqa: SLF001

# The specification wants a window of 4 KiB. QEMU inflates in one call, which makes no use of a
# window: it accepts whatever distance leads to what is there already.
_WINDOW_BITS = -15


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
        inflater = _Inflater(wbits=_WINDOW_BITS)  # type: ignore[no-untyped-call]  # its stub
        content: bytes = inflater.decompress(stored, size)
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
