"""What the mounted tree looks like, here and only here: every name, and what stands behind it.

What a file contains is made in `instarfs.render`, when it is computed is up to the inspector.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from instarfs import render
from instarfs.guest.place import Part, Place
from instarfs.image.file import WouldBlock
from instarfs.inspect.inspector import Inspector
from instarfs.inspect.leaked_runs import LostRuns
from instarfs.inspect.subject import Subject
from instarfs.mount.controls import Controls
from instarfs.mount.mountpoint import DAEMON_FILE, identity
from instarfs.mount.nodes import (
    Brief,
    BriefContent,
    DataFile,
    DeferredDirectory,
    DeferredFile,
    Directory,
    File,
    FixedDirectory,
    GeneratedFile,
    LiveFile,
    MadeDirectory,
    Node,
)
from instarfs.mount.operations import Facts
from instarfs.render.limits import LISTED_RUNS
from instarfs.text import printable
from planner.arrays import GuestOffset, HostOffset
from planner.errors import ImageError, RepairError
from planner.repair.plan import RepairTier
from planner.source import read_present

if TYPE_CHECKING:  # what a mount loads once it answers
    from instarfs.guest.guest import Guest
    from instarfs.inspect.leaked_tables import LostTables
    from instarfs.inspect.values import Briefing, Checkup, Description
    from instarfs.render.aftermath import Mounted
    from instarfs.render.rescue import Rescued
    from planner.check.report import Report
    from planner.repair.plan import Plan
    from planner.repair.tiers import Proposal

_NUMBER = re.compile(r"[0-9]{1,20}|0[xX][0-9a-fA-F]{1,16}")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A node of the tree: its path, what it is in one line, and what stands behind it.

    ``node``: None for a name that the directory of another entry has. ``shown``: what README.txt
    calls a directory whose names are made as they are asked for.
    """

    path: str
    what: str
    node: Node | None
    shown: str = ""


def build_tree(
    inspector: Inspector,
    *,
    read_only: bool = False,
    keeps_undo: bool = True,
    mountpoint: str = "",
    preview: Plan | None = None,
    rescued: Rescued | None = None,
) -> Directory:
    """The root directory of the mount of one image; *read_only*: one that does not repair.

    For the commands that are told to a reader: *mountpoint*, where it will be, and *keeps_undo*,
    whether its repairs can be taken back. *preview*: the plan that is laid over the image; then
    there is nothing to repair it with. *rescued*: what there is to say of it, if it is a rescue.
    """

    def mounted() -> Mounted:
        return render.aftermath.Mounted(mountpoint, not read_only, keeps_undo, preview)

    controls = Controls(inspector, read_only=read_only)
    entries = [
        _image_file(inspector),
        *_guest_files(inspector),
        *_image_files(inspector),
        *_table_files(inspector),
        *_explain_files(inspector),
        *_result_files(inspector, preview),
        *_check_files(inspector, mounted),
        *_lost_files(inspector),
        *(_rescue_files(inspector, rescued) if rescued is not None else ()),
        *(_repair_files(inspector, controls) if preview is None else ()),
    ]
    readme = LiveFile(lambda: _readme(inspector.subject.path, entries, preview))
    nodes: list[tuple[list[str], Node]] = [(["README.txt"], readme)]
    nodes += ((entry.path.split("/"), entry.node) for entry in entries if entry.node is not None)
    claim = identity()
    return _directory(nodes, {DAEMON_FILE: LiveFile(lambda: claim)})


def _directory(
    nodes: Iterable[tuple[list[str], Node]], unlisted: Mapping[str, Node] | None = None
) -> Directory:
    """The directory of *nodes*, each with the names that lead to it, in their order."""
    children: dict[str, Node] = {}
    below: dict[str, list[tuple[list[str], Node]]] = {}
    for (name, *rest), node in nodes:
        if rest:
            below.setdefault(name, []).append((rest, node))
        else:
            children[name] = node
    children |= {name: _directory(inside) for name, inside in below.items()}
    return FixedDirectory(children, unlisted)


def facts(subject: Subject) -> Facts:
    """The size and time that the mount shows: those of the image."""
    generation = subject.generation()
    is_settled = generation.is_settled(time.time_ns())
    return Facts(generation.size, generation.mtime_ns, is_settled=is_settled)


# ---- the image itself ----


