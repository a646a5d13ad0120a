"""instarfs.render.live: as of when a check is, and what that is worth."""

from __future__ import annotations

from dataclasses import replace

import pytest

from instarfs.render.check import check_human, check_messages, result_json
from instarfs.render.live import live_lines, live_value
from instarfs.render.report import report_txt
from planner.check.check import check_image
from planner.check.report import Live, Report
from tests.images.corpus.rule import plain

MOMENT = 1_700_000_000.25
AS_OF = "2023-11-14T22:13:20.250Z"


def report(live: Live | None, *, in_use: bool = True, leaked: bool = False) -> Report:
    made = plain()
    if leaked:
        made.set_refcount(8, 1)
    return replace(check_image(made.source), live=live, in_use=in_use, changed=not in_use)


def test_nothing_is_said_where_nobody_wrote() -> None:
    assert live_value(report(None)) == {}
    assert live_lines(report(None)) == []
    assert b"as-of" not in result_json(report(None), "image.qcow2")


def test_of_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    found = report(Live(MOMENT))
    expected = {"as-of": AS_OF, "in-use": True, "confirmed": 0, "in-motion": 0}
    assert live_value(found) == expected
    assert f'"as-of": "{AS_OF}"'.encode() in result_json(found, "image.qcow2")
    (line,) = live_lines(found)
    assert line.startswith("As of ")
    assert line.endswith(", while a program writes to it.")
    assert line in check_human(found)
    assert check_human(found).startswith("No errors were found on the image.\n")


def test_of_a_program_that_takes_no_locks() -> None:
    (line,) = live_lines(report(Live(MOMENT), in_use=False))
    assert line.endswith(", while it was written to.")


def test_of_no_moment() -> None:
    found = report(Live(None, in_motion=7))
    assert live_value(found)["as-of"] is None
    (line,) = live_lines(found)
    assert line.startswith("Of no single moment, while a program writes to it: 7 changes")
    assert (found.verdict, found.exit_code) == ("unsettled", 1)
    assert check_human(found).startswith("The image never held still")
    text = report_txt(found, "/image.qcow2").decode()
    assert text.startswith("/image.qcow2: unsettled\n")
    assert "instarfs check -U --settle 60 /image.qcow2" in text


def test_leaks_may_be_on_their_way() -> None:
    found = report(Live(MOMENT), leaked=True)
    assert found.verdict == "leaks"
    assert "caches" in live_lines(found)[-1]
    assert list(check_messages(found))
