"""`pmerge watch`: merge a run while it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merge_cli.cli import console
from merge_cli.cli.lists import read_list, split_list
from merge_cli.cli.options import Given, Json, Quiet, flags, takes
from merge_cli.errors import UsageError
from merge_cli.request.amounts import parse_whole
from merge_cli.request.spec import MergeSpec, RunConfig, Selection, lay_over

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_cli.features.watch import Event
    from merge_cli.request.grid import Combination
    from merge_cli.trajectory.evaluators import Evaluator

_LOUD = ("failed", "warning")


@takes(
    *flags(Selection, only=["tokens_per_step"]),
    *flags(MergeSpec, only=["dtype"]),
    *flags(RunConfig, only=["device", "memory", "device_memory", "threads", "chunk_size", "direct", "max_header"]),
)
def watch_command(
    run: Annotated[str, typer.Argument(help="The run folder that the trainer saves into.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="PATH", help="Where merges, ledger and record go (RUN.pmerge).")
    ] = None,
    *,
    method: Annotated[str, typer.Option(metavar="LIST", help="As sma,wma,ema:0.1.")] = "sma",
    last: Annotated[str, typer.Option(metavar="LIST", help="Merges of the newest N, for each N of 6,10.")] = "8",
    every: Annotated[str | None, typer.Option(metavar="LIST", help="One every V steps, for each V of 1000,2k.")] = None,
    list_file: Annotated[
        str | None, typer.Option("--list", metavar="FILE", help="Instead: a JSON array of objects with options of average.")
    ] = None,
    since: Annotated[
        int | None, typer.Option(metavar="STEP", help="Also the merges that end at older checkpoints, from this step on.")
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Keep the last K merges of each kind; remove older ones.")] = None,
    command: Annotated[str | None, typer.Option(metavar="CMD", help="Measure each merge and checkpoint, as evaluate does.")] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Measure the loss on a text, as evaluate does.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Metrics that must be there; the first is shown.")
    ] = None,
    allow_equal: Annotated[bool, typer.Option("--allow-equal", help="Believe equal numbers of different weights.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep a forecast and this report up to date.")] = None,
    then: Annotated[
        str | None, typer.Option(metavar="CMD", help="Run this after each merge; {path} {name} {step} are filled in.")
    ] = None,
    settle: Annotated[float, typer.Option(help="Seconds without a change after which a checkpoint counts.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Do what there is to do, and end: for cron and Slurm.")] = False,
    given: Given,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge a run while it trains: whenever a checkpoint is complete, make the merges that end
    there. Started again after any end, it goes on.

    Example:  pmerge watch run/ --last 8 --keep 2 --then 'rsync -a {path} host:merges/'
    """
    from merge_cli.features.watch import watch
    from merge_cli.features.watch_plan import plan_watch

    if command is not None and text is not None:
        raise UsageError("--command and --text both measure", hint="use one of them")
    plan = plan_watch(
        run,
        _kinds(method, last, every, list_file),
        output=output,
        tokens_per_step=lay_over(Selection(), given).tokens_per_step,
        dtype=lay_over(MergeSpec(), given).dtype,
        config=lay_over(RunConfig(), given),
        evaluator=_evaluator(command, text, metric),
        allow_equal=allow_equal,
        metric=metric[0] if metric else None,
        report=report,
        keep=keep,
        then=then,
        settle_s=settle,
        since=since,
    )

    def show(event: Event) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        if not quiet or event.kind in _LOUD:
            console.err(f"{now}  {event.kind:8}  {event.text}")
        if as_json:
            console.out_json_line({"time": now, "event": event.kind, **{k: v for k, v in vars(event).items() if v and k != "kind"}})
        elif event.kind == "done":
            console.out(event.path)

    if watch(plan, show, once=once):
        raise typer.Exit(1)


def _kinds(method: str, last: str, every: str | None, list_file: str | None) -> list[Combination]:
    from merge_cli.request.grid import entry, grid, unique

    if list_file is not None:
        return unique(list(map(entry, read_list(list_file))))
    counts = [parse_whole(each, "--last") for each in split_list("--last", last)]
    return grid(split_list("--method", method), counts, split_list("--every", every))


def _evaluator(command: str | None, text: Path | None, metrics: list[str] | None) -> Callable[[Path], Evaluator] | None:
    if command is not None:
        from merge_cli.trajectory.evaluators import CommandEvaluator

        evaluator = CommandEvaluator(command, metrics or [])
        return lambda checkpoint: evaluator
    if text is not None:
        return lambda checkpoint: _text(text, checkpoint)
    return None


def _text(text: Path, checkpoint: Path) -> Evaluator:
    from merge_cli.trajectory.heldout import TextEvaluator

    return TextEvaluator(text, checkpoint)
