"""`pmerge inspect`: the content of checkpoints, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from merge_cli.cli import console, layout
from merge_cli.cli.options import Checkpoints, Given, Json, flags, takes
from merge_cli.request.spec import RunConfig, lay_over

if TYPE_CHECKING:
    from merge_cli.features.inspect import Report


@takes(*flags(RunConfig, only=["max_header"]))
def inspect_command(
    checkpoints: Checkpoints,
    *,
    given: Given,
    as_json: Json = False,
) -> None:
    """Show the content of checkpoints and the differences between them. Reads headers only. Exit
    code 2 if one is broken.

    Example:  pmerge inspect ckpt_1000 ckpt_2000
    """
    from merge_cli.features.inspect import inspect_checkpoints

    report = inspect_checkpoints(checkpoints, max_header=lay_over(RunConfig(), given).max_header)
    if as_json:
        console.out_json(
            {
                "checkpoints": [each.as_dict() for each in report.checkpoints],
                "differences": report.differences,
                "notes": report.notes,
                "broken": [{"path": path, "error": str(error)} for path, error in report.broken.items()],
            }
        )
    elif report.checkpoints:
        _show(report)
    for path, error in report.broken.items():
        console.print_error(error, f"broken: {path}")
    if report.broken:
        raise typer.Exit(2)


def _show(report: Report) -> None:
    found = report.checkpoints
    folder = layout.common_folder([each.path for each in found])
    rows = [
        (
            each.path.removeprefix(f"{folder}/"),
            "-" if each.step is None else each.step,
            each.num_tensors,
            each.num_files,
            " ".join(f"{dtype}:{count}" for dtype, count in each.dtypes.items()),
            f"{each.num_parameters:,}",
            console.human_bytes(each.tensor_bytes),
            " ".join(f"{count}x{layers}" for count, layers in each.experts.items()) or "-",
            ", ".join(f"{scheme}:{count}" for scheme, count in each.quantization.items())
            or ("cannot be averaged" if each.unreadable else "none"),
        )
        for each in found
    ]
    header = (
        "checkpoint",
        "step",
        "tensors",
        "files",
        "dtypes",
        "parameters",
        "bytes",
        "experts x layers",
        "quantization",
    )
    if folder:
        console.out_text(f"checkpoints in {folder}:")
    console.out_table(header, rows, empty=("-", "none"))
    newest = found[-1]
    console.out_text(f"side files of {newest.path}: {', '.join(newest.side_files) or 'none'}")
    console.out_text(f"left out by a merge: {', '.join(newest.skipped_files) or 'nothing'}")
    for unreadable in dict.fromkeys(each.unreadable for each in found if each.unreadable):
        console.out_text(f"not averaged: {unreadable}")
    for note in dict.fromkeys([*report.notes, *(note for each in found for note in each.notes)]):
        console.out_text(f"note: {note}")
    if len(found) > 1:
        console.out("differences:" if report.differences else "no differences in tensors or config")
    for line in report.differences:
        console.out_text(f"  {line}")
