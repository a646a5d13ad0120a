"""What the mounted tree looks like, here and only here: every name, and what stands behind it.

What a file contains is made in `instarfs.render`, when it is computed is up to the inspector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from instarfs.errors import RepairNotOffered
from instarfs.inspector import Description, Inspector
from instarfs.mount.nodes import ControlFile, Directory, File, GeneratedFile, LiveFile, Node
from instarfs.mount.operations import Facts
from instarfs.render import check as render_check
from instarfs.render import info as render_info
from instarfs.render.text import printable
from planner.errors import ImageError
from planner.report import Report


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file of the tree: its path, what it is in one line, and what stands behind it."""

    path: str
    what: str
    file: File


def build_tree(inspector: Inspector) -> Directory:
    """The root directory of the mount of one image."""
    entries = [*_image_files(inspector), *_check_files(inspector), *_repair_files()]
    root: dict[str, Node] = {"README.txt": LiveFile(lambda: _readme(inspector.path, entries))}
    folders: dict[str, dict[str, Node]] = {}
    for entry in entries:
        folder, _, name = entry.path.partition("/")
        folders.setdefault(folder, {})[name] = entry.file
    return Directory(root | {name: Directory(files) for name, files in folders.items()})


def facts(inspector: Inspector) -> Facts:
    """The size and time that the mount shows: those of the image."""
    generation = inspector.generation()
    return Facts(size=generation.size, mtime_ns=generation.mtime_ns)


# ---- image/ ----


def _image_files(inspector: Inspector) -> list[_Entry]:
    def info(description: Description) -> bytes:
        known = render_info.ImageFacts(
            inspector.path, description.file_size, description.allocated_size
        )
        if isinstance(description.contents, ImageError):
            return render_info.info_error_json(description.contents, known)
        return render_info.info_json(description.contents, known)

    def header(description: Description) -> bytes:
        if isinstance(description.contents, ImageError):
            return render_info.header_error_json(description.contents, description.header)
        return render_info.header_json(description.contents.layout)

    return [
        _Entry(
            "image/info.json",
            "what `qemu-img info --output=json` says of it, under the same keys",
            GeneratedFile(inspector.description, info),
        ),
        _Entry(
            "image/header.json",
            "every header field and extension, decoded; unknown ones as hex",
            GeneratedFile(inspector.description, header),
        ),
    ]


# ---- check/ ----


def _check_files(inspector: Inspector) -> list[_Entry]:
    def generated(name: str, what: str, render: Callable[[Report], bytes]) -> _Entry:
        return _Entry(f"check/{name}", what, GeneratedFile(inspector.report, render))

    def progress() -> bytes:
        return f"{inspector.progress()}\n".encode()

    return [
        generated(
            "result.json",
            "the result under the keys of `qemu-img check --output=json`, and a verdict",
            lambda report: render_check.result_json(report, inspector.path),
        ),
        generated("result.bin", "the same as a CheckResult, 80 bytes", render_check.result_bin),
        generated(
            "report.txt",
            "the same for a reader: what is wrong, the worst first",
            lambda report: render_check.report_txt(report, inspector.path),
        ),
        generated(
            "leaks",
            "clusters that are counted as used and that nothing refers to",
            render_check.leaks_tsv,
        ),
        generated(
            "corruptions", "what is, or may become, wrong data", render_check.corruptions_tsv
        ),
        generated(
            "refcounts",
            "reference counts that differ from the references",
            render_check.refcounts_tsv,
        ),
        generated(
            "findings.jsonl", "all findings, one JSON object a line", render_check.findings_jsonl
        ),
        _Entry(
            "check/progress",
            "how far a running check is: `idle`, or its stage and percentage",
            LiveFile(progress),
        ),
    ]


# ---- repair/ ----


def _repair_files() -> list[_Entry]:
    async def refuse(_command: bytes) -> None:
        raise RepairNotOffered

    return [
        _Entry(
            "repair/tier",
            "the repair tier last applied, in brackets; this mount does not repair",
            ControlFile(lambda: b"[none] leaks all\n", refuse),
        ),
    ]


# ---- README.txt ----

_README = """\
This is the inside of a qcow2 image, shown as files by instarfs:

    {image}

Nothing here can change the image. Nothing is computed before it is read: the first read of
a file in check/ checks the whole image, which may take a while; every other file answers
meanwhile. When the image changes, the files show its new state the next time they are opened.
The size of a file is shown as 0 until it has been read once.

{files}

Text files are columns separated by tabs, under one line of headings that begins with `#`;
offsets and lengths are decimal bytes.

If a program has the image open for writing, or it changes while it is checked, the verdict
is `torn`: what was read may belong to no single moment. Stop that program and read again.

To unmount: instarfs umount DIRECTORY
"""


def _readme(image: str, entries: list[_Entry]) -> bytes:
    width = max(len(entry.path) for entry in entries)
    files = "\n".join(f"    {entry.path:<{width}}  {entry.what}" for entry in entries)
    return _README.format(image=printable(image), files=files).encode()
