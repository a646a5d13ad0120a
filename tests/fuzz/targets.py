"""What is fuzzed: functions from any bytes to nothing, and the seeds that they begin with.

The contract of each: an answer, or one of the errors that its docstring names. Whatever else it
raises is a bug, and so is more than `SECONDS` of processor time or `MEMORY` on a file below
`FILE_BYTES`. How inputs are made up is not known here: atheris, pytest and a person bring them.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from xml.etree import ElementTree as ET

import numpy as np

from instarfs.errors import DOMAIN_ERRORS, UndoFileDamaged
from instarfs.guest.compressed import look_at_packed
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from instarfs.render import bitmaps as render_bitmaps
from instarfs.render import check as render_check
from instarfs.render import clusters as render_clusters
from instarfs.render import explain as render_explain
from instarfs.render import findings as render_findings
from instarfs.render import info as render_info
from instarfs.render import map as render_map
from instarfs.render import repair as render_repair
from instarfs.render import tables as render_tables
from instarfs.render.guest_map import chain_json, map_json
from instarfs.render.report import report_txt
from instarfs.render.triage import triage_json
from instarfs.repair import journal
from instarfs.repair.undo_place import Identity
from planner.arrays import GuestOffset, HostOffset
from planner.check.check import check_image
from planner.check.report import CheckCounters, Report
from planner.errors import ImageError, NotAMapfile, RepairError
from planner.guest.mapfile import BAD, READ, Mapfile, parse_mapfile
from planner.guestfs.btrfs import filesystem as btrfs
from planner.guestfs.ext import filesystem as ext
from planner.guestfs.fat import filesystem as fat
from planner.guestfs.ntfs import filesystem as ntfs
from planner.guestfs.reading import Holes
from planner.guestfs.xfs import filesystem as xfs
from planner.qcow2.bitmaps import read_bitmaps
from planner.qcow2.contents import Contents
from planner.qcow2.extensions import BitmapsPointer
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import bare_header, decode_header
from planner.qcow2.layout import Layout
from planner.qcow2.luks import encode_luks
from planner.qcow2.snapshots import read_reachable_snapshots, read_snapshots
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan, RepairTier, StageKind
from planner.repair.tiers import propose, same_outcome
from planner.source import SECTOR, Bytes, Source, read_bytes
from planner.triage.triage import triage_leaks
from planner.views.bitmap_state import read_bitmap_states
from planner.views.explain import explain_guest, explain_host
from planner.views.host_map import draw_atlas
from planner.views.table_view import read_l1_page, read_l2_page
from tests.fuzz import filesystems
from tests.images.builder import Image as SampleImage
from tests.images.builder import ImageBuilder
from tests.images.damage import DAMAGES, CannotDamageError
from tests.images.luks_headers import luks_header
from tests.planner.sources import Sparse
from tests.undo_files import encoded

SECONDS = 2.0
MEMORY = 256 << 20
FILE_BYTES = 1 << 20

SHOWN_BYTES = 1 << 20
"""So much of a rendered file is read: longer ones stream."""

NAME = "image\n\x1b[31m.qcow2"


@dataclass(frozen=True, slots=True)
class Target:
    """Something to fuzz."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


# ---- images ----


def header(data: bytes) -> None:
    """What an image says of itself, shown. Refuses with `ImageError`."""
    source, facts = Bytes(data), render_info.ImageFacts(NAME, len(data), len(data))
    bare = bare_header(source)
    try:
        layout = Layout.read(source)
    except ImageError as error:
        json.loads(render_info.info_error_json(error, facts))
        json.loads(render_info.header_error_json(error, bare))
        return
    json.loads(render_info.header_json(layout))
    contents = Contents.read(source)
    json.loads(b"".join(render_info.info_json(contents, facts)))
    _require_printable(b"".join(render_info.info_human(contents, facts)))


