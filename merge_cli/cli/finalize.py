"""`pmerge finalize`: publish by hand the files that several ranks have finished."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli import console
from merge_cli.cli.options import Given, InputsRoot, flags, takes
from merge_cli.request.spec import RunConfig, lay_over


@takes(*flags(RunConfig, only=["max_header", "trust_owner"]))
def finalize_command(
    output: Annotated[Path, typer.Argument(help="The destination that was given to pmerge average.")],
    *,
    given: Given,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    inputs_root: InputsRoot = None,
) -> None:
    """Publish an average whose files are all finished, or list the missing ones; only needed if no
    rank was left to do it.

    Example:  pmerge finalize merged-ema-1000-10000
    """
    from merge_cli.features.finalize import finalize

    run = lay_over(RunConfig(), given)
    path = finalize(output, overwrite=overwrite, inputs_root=inputs_root, max_header=run.max_header, trust_owner=run.trust_owner)
    console.out(path)
