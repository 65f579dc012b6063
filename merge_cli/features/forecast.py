"""What a run's ledger foretells: the feature behind `pmerge forecast`, as a library. Reads numbers
only, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge_cli.errors import UsageError
from merge_cli.stores.store import StrPath
from merge_cli.trajectory.folder import folder_of, read_analysis, read_run
from merge_cli.trajectory.forecast import Forecast, forecast_rows
from merge_cli.trajectory.ledger import Ledger


def forecast(
    paths: StrPath | Sequence[StrPath],
    *,
    output: StrPath | None = None,
    metric: str | None = None,
    assume_loss: bool = False,
    anneal: int | None = None,
) -> Forecast:
    """The forecast for the run at `paths`, from the ledger that `evaluate` keeps in `RUN.pmerge/`
    (or in `output`).

    `metric` is one of the ledger's (default: its first loss); `assume_loss` lets a metric with
    another name count as a loss. `anneal` asks for the loss after a decay over so many steps from
    now. See `merge_cli.trajectory.forecast` for the formulas.

    Raises UsageError where there is no ledger or no such metric, InputError for one that cannot be
    read.
    """
    given = [paths] if isinstance(paths, str) or not isinstance(paths, Sequence) else list(paths)
    if anneal is not None and anneal < 1:
        raise UsageError(f"--anneal must be at least 1 step, not {anneal}")
    folder = folder_of([str(path) for path in given], None if output is None else str(output))
    rows = Ledger(folder).rows()
    if not rows:
        raise UsageError(
            f"there is no ledger in {folder}",
            hint=f"evaluate first:  pmerge evaluate {given[0]} --text FILE",
        )
    run = read_run(folder)
    steps = run.steps if run is not None else []
    return forecast_rows(rows, metric=metric, assume_loss=assume_loss, analysis=read_analysis(folder), steps=steps, anneal=anneal)