def snapshots(data: bytes) -> None:
    """A snapshot table behind how many entries it is said to have. Refuses with `ImageError`."""
    count, table = int.from_bytes(data[:4], "big"), data[4:]
    header = replace(decode_header(bytes(104)), nb_snapshots=count, snapshots_offset=512)
    geometry = Geometry(3, 9, 4, 1 << 30, False, False)
    source = Bytes(bytes(512) + table)
    with suppress(ImageError):
        assert len(read_snapshots(source, header, geometry).snapshots) == count
    with suppress(ImageError):
        found, error = read_reachable_snapshots(source, header, geometry)
        assert error is not None or len(found.snapshots) == count


def bitmaps(data: bytes) -> None:
    """A bitmap directory behind how many bitmaps it is said to have. Refuses with `ImageError`."""
    count, directory = int.from_bytes(data[:4], "big"), data[4:]
    pointer = BitmapsPointer(count, len(directory), 512)
    geometry = Geometry(3, 9, 4, 1 << 20, False, False)
    with suppress(ImageError):
        assert len(read_bitmaps(Bytes(bytes(512) + directory), pointer, geometry)) == count


def check(data: bytes) -> None:
    """The check of an image, with its data, and every file that shows it. Refuses nothing."""
    source = Bytes(data)
    report = check_image(source)
    _show_check(report)
    with_data = look_at_packed(source, report)
    if with_data.counts() != report.counts():
        _show_check(with_data)


def sparse(data: bytes) -> None:
    """The check of an image whose file is as long as its last eight bytes say, a hole behind."""
    size = int.from_bytes(data[-8:], "big") >> 1
    check_image(Sparse.of(data[:-8], max(size, len(data)), block=4096))


def atlas(data: bytes) -> None:
    """Who uses what, listed and drawn: of every cluster, and in numbers that agree.

    Refuses with `ImageError`.
    """
    source = Bytes(data)
    report = check_image(source)
    try:
        drawn = draw_atlas(source, report)
    except ImageError as error:
        assert report.error is not None
        ET.fromstring(render_map.map_svg(error, NAME))  # noqa: S314 - our own
        _shown(render_clusters.clusters_tsv(error))
        return
    runs = list(drawn.runs())
    total = sum(int(part.length.sum()) for part in runs)
    assert total >= drawn.layout.host_clusters << drawn.layout.geometry.cluster_bits
    assert sum(drawn.totals().values()) == total
    for kind, number in report.totals.items():
        mine = [
            part.length[(part.findings >> np.uint64(kind)) & np.uint64(1) != 0] for part in runs
        ]
        counted = sum(int(length.sum()) for length in mine)
        assert counted == number << drawn.layout.geometry.cluster_bits
    _require_printable(_shown(render_clusters.clusters_tsv(drawn)).replace(b"\t", b""))
    ET.fromstring(render_map.map_svg(drawn, NAME))  # noqa: S314 - our own


def tables(data: bytes) -> None:
    """The active tables entry by entry, bitmaps, and a few offsets explained.

    Refuses with `ImageError`.
    """
    source = Bytes(data)
    with suppress(ImageError):
        page = read_l1_page(source)
        _shown(render_tables.l1_tsv(page))
        for index in page.in_use[:3].tolist():
            _shown(render_tables.l2_tsv(read_l2_page(source, index)))
        states = read_bitmap_states(source)
        json.loads(b"".join(render_bitmaps.bitmaps_json(states, is_written=False)))
    rng = random.Random(data)
    host = rng.choice((0, len(data), rng.randrange(1 << 20), (1 << 64) - 1))
    guest = rng.choice((0, rng.randrange(1 << 18), 1 << 63))
    with suppress(ImageError):
        found = explain_host(source, HostOffset(host))
        _require_printable(render_explain.host_txt(found, host, None))
    with suppress(ImageError):
        way = explain_guest(source, GuestOffset(guest))
        _require_printable(render_explain.guest_txt(way, guest, None))


def triage(data: bytes) -> None:
    """What the leaked clusters look like. Refuses nothing."""
    source = Bytes(data)
    report = check_image(source)
    if report.error is None:
        json.loads(_shown(triage_json(triage_leaks(source, report), report, NAME)))


def guest(data: bytes) -> None:
    """The guest's bytes, of the disk and of a snapshot, and its map. Refuses with domain errors."""
    for strict in (False, True):
        _read_guest(data, strict=strict)


