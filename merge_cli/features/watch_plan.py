"""What `pmerge watch` does at each complete checkpoint, checked before it begins to look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_cli.errors import UsageError
from merge_cli.request.grid import Combination, combination
from merge_cli.request.misses import no_such_checkpoint
from merge_cli.request.selection import check_tokens_per_step, in_steps
from merge_cli.request.spec import RunConfig, Selection, read_seconds
from merge_cli.stores.store import StrPath, as_path, is_glob, open_store
from merge_cli.trajectory.command import check_command
from merge_cli.trajectory.evaluators import Evaluator
from merge_cli.trajectory.folder import folder_of

SETTLE_S = 60.0


@dataclass(frozen=True)
class WatchPlan:
    """What is watched, and what is done at each complete checkpoint. `evaluator` gets a complete
    checkpoint, from which it may take tokenizer and configuration.
    """

    run: str
    kinds: tuple[Combination, ...]
    folder: Path
    dtype: str = "keep"
    config: RunConfig = field(default_factory=RunConfig)
    evaluator: Callable[[Path], Evaluator] | None = None
    allow_equal: bool = False
    metric: str | None = None
    report: Path | None = None
    keep: int | None = None
    then: str | None = None
    settle_s: float = SETTLE_S
    since: int | None = None


def plan_watch(
    run: StrPath,
    kinds: Sequence[Combination],
    *,
    output: StrPath | None = None,
    tokens_per_step: int | None = None,
    **options: Any,
) -> WatchPlan:
    """Plan to watch the folder `run`; `kinds` are the merges to make at each checkpoint, by
    `merge_cli.request.grid`, with amounts in tokens where `tokens_per_step` is given. The other
    options are fields of `WatchPlan`.

    Raises UsageError, and InputError where there is no such folder.
    """
    path = as_path(run)
    plan = WatchPlan(path, tuple(kinds), folder_of([path], None if output is None else str(output)), **options)
    if not plan.kinds:
        raise UsageError("watch needs a merge to make", hint="--last 8")
    for kind in plan.kinds:
        if "at" in kind.selection:
            raise UsageError(f"{kind.name} ends at one step, and watch at every new one", hint="leave --at out of the list")
        ending_at(kind, 1)
    if tokens_per_step is not None:
        amounts = [amount for kind in plan.kinds for amount in replace(Selection(), **kind.selection).amounts.values()]
        check_tokens_per_step(tokens_per_step, amounts)
        plan = replace(plan, kinds=tuple(replace(each, selection=in_steps(each.selection, tokens_per_step)) for each in kinds))
    if plan.keep is not None and plan.keep < 1:
        raise UsageError(f"--keep must be at least 1, not {plan.keep}")
    read_seconds(plan.settle_s, "--settle")
    if plan.report is not None and plan.evaluator is None:
        raise UsageError("--report needs --command or --text", hint="--text held_out.txt")
    if plan.then is not None:
        check_command(plan.then, "--then")
    found = open_store(path).stat(path)
    if not is_glob(path) and (found is None or found.kind != "folder"):
        if found is None or found.kind == "broken link":
            raise no_such_checkpoint(path)
        raise UsageError(f"{path} is no folder of a run")
    return plan


def ending_at(kind: Combination, step: int) -> Combination:
    """The merge of a kind that ends at `step`. Raises UsageError."""
    return combination(kind.method, kind.parameters, {**kind.selection, "at": step}, f"{kind.name}-at{step}")
