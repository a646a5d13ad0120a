"""The picture in the README is the one that the code draws now."""

from pathlib import Path

import pytest

from examples import draw_map


def test_the_picture_that_is_checked_in_is_up_to_date() -> None:
    assert draw_map.DEFAULT.read_bytes() == draw_map.draw_sample(), (
        "draw it anew: python -m examples.draw_map"
    )
    assert draw_map.DEFAULT.stat().st_size < 60_000


def test_the_command_writes_where_it_is_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "picture.svg"
    assert draw_map.main([str(target)]) == 0
    assert target.read_bytes().startswith(b"<svg")
    assert capsys.readouterr().out == f"{target}\n"
