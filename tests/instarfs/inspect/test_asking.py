"""instarfs.inspect.asking: what is asked of an image that may not answer."""

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import trio

from instarfs.errors import ImageSilent
from instarfs.inspect import asking
from instarfs.inspect.asking import Asker

DEADLINE = 10.0


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "PATIENCE", 0.05)


@pytest.fixture
def far() -> Asker:
    return Asker("image", at_once=False)


@pytest.fixture
def hung() -> Iterator[tuple[Callable[[], int], threading.Event]]:
    """What answers when it is let go, and what lets it."""
    event = threading.Event()

    def question() -> int:
        assert event.wait(DEADLINE)
        return 1

    yield question, event
    event.set()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_on_this_machine_there_is_no_thread() -> None:
    assert Asker("image", at_once=True).ask(threading.get_ident) == threading.get_ident()


def test_elsewhere_a_thread_asks_and_its_answers_and_errors_are_those_of_the_question(
    far: Asker,
) -> None:
    assert far.ask(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        far.ask(lambda: 1 // 0)
    assert far.ask(lambda: 2) == 2


def test_what_takes_its_time_is_asked_in_a_thread_wherever_it_is() -> None:
    near = Asker("image", at_once=True)
    assert near.ask(threading.get_ident, at_once=False) != threading.get_ident()


def test_who_asks_while_nothing_is_answered_waits_once(
    far: Asker, hung: tuple[Callable[[], int], threading.Event]
) -> None:
    question, event = hung
    with pytest.raises(ImageSilent):
        far.ask(question)
    begun = time.monotonic()
    for _ in range(1000):
        with pytest.raises(ImageSilent):
            far.ask(question)
    assert time.monotonic() - begun < 1000 * asking.PATIENCE / 2
    event.set()
    until(lambda: _answers(far))


def _answers(asker: Asker) -> bool:
    try:
        return asker.ask(lambda: True)
    except ImageSilent:
        return False


async def test_who_waits_waits_as_long_as_it_takes_and_all_of_them_for_one_answer(
    far: Asker, hung: tuple[Callable[[], int], threading.Event]
) -> None:
    question, event = hung
    asked: list[int] = []

    def counted() -> None:
        asked.append(question())

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(far.wait, counted)
            await trio.sleep(2 * asking.PATIENCE)  # longer than any who does not wait
            assert not asked
            event.set()
    assert asked == [1]


async def test_who_waits_can_leave(
    far: Asker, hung: tuple[Callable[[], int], threading.Event]
) -> None:
    with trio.fail_after(DEADLINE), trio.move_on_after(0.01) as left:
        await far.wait(hung[0])
    assert left.cancelled_caught


def test_its_thread_ends_with_who_asks(far: Asker) -> None:
    thread = far.ask(threading.current_thread)
    worker = far._worker
    assert worker is not None
    worker.end()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_an_asker_that_nobody_has_any_more_has_no_thread() -> None:
    thread = Asker("image", at_once=False).ask(threading.current_thread)
    gc.collect()
    thread.join(DEADLINE)
    assert not thread.is_alive()
