"""What an image costs: each command on it, and each file of its mount, in a process of its own.

`python -m tests.fuzz.costs --seconds 60` makes up one bomb after the other; `make fuzz` runs it.
The commands are forked from here, where all that they load is loaded already: what that took counts
for each. This process stays small, for its children begin with the memory that it has.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from instarfs.cli import main as cli
from tests.fuzz.bombs_beside import (
    STATE,
    UNDO,
    make_chain,
    make_rare_bomb,
    make_with_state,
    make_with_undo,
)
from tests.fuzz.guest_bombs import make_aliased_bomb, make_guest_bomb
from tests.fuzz.holed import WITHOUT_A_HEADER, Holed, make_bomb
from tests.fuzz.targets import MEMORY, SECONDS
from tests.images.bombs import BOMBS, Bomb

COMMANDS = (
    "info",
    "info --output=json",
    "info --backing-chain --follow=FOLDER",
    "check",
    "check --output=json",
    "check --data",
    "check -U --settle=0",
    "check -q IMAGE IMAGE",
    "report",
    "report --follow=FOLDER",
    "report --undo-file=UNDO",
    "files",
    "files --follow=FOLDER",
    "files --snapshot=0",
    "rescue",
    "rescue --output=json -o OUT",
    "rescue --free",
    "rescue --in-place --plan=000000000000",
    "rescue --header=IMAGE --assume=cluster_bits=16",
    "rescue --state=STATE",
    "then rescue --state=STATE",
    "scan --jobs=1",
    "scan --jobs=1 --output=jsonl FOLDER",
    "scan --jobs=1 --state=STATE --metrics=FOLDER/of.prom FOLDER",
    "then scan --jobs=1 --state=STATE FOLDER",
    "then scan --report --state=STATE",
    "plan leaks",
    "plan all",
    "plan --output=json all",
    "plan split",
    "plan bitmaps",
    "plan snapshots",
    "map",
    "map --output=json",
    "map --output=json --follow=FOLDER",
    "map --output=json -s 1M -l 1T",
    "export -q IMAGE OUT",
    "export -q --follow=FOLDER IMAGE OUT",
    "export -q --snapshot=0 IMAGE OUT",
    "export -q --preview=all IMAGE OUT",
    "check -r leaks",
    "then undo",
    "check -r all",
    "then undo",
    "check -r split --plan=000000000000",
    "check -r all --no-undo",
    "then trim",
    "trim --plan=000000000000",
    "undo --undo-file=UNDO",
)
"""What is run, on an image each that nobody has touched, but where it begins with `then`. IMAGE
stands at the end where it is not named, nor FOLDER."""

BESIDE_UNDO = ("undo", "check -r leaks", "trim")
"""What looks at an undo file that is there: one that is long, a hole, and says nothing."""

BRIEFLY = ("info --output=json", "check --data", "report", "files", "rescue", "map --output=json")

STREAMED = ("files", "info --output=json", "map", "plan --output=json", "scan", "export")
"""What may print more than `READ_BYTES`: nobody reads on then, and it is to end."""

WORDS = (
    ("repair/tier", "leaks"),
    ("repair/tier", "all"),
    ("repair/tier", "split 000000000000"),
    ("repair/undo", "undo"),
    ("repair/trim", "trim"),
)
"""What is written to the control files of a mount."""

MOUNTS = (
    "mount",
    "mount --follow=FOLDER -o allow_other,ro",
    "mount --undo-file=UNDO",
    "mount --preview=leaks",
    "mount --preview=all",
    "mount --preview=split",
    "mount --preview=bitmaps",
    "mount --preview=snapshots",
    "mount --preview=rescue",
)

KINDS: dict[str, Callable[[int], Holed]] = {
    "tables": make_bomb,
    "guest": make_guest_bomb,
    "aliased": make_aliased_bomb,
    "rare": make_rare_bomb,
    "chain": make_chain,
    "undo": make_with_undo,
    "state": make_with_state,
}
"""What makes the bomb of a seed, of each kind."""

KEPT = Path(".fuzz/bombs")
"""Where images are that cost too much."""

READ_BYTES = 8 << 20
AGAIN = 2
"""So often what costs too much is run again, before it is said: the least is what counts."""

HUNG = 60.0
"""By the clock; nothing waits for anything here."""

EXPORTED = 1.0
"""An export goes on as long as the disk is: so long it is looked at."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run: seconds of processor, bytes of memory, bytes printed, and what went wrong."""

    seconds: float
    memory: int
    printed: int
    wrong: str = ""

    def beyond(self, *, streamed: bool) -> str:
        """What of it no image is to cost; empty: nothing."""
        found = [self.wrong] if self.wrong else []
        if self.seconds > SECONDS:
            found.append(f"{self.seconds:.1f} s")
        if self.memory > MEMORY:
            found.append(f"{self.memory >> 20} MiB")
        if self.printed >= READ_BYTES and not streamed:
            found.append("more than 8 MiB printed")
        return ", ".join(found)


