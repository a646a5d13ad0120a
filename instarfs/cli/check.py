"""`instarfs check`: the grammar, output and exit codes of `qemu-img check`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from instarfs.cli.complaints import Failure, complain, remark, remark_interrupted
from instarfs.cli.grammar import ImageName, image_name, image_options
from instarfs.cli.options import progress_option, quiet_option, settle_option, undo_file_option
from instarfs.cli.progress import progress_bar
from instarfs.errors import (
    DOMAIN_ERRORS,
    WORST_FIRST,
    FormatHasNoChecks,
    FormatNotRead,
    ImageTorn,
    ImageUnreadable,
    ImageUnsettled,
)
from instarfs.image.directory import lasting_name
from instarfs.render.check import check_human, check_messages, result_json, unchecked_json
from instarfs.repair.checking import LiveCheck, run_check
from instarfs.repair.words import TIERS
from instarfs.text import json_array, printable, shell_path
from planner.check.check import check_image
from planner.check.report import Report
from planner.progress import Progress

if TYPE_CHECKING:
    from instarfs.repair.outcome import Pending, RepairOutcome
    from planner.arrays import I64
    from planner.errors import ImageError
    from planner.source import Source

# What only a repair needs is loaded where one is asked for: a check of a small image takes less
# time than loading it.

_SELF_EVIDENT = ("clean", "unreadable")
"""Verdicts of which a report has no more to say."""


@click.command(name="check")
@image_options("-T", "--cache")
@click.option(
    "-r",
    "--repair",
    "tier",
    type=click.Choice(TIERS),
    help="Repair leaked clusters only, or all that the image determines; the others are for a"
    " person to choose, with --plan. See: instarfs plan.",
)
@click.option(
    "--plan", "quote", metavar="ID", help="With -r: carry out the plan of this id, or nothing."
)
@click.option(
    "--no-undo", is_flag=True, help="With -r: for good, and so are the repairs before it then."
)
@undo_file_option
@settle_option
@click.option("--data", is_flag=True, help="Unpack every compressed cluster, too.")
@quiet_option
@progress_option
@click.argument(
    "words", metavar="IMAGE...", type=click.Path(readable=False), nargs=-1, required=True
)
def command(
    output: str,
    image_format: str,
    tier: str | None,
    quote: str | None,
    words: tuple[str, ...],
    *,
    undo_file: str | None,
    settle: float | None,
    image_opts: bool,
    data: bool,
    force_share: bool,
    no_undo: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Check all metadata of the qcow2 image IMAGE, and repair it with -r. No other file is opened.

    Without -r nothing is written. A repair is proven before it is written, is taken back by
    `instarfs undo`, and what it leaves is named. Exit codes, after a repair of what is then: 0
    clean, 1 not completed or refused, 2 corruptions, 3 only leaks or not closed properly, 63 not
    qcow2. With --plan, 0 says that exactly that plan was carried out, whatever it leaves.

    Of several images each is checked, whatever becomes of the others; the exit code is the worst,
    1 before 2 before 63 before 3, and JSON is an array. One image is repaired at a time.
    """
    names = [
        image_name(word, image_format, image_opts=image_opts, force_share=force_share)
        for word in words
    ]
    if undo_file is not None:
        if len(names) > 1:
            raise click.UsageError("--undo-file is for one image at a time")
        names = [replace(names[0], undo_file=undo_file)]
    shown = "" if quiet else output
    if tier is not None:
        if data:
            raise click.UsageError("--data is for a check alone: no repair mends what it finds")
        _refuse_repair(names)
        outcome = _repair(names[0], tier, quote or "", keep_undo=not no_undo, progress=progress)
        sys.exit(_conclude_repair(outcome, names[0], shown, is_quoted=bool(quote)))
    if settle is not None and not all(name.force_share for name in names):
        raise click.UsageError("--settle is for an image that may be written to: add -U")
    if quote is not None or no_undo:
        raise click.UsageError("--plan and --no-undo are for a repair: add -r")
    wanted = _Wanted(data, progress, LiveCheck() if settle is None else LiveCheck(settle))
    if len(names) > 1:
        sys.exit(_check_all(names, shown, wanted))
    sys.exit(_conclude_check(_check(names[0], wanted), shown))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a check is to do: look into compressed ``data`` too, and show its ``progress``.

    ``live``: how to look at an image that may be written to meanwhile.
    """

    data: bool
    progress: bool
    live: LiveCheck


@dataclass(frozen=True, slots=True)
class _Checked:
    """A check that was made. ``left_over``: a repair that was interrupted, if there is one."""

    name: ImageName
    report: Report
    left_over: Pending | None

    @property
    def error(self) -> Failure | None:
        """Why there are no results to go by."""
        report = self.report
        if report.error is not None:
            return self._without_header(report.error)
        if report.live is not None:
            is_unsettled, moved = report.verdict == "unsettled", report.live.in_motion
            return ImageUnsettled(self.name.path, moved) if is_unsettled else None
        if not report.torn:
            return None
        what = "it is in use" if report.in_use else "it was written to during the check"
        return ImageTorn(self.name.path, what)

    def _without_header(self, error: ImageError) -> Failure:
        """*error* of the image; where it comes of a rescue that was interrupted, that it does."""
        failed = self.name.failed(error)
        if self.left_over is None or not isinstance(failed, ImageUnreadable):
            return failed
        return type(failed)(failed.path, f"{failed.reason}; {self.left_over.sentence}")

    @property
    def exit_code(self) -> int:
        """Of the command, were it for this image alone."""
        return self.report.exit_code if self.error is None else self.error.exit_code

    def json(self) -> bytes:
        """As JSON, errors included."""
        return result_json(
            self.report,
            self.name.path,
            pending=self.left_over,
            zeros=False,
            exit_code=self.exit_code,
        )


@contextmanager
def _without_checks() -> Iterator[None]:
    """To qemu-img no check of a raw image fails: there is none."""
    try:
        yield
    except FormatNotRead as error:
        if error.format == "raw":
            raise FormatHasNoChecks(error.path, error.format) from error
        raise


def _check(name: ImageName, wanted: _Wanted) -> _Checked:
    with _without_checks(), name.opened() as image:
        with progress_bar(shown=wanted.progress) as tell:

            def check(source: Source, only: I64 | None = None) -> Report:
                report = check_image(source, progress=tell, only=only)
                return _look_at_data(source, report, tell) if wanted.data else report

            live = replace(wanted.live, again=check) if name.force_share else None
            checked = run_check(image, check, live=live)
        return _Checked(name, checked.report, checked.pending)


def _look_at_data(source: Source, report: Report, tell: Progress) -> Report:
    from instarfs.guest.compressed import look_at_packed  # noqa: PLC0415

    return look_at_packed(source, report, progress=tell)


def _refuse_repair(names: Sequence[ImageName]) -> None:
    if len(names) > 1:
        raise click.UsageError("-r is for one image at a time")
    if names[0].force_share:
        raise click.UsageError("-U is for a check alone: a repair shares the image with nobody")
    if names[0].read_only:
        raise click.UsageError("--image-opts: read-only=on is for a check alone")


def _repair(
    name: ImageName, tier: str, quote: str, *, keep_undo: bool, progress: bool
) -> RepairOutcome:
    from instarfs.cli import repairing  # noqa: PLC0415
    from planner.repair.plan import RepairTier  # noqa: PLC0415

    with _without_checks():
        name.require_qcow2()
    return repairing.run(
        name.path,
        lambda repairer: repairer.repair(RepairTier(tier), quote),
        keep_undo=keep_undo,
        undo_file=name.undo_file,
        progress=progress,
    )


def _conclude_check(checked: _Checked, shown: str) -> int:
    if shown == "json":
        click.echo(checked.json(), nl=False)
    if shown == "human" and checked.report.error is None:
        _show_checked(checked)
    if checked.error is not None:
        raise checked.error
    return checked.exit_code


def _conclude_repair(
    outcome: RepairOutcome, name: ImageName, shown: str, *, is_quoted: bool
) -> int:
    from instarfs.cli import repairing  # noqa: PLC0415
    from instarfs.render.repair import fixed_human, outcome_human  # noqa: PLC0415

    after, path = outcome.after, name.path
    error = repairing.error_of(outcome, path)
    code = after.exit_code if after is not None else 1
    if is_quoted and error is None:
        code = 0  # exactly that was done, whatever it leaves
    if shown == "json" and after is not None:
        ends_with = code if error is None else name.failed(error).exit_code
        document = result_json(after, path, outcome, zeros=False, exit_code=ends_with)
        click.echo(document, nl=False)
    if error is not None:
        repairing.tell_what_came_first(outcome)
        raise name.failed(error)
    if shown == "human" and after is not None:
        click.echo(fixed_human(outcome), nl=False)
        _show_check(after)
        click.echo("\n" + outcome_human(outcome, lasting_name(path), name.undo_file), nl=False)
    return code


def _show_checked(checked: _Checked, label: str = "") -> None:
    remark_interrupted(checked.left_over, label)
    _show_check(checked.report, label)
    if checked.report.verdict != "torn" and checked.report.verdict not in _SELF_EVIDENT:
        path = shell_path(lasting_name(checked.name.path))
        remark(f"{label}NOTE what it means, and what to do: instarfs report {path}")


def _show_check(report: Report, label: str = "") -> None:
    for message in check_messages(report):
        remark(label + message)
    click.echo(check_human(report), nl=False)


# ---- several images ----


def _check_all(names: Sequence[ImageName], shown: str, wanted: _Wanted) -> int:
    """Check each, and say of each what is to be said: the worst exit code."""
    codes: list[int] = []

    def documents() -> Iterator[bytes]:
        for name in names:
            outcome = _attempt(name, wanted)
            codes.append(_complain(outcome))
            if isinstance(outcome, _Checked):
                yield outcome.json()
            else:
                yield unchecked_json(name.path, str(outcome), codes[-1])

    if shown == "json":
        for part in json_array(documents()):
            click.echo(part, nl=False)
        return min(codes, key=WORST_FIRST.index)
    for number, name in enumerate(names):
        outcome = _attempt(name, wanted)
        if shown:
            click.echo(f"{chr(10) if number else ''}image: {printable(name.path)}")
            if isinstance(outcome, _Checked) and outcome.report.error is None:
                _show_checked(outcome, f"{name.path}: ")
        codes.append(_complain(outcome))
    return min(codes, key=WORST_FIRST.index)


def _attempt(name: ImageName, wanted: _Wanted) -> _Checked | Failure:
    try:
        return _check(name, wanted)
    except DOMAIN_ERRORS as error:
        return error


def _complain(outcome: _Checked | Failure) -> int:
    """Say what went wrong with one of several images, if anything: its exit code."""
    error = outcome.error if isinstance(outcome, _Checked) else outcome
    if error is not None:
        complain(str(error))
    return outcome.exit_code