def _image_file(inspector: Inspector) -> _Entry:
    subject = inspector.subject

    def at_hand(offset: int, size: int) -> bytes | None:
        image = subject.image
        if not image.answers_at_once:
            return None
        try:
            return read_present(image.source(wait=False), offset, size)
        except WouldBlock:
            return None

    async def read(offset: int, size: int) -> bytes:
        await subject.attend()
        return await trio.to_thread.run_sync(
            read_present, subject.source(), offset, size, abandon_on_cancel=True
        )

    def allocated() -> int | None:
        image = subject.image
        return image.allocated_size() if image.answers_at_once else None

    return _Entry(
        "image.qcow2",
        "the bytes of the image itself, as this mount shows it: for qemu-img, or to copy",
        DataFile(
            lambda: subject.generation().size,
            read,
            subject.state,
            at_hand,
            allocated=allocated,
        ),
    )


# ---- the guest's bytes ----


_SNAPSHOT_NAME_SECONDS = 1.0
"""A snapshot's number stands for what it is in the image now, and opening its files says what that
is: for a listing of very many the kernel need not ask of each, again and again."""


def _guest_files(inspector: Inspector) -> list[_Entry]:
    # Listing them makes a node of each snapshot, which is to be a small one.
    files = partial(_snapshot_files, inspector)
    return [
        _Entry(
            "disk.raw",
            "the guest's disk as QEMU reads it; can be loop-mounted, read-only",
            _data_file(
                inspector,
                Place(Part.DISK),
                inspector.subject.disk_size,
                inspector.subject.learn_disk_size,
            ),
        ),
        _Entry(
            "snapshots",
            "for each internal snapshot info.json, disk.raw, vmstate.raw if there is any, and"
            " files.tsv, as in check/",
            MadeDirectory(
                partial(_snapshot, inspector, files),
                partial(_snapshot_names, inspector),
                make_listed=partial(_known_snapshot, inspector, files),
                name_seconds=_SNAPSHOT_NAME_SECONDS,
            ),
            shown="snapshots/N/",
        ),
    ]


def _data_file(
    inspector: Inspector,
    place: Place,
    size: Callable[[], int],
    learn_size: Callable[[], Awaitable[None]] | None = None,
) -> DataFile:
    reader, allocated = inspector.reader, inspector.allocated
    read, ready = partial(reader.read, place), partial(reader.ready, place)
    known = partial(allocated.known, place)

    async def learn() -> None:
        await reader.refresh()  # the kernel keeps what it has read while its state is the same
        await allocated.learn(place)

    return DataFile(
        size, read, reader.state, ready, allocated=known, learn=learn, learn_length=learn_size
    )


async def _snapshot_names(inspector: Inspector) -> list[str]:
    await inspector.description.get()
    return [str(index) for index in range(len(inspector.snapshots()))]


_FilesOfSnapshot = Callable[[int], dict[str, Callable[[], File | Brief]]]


async def _snapshot(inspector: Inspector, files: _FilesOfSnapshot, name: str) -> Directory | None:
    await inspector.description.get()
    return _known_snapshot(inspector, files, name)


def _known_snapshot(inspector: Inspector, files: _FilesOfSnapshot, name: str) -> Directory | None:
    """The same as the image was when it was last described."""
    index = _number(name)
    # As it is listed, and no other way. There may be 65,536 of them, each of which is asked for.
    if index is None or str(index) != name or index >= len(inspector.snapshots()):
        return None
    return DeferredDirectory(files, index, name_seconds=_SNAPSHOT_NAME_SECONDS)


def _snapshot_files(inspector: Inspector, index: int) -> dict[str, Callable[[], File | Brief]]:
    """What makes each of the files of a snapshot: of very many only some are ever looked at."""

    def data(part: Part) -> File:
        place = Place(part, index)
        return _data_file(inspector, place, partial(inspector.snapshot_size, place))

    def info() -> Brief:
        return BriefContent(
            inspector.description, lambda it: render.info.snapshot_json(it.contents, index)
        )

    def hit() -> File:
        found = inspector.files_of(Place(Part.SNAPSHOT, index))
        return GeneratedFile(found, lambda it: render.files.files_tsv(it))

    makers: dict[str, Callable[[], File | Brief]] = {
        "info.json": info,
        "disk.raw": partial(data, Part.SNAPSHOT),
        "files.tsv": hit,
    }
    if inspector.snapshot_size(Place(Part.VMSTATE, index)):
        makers["vmstate.raw"] = partial(data, Part.VMSTATE)
    return makers