def _read_guest(data: bytes, *, strict: bool) -> None:
    with _image_of(data) as image, suppress(*DOMAIN_ERRORS):
        opened = Guest(image, Follow(), strict=strict)
        json.loads(_shown(chain_json(opened.members)))
        for place in (Place(Part.DISK), Place(Part.SNAPSHOT), Place(Part.VMSTATE)):
            with suppress(*DOMAIN_ERRORS):
                disk = opened.find(place)
                for offset in (0, 4097, disk.size // 2, max(0, disk.size - 5000)):
                    with suppress(*DOMAIN_ERRORS):
                        content = disk.read(offset, 9000)
                        assert len(content) == max(0, min(9000, disk.size - offset))
        _shown(map_json(opened.extents(), opened.members))


def mapfile(data: bytes) -> None:
    """The list beside a copy, which comes again as it was. Refuses with `NotAMapfile`."""
    with suppress(NotAMapfile):
        found = parse_mapfile(data)
        again = parse_mapfile(b"".join(found.render()))
        assert (again.size, again.position) == (found.size, found.position)
        assert again.blocks(READ) == found.blocks(READ)
        assert again.blocks(BAD) == found.blocks(BAD)


def _image_of(data: bytes) -> AbstractContextManager[Image]:
    """A file with *data* in it that has no name."""
    fd = os.memfd_create("image")
    os.write(fd, data)
    return Image(NAME, fd, os.open("/", os.O_PATH | os.O_DIRECTORY), is_device=False)


def plan(data: bytes) -> None:
    """Both tiers' plans, laid over the image, taken back, shown. Refuse with `RepairError`."""
    source = Bytes(data)
    report = check_image(source)
    for tier in RepairTier:
        try:
            proposal = propose(source, report, tier)
        except RepairError as error:
            json.loads(_shown(render_repair.refusal_json(error, tier, NAME)))
            continue
        after = _laid(source, proposal.plan)
        assert same_outcome(check_image(after), proposal.after)
        assert _laid(after, proposal.plan.inverse()).data == data
        _shown(render_repair.plan_json(proposal, NAME))
        _require_printable(_shown(render_repair.plan_human(proposal, NAME)))


def _laid(source: Source, plan: Plan) -> Bytes:
    """The file as it is when *plan* has been written."""
    return Bytes(read_bytes(Overlay(source, plan), 0, plan.size_after))


def _show_check(report: Report) -> None:
    result = json.loads(_shown(render_check.result_json(report, NAME)))
    assert result["verdict"] == report.verdict
    assert len(render_check.result_bin(report)) == 80
    _require_printable(_shown(report_txt(report, NAME)))
    _require_printable(_shown(render_check.check_human(report)))
    _require_printable("\n".join(itertools.islice(render_check.check_messages(report), 1000)))
    for render in (
        render_check.leaks_tsv,
        render_check.corruptions_tsv,
        render_check.refcounts_tsv,
        render_findings.findings_jsonl,
    ):
        _require_printable(_shown(render(report)).replace(b"\t", b""))


def _shown(content: bytes | str | Iterable[bytes]) -> bytes:
    """A rendered file, or the beginning of one that streams."""
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, bytes):
        return content
    beginning = io.BytesIO()
    for part in content:
        if beginning.write(part) and beginning.tell() >= SHOWN_BYTES:
            break
    return beginning.getvalue()


def _require_printable(text: bytes | str) -> None:
    """No terminal obeys what comes from an image."""
    decoded = text.decode() if isinstance(text, bytes) else text
    assert decoded.replace("\n", "").isprintable()


# ---- undo files ----


