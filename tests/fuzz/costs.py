"""What an image costs: each command on it, and each file of its mount, in a process of its own.

`python -m tests.fuzz.costs --seconds 60` makes up one bomb after the other; `make fuzz` runs it.
The commands are forked from here, where all that they load is loaded already: what that took counts
for each. This process stays small, for its children begin with the memory that it has.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import importlib
import itertools
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from instarfs.cli import main as cli
from tests.fuzz.bombs_beside import (
    STATE,
    UNDO,
    make_chain,
    make_rare_bomb,
    make_with_scans,
    make_with_state,
    make_with_undo,
)
from tests.fuzz.commands import (
    AFTER_WORDS,
    ASKED_FOR,
    BESIDE_UNDO,
    BRIEFLY,
    COMMANDS,
    MOUNTS,
    STREAMED,
    TIER,
    WITHOUT_IMAGE,
    WORDS,
    asking,
    chains,
)
from tests.fuzz.guest_bombs import make_aliased_bomb, make_guest_bomb
from tests.fuzz.holed import WITHOUT_A_HEADER, Holed, make_bomb
from tests.fuzz.limit_bombs import make_limits
from tests.fuzz.table_bombs import make_blocks, make_subclusters, make_turns
from tests.fuzz.targets import MEMORY, SECONDS
from tests.images.bombs import BOMBS, Bomb

KINDS: dict[str, Callable[[int], Holed]] = {
    "tables": make_bomb,
    "guest": make_guest_bomb,
    "aliased": make_aliased_bomb,
    "rare": make_rare_bomb,
    "chain": make_chain,
    "undo": make_with_undo,
    "state": make_with_state,
    "scans": make_with_scans,
    "turns": make_turns,
    "blocks": make_blocks,
    "subclusters": make_subclusters,
    "limits": make_limits,
}
"""What makes the bomb of a seed, of each kind."""

KEPT = Path(".fuzz/bombs")
"""Where images are that cost too much."""

READ_BYTES = 8 << 20
HEAD_BYTES = 1 << 16
"""At the beginning of a plan, in which its id is."""

MANY = 12
"""Names in a directory of a mount; of more a few are read."""

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
        """*only*: patterns of the commands that are run, and what they follow with them."""

        def chosen(command: str) -> bool:
            return any(fnmatch.fnmatchcase(command, pattern) for pattern in only)

        before = time.process_time()
        for module in (*(f"cli.{name}" for name in cli.COMMANDS), "mount.tree", "render.report"):
            importlib.import_module(f"instarfs.{module}")
        self.begun = time.process_time() - before
        gc.freeze()
        self._image, self._log = folder / "image.qcow2", folder / "log"
        self._mountpoint = folder / "mnt"
        self._mountpoint.mkdir()
        self._briefly = briefly
        self._chains = list(chains(BRIEFLY if briefly else COMMANDS))
        self._mounts: Sequence[str] = MOUNTS[:1] if briefly else MOUNTS
        if only:
            self._chains = [chain for chain in self._chains if any(map(chosen, chain))]
            self._mounts = [mount for mount in self._mounts if chosen(mount)]
        self._beside_undo = () if briefly or only else BESIDE_UNDO
        self.runs, self.most_seconds, self.most_memory = 0, 0.0, 0

    def of(self, write: Callable[[Path], None]) -> Iterator[tuple[str, str]]:
        """What costs too much of the image that *write* writes: the command, and how much."""
        for chain in self._chains:
            self._anew(write)
            for number, command in enumerate(chain):
                cost = self._least(chain[: number + 1], write)
                self._note(cost)
                if found := cost.beyond(streamed=command.startswith(STREAMED)):
                    yield ", then ".join(chain[: number + 1]), found
            self._unmount()
        for command in self._beside_undo:
            self._anew(write)
            self._plant_undo()
            cost = self._command(command)
            self._note(cost)
            if found := cost.beyond(streamed=False):
                yield f"{command}, beside an undo file", found
        for mount in self._mounts:
            yield from self._least_mounted(mount, write)

    def _least(self, chain: Sequence[str], write: Callable[[Path], None]) -> Cost:
        """Of the last of *chain*, those before which have been run.

        Processes that share a core make each other slower, now more and now less.
        """
        cost = self._command(chain[-1])
        for _ in range(AGAIN):
            if cost.seconds > SECONDS:
                self._unmount()
                self._anew(write)
                *_, again = map(self._command, chain)
                cost = min(cost, again, key=lambda it: it.seconds)
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
        operands = [word for word in words[1:] if not word.startswith("-")]
        is_named = any("IMAGE" in word or "FOLDER" in word for word in operands)
        if not is_named and not command.startswith(WITHOUT_IMAGE):
            words.append("IMAGE")
        folder = self._image.parent
        places = {"IMAGE": self._image, "OUT": folder / "out", "FOLDER": folder}
        places |= {"STATE": folder / STATE, "UNDO": folder / UNDO, "MNT": self._mountpoint}
        if "--plan=PLAN" in words:
            words[words.index("--plan=PLAN")] = f"--plan={self._plan(' '.join(asking(words)))}"
        for name, place in places.items():
            words = [word.replace(name, str(place)) for word in words]
        return words

    def _plan(self, command: str) -> str:
        """The id of the plan that *command* tells of; zeros: of none."""
        reading, writing = os.pipe()
        pid = self._fork(self._arguments(command), writing, reading)
        os.close(writing)
        _, _, head = _read(reading, HUNG)
        os.close(reading)
        _wait(pid, HUNG)
        return _plan_id(head + self._log.read_bytes())

    def _unmount(self) -> None:
        """Let nothing that a chain has left mounted hide the folder."""
        if self._mountpoint.is_mount():
            subprocess.run(["fusermount3", "-uz", self._mountpoint], check=False)

    def _command(self, command: str) -> Cost:
        is_export = command.startswith("export")
        arguments = self._arguments(command)
        reading, writing = os.pipe()
        pid = self._fork(arguments, writing, reading)
        os.close(writing)
        printed, is_late, _ = _read(reading, EXPORTED if is_export else HUNG)
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
        elif command.startswith("umount") and self._mountpoint.is_mount():
            wrong = "still mounted"
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
        is_up = False
        try:
            if is_up := self._is_up(pid):
                daemon = _Daemon(pid)
                yield from self._beyond(f"{name}: until it answers", self.begun + daemon.seconds())
                for file, found in self._files(daemon):
                    yield f"{name}: {file}", found
                yield from self._beyond(name, 0, daemon.peak())
        finally:
            os.kill(pid, signal.SIGTERM)
            _, used, ended = _wait(pid)
            if not ended:
                yield name, "did not end"
        if not is_up:
            seconds = self.begun + used.ru_utime + used.ru_stime
            yield from self._beyond(f"{name}: until it failed", seconds, used.ru_maxrss << 10)
        wrong = self._traceback()
        if wrong:
            yield name, wrong

    def _beyond(self, what: str, seconds: float, memory: int = 0) -> Iterator[tuple[str, str]]:
        """Note what something cost, and say so if it was too much."""
        cost = Cost(seconds, memory, 0)
        self._note(cost)
        if found := cost.beyond(streamed=True):
            yield what, found

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

    def _files(self, daemon: _Daemon) -> Iterator[tuple[str, str]]:
        answers = yield from self._read_all(daemon, walk(self._mountpoint))
        if answers and not self._briefly and os.access(self._mountpoint / TIER, os.W_OK):
            yield from self._obeyed(daemon)

    def _read_all(
        self, daemon: _Daemon, paths: Iterable[Path]
    ) -> Generator[tuple[str, str], None, bool]:
        """What costs too much of these files; returns whether the mount still answers."""
        for path in paths:
            before, name = daemon.seconds(), str(path.relative_to(self._mountpoint))
            is_done = _apart(partial(_read_file, path))
            yield from self._beyond(name, daemon.seconds() - before)
            if is_done is None:
                yield name, "hung"
                return False
        return True

    def _obeyed(self, daemon: _Daemon) -> Iterator[tuple[str, str]]:
        """What costs too much of the words for control files, and of what is read after them."""
        for name, template in WORDS:
            word = template.replace("PLAN", self._shown_plan(template.split()[0]))
            what, before = f"{template} > {name}", daemon.seconds()
            is_done = _apart(partial((self._mountpoint / name).write_text, word))
            yield from self._beyond(what, daemon.seconds() - before)
            if is_done is None:
                yield what, "hung"
                return
            is_repaired = is_done and name == TIER
            after = walk(self._mountpoint) if is_repaired else self._after_words()
            for file, found in self._read_all(daemon, after):
                yield f"{what}, then {file}", found

    def _after_words(self) -> Iterator[Path]:
        yield from map(self._mountpoint.joinpath, AFTER_WORDS)

    def _shown_plan(self, tier: str) -> str:
        head, plan = b"", self._mountpoint / f"repair/plan/{tier}.json"
        with contextlib.suppress(OSError), plan.open("rb") as file:
            head = file.read(HEAD_BYTES)
        return _plan_id(head)


class _Daemon:
    """The processes of a mount: the one that was started, and those that it has."""

    def __init__(self, pid: int) -> None:
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                parents[int(stat.parent.name)] = int(_stat(stat)[1])
        self._pids = [pid, *(child for child, parent in parents.items() if parent == pid)]

    def seconds(self) -> float:
        """Of processor that they have used."""
        return sum(map(_processor, self._pids))

    def peak(self) -> int:
        """Bytes of memory that one of them had at most."""
        return max(map(_peak, self._pids))


def _apart(work: Callable[[], object]) -> bool | None:
    """Do it in a process that may hang: whether it could be done; None if it hung."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):  # errors are answers
            work()
            os._exit(0)
        os._exit(1)
    status, _, ended = _wait(pid, HUNG)
    return status == 0 if ended else None


