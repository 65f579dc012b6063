"""One HTML file about a run: the feature behind `pmerge report`, as a library. Reads the ledger and
the analysis, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merge_cli.errors import OutputError, UsageError
from merge_cli.stores.store import StrPath
from merge_cli.system.durable import write_file
from merge_cli.system.files import read_regular
from merge_cli.trajectory.evidence import collect
from merge_cli.trajectory.folder import ANALYSIS, RUN, Run, folder_of, read_analysis, read_run
from merge_cli.trajectory.forecast import forecast_rows
from merge_cli.trajectory.ledger import Ledger
from merge_cli.trajectory.page import page
from merge_cli.trajectory.propose import command_of

REPORT = "report.html"
_MARK = b'id="pmerge-data"'


def report(
    paths: StrPath | Sequence[StrPath],
    destination: StrPath | None = None,
    *,
    ledger: StrPath | None = None,
    metric: str | None = None,
    assume_loss: bool = False,
    anneal: int | None = None,
) -> Path:
    """Write the report about the run at `paths` to `destination` (`RUN.pmerge/report.html`), and
    return its path.

    `ledger` is the folder with the ledger (`RUN.pmerge/`); the other options are those of
    `forecast`. The same ledger and analysis give the same bytes. Raises UsageError where there is
    no ledger, InputError where it cannot be read, OutputError.
    """
    given = [str(paths)] if isinstance(paths, str) or not isinstance(paths, Sequence) else [str(path) for path in paths]
    folder = folder_of(given, None if ledger is None else str(ledger))
    rows = Ledger(folder).rows()
    if not rows:
        raise UsageError(f"there is no ledger in {folder}", hint=f"evaluate first:  pmerge evaluate {given[0]} --text FILE")
    run = read_run(folder) or Run(given[0], ())
    analysis = read_analysis(folder)
    found = forecast_rows(rows, metric=metric, assume_loss=assume_loss, analysis=analysis, steps=run.steps, anneal=anneal)
    names = [*sorted(path.name for path in folder.glob("ledger*.jsonl")), RUN, ANALYSIS]
    sources = {name: read_regular(folder / name, 1 << 30) for name in names if (folder / name).exists()}
    evidence = collect(rows, metric, analysis)
    text = page(run, evidence, found, analysis, evidence.rows, sources, command_of(found, given))
    path = folder / REPORT if destination is None else Path(destination)
    if path.is_dir() or (path.exists() and _MARK not in read_regular(path, 1 << 30)):
        raise OutputError(f"{path} exists, and is no report", hint="choose another place:  -o report.html")
    write_file(path, text.encode())
    return path
