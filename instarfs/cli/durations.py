"""Spans of time as they are written on a command line: ``90``, ``15m``, ``12h``, ``7d``."""

from __future__ import annotations

import re

import click

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw]?)", re.ASCII)


class Duration(click.ParamType[float]):
    """Seconds; or with a suffix: s, m, h, d or w."""

    name = "TIME"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float | int):
            return float(value)
        match = _SPAN.fullmatch(str(value))
        if match is None:
            self.fail(f"'{value}' is no span of time; s, m, h, d or w may follow it", param, ctx)
        return float(match[1]) * _SECONDS[match[2]]
