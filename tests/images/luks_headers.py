"""A LUKS header that QEMU accepts, and the ways to spoil it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from planner.qcow2.luks import DISABLED, ENABLED, MAGIC, STRIPES, KeySlot, LuksHeader, encode_luks

SLOT_SECTORS = 504  # 64 bytes of key x 4000 stripes, rounded up to 4096 bytes
RANDOM = random.Random(2).randbytes(32)


def luks_header(**changes: Any) -> LuksHeader:
    """aes-xts-plain64, one key; *changes* replace fields."""
    slots = tuple(
        KeySlot(ENABLED if n == 0 else DISABLED, 1000 if n == 0 else 0, RANDOM, at, STRIPES)
        for n, at in enumerate(range(8, 8 + 8 * SLOT_SECTORS, SLOT_SECTORS))
    )
    header = LuksHeader(
        magic=MAGIC,
        version=1,
        cipher_name=_name("aes"),
        cipher_mode=_name("xts-plain64"),
        hash_spec=_name("sha256"),
        payload_offset=8 + 8 * SLOT_SECTORS,
        key_bytes=64,
        mk_digest=RANDOM[:20],
        mk_digest_salt=RANDOM,
        mk_digest_iter=1000,
        uuid=b"f2d7a1b0-5a0c-4cf1-9a64-0f6f3f2f6d11".ljust(40, b"\0"),
        key_slots=slots,
    )
    return replace(header, **changes)


def with_slot(index: int, **changes: Any) -> LuksHeader:
    """The same, with *changes* to one key slot."""
    header = luks_header()
    slots = list(header.key_slots)
    slots[index] = replace(slots[index], **changes)
    return replace(header, key_slots=tuple(slots))


def _name(text: str) -> bytes:
    return text.encode().ljust(32, b"\0")


def _spread(header: LuksHeader) -> LuksHeader:
    """The same with room between the key slots."""
    slots = [replace(s, key_material_offset=8 + 1024 * n) for n, s in enumerate(header.key_slots)]
    return replace(header, key_slots=tuple(slots), payload_offset=8 + 8 * 1024)


def small_luks_header() -> LuksHeader:
    """As short as one gets: 128-bit keys, their slots close together."""
    header = luks_header(cipher_mode=_name("cbc-plain"), key_bytes=16)
    slots = [replace(s, key_material_offset=8 + 128 * n) for n, s in enumerate(header.key_slots)]
    return replace(header, key_slots=tuple(slots), payload_offset=8 + 128 * len(slots))


def luks_bytes() -> bytes:
    """The whole header area of a small LUKS header, its key material at random."""
    header = small_luks_header()
    raw = encode_luks(header)
    return raw + random.Random(1).randbytes(header.payload_offset * 512 - len(raw))


ACCEPTED = {
    "small": small_luks_header(),
    "plain": luks_header(),
    "cbc-essiv": luks_header(cipher_mode=_name("cbc-essiv:sha256"), key_bytes=32),
    "cbc-plain": luks_header(cipher_mode=_name("cbc-plain"), key_bytes=16),
    "ecb-plain": luks_header(cipher_mode=_name("ecb-plain"), key_bytes=24),
    "ctr-plain64": luks_header(cipher_mode=_name("ctr-plain64"), key_bytes=32),
    "unused-iv-hash": luks_header(cipher_mode=_name("xts-plain64:sha1")),
    "serpent": luks_header(cipher_name=_name("serpent")),
    "twofish": luks_header(cipher_name=_name("twofish"), key_bytes=32),
    "cast5": luks_header(cipher_name=_name("cast5"), cipher_mode=_name("cbc-plain"), key_bytes=16),
    "sha1": luks_header(hash_spec=_name("sha1")),
    "ripemd160": luks_header(hash_spec=_name("ripemd160")),
    "all-enabled": luks_header(
        key_slots=tuple(replace(s, active=ENABLED, iterations=7) for s in luks_header().key_slots)
    ),
    "key-odd": _spread(luks_header(key_bytes=65)),
    "payload-far": luks_header(payload_offset=1 << 30),
    "no-uuid": luks_header(uuid=bytes(40)),
    "uuid-unterminated": luks_header(uuid=b"x" * 40),
}
"""What QEMU accepts, by name."""

REFUSED = {
    "magic": luks_header(magic=b"SKUL\xba\xbe"),
    "version": luks_header(version=2),
    "cipher-unterminated": luks_header(cipher_name=b"a" * 32),
    "mode-unterminated": luks_header(cipher_mode=b"x" * 32),
    "hash-unterminated": luks_header(hash_spec=b"s" * 32),
    "cipher-unknown": luks_header(cipher_name=_name("rot13")),
    "mode-unknown": luks_header(cipher_mode=_name("gcm-plain64")),
    "mode-without-iv": luks_header(cipher_mode=_name("xts")),
    "iv-unknown": luks_header(cipher_mode=_name("xts-random")),
    "essiv-without-hash": luks_header(cipher_mode=_name("cbc-essiv"), key_bytes=32),
    "essiv-hash-unknown": luks_header(cipher_mode=_name("cbc-essiv:crc32"), key_bytes=32),
    "essiv-digest-without-cipher": luks_header(cipher_mode=_name("cbc-essiv:sha1"), key_bytes=32),
    "essiv-with-cast5": luks_header(
        cipher_name=_name("cast5"), cipher_mode=_name("cbc-essiv:sha256"), key_bytes=16
    ),
    "hash-unknown": luks_header(hash_spec=_name("crc32")),
    "key-31": luks_header(key_bytes=63),
    "key-size-unknown": luks_header(key_bytes=40),
    "payload-in-header": luks_header(payload_offset=7),
    "payload-on-keys": luks_header(payload_offset=8 + 7 * SLOT_SECTORS),
    "digest-without-iterations": luks_header(mk_digest_iter=0),
    "slot-state": with_slot(3, active=1),
    "slot-without-iterations": with_slot(0, iterations=0),
    "slot-stripes": with_slot(2, stripes=3999),
    "slot-in-header": with_slot(0, key_material_offset=7),
    "slot-in-payload": with_slot(7, key_material_offset=8 + 8 * SLOT_SECTORS),
    "slots-overlap": with_slot(1, key_material_offset=16),
}
"""What QEMU refuses, by the field that is wrong."""

LOCKED = {
    "key-odd": ACCEPTED["key-odd"],
    "cast5-xts": luks_header(cipher_name=_name("cast5"), key_bytes=32),
    "digest-of-zeros": luks_header(mk_digest=bytes(20)),
    "digest-salt-of-ones": luks_header(mk_digest_salt=b"\xff" * 32),
    "no-keys": luks_header(
        key_slots=tuple(replace(s, active=DISABLED) for s in luks_header().key_slots)
    ),
}
"""What QEMU accepts until it is given a password, by what is wrong then."""
