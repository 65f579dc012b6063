"""`pmerge evaluate`: measure checkpoints and merges of a run, and keep the numbers in a ledger."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_cli.cli import console
from merge_cli.cli.lists import read_list, split_list
from merge_cli.cli.options import Checkpoints, DryRun, Given, Json, Quiet, flags, takes
from merge_cli.errors import UsageError
from merge_cli.request.spec import MergeSpec, Processes, Selection, lay_over

if TYPE_CHECKING:
    from merge_cli.features.evaluate import EvaluationPlan, EvaluationResult
    from merge_cli.trajectory.evaluators import Evaluator
    from merge_cli.trajectory.ledger import Row


@takes(
    *flags(Selection, only=["incomplete", "allow_merged"]),
    *flags(MergeSpec, only=["dtype"]),
    *flags(Processes, only=["rank", "world_size"]),
)
def evaluate_command(
    checkpoints: Checkpoints,
    command: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Your evaluation: {path} {name} {step} {out} are filled in, PMERGE_PATH ... set."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Built in: the loss on a .txt, .jsonl or .parquet file.")
    ] = None,
    plan: Annotated[str, typer.Option(help="auto, rolling, grid, pairs, plane, or a JSON file with a list as of sweep.")] = "auto",
    metric: Annotated[list[str] | None, typer.Option(metavar="PATH", help="Metrics that must be there and are shown.")] = None,
    annealed: Annotated[
        list[str] | None, typer.Option(metavar="PATH:STEP", help="Also the end of a real annealing, which began at STEP.")
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="The ledger's folder (RUN.pmerge).")] = None,
    *,
    given: Given,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Commands at the same time.")] = 1,
    gpus: Annotated[str | None, typer.Option(metavar="LIST", help="As 0,1,2: one command a GPU, which sees no other.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Merges that lie on the disk at once.")] = 4,
    keep: Annotated[bool, typer.Option("--keep", help="Do not remove merges once they are measured.")] = False,
    redo: Annotated[bool, typer.Option("--redo", help="Measure again what the ledger knows.")] = False,
    allow_equal: Annotated[bool, typer.Option("--allow-equal", help="Believe equal numbers of different weights.")] = False,
    tokenizer: Annotated[str | None, typer.Option(metavar="PATH", help="--text: another tokenizer's folder, or bytes.")] = None,
    context: Annotated[int | None, typer.Option(help="--text: tokens of a window (the model's, at most 2048).")] = None,
    stride: Annotated[int | None, typer.Option(help="--text: from one window to the next (the context).")] = None,
    device: Annotated[str, typer.Option(help="--text: auto (a GPU if there is one), cpu, cuda or cuda:K.")] = "auto",
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure checkpoints and merges; the numbers go into a ledger, which forecast and report read.

    Example:  pmerge evaluate run/ --command 'python eval_loss.py {path}'
    """
    from merge_cli.features.evaluate import plan_evaluation, run_evaluation
    from merge_cli.ranks.launcher import find_rank
    from merge_cli.trajectory.plans import PLANS

    processes = lay_over(Processes(), given)
    selection = lay_over(Selection(), given)
    me = find_rank(os.environ, processes.rank, processes.world_size)
    if (command is None) == (text is None):
        raise UsageError("evaluate needs one of --command and --text", hint=f"pmerge evaluate {checkpoints[0]} --text held_out.txt")
    evaluator = _command(command, metric or [], jobs, gpus) if command is not None else None
    if evaluator is None:
        if jobs > 1 or gpus:
            raise UsageError(
                "--jobs and --gpus are for commands", hint="--text uses more GPUs by ranks:  torchrun --nproc-per-node 8 ..."
            )
        evaluator = _text_evaluator(checkpoints, selection, text, tokenizer, context, stride, device, me.local_rank)
    planned = plan_evaluation(
        checkpoints,
        evaluator,
        plan=plan if plan in PLANS or not Path(plan).is_file() else read_list(plan),
        annealed=dict(map(_annealed, annealed or [])),
        output=output,
        dtype=lay_over(MergeSpec(), given).dtype,
        selection=selection,
        batch=batch,
        keep=keep,
        redo=redo,
        allow_equal=allow_equal,
        rank=me,
        **given,
    )
    if not quiet:
        _show_plan(planned)
    if dry_run:
        for each in planned.missing:
            console.out(each.claim.name)
        return

    def show(row: Row, done: int, total: int) -> None:
        if not quiet:
            console.err(f"{done} of {total}  {row.name}  {_numbers(row, metric)}  ({console.human_seconds(row.seconds)})")

    result = run_evaluation(planned, on_row=show, command=sys.argv)
    _show_result(result, metric, as_json)
    if not quiet:
        console.err(f"ledger: {result.folder};  next:  pmerge forecast {checkpoints[0]}")
    if result.error is not None:
        raise result.error


def _command(command: str, metrics: list[str], jobs: int, gpus: str | None) -> Evaluator:
    from merge_cli.trajectory.evaluators import CommandEvaluator

    return CommandEvaluator(command, metrics, jobs, split_list("--gpus", gpus, "numbers with commas: 0,1,2"))


def _text_evaluator(checkpoints: list[str], selection: Selection, text: Path | None, *options: Any) -> Evaluator:
    from merge_cli.request.discovery import find_candidates
    from merge_cli.request.selection import order_candidates
    from merge_cli.trajectory.heldout import TextEvaluator

    tokenizer, context, stride, device, local_rank = options
    candidates = find_candidates([Path(path) for path in checkpoints], selection).candidates
    newest = order_candidates(candidates, "step", needs_order=True)[-1].path
    return TextEvaluator(
        text or Path(), Path(newest), tokenizer=tokenizer, context=context, stride=stride, device=device, local_rank=local_rank
    )


def _annealed(text: str) -> tuple[str, int]:
    path, _, step = text.rpartition(":")
    if not path or not (step.isascii() and step.isdecimal()):
        raise UsageError(f"--annealed cannot be {text!r}", details=["expected  PATH:STEP, the step at which the decay began"])
    return path, int(step)


def _show_plan(plan: EvaluationPlan) -> None:
    missing = plan.missing
    merges = sum(each.entry is not None for each in missing)
    known = f", {len(plan.known)} of {len(plan.targets)} are known" if plan.known else ""
    share = "" if plan.rank.is_alone else f" ({plan.rank})"
    console.err(f"{len(missing)} evaluations{share}: {len(missing) - merges} checkpoints, {merges} merges{known}")
    if merges:
        console.err(f"  merges take up to {console.human_bytes(plan.disk_bytes)} on the disk of {plan.folder}")
    for note in plan.notes:
        console.err(f"note: {note}")
    for warning in plan.evaluator.warnings:
        console.err(f"warning: {warning}")


def _numbers(row: Row, wanted: list[str] | None) -> str:
    from merge_cli.trajectory.results import main_metric, pick

    names = pick(row.metrics, wanted) if wanted else [main_metric(list(row.metrics))]
    return "  ".join(f"{name} {row.metrics[name]:.6g}" + _plus_minus(row, name) for name in names)


def _plus_minus(row: Row, name: str) -> str:
    return f" +- {row.errors[name]:.2g}" if name in row.errors else ""


def _show_result(result: EvaluationResult, wanted: list[str] | None, as_json: bool) -> None:
    from merge_cli.trajectory.records import encode

    if as_json:
        console.out_json({"folder": str(result.folder), "rows": [encode(row) for row in result.rows]})
        return
    for line in console.table(("", ""), [(row.name, _numbers(row, wanted)) for row in result.rows], indent="")[1:]:
        console.out(line)
