"""`pmerge verify`: check a merged checkpoint against its record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_cli.cli import console
from merge_cli.cli.options import Given, InputsRoot, Json, Quiet, flags, takes
from merge_cli.errors import InputError, UsageError
from merge_cli.request.spec import RunConfig, lay_over

if TYPE_CHECKING:
    from merge_cli.features.verify import Verification
    from merge_cli.output.progress import Progress


@takes(*flags(RunConfig, only=["max_header"]))
def verify_command(
    output: Annotated[Path, typer.Argument(help="A folder written by pmerge average or pmerge sweep.")],
    *,
    given: Given,
    against_inputs: Annotated[
        bool, typer.Option("--against-inputs", help="Compute tensors again from the inputs, and compare bits.")
    ] = False,
    sample: Annotated[
        str | None, typer.Option(metavar="N", help="Tensors to compute again, drawn at random, or all. [default: 64]")
    ] = None,
    inputs_root: InputsRoot = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check headers, sizes, sha256, index and side files of a result; exit code 0 only if all are
    right.

    Example:  pmerge verify merged-ema-1000-10000 --against-inputs
    """
    from merge_cli.features.verify import results_in

    options: dict[str, Any] = {} if sample is None else {"sample": _parse_sample(sample)}
    options["max_header"] = lay_over(RunConfig(), given).max_header
    if sample is not None and not against_inputs:
        raise UsageError("--sample is the number of tensors to compute again", hint="read them again:  --against-inputs")
    if inputs_root is not None:
        if not against_inputs:
            raise UsageError("--inputs-root is for inputs that are read again", hint="read them again:  --against-inputs")
        options["inputs_root"] = inputs_root
    results = results_in(output)
    found = []
    for path in results:
        with console.ProgressLine(quiet) as line:
            found.append(_verify(path, against_inputs, options, line.update, alone=path == output))
        if not as_json:
            _show(found[-1], quiet, named=len(results) > 1)
    if as_json and found[0].path == output:
        console.out_json(_as_dict(found[0]))
    elif as_json:
        console.out_json({"path": str(output), "ok": all(each.ok for each in found), "outputs": [_as_dict(each) for each in found]})
    if not all(each.ok for each in found):
        raise typer.Exit(1)


def _verify(
    path: Path, against_inputs: bool, options: dict[str, Any], on_progress: Callable[[Progress], None], *, alone: bool
) -> Verification:
    """Verify a result. An output of a sweep (not `alone`) that is no result of pmerge is one that
    failed, so that the others are checked too.
    """
    from merge_cli.features.verify import Verification, verify
    from merge_cli.formats.safetensors import BoundError

    try:
        return verify(path, against_inputs=against_inputs, **options, on_progress=on_progress)
    except InputError as error:
        if alone or isinstance(error, BoundError):
            raise
        return Verification(path, {}, (error.message,), (), 0, 0.0)


def _as_dict(found: Verification) -> dict[str, Any]:
    return {
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


def _show(found: Verification, quiet: bool, named: bool) -> None:
    if not quiet:
        if named:
            console.out(f"{found.path}:")
        for row in console.table(("file", "state"), [(name, state[:100]) for name, state in found.files.items()], indent=""):
            console.out(row)
        if found.num_tensors:
            console.out(f"{found.recomputed} of {console.count(found.num_tensors, 'tensor')} computed again")
        console.out("ok" if found.ok else f"{console.count(len(found.problems), 'check')} failed")
    for problem in found.problems[:20]:
        console.err(f"error: {problem}")
    if len(found.problems) > 20:
        console.err(f"... and {len(found.problems) - 20} more; --json lists them all")
    if not quiet:
        for note in found.notes[:10]:
            console.err(f"note: {note}")


def _parse_sample(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise UsageError(f"--sample cannot be {text!r}", details=["expected  a number of tensors, or all"], hint="--sample 64")
    return int(text)
