"""What `qemu-img check -U` and `instarfs check -U` say of an image, and how long that takes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mount.mounts import INSTARFS, environment
from tests.schemas import require_valid_output

SECONDS = 120.0
CODES = (0, 1, 2, 3)
"""Of both tools: clean, not completed or unsettled, corruptions, leaks."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``verdict``, ``as_of``, ``confirmed`` and ``in_motion`` are of ours alone."""

    code: int
    corruptions: int
    leaks: int
    seconds: float
    verdict: str = ""
    as_of: str | None = None
    confirmed: int = 0
    in_motion: int = 0
    said: str = ""


def _asked(command: Sequence[str]) -> tuple[int, str, str, float]:
    began = time.monotonic()
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=SECONDS,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def _values(text: str) -> dict[str, object]:
    try:
        found: dict[str, object] = json.loads(text)
    except ValueError:
        return {}
    return found


def _number(found: dict[str, object], name: str) -> int:
    value = found.get(name, 0)
    return value if isinstance(value, int) else 0


def ask_qemu(image: Path, *more: str) -> Answer:
    """What `qemu-img` says; *more* than ``-U``, or without it."""
    code, out, err, seconds = _asked(
        ["qemu-img", "check", *more, "-f", "qcow2", "--output=json", str(image)]
    )
    found = _values(out)
    counts = _number(found, "corruptions"), _number(found, "leaks")
    return Answer(code, *counts, seconds, said=out + err)


def ask_ours(image: Path, *more: str) -> Answer:
    """What we say."""
    command = [*INSTARFS, "check", *more, "--output", "json", str(image)]
    code, out, err, seconds = _asked(command)
    require_valid_output(command, out)
    assert code in CODES, err
    assert "Traceback" not in err, err
    found = _values(out)
    verdict, as_of = found.get("verdict"), found.get("as-of")
    return Answer(
        code,
        _number(found, "corruptions"),
        _number(found, "leaks"),
        seconds,
        verdict=str(verdict),
        as_of=None if as_of is None else str(as_of),
        confirmed=_number(found, "confirmed"),
        in_motion=_number(found, "in-motion"),
        said=out + err,
    )