# ---- image/ ----


def _image_files(inspector: Inspector) -> list[_Entry]:
    def info(description: Description) -> bytes | Iterator[bytes]:
        known = render.info.ImageFacts(
            inspector.subject.path, description.file_size, description.allocated_size
        )
        if isinstance(description.contents, ImageError):
            return render.info.info_error_json(description.contents, known)
        return render.info.mounted_info_json(description.contents, known)

    def header(description: Description) -> bytes:
        if isinstance(description.contents, ImageError):
            return render.info.header_error_json(description.contents, description.header)
        return render.info.header_json(description.contents.layout)

    def chain(guest: Guest | ImageError) -> bytes:
        if isinstance(guest, ImageError):
            return render.info.error_json(guest)
        return render.guest_map.chain_json(guest.members)

    return [
        _Entry(
            "image/info.json",
            "what `qemu-img info --output=json` says of it, under the same keys",
            GeneratedFile(inspector.description, info),
        ),
        _Entry(
            "image/chain.json",
            "the files that the image names, and theirs: opened, or why not; see --follow",
            GeneratedFile(inspector.guest, chain),
        ),
        _Entry(
            "image/map.json",
            "what `qemu-img map --output=json` says: where each part of the disk is read from",
            GeneratedFile(inspector.guest, _map, _map_length),
        ),
        _Entry(
            "image/header.json",
            "every header field and extension, decoded; unknown ones as hex",
            GeneratedFile(inspector.description, header),
        ),
        _Entry(
            "image/bitmaps.json",
            "persistent bitmaps: what is dirty in each, and what is wrong with it",
            GeneratedFile(
                inspector.bitmaps,
                lambda it: render.bitmaps.bitmaps_json(it.states, is_written=it.is_written),
            ),
        ),
        _Entry(
            "image/map.svg",
            "a picture of the host file: what each part is used for, leaks, damage",
            GeneratedFile(
                inspector.atlas, lambda atlas: render.map.map_svg(atlas, inspector.subject.path)
            ),
        ),
    ]


def _map(guest: Guest | ImageError) -> bytes | Iterator[bytes]:
    if isinstance(guest, ImageError):
        return render.info.error_json(guest)
    return render.guest_map.map_json(guest.extents(), guest.members)


def _map_length(guest: Guest | ImageError) -> int:
    if isinstance(guest, ImageError):
        return len(render.info.error_json(guest))
    return render.guest_map.map_json_length(guest.extents(), guest.members)


# ---- tables/ ----


def _table_files(inspector: Inspector) -> list[_Entry]:
    async def in_use() -> list[str]:
        page = (await inspector.l1_page.get()).value
        return [] if isinstance(page, ImageError) else [f"{n}.tsv" for n in page.in_use.tolist()]

    async def l2_table(name: str) -> Node | None:
        number, l1 = _number(name.removesuffix(".tsv")), (await inspector.l1_page.get()).value
        if number is None or name != f"{number}.tsv":
            return None
        if isinstance(l1, ImageError) or not l1.leads(number):
            return None
        return DeferredFile(partial(_l2_file, inspector, number))

    return [
        _Entry(
            "tables/l1.tsv",
            "the active L1 table: where its L2 tables are, and what is wrong with its entries",
            GeneratedFile(inspector.l1_page, lambda it: render.tables.l1_tsv(it)),
        ),
        _Entry(
            "tables/l2",
            "the L2 table of each L1 entry in use, entry by entry",
            MadeDirectory(l2_table, in_use),
            shown="tables/l2/N.tsv",
        ),
        _Entry(
            "tables/clusters.tsv",
            "every run of the host file: its owner, refcount, references, what was found there",
            GeneratedFile(
                inspector.atlas,
                lambda it: render.clusters.clusters_tsv(it),
                lambda it: render.clusters.clusters_tsv_length(it),
            ),
        ),
    ]


def _l2_file(inspector: Inspector, number: int) -> File:
    return GeneratedFile(inspector.l2_page(number), lambda it: render.tables.l2_tsv(it))