def undo_file(data: bytes) -> None:
    """An undo file. Refuses with `UndoFileDamaged`."""
    for raw in (data, _sealed(data)):

        def read(offset: int, length: int, raw: bytes = raw) -> bytes:
            return raw[offset : offset + length]

        with suppress(UndoFileDamaged):
            found = journal.decode_summary(read, len(raw), "undo")
            if found is not None:
                _require_printable(found[0].plan_id)
        with suppress(UndoFileDamaged):
            status = journal.decode_word(raw[: journal.BODY_AT], len(raw), "undo")
            while status.depth:
                record, below = journal.decode_record(read, status, "undo")
                assert below.end < status.end
                pieces = b"".join(map(bytes, journal.encode_record(record, below)))
                again = journal.decode_record(
                    lambda at, length, p=pieces, top=status.top: p[at - top : at - top + length],  # type: ignore[misc]
                    status,
                    "undo",
                )
                assert again == (record, below)
                Overlay(Bytes(bytes(SECTOR)), record.plan.inverse()).read_into(
                    0, memoryview(bytearray(SECTOR))
                )
                status = below


def _sealed(data: bytes) -> bytes:
    """*data* with the magic and the checksums that it lacks, so that what they guard is reached."""
    raw = bytearray(data.ljust(journal.BODY_AT, b"\0"))
    fixed = journal.MAGIC + journal.VERSION
    raw[: len(fixed)] = fixed
    for at in range(journal.SLOTS_AT, journal.BODY_AT, SECTOR):
        to = at + journal.WORD.sizeof()
        top = journal.WORD.parse(bytes(raw[at:to])).top
        if journal.BODY_AT <= top <= len(raw) - SECTOR:
            _seal_record(raw, top)
        raw[to : to + 4] = zlib.crc32(raw[at:to]).to_bytes(4, "little")
    return bytes(raw)


def _seal_record(raw: bytearray, top: int) -> None:
    """Give the record at *top* the checksums, and its plan the id, that it has."""
    length = journal.HEADER.sizeof()
    found = journal.HEADER.parse(bytes(raw[top : top + length]))
    found.magic = journal.RECORD_MAGIC
    size = sum(found.sectors) * (8 + 2 * SECTOR)
    body = memoryview(bytes(raw))[top + SECTOR : top + SECTOR + size]
    found.body_digest = journal.digest_of(body)
    with suppress(ValueError):
        tier = RepairTier(found.tier.rstrip(b"\0").decode("ascii"))
        if len(body) == size:
            stages = tuple(journal._stages(body, found.sectors))
            named = Plan(tier, stages, found.size_before, found.size_after)
            found.plan_id = named.id.encode()
    header: bytes = journal.HEADER.build(found)
    raw[top : top + length + journal.DIGEST_LENGTH] = header + journal.digest_of(header)


# ---- seeds ----


def _small_images() -> Iterator[ImageBuilder]:
    """One of every feature, with clusters as small as it allows."""
    build = partial(ImageBuilder, cluster_bits=9, size=200 * 512)
    yield build()
    yield build(version=2)
    yield from (build(refcount_order=order) for order in (0, 2, 3, 6))
    yield ImageBuilder(cluster_bits=14, size=40 << 14, extended_l2=True)
    yield build(lazy_refcounts=True)
    yield build(zstd=True)
    yield build(data_file=b"data.raw")
    yield build(data_file=b"data.raw", data_file_raw=True)
    yield build(backing_file=b"json:{}", backing_format=b"qcow2")
    yield ImageBuilder(
        cluster_bits=12, size=1 << 20, crypt_method=2, luks_header=encode_luks(luks_header())
    )
    yield build(more_extensions=((0x12345678, b"unknown"),))


@cache
def _images() -> tuple[SampleImage, ...]:
    found = []
    for builder in _small_images():
        external, wide = builder.geometry.external_data, builder.geometry.refcount_order > 0
        size = builder.geometry.cluster_size
        for cluster in (0, 1, 2, 5, 80):
            if cluster < builder.geometry.guest_clusters:
                builder.write(cluster, b"%d" % cluster * 10)
        builder.write_zeros(3)
        builder.write_zeros(4, allocated=True)
        if not external and wide:
            builder.write_compressed(6, b"a" * size)
            builder.write_compressed(7, b"b" * size)
        if not external and wide and not builder.luks_header:
            builder.take_snapshot("one")
            builder.write(1, b"new")
            builder.take_snapshot("two\x1b[31m")
        if builder.geometry.version == 3 and not external:
            builder.add_bitmap("bitmap", {0, 3}, granularity_bits=9)
        found.append(builder.build())
    return tuple(found)


