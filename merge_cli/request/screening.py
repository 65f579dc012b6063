"""What discovery found, and no run has as a checkpoint to average: earlier results, and saves that
are still under way.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from merge_cli.errors import IncompleteError, InputError, UsageError, first_ten
from merge_cli.formats.completeness import incomplete_reason
from merge_cli.formats.opening import Seen
from merge_cli.names import MANIFEST
from merge_cli.request.labels import Candidate
from merge_cli.stores.store import folder_of, is_local

_LONG = 200


def find_incomplete(in_runs: Sequence[Candidate], which: str, seen: Seen | None = None) -> dict[str, str]:
    """By path, why a checkpoint of a run folder is incomplete: of the newest ones, or of all if
    `which` is "skip"; nothing is looked at if it is "error". `seen` as in `open_checkpoint`. One
    that is broken in another way is kept: if it is selected, opening it raises the error.
    """
    chosen = {"newest": _newest_of_each_run(in_runs), "skip": in_runs, "error": []}[which]
    reasons: dict[str, str | None] = {}
    for each in chosen:
        with suppress(InputError):
            reasons[each.path] = incomplete_reason(each.path, seen=seen)
    return {path: reason for path, reason in reasons.items() if reason is not None}


@contextmanager
def offering_to_skip(candidates: Sequence[Candidate], seen: Seen | None = None) -> Iterator[None]:
    """An IncompleteError inside gets the hint `--incomplete skip`, where all `candidates` are of
    run folders and that leaves at least two of them.
    """
    try:
        yield
    except IncompleteError as error:
        skip = "to leave out what is incomplete:  --incomplete skip"
        if all(each.in_run for each in candidates) and len(candidates) - len(find_incomplete(candidates, "skip", seen)) > 1:
            raise IncompleteError(error.message, details=error.details, hint=f"{error.hint}; {skip}") from error
        raise


def _newest_of_each_run(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The last checkpoint of each folder, by time if that was read, else by step, else in the order
    of discovery.
    """
    newest: dict[str, Candidate] = {}
    for each in candidates:
        other = newest.setdefault(folder_of(each.path), each)
        if (each.mtime_ns, each.step or 0) >= (other.mtime_ns, other.step or 0):
            newest[folder_of(each.path)] = each
    return list(newest.values())


def check_none_is_merged(found: Sequence[str]) -> None:
    """Raise UsageError for a result of pmerge, as `run/*` has it: it would be averaged once more,
    often as the newest and so as the base.
    """
    local = [path for path in found if is_local(path)]
    merged = [path for path in local if Path(path if Path(path).is_dir() else folder_of(path), MANIFEST).exists()]
    if merged:
        rest = shlex.join(path for path in found if path not in merged)
        instead = rest if rest and len(rest) < _LONG else shlex.quote(folder_of(merged[0]))
        raise UsageError(
            f"{merged[0]} is an earlier result of pmerge, not a checkpoint of the run",
            details=first_ten(merged[1:]),
            hint=f"leave it out:  pmerge average {instead}  or average it too:  --allow-merged",
        )
