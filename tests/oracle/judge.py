"""`qemu-img check` against our check, on one image.

Both exit codes must be the same, and every counter of the JSON (one that QEMU leaves out is 0).
Where QEMU ends with exit code 1 and prints no JSON there is only the exit code to compare. What
QEMU has no sensible answer to is in `EXCEPTIONS`, each with its reason. Nothing here makes or
damages images.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from planner.check.check import check_image
from planner.check.report import Report
from tests.images.matrix import Row, check_command, data_extents
from tests.oracle.scene import FileSource
from tests.schemas import require_valid_output

COUNTERS = (
    "check-errors",
    "corruptions",
    "leaks",
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)
_CODES = {"check-errors": 1, "corruptions": 2, "leaks": 3}
"""QEMU's exit codes by the first of these counters that is not 0."""
QEMU_SECONDS = 60
HUNG = -14
"""QEMU's exit code where it had to be killed."""
CRASHED = -1
"""Our exit code where the check raised what it should not."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a check said. ``counters`` is empty where it printed none.

    ``own_exit_code``: of our check, that of the verdict; it may be worse than the counters.
    """

    exit_code: int
    counters: dict[str, int] = field(default_factory=dict)
    stderr: str = ""
    own_exit_code: int | None = None

    def __str__(self) -> str:
        shown = {name: value for name, value in self.counters.items() if value}
        return f"exit {self.exit_code} {shown or ''} {self.stderr.strip()[:300]}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """Both answers, how they differ, what is wrong with ours alone, and what excuses us."""

    qemu: Answer
    ours: Answer
    differences: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    exception: str = ""

    @property
    def agreed(self) -> bool:
        return not self.faults and (not self.differences or bool(self.exception))


def ask_qemu(row: Row, image: Path) -> Answer:
    """`qemu-img check`, run beside the image, where the names in it lead.

    The exit code is -SIGNAL where a signal ended it, and HUNG where it never ended.
    """
    try:
        done = subprocess.run(
            check_command(row, image),
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=image.parent,
            timeout=QEMU_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Answer(HUNG, stderr=f"still running after {QEMU_SECONDS} s")
    return _answer(done)


def ask_us(image: Path) -> Answer:
    """`planner.check.check` in this process."""
    with image.open("rb") as file:
        try:
            report = check_image(FileSource(file.fileno()))
        except Exception:  # noqa: BLE001 -- whatever it is, it is a fault of this one case
            return Answer(CRASHED, stderr=traceback.format_exc())
    return answer_of(report)


def answer_of(report: Report) -> Answer:
    """A report in QEMU's terms: its exit code says what its counters say, and no more."""
    if report.error is not None:
        return Answer(report.exit_code, stderr=str(report.error), own_exit_code=report.exit_code)
    counters = {name: getattr(report.counters, name.replace("-", "_")) for name in COUNTERS}
    worst = next((code for name, code in _CODES.items() if counters[name]), 0)
    stopped = "; ".join(map(str, report.stopped))
    return Answer(worst, counters, stopped, report.exit_code)


def ask_our_command(image: Path) -> Answer:
    """`instarfs check`, the real command."""
    command = [sys.executable, "-m", "instarfs", "check", "--output=json", str(image)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=QEMU_SECONDS
    )
    require_valid_output(command, done.stdout)
    return _answer(done)


def _answer(done: subprocess.CompletedProcess[str]) -> Answer:
    counters = {}
    if done.stdout.strip():
        printed = json.loads(done.stdout)
        counters = {name: printed.get(name, 0) for name in COUNTERS}
    return Answer(done.returncode, counters, done.stderr)


def judge(row: Row, image: Path, command: bool = False) -> Judgement:
    """Ask both; *command* asks `instarfs check` too. Our check must leave the file as it is."""
    qemu = ask_qemu(row, image)
    before = fingerprint(image)
    ours = ask_us(image)
    differences = compare(qemu, ours)
    exception = ""
    if differences:
        exception = next((one.name for one in EXCEPTIONS if one.applies(qemu, ours)), "")
    faults = _faults(image, ours, before, command)
    return Judgement(qemu, ours, tuple(differences), tuple(faults), exception)


