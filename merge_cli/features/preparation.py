"""The last steps of planning, the same for one output and for many: what cheap checks find at the
destinations, and after them how the work is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from merge_cli.errors import PmergeError
from merge_cli.output.existing import is_published
from merge_cli.output.preflight import check_destinations
from merge_cli.planning.plan import MergePlan
from merge_cli.ranks.launcher import Rank
from merge_cli.request.spec import RunConfig
from merge_cli.tuning.tune import Tuning, tune


class Prepared(NamedTuple):
    """The destinations whose results are there already, the findings at the others that would stop
    the run, and the device and memory.
    """

    done: frozenset[Path]
    findings: tuple[PmergeError, ...]
    tuning: Tuning


def prepare(
    plans: Mapping[Path, MergePlan], tuned: MergePlan, run: RunConfig, rank: Rank, found: Sequence[PmergeError] = ()
) -> Prepared:
    """Look at the destinations of `plans`, then tune for `tuned`; `found` are findings of checks
    before.

    Weights are timed to choose the device and the kind of reads only where something is left to do
    and no finding stops it. Raises UsageError for a missing device or too little memory.
    """
    hashed = run.overwrite or run.verify_existing
    done = frozenset(path for path, merge in plans.items() if is_published(path, merge, hashed=hashed))
    left = {path: merge for path, merge in plans.items() if path not in done}
    findings = (*check_destinations(left, run, rank.world_size), *found) if left else tuple(found)
    return Prepared(done, findings, tune(tuned, run if left and not findings else run.without_trials(), rank))
