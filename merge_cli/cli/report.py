"""`pmerge report`: one HTML file about a run."""

from __future__ import annotations

from typing import Annotated

import typer

from merge_cli.cli import console
from merge_cli.cli.options import Checkpoints


def report_command(
    checkpoints: Checkpoints,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="Where it goes (RUN.pmerge/report.html).")
    ] = None,
    ledger: Annotated[str | None, typer.Option(metavar="PATH", help="The ledger's folder (RUN.pmerge).")] = None,
    metric: Annotated[str | None, typer.Option(metavar="PATH", help="Which metric of the ledger (its first loss).")] = None,
    is_loss: Annotated[bool, typer.Option("--is-loss", help="The metric is a loss, whatever its name.")] = False,
    anneal: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Also the loss after a decay over so many steps from now.")
    ] = None,
) -> None:
    """Write a report about a run as one HTML file, whose path is printed. Reads the ledger and the
    analysis only.

    Example:  pmerge report run/ -o report.html
    """
    from merge_cli.features.report import report

    console.out(report(checkpoints, output, ledger=ledger, metric=metric, assume_loss=is_loss, anneal=anneal))