class Costs:
    """Runs commands in *folder*, where images may be large and have holes."""

    def __init__(self, folder: Path, *, briefly: bool = False, only: Sequence[str] = ()) -> None:
        before = time.process_time()
        for module in (*(f"cli.{name}" for name in cli.COMMANDS), "mount.tree", "render.report"):
            importlib.import_module(f"instarfs.{module}")
        self.begun = time.process_time() - before
        gc.freeze()
        self._image, self._log = folder / "image.qcow2", folder / "log"
        self._mountpoint = folder / "mnt"
        self._mountpoint.mkdir()
        self._briefly = briefly
        self._commands: tuple[str, ...] = BRIEFLY if briefly else COMMANDS
        self._mounts: tuple[str, ...] = MOUNTS[:1] if briefly else MOUNTS
        if only:
            self._commands, self._mounts = (
                tuple(command for command in among if command in only)
                for among in (self._commands, self._mounts)
            )
        self._beside_undo = () if briefly or only else BESIDE_UNDO
        self.runs, self.most_seconds, self.most_memory = 0, 0.0, 0

    def of(self, write: Callable[[Path], None]) -> Iterator[tuple[str, str]]:
        """What costs too much of the image that *write* writes: the command, and how much."""
        for command in self._commands:
            cost = self._least(command, write)
            self._note(cost)
            if found := cost.beyond(streamed=command.removeprefix("then ").startswith(STREAMED)):
                yield command, found
        for command in self._beside_undo:
            self._anew(write)
            self._plant_undo()
            cost = self._command(command)
            self._note(cost)
            if found := cost.beyond(streamed=False):
                yield f"{command}, beside an undo file", found
        for mount in self._mounts:
            yield from self._least_mounted(mount, write)

    def _least(self, command: str, write: Callable[[Path], None]) -> Cost:
        """Processes that share a core make each other slower, now more and now less."""
        if command.startswith("then "):
            return self._command(command.removeprefix("then "))
        self._anew(write)
        cost = self._command(command)
        for _ in range(AGAIN):
            if cost.seconds > SECONDS:
                self._anew(write)
                cost = min(cost, self._command(command), key=lambda it: it.seconds)
        return cost

    def _least_mounted(
        self, mount: str, write: Callable[[Path], None]
    ) -> Iterator[tuple[str, str]]:
        """What costs too much of a mount, each time."""
        self._anew(write)
        found = dict(self._mounted(mount))
        for _ in range(AGAIN):
            if found:
                self._anew(write)
                again = dict(self._mounted(mount))
                found = {name: again[name] for name in found if name in again}
        yield from found.items()

    def _note(self, cost: Cost) -> None:
        self.runs += 1
        self.most_seconds = max(self.most_seconds, cost.seconds)
        self.most_memory = max(self.most_memory, cost.memory)

    def _anew(self, write: Callable[[Path], None]) -> None:
        for old in self._image.parent.iterdir():
            if old != self._mountpoint:
                old.unlink()
        write(self._image)
        os.utime(self._image, (1e9, 1e9))

    def _plant_undo(self) -> None:
        path = self._image.with_name(UNDO)
        path.touch(0o600)
        path.write_bytes(b"garbage")
        os.truncate(path, 1900 << 20)

    def _fork(self, arguments: list[str], out: int, *ours: int) -> int:
        """A process that is `instarfs` with *arguments*, and has none of *ours*."""
        pid = os.fork()
        if pid:
            return pid
        for descriptor in ours:
            os.close(descriptor)
        try:
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(out, 1)
            os.dup2(log, 2)
            sys.argv = ["instarfs", *arguments]
            cli.main()
        except SystemExit as error:
            os._exit(int(error.code or 0))
        except BaseException:  # noqa: BLE001 - as Python itself ends
            sys.excepthook(*sys.exc_info())
        os._exit(99)

    def _arguments(self, command: str) -> list[str]:
        words = command.split()
        if not {"IMAGE", "FOLDER"} & set(words) and "--report" not in words:
            words.append("IMAGE")
        folder = self._image.parent
        places = {"IMAGE": self._image, "OUT": folder / "out", "FOLDER": folder}
        places |= {"STATE": folder / STATE, "UNDO": folder / UNDO}
        for name, place in places.items():
            words = [word.replace(name, str(place)) for word in words]
        return words

    def _command(self, command: str) -> Cost:
        is_export = command.startswith("export")
        arguments = self._arguments(command)
        reading, writing = os.pipe()
        pid = self._fork(arguments, writing, reading)
        os.close(writing)
        printed, is_late = _read(reading, EXPORTED if is_export else HUNG)
        os.close(reading)
        if is_export and is_late:
            os.kill(pid, signal.SIGTERM)
        wrong = "" if is_export or not is_late else "hung"
        status, used, ended = _wait(pid)
        code = os.waitstatus_to_exitcode(status)
        if not ended:
            wrong = "did not end"
        elif code not in (0, 1, 2, 3, 63, 143) and not (is_export and code == -signal.SIGTERM):
            wrong = wrong or f"exit code {code}"
        wrong = wrong or self._traceback()
        seconds = used.ru_utime + used.ru_stime
        seconds = 0 if is_export else seconds + self.begun
        return Cost(seconds, used.ru_maxrss << 10, printed, wrong)

    def _traceback(self) -> str:
        text = self._log.read_text(errors="replace")
        if "Traceback" in text:
            return "\n" + text[text.index("Traceback") :]
        return "out of memory" if "more memory than" in text else ""

    # ---- a mount ----

    def _mounted(self, name: str) -> Iterator[tuple[str, str]]:
        """What costs too much of a mount: each file of it is read, as far as `READ_BYTES`."""
        null = os.open(os.devnull, os.O_WRONLY)
        arguments = [*self._arguments(name), "-f", str(self._mountpoint)]
        pid = self._fork(arguments, null)
        os.close(null)
        try:
            if self._is_up(pid):
                seconds = _processor(pid) + self.begun
                self._note(Cost(seconds, 0, 0))
                if seconds > SECONDS:
                    yield f"{name}: until it answers", f"{seconds:.1f} s"
                for file, found in self._files(pid):
                    yield f"{name}: {file}", found
                memory = _peak(pid)
                self._note(Cost(0, memory, 0))
                if memory > MEMORY:
                    yield name, f"{memory >> 20} MiB"
        finally:
            os.kill(pid, signal.SIGTERM)
            _, _, ended = _wait(pid)
            if not ended:
                yield name, "did not end"
        wrong = self._traceback()
        if wrong:
            yield name, wrong

    def _is_up(self, pid: int) -> bool:
        until = time.monotonic() + HUNG
        device = self._mountpoint.parent.stat().st_dev
        while self._mountpoint.stat().st_dev == device:
            if time.monotonic() > until or os.waitid(
                os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                return False
            time.sleep(0.005)
        return True

    def _files(self, pid: int) -> Iterator[tuple[str, str]]:
        for path in _walk(self._mountpoint):
            before = _processor(pid)
            seen = _read_apart(path)
            seconds = _processor(pid) - before
            self._note(Cost(seconds, 0, 0))
            if seconds > SECONDS:
                yield str(path.relative_to(self._mountpoint)), f"{seconds:.1f} s"
            if not seen:
                yield str(path.relative_to(self._mountpoint)), "hung"
                return
        if self._briefly:
            return
        for name, word in WORDS:
            before = _processor(pid)
            _write_apart(self._mountpoint / name, word)
            seconds = _processor(pid) - before
            if seconds > SECONDS:
                yield f"{word} > {name}", f"{seconds:.1f} s"


def _apart(work: Callable[[], None]) -> bool:
    """Do it in a process that may hang: whether it came back."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):  # errors are answers
            work()
        os._exit(0)
    return _wait(pid, HUNG)[2]


def _read_apart(path: Path) -> bool:
    def read() -> None:
        with path.open("rb", buffering=0) as file:
            left = READ_BYTES
            while left > 0 and (part := file.read(1 << 17)):
                left -= len(part)

    return _apart(read)


def _write_apart(path: Path, word: str) -> None:
    def write() -> None:
        path.write_text(word)

    _apart(write)


def _walk(root: Path) -> Iterator[Path]:
    """Every file, of a long directory a few; what only opens by name, too."""
    for folder, names, files in os.walk(root):
        if Path(folder).name == "explain":
            for number in ("0", "65536", str(1 << 40), str((1 << 64) - 1)):
                yield from (Path(folder) / side / number for side in ("host", "guest"))
            names.clear()
        for listed in (names, files):
            listed.sort()
            if len(listed) > 12:
                listed[:] = [*listed[:2], listed[len(listed) // 2], listed[-1]]
        yield from (Path(folder) / name for name in files)


def _read(descriptor: int, seconds: float) -> tuple[int, bool]:
    """Read to the end, as far as `READ_BYTES`: how many bytes, and whether time was up."""
    count, until = 0, time.monotonic() + seconds
    while count < READ_BYTES:
        left = until - time.monotonic()
        if left <= 0:
            return count, True
        if select.select([descriptor], [], [], left)[0]:
            part = os.read(descriptor, 1 << 16)
            if not part:
                break
            count += len(part)
    return count, False


def _wait(pid: int, seconds: float = 10.0) -> tuple[int, resource.struct_rusage, bool]:
    """The status of a process, what it used, and whether it ended by itself in time."""
    until = time.monotonic() + seconds
    ended = True
    while True:
        found, status, used = os.wait4(pid, os.WNOHANG if ended else 0)
        if found:
            return status, used, ended
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            ended = False
        time.sleep(0.002)


def _processor(pid: int) -> float:
    """Seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak(pid: int) -> int:
    """Bytes of memory that a process had at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def main() -> int:
    """The exit code: 1 if an image cost too much."""
    parser = argparse.ArgumentParser(prog="tests.fuzz.costs", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the first bomb")
    parser.add_argument("--bombs", type=int, default=1 << 62, help="no more than so many")
    parser.add_argument("--folder", type=Path, help="where images are written")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of this kind, and no other")
    parser.add_argument("--named", action="store_true", help="those with names, and no others")
    parser.add_argument(
        "--briefly", action="store_true", help="a few commands, and a mount; a kind a seed"
    )
    parser.add_argument("--only", action="append", default=[], metavar="COMMAND", help="no other")
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="only these")
    arguments = parser.parse_args()
    found = 0
    folder = Path(tempfile.mkdtemp(prefix="instarfs-bombs-", dir=arguments.folder))
    try:
        costs = Costs(folder, briefly=arguments.briefly, only=arguments.only)
        until, made = time.monotonic() + arguments.seconds, 0
        for name, write in _chosen(arguments):
            if time.monotonic() > until or made >= arguments.bombs:
                break
            made += 1
            before = found
            for command, cost in costs.of(write):
                found += 1
                print(f"{name}: {command}: {cost}", flush=True)
            if found > before:
                _keep(name, write)
        print(
            f"{made} bombs, {costs.runs} runs: {found} findings; at most {costs.most_seconds:.2f} s"
            f" of processor, {costs.most_memory >> 20} MiB (to begin with {costs.begun:.2f} s)"
        )
    finally:
        shutil.rmtree(folder)
    return bool(found)


def _keep(name: str, write: Callable[[Path], None]) -> None:
    """Write it where it stays: what programs make of a guest's disk has another UUID each time."""
    folder = KEPT / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write(folder / "image.qcow2")


def _write_bomb(make: Bomb, to: Path) -> None:
    to.write_bytes(make().data)


def _chosen(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The bombs asked for: their names, and what writes them."""
    if arguments.images:
        yield from (
            (path.name, lambda to, path=path: copy_holed(path, to)) for path in arguments.images
        )
        return
    if arguments.named:
        for name, make in BOMBS.items():
            yield name, partial(_write_bomb, make)
        for name, made in WITHOUT_A_HEADER.items():
            yield name, made().write
        return
    for seed in itertools.count(arguments.seed):
        kinds = arguments.kind or list(KINDS)
        if arguments.briefly and not arguments.kind:
            kinds = [kinds[(seed - 1) % len(kinds)]]
        for kind in kinds:
            yield f"{kind} {seed}", KINDS[kind](seed).write


def copy_holed(path: Path, to: Path) -> None:
    """Copy what is there of a file, and leave its holes."""
    holed, at = Holed(size=path.stat().st_size), 0
    with path.open("rb") as file:
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            holed.parts.append((at, os.pread(file.fileno(), end - at, at)))
            at = end
    holed.write(to)


if __name__ == "__main__":
    sys.exit(main())
