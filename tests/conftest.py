"""Options and settings that every test shares.

Fixtures live beside the tests that use them; here stands only what all levels need.
"""

import os
import signal
from collections.abc import Generator

import hypothesis
import pytest

CASES = 300
SEED = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    """Size and seed of the seeded campaigns: `make test ARGS="--cases 5000 --seed 7"`."""
    group = parser.getgroup("instarfs")
    group.addoption(
        "--cases",
        type=int,
        default=CASES,
        metavar="N",
        help=f"cases of each seeded campaign (default {CASES})",
    )
    group.addoption(
        "--seed", type=int, default=SEED, metavar="N", help=f"their first seed (default {SEED})"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes runs repeatable, in any locale."""
    # qemu-img prints sizes and dates by locale and time zone; the differential tests compare text.
    os.environ["LC_ALL"] = "C.UTF-8"
    # mkfs.ext4 and losetup are not in everybody's path.
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    # What a caller ignores, nohup or a shell's &, so does all that is started here.
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    # A slow machine is not a failure, and a failure must come back on the next run.
    hypothesis.settings.register_profile("instarfs", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("instarfs")


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> int:
    """How many cases a seeded campaign runs."""
    return int(request.config.getoption("--cases"))


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The first seed of a campaign."""
    return int(request.config.getoption("--seed"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What runs tests side by side sends UTF-8, and some tests log names that are not."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report