def _number(text: str) -> int | None:
    """A decimal number, or a hexadecimal one with ``0x``, of at most 64 bits; None: it is none."""
    if not _NUMBER.fullmatch(text):
        return None
    number = int(text, 16 if text[:2] in ("0x", "0X") else 10)
    return number if number < 1 << 64 else None


# ---- explain/ ----


def _explain_files(inspector: Inspector) -> list[_Entry]:
    def report() -> Report | None:
        checkup = inspector.checkup.peek()
        return checkup.value.report if checkup else None

    async def host(name: str) -> Node | None:
        number = _number(name)
        if number is None:
            return None
        offset = HostOffset(number)
        return GeneratedFile(
            inspector.host_byte(offset), lambda it: render.explain.host_txt(it, offset, report())
        )

    async def guest(name: str) -> Node | None:
        number = _number(name)
        if number is None:
            return None
        offset = GuestOffset(number)
        return GeneratedFile(
            inspector.guest_byte(offset),
            lambda it: render.explain.guest_txt(it.way, offset, report(), it.owner),
        )

    return [
        _Entry(
            "explain/host",
            "what a byte of the image file is used for; OFFSET is decimal, or begins with 0x",
            MadeDirectory(host),
            shown="explain/host/OFFSET",
        ),
        _Entry(
            "explain/guest",
            "where a byte of the guest's disk is: the way through the tables to it, and its file",
            MadeDirectory(guest),
            shown="explain/guest/OFFSET",
        ),
    ]


# ---- check/ ----


def _check_files(inspector: Inspector, mounted: Callable[[], Mounted]) -> list[_Entry]:
    def report(it: Briefing) -> bytes:
        checkup = it.checkup
        known = render.aftermath.Aftermath(
            it.triage,
            it.proposals,
            checkup.pending,
            mounted(),
            it.surroundings,
            it.beside,
            checkup.gone,
            it.files,
        )
        return render.report.report_txt(checkup.report, inspector.subject.path, known)

    def progress() -> bytes:
        return f"{inspector.progress()}\n".encode()

    return [
        _Entry(
            "check/files.tsv",
            "which files of the guest are hit: a row a piece of one, or of free space",
            GeneratedFile(inspector.files, lambda it: render.files.files_tsv(it)),
        ),
        _Entry(
            "check/report.txt",
            "the same for a reader: what is wrong, what it means, and what to do about it",
            GeneratedFile(inspector.briefing, report),
        ),
        _Entry(
            "check/progress",
            "how far a check is, or what follows from it: `idle`, or its stage and percentage",
            LiveFile(progress),
        ),
    ]


def _result_files(inspector: Inspector, preview: Plan | None) -> list[_Entry]:
    """What the check alone has found, as `qemu-img check` says it and finding by finding."""

    def entry(
        name: str,
        what: str,
        show: Callable[[Checkup], bytes | Iterable[bytes]],
        length: Callable[[Checkup], int] | None = None,
    ) -> _Entry:
        return _Entry(f"check/{name}", what, GeneratedFile(inspector.checkup, show, length))

    def result(it: Checkup) -> bytes:
        return render.check.result_json(
            it.report,
            inspector.subject.path,
            it.repaired,
            it.pending,
            gone=it.gone,
            preview=preview,
        )

    return [
        entry(
            "result.json",
            "the result under the keys of `qemu-img check --output=json`, and a verdict",
            result,
        ),
        entry(
            "result.bin",
            "the same as a CheckResult, 80 bytes",
            lambda it: render.check.result_bin(it.report, it.repaired),
        ),
        entry(
            "leaks",
            "clusters that are counted as used and that nothing refers to",
            lambda it: render.check.leaks_tsv(it.report),
            lambda it: render.check.leaks_tsv_length(it.report),
        ),
        entry(
            "corruptions",
            "what is, or may become, wrong data",
            lambda it: render.check.corruptions_tsv(it.report),
            lambda it: render.check.corruptions_tsv_length(it.report),
        ),
        entry(
            "refcounts",
            "reference counts that differ from the references",
            lambda it: render.check.refcounts_tsv(it.report),
            lambda it: render.check.refcounts_tsv_length(it.report),
        ),
        entry(
            "findings.jsonl",
            "all findings, one JSON object a line",
            lambda it: render.findings.findings_jsonl(it.report),
            lambda it: render.findings.findings_jsonl_length(it.report),
        ),
    ]


# ---- lost/ ----