def _faults(
    image: Path, ours: Answer, before: tuple[int, int, str], command: bool
) -> Iterator[str]:
    """What no exception excuses."""
    if ours.exit_code == CRASHED:
        yield ours.stderr
    if command:
        printed = ask_our_command(image)
        same = printed.counters == ours.counters or not ours.counters
        if printed.exit_code != ours.own_exit_code or not same:
            yield f"the command said {printed}"
    if ours.own_exit_code == 0 and ours.exit_code != 0:
        yield "our exit code is 0, and our counters are not"
    if fingerprint(image) != before:
        yield "our check changed the file"


def compare(qemu: Answer, ours: Answer) -> list[str]:
    """Every difference, a line each."""
    differences = []
    if qemu.exit_code != ours.exit_code:
        differences.append(f"exit code: qemu {qemu.exit_code}, ours {ours.exit_code}")
    if qemu.counters:
        for name in COUNTERS:
            theirs, mine = qemu.counters[name], ours.counters.get(name, 0)
            if theirs != mine:
                differences.append(f"{name}: qemu {theirs}, ours {mine}")
    return differences


def fingerprint(image: Path) -> tuple[int, int, str]:
    """Size, modification time and a digest of the bytes; holes are skipped, they are zeros."""
    digest = hashlib.blake2b()
    with image.open("rb") as file:
        status = os.fstat(file.fileno())
        for start, end in data_extents(file.fileno(), 0, status.st_size):
            digest.update(b"%d-%d" % (start, end))
            digest.update(os.pread(file.fileno(), end - start, start))
    return status.st_size, status.st_mtime_ns, digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Exempt:
    """A difference that we want: when it applies, and why QEMU is no measure there."""

    name: str
    reason: str
    applies: Callable[[Answer, Answer], bool]


def _qemu_says(*words: str) -> Callable[[Answer, Answer], bool]:
    """QEMU could not open the image, and said one of these words."""

    def applies(qemu: Answer, ours: Answer) -> bool:
        return qemu.exit_code == 1 and any(word in qemu.stderr for word in words)

    return applies


EXCEPTIONS: tuple[Exempt, ...] = (
    Exempt(
        "asserts",
        "QEMU died of an assertion: it has no answer.",
        lambda qemu, ours: "Assertion" in qemu.stderr and "failed" in qemu.stderr,
    ),
    Exempt(
        "hangs",
        "QEMU did not end: it waits for a file that the image names, or for a huge allocation.",
        lambda qemu, ours: qemu.exit_code == HUNG,
    ),
    Exempt(
        "too-many-clusters",
        "QEMU gives up on files of 2^31 clusters and more, however sparse.",
        _qemu_says("File too large"),
    ),
    Exempt(
        "header-cut-off",
        "QEMU reads the missing rest of a header as zeros and goes by what that happens to mean.",
        lambda qemu, ours: "cut off inside the qcow2 header" in ours.stderr,
    ),
    Exempt(
        "data-file-missing",
        "QEMU opens the data file that the image names; a check needs none of its bytes.",
        _qemu_says(
            "'data-file' is required",
            "': Could not open '",
            "block driver requires a file name",
            "Unknown protocol",
        ),
    ),
    Exempt(
        "backing-file-missing",
        "QEMU opens the backing file that the image names; a check needs none of its bytes.",
        _qemu_says("Could not open backing file"),
    ),
    Exempt(
        "version-1",
        "That is the older qcow format, which QEMU opens with another driver and its rules.",
        lambda qemu, ours: ours.exit_code == 63 and "version 1" in ours.stderr,
    ),
    Exempt(
        "format-given",
        "A secret can only be given with the format; QEMU then does not probe: 1 instead of 63.",
        lambda qemu, ours: (
            (qemu.exit_code, ours.exit_code) == (1, 63) and "encrypt.key-secret" in qemu.stderr
        ),
    ),
    Exempt(
        "secret-missing",
        "QEMU wants the secret of an image whose header says that it is encrypted; we need none.",
        _qemu_says("Parameter 'encrypt.key-secret' is required"),
    ),
    Exempt(
        "luks-header",
        "QEMU unlocks the image before it checks; a check needs no secret.",
        _qemu_says("outside of extension header", "Volume is not in LUKS format"),
    ),
)
