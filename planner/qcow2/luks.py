"""The LUKS header inside an encrypted image: its fields, and what QEMU refuses in them.

No key is ever derived; of key material it is only seen where something else lies in its place.
Source: LUKS On-Disk Format Specification, version 1.2.3, section 3; for what QEMU refuses,
qcrypto_block_luks_open. One version of it refuses less than the next: what any of them refuses is
refused here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from construct import Array, Bytes, Int16ub, Int32ub, Struct

from planner.errors import ImageError, as_value
from planner.qcow2.extensions import CryptoPointer
from planner.qcow2.names import decode_name, quoted
from planner.source import Source, read_bytes

MAGIC = b"LUKS\xba\xbe"
SECTOR = 512
KEY_SLOTS = 8
STRIPES = 4000
HEADER_AREA = 4096
"""Bytes before the first key material; key material is aligned to them as well."""

ENABLED, DISABLED = 0x00AC_71F3, 0x0000_DEAD

KEY_SLOT = Struct(
    "active" / Int32ub,
    "iterations" / Int32ub,
    "salt" / Bytes(32),
    "key_material_offset" / Int32ub,
    "stripes" / Int32ub,
)
LUKS_HEADER = Struct(
    "magic" / Bytes(6),
    "version" / Int16ub,
    "cipher_name" / Bytes(32),
    "cipher_mode" / Bytes(32),
    "hash_spec" / Bytes(32),
    "payload_offset" / Int32ub,
    "key_bytes" / Int32ub,
    "mk_digest" / Bytes(20),
    "mk_digest_salt" / Bytes(32),
    "mk_digest_iter" / Int32ub,
    "uuid" / Bytes(40),
    "key_slots" / Array(KEY_SLOTS, KEY_SLOT),
)
LUKS_BYTES: int = LUKS_HEADER.sizeof()
SLOT_BYTES: int = KEY_SLOT.sizeof()
SLOTS_AT = LUKS_BYTES - KEY_SLOTS * SLOT_BYTES

CIPHER_KEY_BYTES = {
    "aes": (16, 24, 32),
    "cast5": (16,),
    "serpent": (16, 24, 32),
    "twofish": (16, 24, 32),
}
MODES = ("ecb", "cbc", "xts", "ctr")
IV_GENERATORS = ("plain", "plain64", "essiv")
RANDOM_BYTES = 128
"""So many different bytes are in each sector of what looks random: 222 are to be expected."""

DIGEST_BYTES = {
    "md5": 16,
    "sha1": 20,
    "sha224": 28,
    "sha256": 32,
    "sha384": 48,
    "sha512": 64,
    "ripemd160": 20,
}
"""The hashes that QEMU knows."""


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One key slot. ``key_material_offset`` counts sectors from the LUKS header's beginning."""

    active: int
    iterations: int
    salt: bytes
    key_material_offset: int
    stripes: int

    @property
    def enabled(self) -> bool:
        """Whether it holds a key."""
        return self.active == ENABLED


