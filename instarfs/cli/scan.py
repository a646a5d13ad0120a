"""`instarfs scan`: every qcow2 image below some paths, and what is known of all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version

import click

from instarfs.cli.complaints import NAME, remark
from instarfs.cli.durations import Duration
from instarfs.cli.options import quiet_option
from instarfs.cli.sizes import Size
from instarfs.cli.stopping import stoppable
from instarfs.errors import WORST_FIRST
from instarfs.render.scan import (
    change_line,
    interrupted_text,
    report_text,
    row_line,
    run_line,
    skipped_line,
    skipped_text,
)
from instarfs.scan.pool import Pool
from instarfs.scan.run import Engine, Scan, Wanted
from instarfs.scan.state import State
from instarfs.scan.values import Limits, Row, Shard, Skipped, Tell
from instarfs.scan.workers import Lister, Nursery

_DAY = 86400.0
_LEAST_MEMORY = 128 << 20
"""What it takes to look at a small image."""


class _ShardName(click.ParamType[Shard]):
    name = "N/T"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Shard:
        number, slash, total = str(value).partition("/")
        if not (slash and number.isascii() and number.isdigit() and total.isascii()):
            self.fail(f"'{value}' is not N/T, as 0/4 to 3/4 are", param, ctx)
        if not (total.isdigit() and len(total) < 10 and int(number) < int(total)):
            self.fail(f"'{value}': N counts from 0, and is less than T", param, ctx)
        return Shard(int(number), int(total))


@click.command(name="scan")
@click.option(
    "--state",
    "state_path",
    metavar="FILE",
    type=click.Path(readable=False),
    help="Where what is known is kept from scan to scan; without it nothing is.",
)
@click.option(
    "--metrics",
    metavar="FILE",
    type=click.Path(readable=False),
    help="What is known, for the node exporter of Prometheus to collect; ends in .prom.",
)
@click.option("--report", is_flag=True, help="Look at no image: say what the state knows.")
@click.option(
    "--output",
    type=click.Choice(["human", "jsonl"]),
    default="human",
    show_default=True,
    help="A text when all is done, worst first; or a JSON object a line for each image at once.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    help="Images that are checked at a time; by default as many as there are processors.",
)
@click.option("--timeout", type=Duration(), default="10m", show_default=True, help="For one image.")
@click.option(
    "--max-memory",
    type=Size(),
    default=0,
    metavar="SIZE",
    help="For one image; by default what it may need at most grows with its size.",
)
@click.option(
    "--max-read-rate",
    type=Size(),
    default=0,
    metavar="SIZE",
    help="Bytes to read a second, all together; by default as many as there are.",
)
@click.option(
    "--max-duration",
    type=Duration(),
    default=float("inf"),
    metavar="TIME",
    help="Begin with no image after this; the next scan goes on.",
)
@click.option(
    "--outdated-after",
    type=Duration(),
    default=7 * _DAY,
    metavar="TIME",
    help="Check what has not changed, too, when its verdict is older than this; by default 7d.",
)
@click.option(
    "--shard",
    type=_ShardName(),
    default="0/1",
    metavar="N/T",
    help="The images of part N of T alone; N counts from 0.",
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Have the images checked by the Dask cluster of this scheduler, whose hosts see them too.",
)
@quiet_option
@click.argument("paths", metavar="PATH...", type=click.Path(readable=False), nargs=-1)
def command(
    *,
    paths: tuple[str, ...],
    state_path: str | None,
    metrics: str | None,
    output: str,
    jobs: int | None,
    timeout: float,
    max_memory: int,
    max_read_rate: int,
    max_duration: float,
    outdated_after: float,
    shard: Shard,
    dask: str | None,
    report: bool,
    quiet: bool,
) -> int:
    """Check every qcow2 image that is PATH, or below it, whatever it is called, in use or not.

    No image stops a scan: one that hangs, or whose check is killed, is a row that says so. Nothing
    is written but the state. Links are not followed, and no backing file is opened. The exit code
    is the worst of all images that are known, as of `instarfs check`; 1 also where something could
    not be looked at.
    """
    shown = "" if quiet else output
    if report:
        if paths or state_path is None:
            raise click.UsageError("--report is of a state alone: it takes --state and no PATH")
        with State.read(state_path) as state:
            _tell_prometheus(metrics, state)
            return _report(state, shown, _worst(state))
    if 0 < max_memory < _LEAST_MEMORY:
        raise click.UsageError(f"--max-memory: {_LEAST_MEMORY >> 20}M are the least it takes")
    if not paths:
        raise click.UsageError("Missing argument 'PATH...'.")
    named = [os.fsencode(path) for path in paths]
    wanted = Wanted(named, version(NAME), shard, outdated_after, max_duration)
    limits = Limits(timeout, max_read_rate, max_memory)
    with State.open(state_path) if state_path is not None else State.none() as state:
        where = dask or jobs or _processors()
        with _looking(limits, where) as (engine, lister, stop):
            code = Scan(wanted, state, lister, _teller(shown), stop).run(engine)
        _tell_prometheus(metrics, state)
        if shown == "human":
            _report(state, shown, code)
        elif shown:
            _conclude(state, code)
        return code


def _tell_prometheus(path: str | None, state: State) -> None:
    if path is not None:
        from instarfs.scan.metrics import write_metrics  # noqa: PLC0415 - for nothing but this

        write_metrics(path, state)


def _processors() -> int:
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _looking(
    limits: Limits, where: int | str
) -> Iterator[tuple[Engine, Lister, Callable[[], bool]]]:
    """Who checks, who lists, and whether to stop.

    *where*: by so many processes here, or by the cluster at that address.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(stoppable())
        jobs = where if isinstance(where, int) else 1
        nursery = stack.enter_context(Nursery(jobs, limits))
        engine: Engine = Pool(nursery, jobs, stop)
        if isinstance(where, str):
            from instarfs.scan.cluster import Cluster  # noqa: PLC0415 - for nothing but this

            engine = stack.enter_context(contextlib.closing(Cluster(where, limits, stop)))
        yield engine, Lister(nursery, stop), stop


def _teller(shown: str) -> Tell:
    def tell(what: Row | Skipped, unchanged: bool) -> None:
        if shown and isinstance(what, Row) and what.interrupted:
            remark(interrupted_text(what))
        if shown == "jsonl":
            line = skipped_line(what) if isinstance(what, Skipped) else row_line(what, unchanged)
            click.echo(line, nl=False)
        elif shown and isinstance(what, Skipped) and what.is_failure:
            remark(f"{NAME}: {skipped_text(what)}")

    return tell


# ---- what is known ----


def _worst(state: State) -> int:
    codes = state.exit_codes()
    if next(state.unseen(), None) is not None:
        codes.add(1)
    return min(codes or {0}, key=WORST_FIRST.index)


def _report(state: State, shown: str, code: int) -> int:
    counts = state.counts()
    if shown == "jsonl":
        for verdict in counts:
            for row in state.rows(verdict):
                click.echo(row_line(row), nl=False)
        _conclude(state, code)
    elif shown:
        worst = ((verdict, state.rows(verdict)) for verdict in counts if verdict != "clean")
        changes = list(state.changes())
        for part in report_text(state.last_run(), counts, worst, state.unseen(), changes):
            click.echo(part, nl=False)
    return code


def _conclude(state: State, code: int) -> None:
    for line in _last_lines(state, code):
        click.echo(line, nl=False)


def _last_lines(state: State, code: int) -> Iterator[str]:
    yield from map(change_line, state.changes())
    run = state.last_run()
    if run is not None:
        yield run_line(run, state.counts(), code)
