"""`pmerge verify`: check a merged checkpoint against its record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from merge_cli.cli import console
from merge_cli.cli.options import Json, Quiet
from merge_cli.errors import UsageError


def verify_command(
    output: Annotated[Path, typer.Argument(help="A folder written by pmerge average.")],
    against_inputs: Annotated[
        bool, typer.Option("--against-inputs", help="Compute tensors again from the inputs, and compare bits.")
    ] = False,
    sample: Annotated[
        str | None, typer.Option(metavar="N", help="Tensors to compute again, drawn at random, or all. [default: 64]")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check headers, sizes, sha256, index and side files of a result; exit code 0 only if all are
    right.

    Example:  pmerge verify merged-ema-1000-10000 --against-inputs
    """
    from merge_cli.features.verify import verify

    given: dict[str, Any] = {} if sample is None else {"sample": _parse_sample(sample)}
    if sample is not None and not against_inputs:
        raise UsageError("--sample is the number of tensors to compute again", hint="add --against-inputs")
    with console.ProgressLine(quiet) as line:
        found = verify(output, against_inputs=against_inputs, **given, on_progress=line.update)
    if as_json:
        console.out_json(
            {
                "path": str(found.path),
                "ok": found.ok,
                "files": found.files,
                "problems": found.problems,
                "notes": found.notes,
                "recomputed": found.recomputed,
                "tensors": found.num_tensors,
                "bytes_read": found.bytes_read,
                "seconds": found.seconds,
            }
        )
    elif not quiet:
        for row in console.table(("file", "state"), [(name, state[:100]) for name, state in found.files.items()], indent=""):
            console.out(row)
        if found.num_tensors:
            console.out(f"{found.recomputed} of {console.count(found.num_tensors, 'tensor')} computed again")
        console.out("ok" if found.ok else f"{console.count(len(found.problems), 'check')} failed")
    for problem in found.problems[:20]:
        console.say(f"error: {problem}")
    if len(found.problems) > 20:
        console.say(f"... and {len(found.problems) - 20} more; --json lists them all")
    if not quiet:
        for note in found.notes[:10]:
            console.say(f"note: {note}")
    if not found.ok:
        raise typer.Exit(1)


def _parse_sample(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise UsageError(f"--sample cannot be {text!r}", details=["expected  a number of tensors, or all"], hint="--sample 64")
    return int(text)
