"""From the combinations of a sweep to the checkpoints and coefficients of each output. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from merge_cli.errors import MismatchError, UsageError, first_ten
from merge_cli.request.coefficients import Coefficients
from merge_cli.request.grid import Combination
from merge_cli.request.labels import Candidate
from merge_cli.request.selection import coefficients_of, select_checkpoints
from merge_cli.request.spec import MergeSpec, Selection
from merge_cli.stores.store import folder_of


@dataclass(frozen=True)
class Chosen:
    """A combination with its checkpoints, oldest to newest, and their coefficients."""

    combination: Combination
    candidates: tuple[Candidate, ...]
    coefficients: Coefficients


def choose_all(
    wanted: Sequence[Combination], candidates: Sequence[Candidate], selection: Selection
) -> tuple[list[Chosen], list[tuple[Combination, str]], list[tuple[Combination, str]], list[str]]:
    """The combinations that can be made, those that equal another, those that cannot, and warnings.
    Raises UsageError for none.
    """
    made: dict[object, Chosen] = {}
    same_as: list[tuple[Combination, str]] = []
    skipped: list[tuple[Combination, str]] = []
    warnings: dict[str, tuple[str, list[str]]] = {}
    for each in wanted:
        try:
            asked = replace(selection, **each.selection)
            selected = select_checkpoints(candidates, asked, each.method)
        except (UsageError, MismatchError) as error:
            skipped.append((each, "; ".join([error.message, *(" ".join(line.split()) for line in error.details[:1])])))
            continue
        own = MergeSpec(method=each.method, parameters=each.parameters)
        found, more = coefficients_of(selected.candidates, own, selection.order)
        key = (tuple(candidate.path for candidate in selected.candidates), found)
        first = made.setdefault(key, Chosen(each, selected.candidates, found))
        if first.combination is not each:
            same_as.append((each, first.combination.name))
            continue
        for line in (*selected.warnings, *more):  # of several that differ in numbers only, the first is shown
            warnings.setdefault(re.sub(r"[0-9][0-9.]*", "#", line), (line, []))[1].append(each.name)
    if not made:
        where = shlex.quote(folder_of(candidates[-1].path)) if candidates else "RUN_FOLDER"
        reasons = [f"{each.name}  {reason}" for each, reason in skipped]
        raise UsageError(
            "no combination of the sweep can be made",
            details=first_ten(reasons),
            hint=f"pmerge inspect {where}  lists the checkpoints",
        )
    lines = [f"{_few(names)}: {line}" for line, names in warnings.values()]
    return list(made.values()), same_as, skipped, lines


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more output{'s' if len(names) > 2 else ''}"