def _lost_files(inspector: Inspector) -> list[_Entry]:
    runs = LostRuns(inspector.last_check, inspector.subject.source)

    async def listed() -> Sequence[str]:
        return [str(offset) for offset in await runs.offsets(LISTED_RUNS)]

    async def make(name: str) -> Node | None:
        offset = _offset(name)
        run = await runs.find(offset) if offset >= 0 else None
        if run is None:
            return None
        return DataFile(lambda: run.length, partial(runs.read, run), inspector.subject.state)

    triage = GeneratedFile(
        inspector.leaks,
        lambda it: render.triage.triage_json(it.triage, it.report, inspector.subject.path),
    )
    return [
        _Entry("lost/triage.json", "what the leaked clusters look like, and what looks lost", None),
        _Entry(
            "lost",
            "the bytes of a run of leaked clusters, by its host offset, once a check has run;"
            f" a listing shows the first {LISTED_RUNS}",
            MadeDirectory(
                make,
                listed,
                {
                    "triage.json": triage,
                    **_lost_tables(inspector),
                },
            ),
            shown="lost/OFFSET",
        ),
        _Entry(
            "lost/l2",
            "the part of a disk that a lost L2 table maps, by its host offset, once triage.json or"
            " check/report.txt was read",
            None,
            shown="lost/l2/OFFSET.raw",
        ),
        _Entry(
            "lost/snapshots",
            "the disk of a lost L1 table, as of a deleted snapshot: likewise",
            None,
            shown="lost/snapshots/OFFSET/disk.raw",
        ),
    ]


def _lost_tables(inspector: Inspector) -> dict[str, Node]:
    """The directories of what lost tables lead to, one for each kind of table."""

    def tables() -> LostTables:
        from instarfs.inspect.leaked_tables import LostTables  # noqa: PLC0415

        return LostTables(inspector.last_leaks)

    async def l2_table(name: str) -> Node | None:
        offset = _offset(name.removesuffix(".raw")) if name.endswith(".raw") else -1
        place = tables().l2_table(offset)
        return None if place is None else _lost_disk(inspector, place)

    async def l2_tables() -> Sequence[str]:
        return [f"{offset}.raw" for offset in tables().l2_tables(LISTED_RUNS)]

    async def snapshot(name: str) -> Node | None:
        place = tables().snapshot(_offset(name))
        if place is None:
            return None
        return FixedDirectory({"disk.raw": _lost_disk(inspector, place)})

    async def snapshots() -> Sequence[str]:
        return [str(offset) for offset in tables().snapshots(LISTED_RUNS)]

    return {
        "l2": MadeDirectory(l2_table, l2_tables),
        "snapshots": MadeDirectory(snapshot, snapshots),
    }


def _lost_disk(inspector: Inspector, place: Place) -> DataFile:
    """What a table maps that nothing leads to; always read in a thread, with its tables."""
    reader, allocated = inspector.reader, inspector.allocated
    return DataFile(
        lambda: place.size,
        partial(reader.read, place),
        reader.state,
        allocated=partial(allocated.known, place),
        learn=partial(allocated.learn, place),
    )


def _offset(name: str) -> int:
    """The number that *name* is in decimal, the one way that it is listed; -1 where it is none."""
    is_one = name.isascii() and name.isdecimal() and str(int(name)) == name
    return int(name) if is_one else -1


# ---- rescue/ ----


def _rescue_files(inspector: Inspector, rescued: Rescued) -> list[_Entry]:
    def file(content: Callable[[], bytes | Iterator[bytes]]) -> File:
        # It is of the image that was looked at, and of no other.
        seen = inspector.look(lambda _source: None, is_kept=True)
        return GeneratedFile(seen, lambda _: content())

    return [
        _Entry(
            "rescue/report.txt",
            "what was lost, what is put back, and why that is believed",
            file(lambda: rescued.report),
        ),
        _Entry(
            "rescue/placements.tsv",
            "every L2 table that no entry leads to: where it belongs, and what says so",
            file(lambda: render.rescue.placements_tsv(rescued.placements)),
        ),
        _Entry(
            "rescue/plan.json",
            "the same as `instarfs rescue --output json`",
            file(rescued.plan),
        ),
    ]


# ---- repair/ ----


