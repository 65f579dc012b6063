"""`pmerge push`: send a published result to the Hub or to an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli import console
from merge_cli.cli.options import Given, Json, Quiet, flags, takes
from merge_cli.request.spec import RunConfig, lay_over


@takes(*flags(RunConfig, only=["max_header"]))
def push_command(
    folder: Annotated[Path, typer.Argument(help="A folder written by pmerge average.")],
    address: Annotated[str, typer.Argument(help="hf://org/name@branch, s3://bucket/folder, gs:// or az://.")],
    *,
    given: Given,
    read_back: Annotated[
        bool, typer.Option("--read-back", help="Read all bytes again from there, and compare their sha256.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Verify a result and send it; the index goes last, nothing there is replaced, and the same
    command continues a push that broke off. The address of what was sent is printed.

    Example:  pmerge push merged-ema-1000-10000 hf://org/name@merged
    """
    from merge_cli.features.push import push

    max_header = lay_over(RunConfig(), given).max_header
    with console.ProgressLine(quiet) as line:
        done = push(folder, address, read_back=read_back, max_header=max_header, on_progress=line.update)
    if not quiet:
        console.err(
            f"sent {console.count(len(done.sent), 'file')} ({console.human_bytes(done.sent_bytes)}),"
            f" kept {len(done.kept)} that were there, in {console.human_seconds(done.seconds)}"
        )
    if as_json:
        console.out_json(
            {
                "address": done.address,
                "sent": done.sent,
                "kept": done.kept,
                "sent_bytes": done.sent_bytes,
                "seconds": done.seconds,
            }
        )
    else:
        console.out(done.address)