@dataclass(frozen=True, slots=True)
class Cipher:
    """What the names in a LUKS header stand for; ``key_bits`` as the cipher itself sees them."""

    algorithm: str
    key_bits: int
    mode: str
    iv_generator: str
    iv_hash: str | None


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """The header's fields under the specification's names; ``payload_offset`` counts sectors."""

    magic: bytes
    version: int
    cipher_name: bytes
    cipher_mode: bytes
    hash_spec: bytes
    payload_offset: int
    key_bytes: int
    mk_digest: bytes
    mk_digest_salt: bytes
    mk_digest_iter: int
    uuid: bytes
    key_slots: tuple[KeySlot, ...]

    @property
    def hash_name(self) -> str:
        """The hash of key derivation and anti-forensic splitter."""
        return decode_name(self.hash_spec)

    @property
    def uuid_text(self) -> str:
        """The UUID as text, which is how it is stored."""
        return decode_name(self.uuid)

    @property
    def key_material_sectors(self) -> int:
        """Sectors that the material of one key slot takes."""
        sectors = -(-self.key_bytes * STRIPES // SECTOR)
        alignment = HEADER_AREA // SECTOR
        return -(-sectors // alignment) * alignment


def decode_luks(raw: bytes) -> LuksHeader:
    """Decode a header from its 592 bytes, whatever they are."""
    values = LUKS_HEADER.parse(raw)
    slots = [
        KeySlot(s.active, s.iterations, s.salt, s.key_material_offset, s.stripes)
        for s in values.key_slots
    ]
    names = [sub.name for sub in LUKS_HEADER.subcons if sub.name != "key_slots"]
    return LuksHeader(**{name: values[name] for name in names}, key_slots=tuple(slots))


def encode_luks(header: LuksHeader) -> bytes:
    """The inverse of `decode_luks`."""
    slots = [{name: getattr(s, name) for name in KeySlot.__slots__} for s in header.key_slots]
    values = {name: getattr(header, name) for name in LuksHeader.__slots__}
    raw: bytes = LUKS_HEADER.build(values | {"key_slots": slots})
    return raw


def read_luks(source: Source, pointer: CryptoPointer) -> LuksHeader:
    """The LUKS header of an image. Raises `ImageError` for the first thing that QEMU refuses.

    For what it refuses only when it is given a password see `check_unlocking`.
    """
    if pointer.length < LUKS_BYTES:
        raise ImageError("crypto header length", pointer.length, f"LUKS needs {LUKS_BYTES} bytes")
    header = decode_luks(read_bytes(source, pointer.offset, LUKS_BYTES))
    check_luks(header)
    return header


def luks_error(source: Source, pointer: CryptoPointer) -> ImageError | None:
    """Why QEMU would not open the disk of an image, whatever the password; None where it would."""
    try:
        header = read_luks(source, pointer)
        check_unlocking(header, pointer.length)
        check_key_material(source, pointer, header)
    except ImageError as error:
        return as_value(error)
    return None


def luks_length(source: Source, pointer: CryptoPointer) -> int:
    """How long a LUKS header says that it is, bytes; as short as one can be where none is there."""
    header = decode_luks(read_bytes(source, pointer.offset, LUKS_BYTES))
    said = header.payload_offset * SECTOR if header.magic == MAGIC else 0
    return max(LUKS_BYTES, said)


def check_luks(header: LuksHeader) -> None:
    """Judge a header as QEMU does before it asks for a key. Raises `ImageError`."""
    if header.magic != MAGIC:
        raise ImageError("LUKS magic", f"0x{header.magic.hex()}", f"must be 0x{MAGIC.hex()}")
    if header.version != 1:
        raise ImageError("LUKS version", header.version, "only version 1 is known")
    for field in ("cipher_name", "cipher_mode", "hash_spec"):
        value = getattr(header, field)
        if b"\0" not in value:
            raise ImageError(f"LUKS {field}", f"0x{value.hex()}", "the name has no end")
    if header.payload_offset < HEADER_AREA // SECTOR:
        raise ImageError("LUKS payload_offset", header.payload_offset, "inside the LUKS header")
    if header.mk_digest_iter == 0:
        raise ImageError("LUKS mk_digest_iter", 0, "a digest takes at least one iteration")
    for index in range(KEY_SLOTS):
        _check_slot(header, index)
    cipher_of(header)
    if header.hash_name not in DIGEST_BYTES:
        raise ImageError("LUKS hash_spec", quoted(header.hash_spec), "not a known hash")


def check_unlocking(header: LuksHeader, room: int) -> None:
    """Judge a header that `check_luks` accepts as QEMU does with a password, whichever it is.

    *room*: bytes that the image has for the header. Raises `ImageError`.
    """
    # With a digest that was overwritten no key is the right one.
    for field in ("mk_digest", "mk_digest_salt"):
        value = getattr(header, field)
        if _is_one_byte(value):
            raise ImageError(f"LUKS {field}", f"0x{value.hex()}", "no password opens the disk")
    cipher = cipher_of(header)
    if cipher.mode == "xts" and header.key_bytes % 2:
        raise ImageError("LUKS key_bytes", header.key_bytes, "xts takes two keys of one length")
    if cipher.mode == "xts" and cipher.algorithm == "cast5":
        raise ImageError("LUKS cipher_mode", quoted(header.cipher_mode), "not with cast5")
    # QEMU tries one after the other, and gives up at the first whose material it cannot read.
    first = next((n for n, slot in enumerate(header.key_slots) if slot.enabled), None)
    if first is None:
        raise ImageError("LUKS key slots", "all disabled", "no password opens the disk")
    start = header.key_slots[first].key_material_offset * SECTOR
    if start + header.key_bytes * STRIPES > room:
        problem = f"reaches past the {room} bytes that the image has for the header"
        raise ImageError(f"key_material_offset of LUKS key slot {first}", start // SECTOR, problem)


def check_key_material(source: Source, pointer: CryptoPointer, header: LuksHeader) -> None:
    """Raise `ImageError` where no key slot has its salt and its material left: zeros, or what else.

    A key is spread over all of its material, which looks random throughout (LUKS, section 2.4): one
    sector that does not, and no password opens that slot. QEMU finds out when it is given one.
    """
    gone = _gone_slots(source, pointer, header)
    if len(gone) == sum(slot.enabled for slot in header.key_slots):
        slots, sectors = list(gone), list(gone.values())
        named = f"slot {slots[0]}" if len(slots) == 1 else "slots " + ", ".join(map(str, slots))
        raise ImageError(
            f"LUKS key {named}", f"overwritten in sector {sectors[0]}", "no password opens the disk"
        )


def gone_key_slots(source: Source, pointer: CryptoPointer) -> dict[int, int]:
    """The key slots that no password opens any more, where `luks_error` finds one that it does; of
    each the first sector that was overwritten, from the header's beginning.
    """
    return _gone_slots(source, pointer, read_luks(source, pointer))


def _gone_slots(source: Source, pointer: CryptoPointer, header: LuksHeader) -> dict[int, int]:
    enabled = [n for n, slot in enumerate(header.key_slots) if slot.enabled]
    first = {slot: _first_bad_sector(source, pointer, header, slot) for slot in enabled}
    return {slot: sector for slot, sector in first.items() if sector is not None}


def _first_bad_sector(
    source: Source, pointer: CryptoPointer, header: LuksHeader, index: int
) -> int | None:
    """The first sector of a slot's salt or material that is none, from the header's beginning."""
    if _is_one_byte(header.key_slots[index].salt):
        return (SLOTS_AT + index * SLOT_BYTES) // SECTOR
    start = header.key_slots[index].key_material_offset
    whole = header.key_bytes * STRIPES // SECTOR
    raw = np.frombuffer(
        read_bytes(source, pointer.offset + start * SECTOR, whole * SECTOR), np.uint8
    )
    ordered = np.sort(raw.reshape(whole, SECTOR), axis=1)
    different = np.count_nonzero(np.diff(ordered, axis=1), axis=1) + 1
    bad = np.flatnonzero(different < RANDOM_BYTES)[:1].tolist()
    return start + bad[0] if bad else None


def _is_one_byte(field: bytes) -> bool:
    """Whether what is random in each LUKS header is one byte over and over: zeros, say."""
    return len(set(field)) == 1


def _check_slot(header: LuksHeader, index: int) -> None:
    slot, length = header.key_slots[index], header.key_material_sectors
    start = slot.key_material_offset
    name = f"of LUKS key slot {index}"
    if slot.stripes != STRIPES:
        raise ImageError(f"stripes {name}", slot.stripes, f"must be {STRIPES}")
    if start < HEADER_AREA // SECTOR:
        raise ImageError(f"key_material_offset {name}", start, "inside the LUKS header")
    if slot.active not in (ENABLED, DISABLED):
        raise ImageError(f"active {name}", f"{slot.active:#x}", "neither enabled nor disabled")
    if slot.enabled and slot.iterations == 0:
        raise ImageError(f"iterations {name}", 0, "a key takes at least one iteration")
    if start + length > header.payload_offset:
        raise ImageError(f"key_material_offset {name}", start, "reaches into the payload")
    for other, later in enumerate(header.key_slots[index + 1 :], index + 1):
        if abs(start - later.key_material_offset) < length:
            raise ImageError(f"key_material_offset {name}", start, f"overlaps key slot {other}")


def cipher_of(header: LuksHeader) -> Cipher:
    """The cipher that the header names. Raises `ImageError` for one that QEMU does not know."""
    algorithm, specification = decode_name(header.cipher_name), decode_name(header.cipher_mode)
    mode, dash, generator = specification.partition("-")
    generator, colon, iv_hash = generator.partition(":")
    if not dash or mode not in MODES or generator not in IV_GENERATORS:
        raise ImageError("LUKS cipher_mode", quoted(header.cipher_mode), "not a known cipher mode")
    if colon and iv_hash not in DIGEST_BYTES:
        raise ImageError("LUKS cipher_mode", quoted(header.cipher_mode), "not a known hash")
    if generator == "essiv" and not colon:
        raise ImageError("LUKS cipher_mode", quoted(header.cipher_mode), "essiv needs a hash")
    key_bytes = header.key_bytes
    if mode == "xts":  # two keys in one; QEMU does not mind a byte left over
        key_bytes //= 2
    if key_bytes not in CIPHER_KEY_BYTES.get(algorithm, ()):
        problem = f"not a cipher with keys of {key_bytes} bytes"
        raise ImageError("LUKS cipher_name", quoted(header.cipher_name), problem)
    # What essiv encrypts sector numbers with takes a digest for its key.
    if generator == "essiv" and DIGEST_BYTES[iv_hash] not in CIPHER_KEY_BYTES[algorithm]:
        problem = f"{algorithm} takes no key as long as that digest"
        raise ImageError("LUKS cipher_mode", quoted(header.cipher_mode), problem)
    return Cipher(algorithm, key_bytes * 8, mode, generator, iv_hash if colon else None)