def _repair_files(inspector: Inspector, controls: Controls) -> list[_Entry]:
    def plan(tier: RepairTier, proposal: Proposal | RepairError) -> bytes | Iterator[bytes]:
        if isinstance(proposal, RepairError):
            return render.repair.refusal_json(proposal, tier, inspector.subject.path)
        return render.repair.plan_json(proposal, inspector.subject.path)

    def result() -> bytes:
        outcome, pending = inspector.repairs.outcome, inspector.subject.pending()
        return render.repair.outcome_json(outcome, inspector.subject.path, pending)

    def progress() -> bytes:
        return f"{inspector.repair_progress()}\n".encode()

    return [
        _Entry(
            "repair/tier",
            "write `leaks` or `all` to repair, or with the id of a plan `split`, `bitmaps` or"
            " `snapshots`, which a person chooses; shows the tier last applied, in brackets",
            controls.tier_file(),
        ),
        *(
            _Entry(
                f"repair/plan/{tier}.json",
                f"what `{tier}` would do, change by change, or why it refuses; writes nothing",
                GeneratedFile(inspector.proposals[tier], partial(plan, tier)),
            )
            for tier in RepairTier
        ),
        _Entry(
            "repair/result.json",
            "what the last repair did: found, planned, repaired, left, and why",
            LiveFile(result),
        ),
        _Entry(
            "repair/progress",
            "how far a repair is, or the plan of one: `idle`, or its stage and percentage",
            LiveFile(progress),
        ),
        _Entry(
            "repair/undo",
            "write `undo` to take the last repair back; again: the one before",
            controls.undo_file(),
        ),
        _Entry(
            "repair/trim",
            "write `trim` to give the disk space of free clusters back",
            controls.trim_file(),
        ),
    ]


# ---- README.txt ----

_OF_FILES = """\
Until a file has been opened once, its size is shown as 0 (but for info.json of a snapshot).
Programs that copy files (cp, tar, rsync) open them, and copy them whole, with the bytes of disk.raw
and image.qcow2. Have the image checked first, or lost/ has nothing to copy yet. What they copy
belongs to who made the copy.

{files}

Text files are columns separated by tabs, under one line of headings that begins with `#`;
offsets and lengths are decimal bytes.
"""

_README = f"""\
This is the inside of a qcow2 image, shown as files by instarfs:

    {{image}}

Only writing to repair/tier, repair/undo or repair/trim changes the image. Nothing is computed
before it is opened: whoever opens a file in check/ first has the whole image checked, which may
take a while; every other file answers meanwhile. check/report.txt also plans the repairs, where
there is anything to repair. When the image changes, the files show its new state the next time
they are opened; who has one open reads on in the old one, of disk.raw and image.qcow2 in the new.

{_OF_FILES}
If a program writes to the image while it is checked, the check is of a moment between its
writes, and check/report.txt says of which; `unsettled`: it never held still for long enough.

To repair, read check/report.txt and repair/plan/leaks.json, and then:

    echo leaks > repair/tier

or, to have exactly the plan carried out that you have read, or nothing, its id with it. The
command ends when the repair has; should it fail, repair/result.json says why. Each write is one
command. What a repair changes is kept in the undo file, unless mounted with --no-undo: `echo undo >
repair/undo` takes the last one back, and again the one before.

To unmount: instarfs umount DIRECTORY
"""

_README_OF_PREVIEW = f"""\
This is the inside of a qcow2 image as it would be, shown as files by instarfs:

    {{image}}

It is a preview of `{{tier}}`, plan {{plan}}. Nothing has been written, and nothing here
writes. Run `qemu-img check` on image.qcow2, boot a machine on an overlay over it, or copy it
elsewhere instead of repairing in place. Once the image itself is written to, nothing is read of
this preview any more (ESTALE): mount it anew.

{_OF_FILES}
To have it so: {{how}} IMAGE

To unmount: instarfs umount DIRECTORY
"""


def _readme(image: str, entries: list[_Entry], preview: Plan | None) -> bytes:
    lines = [(entry.shown or entry.path, entry.what) for entry in entries]
    width = max(len(path) for path, _ in lines)
    files = "\n".join(f"    {path:<{width}}  {what}" for path, what in lines)
    values = {"image": printable(image), "files": files}
    if preview is None:
        return _README.format(**values).encode()
    values |= {"tier": preview.tier, "plan": preview.id, "how": render.repair.quoting(preview)}
    return _README_OF_PREVIEW.format(**values).encode()
