"""How what is stored with a file system is written for people."""

from __future__ import annotations


def written_uuid(raw: bytes) -> str:
    """16 bytes, the first of them first, as blkid writes a UUID."""
    digits = raw.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