def _image_seeds() -> Iterator[bytes]:
    for image in _images():
        yield bytes(image.data)
    for number, image in enumerate(_images()[:7]):
        for name, damage in DAMAGES.items():
            damaged = SampleImage(bytearray(image.data), image.data_file)
            with suppress(CannotDamageError):
                damage(damaged, random.Random(f"{number} {name}"))
                yield bytes(damaged.data)


def _header_seeds() -> Iterator[bytes]:
    """The first clusters hold all that is not a table."""
    return (seed[: 8 << 10] for seed in _image_seeds())


def _snapshot_seeds() -> Iterator[bytes]:
    for image in _images():
        header = image.header
        if header.nb_snapshots:
            table = image.data[header.snapshots_offset :][:1024]
            yield header.nb_snapshots.to_bytes(4, "big") + bytes(table)
    yield b"\0\1\0\0"


def _bitmap_seeds() -> Iterator[bytes]:
    for image in _images():
        pointer = Layout.read(image.source).extensions.bitmaps
        if pointer is not None:
            start, size = pointer.bitmap_directory_offset, pointer.bitmap_directory_size
            yield pointer.nb_bitmaps.to_bytes(4, "big") + bytes(image.data[start : start + size])


def _sparse_seeds() -> Iterator[bytes]:
    sizes = itertools.cycle([1 << 20, 1 << 31, 1 << 45, (1 << 64) - 2])
    for seed, size in zip(_image_seeds(), sizes, strict=False):
        yield seed + size.to_bytes(8, "big")


def _undo_seeds() -> Iterator[bytes]:
    for image in _images()[:3]:
        draft = Draft(Bytes(bytes(image.data)))
        for kind in StageKind:
            draft.write(kind, 512 * int(kind) + 7, b"changed")
        draft.size += 512
        for tier in RepairTier:
            identity = Identity(1, 2)
            record = journal.Record(draft.plan(tier), bytes(32), CheckCounters(leaks=3), identity)
            for records in ([record], [record, record]):
                whole = encoded(*records)
                yield from (whole, whole[: journal.BODY_AT], whole[: len(whole) // 2])


def _mapfile_seeds() -> Iterator[bytes]:
    """Of a copy that has come to everything, and one by hand."""
    blocks = [(0, 1 << 20, READ), (1 << 20, 1 << 21, BAD)]
    listed = Mapfile.untried(1 << 30, ("of a copy",)).overlaid(blocks)
    yield b"".join(listed.render())
    yield b"0 ? 1\n0 0x8 +\n0x8 0x200 * # by hand\n"


FILE_SYSTEMS = {
    "ext": ext.recognise,
    "xfs": xfs.recognise,
    "ntfs": ntfs.recognise,
    "fat": fat.recognise,
    "exfat": fat.recognise_exfat,
    "btrfs": btrfs.recognise,
}


def file_system(name: str, data: bytes) -> None:
    """A file system on a guest's disk, asked for all there is. Refuses nothing."""
    filesystems.walk(FILE_SYSTEMS[name](Holes(filesystems.disk_of(data))))


TARGETS = {
    "header": Target(header, _header_seeds),
    "snapshots": Target(snapshots, _snapshot_seeds),
    "bitmaps": Target(bitmaps, _bitmap_seeds),
    "check": Target(check, _image_seeds),
    "atlas": Target(atlas, _image_seeds),
    "tables": Target(tables, _image_seeds),
    "sparse": Target(sparse, _sparse_seeds),
    "triage": Target(triage, _image_seeds),
    "guest": Target(guest, _image_seeds),
    "plan": Target(plan, _image_seeds),
    "undo-file": Target(undo_file, _undo_seeds),
    "mapfile": Target(mapfile, _mapfile_seeds),
} | {
    name: Target(partial(file_system, name), partial(filesystems.seeds, name))
    for name in FILE_SYSTEMS
}
