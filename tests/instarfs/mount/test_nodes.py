"""instarfs.mount.nodes: snapshots, sizes, and what is fresh when."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import trio

from instarfs.errors import FileOutdated
from instarfs.inspect.shared_value import Edition
from instarfs.mount import nodes
from instarfs.mount.nodes import (
    BriefContent,
    ControlFile,
    DataFile,
    DeferredDirectory,
    DeferredFile,
    File,
    FixedDirectory,
    FixedFile,
    GeneratedFile,
    LiveFile,
    MadeDirectory,
    Node,
)

DEADLINE = 10


class FakeValue:
    """A value that is known after the first `get`, until a test replaces it."""

    def __init__(self, value: str) -> None:
        self.known = False
        self.edition = Edition(value)

    def replace(self, value: str) -> None:
        self.known = False
        self.edition = Edition(value)

    def peek(self) -> Edition[str] | None:
        return self.edition if self.known else None

    async def get(self) -> Edition[str]:
        await trio.lowlevel.checkpoint()
        self.known = True
        return self.edition


@pytest.fixture
def value() -> FakeValue:
    return FakeValue("0123456789")


async def test_opening_a_file_renders_it_and_nothing_does_before(value: FakeValue) -> None:
    rendered: list[str] = []

    def render(text: str) -> bytes:
        rendered.append(text)
        return text.encode()

    node = GeneratedFile(value, render)
    assert node.size() == 0
    assert rendered == []
    handle = await node.open()
    assert rendered == ["0123456789"]
    assert handle.size() == node.size() == 10
    assert await handle.read(0, 4) == b"0123"
    assert await handle.read(4, 100) == b"456789"
    assert await handle.read(10, 100) == b""
    assert await handle.read(1 << 62, 100) == b""
    assert rendered == ["0123456789"]


async def test_the_size_is_known_as_long_as_the_value_is_good(value: FakeValue) -> None:
    node = GeneratedFile(value, str.encode)
    await node.open()
    assert node.size() == 10
    value.replace("other")
    assert node.size() == 0
    value.known = True
    assert node.size() == 0
    await node.open()
    assert node.size() == 5


async def test_a_handle_stays_what_it_was(value: FakeValue) -> None:
    node = GeneratedFile(value, str.encode)
    early = await node.open()
    value.replace("abcdef")
    assert await (await node.open()).read(2, 2) == b"cd"
    assert await early.read(2, 2) == b"23"
    assert early.size() == 10


async def test_handles_share_one_rendering_even_at_the_same_time(value: FakeValue) -> None:
    threads: list[threading.Thread] = []

    def render(text: str) -> bytes:
        threads.append(threading.current_thread())
        return text.encode()

    node = GeneratedFile(value, render)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(node.open)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


async def test_long_content_is_gone_with_its_last_handle() -> None:
    node = GeneratedFile(FakeValue("x" * (nodes.KEPT_BYTES + 1)), str.encode)
    handle = await node.open()
    snapshot = node._snapshot
    assert snapshot is not None
    assert snapshot() is not None
    del handle
    gc.collect()
    assert snapshot() is None
    assert node.size() == nodes.KEPT_BYTES + 1


async def test_short_content_is_rendered_once_an_edition(value: FakeValue) -> None:
    rendered: list[str] = []

    def render(text: str) -> bytes:
        rendered.append(text)
        return text.encode()

    node = GeneratedFile(value, render)
    for _ in range(3):
        assert await (await node.open()).read(2, 100) == b"23456789"
        gc.collect()
    value.replace("new")
    for _ in range(2):
        assert await (await node.open()).read(0, 100) == b"new"
    assert rendered == ["0123456789", "new"]


async def test_kept_content_does_not_keep_its_edition(value: FakeValue) -> None:
    node = GeneratedFile(value, str.encode)
    await (await node.open()).read(0, 1)
    edition = weakref.ref(value.edition)
    value.replace("new")
    await trio.to_thread.run_sync(int)  # an idle thread holds what it did last
    gc.collect()
    assert edition() is None
    assert await (await node.open()).read(0, 100) == b"new"


async def test_a_deferred_file_is_made_when_it_is_opened_and_once(value: FakeValue) -> None:
    made: list[GeneratedFile[str]] = []

    def make() -> GeneratedFile[str]:
        made.append(GeneratedFile(value, str.encode))
        return made[-1]

    node = DeferredFile(make)
    assert (node.size(), made) == (0, [])
    for _ in range(2):
        assert await (await node.open()).read(2, 2) == b"23"
        assert node.size() == 10
    assert len(made) == 1
    assert not hasattr(node, "__dict__")  # of these there may be a hundred thousand


async def test_what_is_measured_is_not_made_to_be_counted(value: FakeValue) -> None:
    made: list[int] = []

    def render(text: str) -> Iterator[bytes]:
        for number in range(100):
            made.append(number)
            yield text.encode() * (1 << 17)

    node = GeneratedFile(value, render, lambda text: 100 * len(text) << 17)
    handle = await node.open()
    assert handle.size() == node.size() == 100 * 10 << 17
    assert len(made) < 10
    assert await handle.read((100 * 10 << 17) - 3, 100) == b"789"


async def test_what_is_no_bytes_fails_before_the_kernel_sees_it(value: FakeValue) -> None:
    node = GeneratedFile(value, str.upper)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        await node.open()


async def test_what_failed_to_open_can_be_opened_again(value: FakeValue) -> None:
    errors = [ZeroDivisionError()]

    def render(text: str) -> bytes:
        while errors:
            raise errors.pop()
        return text.encode()

    node = GeneratedFile(value, render)
    with pytest.raises(ZeroDivisionError):
        await node.open()
    assert await (await node.open()).read(0, 1) == b"0"


# ---- what is made while it is read ----

LINES = [f"{number:09}\n".encode() for number in range(1000)]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "SHARED_BYTES", 100)
    monkeypatch.setattr(nodes, "BEHIND_BYTES", 200)


async def read_all(node: GeneratedFile[str], size: int = 64) -> bytes:
    handle, parts = await node.open(), [b""]
    while len(parts) == 1 or parts[-1]:
        parts.append(bytes(await handle.read(sum(map(len, parts)), size)))
    return b"".join(parts)


@pytest.mark.usefixtures("small_windows")
async def test_a_long_file_is_whole_and_has_its_size_when_it_is_open(value: FakeValue) -> None:
    node = GeneratedFile(value, lambda _: iter(LINES))
    assert (await node.open()).size() == node.size() == 10_000
    assert await read_all(node) == b"".join(LINES)
    assert await read_all(node, 7777) == b"".join(LINES)


@pytest.mark.usefixtures("small_windows")
async def test_of_a_long_file_no_more_is_held_or_made_than_is_read(value: FakeValue) -> None:
    made: list[bytes] = []

    def render(_: str) -> Iterator[bytes]:
        for line in LINES:
            made.append(line)
            yield line

    node = GeneratedFile(value, render)
    handle = await node.open()
    assert made == LINES  # counted, once an edition
    assert node._snapshot is not None
    snapshot = node._snapshot()
    assert snapshot is not None
    assert len(snapshot.content) == 100
    made.clear()
    assert await handle.read(0, 50) == b"".join(LINES)[:50]
    assert not made
    assert await handle.read(3000, 10) == LINES[300]
    assert len(made) == 301
    made.clear()
    del handle, snapshot
    assert (await node.open()).size() == 10_000
    assert len(made) == 10


@pytest.mark.usefixtures("small_windows")
async def test_rendering_ends_when_nobody_waits_for_it(value: FakeValue) -> None:
    begun, ended = threading.Event(), threading.Event()

    def render(_: str) -> Iterator[bytes]:
        try:
            while True:
                begun.set()
                yield LINES[0]
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(GeneratedFile(value, render).open)
        assert await trio.to_thread.run_sync(begun.wait, DEADLINE)
        nursery.cancel_scope.cancel()
    assert await trio.to_thread.run_sync(ended.wait, DEADLINE)


@pytest.mark.usefixtures("small_windows")
async def test_a_long_file_can_be_read_backwards(value: FakeValue) -> None:
    handle = await GeneratedFile(value, lambda _: iter(LINES)).open()
    for line in (999, 500, 499, 998, 0, 20):
        assert await handle.read(line * 10, 10) == LINES[line]
    assert await handle.read(10_000, 10) == b""


@pytest.mark.usefixtures("small_windows")
async def test_the_size_of_a_long_file_is_not_that_of_the_one_before(value: FakeValue) -> None:
    node = GeneratedFile(value, lambda text: iter(LINES[: int(text, 16) & 255]))
    value.replace("20")
    assert len(await read_all(node)) == 320
    value.replace("ff")
    assert node.size() == 0
    assert len(await read_all(node)) == node.size() == 2550


# ---- directories ----


async def test_a_made_directory_makes_a_node_once_as_long_as_it_is_held() -> None:
    made: list[str] = []

    async def make(name: str) -> Node | None:
        made.append(name)
        return LiveFile(name.encode) if name.isdigit() else None

    directory = MadeDirectory(make, fixed={"README": LiveFile(lambda: b"")})
    one = await directory.child("17")
    assert await directory.child("17") is one
    assert await directory.child("seventeen") is None
    assert await directory.child("README") is not None
    assert made == ["17", "seventeen"]
    assert await directory.names() == ["README"]


async def test_a_deferred_directory_makes_a_file_when_it_is_looked_at() -> None:
    made: list[LiveFile] = []
    asked = []

    def make() -> LiveFile:
        made.append(LiveFile(lambda: b"1"))
        return made[-1]

    def makers(what: int) -> dict[str, Callable[[], File]]:
        asked.append(what)
        return {"a": make, "b": make}

    directory = DeferredDirectory(makers, 1)
    assert not hasattr(directory, "__dict__")  # of these there may be tens of thousands
    assert not asked
    assert await directory.names() == ["a", "b"]
    assert not made
    assert await directory.child("a") is made[0]
    assert await directory.child("a") is made[0]
    assert await directory.child("c") is None
    assert (len(asked), len(made)) == (1, 1)


# ---- what is brief ----


async def brief_file(value: FakeValue, render: Callable[[str], bytes] = str.encode) -> FixedFile:
    file = await BriefContent(value, render).file()
    assert isinstance(file, FixedFile)
    return file


async def test_a_brief_file_is_made_when_it_is_looked_up_without_asking_a_thread(
    value: FakeValue,
) -> None:
    """Of tens of thousands of them a thread each takes most of the time."""
    threads = []

    def render(text: str) -> bytes:
        threads.append(threading.current_thread())
        return text.encode()

    file = await brief_file(value, render)
    assert file.size() == 10
    handle = file.opened()
    assert handle is not None
    assert (handle.size(), handle.ready(0, 4), handle.ready(4, 100)) == (10, b"0123", b"456789")
    assert await handle.read(9, 100) == b"9"
    assert threads == [threading.current_thread()]


async def test_another_content_is_another_file_and_the_same_is_the_same(value: FakeValue) -> None:
    brief = BriefContent(value, str.encode)
    early = await brief.file()
    held = await early.open()
    value.replace("0123456789")  # as of an image that was written to a moment ago
    assert await brief.file() is early
    value.replace("abcdef")
    assert early.opened() is None  # that is to be computed, and may have to be waited for
    with pytest.raises(FileOutdated):
        await early.open()
    late = await brief.file()
    assert late is not early
    assert early.opened() is None
    assert await (await late.open()).read(0, 100) == b"abcdef"
    assert (early.size(), await held.read(0, 100)) == (10, b"0123456789")


async def test_of_a_brief_file_that_is_looked_at_again_nothing_is_waited_for(
    value: FakeValue,
) -> None:
    file = await brief_file(value)
    value.known = False
    assert file.opened() is None
    assert await (await file.open()).read(0, 100) == b"0123456789"
    assert file.opened() is not None


async def test_what_is_not_brief_after_all_is_not_held() -> None:
    value = FakeValue("x" * (nodes.FIXED_BYTES + 1))
    brief = BriefContent(value, str.encode)
    long = await brief.file()
    assert isinstance(long, GeneratedFile)
    assert await (await long.open()).read(0, 1 << 20) == value.edition.value.encode()
    value.replace("y" * (nodes.FIXED_BYTES + 2))
    assert await brief.file() is long
    value.replace("z" * nodes.FIXED_BYTES)
    assert isinstance(await brief.file(), FixedFile)


async def test_no_brief_file_holds_the_value_that_it_was_made_of(value: FakeValue) -> None:
    file, edition = await brief_file(value), weakref.ref(value.edition)
    value.replace("other")
    gc.collect()
    assert edition() is None
    assert file.size() == 10


async def test_a_directory_shows_what_is_brief_as_it_is_now(value: FakeValue) -> None:
    brief = BriefContent(value, str.encode)
    directory = DeferredDirectory(lambda _: {"info": lambda: brief}, 1)
    early = await directory.child("info")
    assert early is await directory.child("info") is await brief.file()
    value.replace("other")
    late = await directory.child("info")
    assert isinstance(late, FixedFile)
    assert late is not early
    assert late.content == b"other"


async def test_a_made_directory_lists_what_it_is_told_to() -> None:
    async def nothing(_: str) -> Node | None:
        return None

    async def listed() -> list[str]:
        return ["1", "2"]

    directory = MadeDirectory(nothing, listed, {"all": LiveFile(lambda: b"")})
    assert await directory.names() == ["all", "1", "2"]


async def test_names_that_were_just_listed_are_not_asked_about_one_by_one() -> None:
    asked: list[str] = []

    async def make(name: str) -> Node | None:
        asked.append(name)
        return make_listed(name)

    def make_listed(name: str) -> Node | None:
        return FixedDirectory({}) if name in {"1", "2"} else None

    directory = MadeDirectory(make, fixed={"all": FixedDirectory({})}, make_listed=make_listed)
    one = await directory.listed_child("1")
    assert one is not None
    assert await directory.child("1") is one
    assert await directory.listed_child("3") is None  # gone since
    assert not asked
    assert await directory.listed_child("all") is await directory.child("all")
    two = await directory.child("2")
    assert await directory.listed_child("2") is two
    assert asked == ["2"]


def test_a_fixed_directory_knows_how_many_directories_are_in_it() -> None:
    below = FixedDirectory({})
    assert FixedDirectory({"a": below, "b": LiveFile(lambda: b"")}).subdirectories == 1


# ---- data files ----


async def test_what_the_kernel_kept_of_a_data_file_is_good_until_the_content_changes() -> None:
    content = ["first"]

    async def read(offset: int, size: int) -> bytes:
        return b"0123456789"[offset : offset + size]

    node = DataFile(lambda: 10, read, lambda: content[0])
    assert not node.may_keep_cache()
    assert node.may_keep_cache()
    content[0] = "second"
    assert not node.may_keep_cache()
    assert await (await node.open()).read(3, 4) == b"3456"
    assert node.size() == 10


# ---- live and control files ----


async def test_a_live_file_is_fresh_at_each_beginning() -> None:
    now = [b"idle\n"]
    node = LiveFile(lambda: now[0])
    handle = await node.open()
    assert await handle.read(0, 3) == b"idl"
    now[0] = b"census 43%\n"
    assert await handle.read(3, 100) == b"e\n"
    assert await handle.read(0, 100) == b"census 43%\n"
    assert handle.size() == node.size() == 11


async def test_a_live_file_is_as_long_as_it_was_when_it_was_opened() -> None:
    now = [b"idle\n"]
    node = LiveFile(lambda: now[0])
    handle = await node.open()
    now[0] = b"census 43%\n"
    assert (handle.size(), node.size()) == (5, 11)
    assert await handle.read(0, 5) == b"idle\n"
    assert await handle.read(5, 100) == b""


async def test_a_live_file_may_be_read_from_the_middle() -> None:
    handle = await LiveFile(lambda: b"census 43%\n").open()
    assert await handle.read(7, 100) == b"43%\n"


async def test_a_control_file_acts_on_what_it_is_handed() -> None:
    commands: list[bytes] = []

    async def act(command: bytes) -> None:
        commands.append(command)

    node = ControlFile(lambda: b"[none] leaks all\n", act)
    await node.act(b"leaks\n")
    assert commands == [b"leaks\n"]
    assert await (await node.open()).read(0, 100) == b"[none] leaks all\n"


async def test_after_a_write_a_control_file_shows_what_came_of_it() -> None:
    state = [b"[none] leaks all\n"]

    async def act(command: bytes) -> None:
        if command != b"all":
            raise ZeroDivisionError
        state[0] = b"none leaks [all]\n"

    handle = await ControlFile(lambda: state[0], act).open()
    with pytest.raises(ZeroDivisionError):
        await handle.write(b"nonsense")
    await handle.write(b"all")
    assert await handle.read(0, 100) == state[0]
