"""Images whose every name is an attack on whoever prints it, and the judge of what is printed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from planner.qcow2 import extensions
from planner.qcow2.header import CRYPT_LUKS
from planner.qcow2.luks import encode_luks
from tests.images.builder import MIB, Image, ImageBuilder
from tests.images.damage import DAMAGES
from tests.images.luks_headers import luks_header
from tests.images.planted_guest import planted_guest
from tests.images.poison import AFTER_NUL, MARK, POISON, cut
from tests.images.sample import sample

# ---- images ----


def _features(kind: int = 0, first: int = 40) -> tuple[int, bytes]:
    rows = [
        extensions.FEATURE_NAME.build(
            {"type": kind, "bit": first + n, "name": name.ljust(46, b"\0")}
        )
        for n, name in enumerate(cut(46))
    ]
    return extensions.FEATURE_NAMES, b"".join(rows)


def _every_name() -> Image:
    """A damaged image with two snapshots and two bitmaps, leaks among which there is a table."""
    builder = sample(size=64 * MIB, cluster_bits=12)
    builder.take_snapshot("second")
    for cluster in range(300, 316):
        builder.write(cluster, b"later")
    builder.extensions += [
        (extensions.BACKING_FORMAT, POISON[:15]),
        _features(),
        (0x12345678, POISON),
    ]
    builder.backing_file = POISON + AFTER_NUL
    for number, (snapshot, l1) in enumerate(builder.snapshots):
        identity = b"%d" % number + POISON + AFTER_NUL
        builder.snapshots[number] = replace(snapshot, id_str=identity, name=POISON), l1
    builder.bitmaps = [
        (replace(bitmap, name=POISON + b"%d" % number, flags=bitmap.flags | 1), table)
        for number, (bitmap, table) in enumerate(builder.bitmaps * 2)
    ]
    image = builder.build()
    rng = random.Random(1)
    for kind in ("leaked-clusters", "lost-l2-table", "low-refcount", "shared-cluster"):
        DAMAGES[kind](image, rng)
    return image


def _lost_snapshot() -> Image:
    builder = sample(size=64 * MIB, cluster_bits=12)
    snapshot, l1 = builder.snapshots[0]
    builder.snapshots[0] = replace(snapshot, id_str=POISON, name=POISON), l1
    image = builder.build()
    image.change_header(nb_snapshots=0)
    return image


def _unknown_features() -> Image:
    builder = ImageBuilder(size=MIB, more_extensions=(_features(),))
    image = builder.build()
    names = len(list(cut(46)))
    image.change_header(incompatible_features=((1 << names) - 1) << 40)
    return image


def _luks(number: int) -> Callable[[], Image]:
    def make() -> Image:
        name = (list(cut(31)) * 2)[number].ljust(32, b"\0")
        field = ("cipher_name", "cipher_mode", "hash_spec")[number % 3]
        header = luks_header(uuid=POISON[:40], **{field: name})
        raw = encode_luks(header).ljust(header.payload_offset * 512, b"k")
        return ImageBuilder(size=MIB, crypt_method=CRYPT_LUKS, luks_header=raw).build()

    return make


def _data_file() -> Image:
    builder = ImageBuilder(size=MIB, data_file=POISON + AFTER_NUL)
    builder.write(0, b"x" * builder.geometry.cluster_size)
    return builder.build()


def _same_bitmaps() -> Image:
    builder = ImageBuilder(size=MIB)
    for _ in range(2):
        builder.add_bitmap("same", {1})
    builder.bitmaps = [(replace(each, name=POISON), table) for each, table in builder.bitmaps]
    return builder.build()


UNREADABLE = "beneath.qcow2"


def _backed() -> Image:
    """By a file whose features have names: see `_unknown_features`."""
    builder = ImageBuilder(size=MIB, backing_file=UNREADABLE.encode(), backing_format=b"qcow2")
    return builder.build()


IMAGES: dict[str, Callable[[], Image]] = {
    "every-name": _every_name,
    "lost-snapshot": _lost_snapshot,
    "unknown-features": _unknown_features,
    **{f"luks-{number}": _luks(number) for number in range(6)},
    "data-file": _data_file,
    "same-bitmaps": _same_bitmaps,
    "backed": _backed,
    "guest": planted_guest,
}
"""By what is planted where."""


# ---- the judge ----


def require_harmless(text: str, where: object, *, tabs: bool = False) -> None:
    """Nothing in *text* but what prints, lines, and *tabs* of a table; and no line forged."""
    allowed = "\n\t" if tabs else "\n"
    bad = sorted(
        {character for character in text if not (character.isprintable() or character in allowed)}
    )
    assert not bad, (where, bad)
    for line in text.split("\n"):
        cells = line.split("\t")
        assert not any(cell.startswith(MARK) for cell in cells), (where, line)


def require_json(text: str, where: object) -> object:
    """The same of JSON, which every reader takes, and which holds no key that it should not."""
    require_harmless(text, where)
    assert text.isascii(), where
    value = json.loads(text, object_pairs_hook=_unforged, parse_constant=_no_constant)
    json.dumps(value, ensure_ascii=False).encode()  # no lone surrogate
    return value


def _unforged(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    assert len(set(keys)) == len(keys), keys
    assert MARK not in keys, keys
    return dict(pairs)


def _no_constant(word: str) -> object:
    raise AssertionError(word)