def _read_file(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        left = READ_BYTES
        while left > 0 and (part := file.read(1 << 17)):
            left -= len(part)


def walk(root: Path) -> Iterator[Path]:
    """Every file of a mount, of a long directory a few; what only opens by name, too."""
    for folder, names, files in os.walk(root):
        for listed in (names, files):
            listed.sort()
            if len(listed) > MANY:
                listed[:] = [*listed[:2], listed[len(listed) // 2], listed[-1]]
        asked = ASKED_FOR.get(str(Path(folder).relative_to(root)), ())
        yield from (Path(folder) / name for name in (*files, *asked))


def _plan_id(text: bytes) -> str:
    """Of the plan that it tells of; zeros: of none."""
    found = re.search(rb'(?:"plan-id": "|--plan )([0-9a-f]{12})', text)
    return found[1].decode() if found else "0" * 12


def _read(descriptor: int, seconds: float) -> tuple[int, bool, bytes]:
    """Read to the end, as far as `READ_BYTES`: how many bytes, whether time was up, the first."""
    count, head, until = 0, b"", time.monotonic() + seconds
    while count < READ_BYTES:
        left = until - time.monotonic()
        if left <= 0:
            return count, True, head
        if select.select([descriptor], [], [], left)[0]:
            part = os.read(descriptor, 1 << 16)
            if not part:
                break
            count += len(part)
            head += part if len(head) < HEAD_BYTES else b""
    return count, False, head


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
    fields = _stat(Path(f"/proc/{pid}/stat"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stat(path: Path) -> list[str]:
    """What the kernel says of a process, from its state on: proc(5)."""
    return path.read_text().rpartition(")")[2].split()


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
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="COMMAND",
        help="no other than these, which may be patterns",
    )
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
