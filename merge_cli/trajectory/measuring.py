"""Measure claims, several at once, and add a row to the ledger for each as soon as its numbers are
known.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from merge_cli.errors import ChangedError, InputError, PmergeError
from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.formats.opening import open_checkpoint
from merge_cli.names import MANIFEST
from merge_cli.output.existing import read_manifest
from merge_cli.trajectory.evaluators import EvaluationError, Evaluator, Subject, empty_folder
from merge_cli.trajectory.folder import OUTPUTS
from merge_cli.trajectory.ledger import Ledger, Row
from merge_cli.trajectory.results import digits

_ENOUGH_DIGITS = 8  # of all numbers of a result: two equal ones are then no chance; with fewer, three are


class Measuring:
    """Rows without numbers become rows of the ledger. `on_row` gets each, how many are done, and
    how many there are.

    `measured` are the rows made so far, `failures` the errors of those that could not be, by name.
    """

    def __init__(
        self,
        folder: Path,
        evaluator: Evaluator,
        ledger: Ledger,
        total: int,
        allow_equal: bool,
        on_row: Callable[[Row, int, int], None] | None,
    ) -> None:
        self._folder = folder
        self._evaluator = evaluator
        self._ledger = ledger
        self._total = total
        self._allow_equal = allow_equal
        self._on_row = on_row
        self._before = [row for row in ledger.rows() if row.evaluator == evaluator.identity]
        self.measured: list[Row] = []
        self.failures: dict[str, PmergeError] = {}

    def measure(self, claims: Sequence[tuple[Row, Subject]]) -> None:
        """Measure all claims. An error stops the others only if it is the first thing that happens,
        or makes all doubtful.
        """
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self._evaluator.at_once):
            slots.put(slot)
        pool = ThreadPoolExecutor(self._evaluator.at_once)
        try:
            running: dict[Future[Row], Row] = {pool.submit(self._one, *each, slots): each[0] for each in claims}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._finish(running.pop(future), future)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._evaluator.stop()

    def _one(self, claim: Row, subject: Subject, slots: SimpleQueue[int]) -> Row:
        slot = slots.get()
        try:
            folder = self._folder / OUTPUTS / f"{claim.name}-{claim.key[:8]}"
            empty_folder(folder)
            began = time.perf_counter()
            result = self._evaluator.measure(subject, folder, slot)
            seconds = time.perf_counter() - began
            is_made_here = self._folder in subject.path.parents
            if claim.is_single and not is_made_here and version_of(open_checkpoint(subject.path)) != claim.parts[0].version:
                raise ChangedError(f"{subject.path} has changed while it was evaluated", hint="run the same command again")
            return replace(
                claim,
                metrics=result.metrics,
                errors=result.errors,
                documents=result.documents,
                weights=_weights(subject.path),
                seconds=seconds,
                time=time.time(),
            )
        finally:
            slots.put(slot)

    def _finish(self, claim: Row, future: Future[Row]) -> None:
        error = future.exception()
        if isinstance(error, PmergeError):
            if not self.measured and not self._before:
                raise error  # the others would most likely fail in the same way
            self.failures[claim.name] = error
            return
        row = future.result()
        if not self._allow_equal:
            check_different(row, [*self._before, *self.measured])
        self._ledger.append(row)
        self.measured.append(row)
        if self._on_row is not None:
            self._on_row(row, len(self.measured) + len(self.failures), self._total)


def check_different(row: Row, others: Sequence[Row]) -> None:
    """Raise EvaluationError where other weights gave exactly these numbers: the evaluation does not
    depend on the weights.

    With few digits, as of an accuracy on a hundred questions, two equal results may be chance, and
    three are not believed.
    """
    same = [
        other.name
        for other in others
        if other.subject != row.subject
        and (other.metrics, other.documents) == (row.metrics, row.documents)
        and not (row.weights and row.weights == other.weights)
    ]
    if len(same) >= (1 if digits(row.metrics) >= _ENOUGH_DIGITS else 2):
        raise EvaluationError(
            f"different weights give exactly the same result: {', '.join([*same, row.name])}",
            details=[f"{name} = {value!r}" for name, value in list(row.metrics.items())[:3]],
            hint="does the command evaluate {path}, without a cache of results? Equal for a good reason:  --allow-equal",
        )


def version_of(checkpoint: Checkpoint) -> str:
    """The version of a checkpoint's weights, as far as it can be seen without reading them: names,
    sizes, times, headers.
    """
    files = [(file.name, file.fingerprint) for file in checkpoint.files]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]


def _weights(path: Path) -> dict[str, str]:
    """The sha256 of the weight files of a merge, which its pmerge.json has; none of another
    checkpoint.
    """
    try:
        return {name: entry["sha256"] for name, entry in read_manifest(path).get("files", {}).items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path / MANIFEST} does not list the files of a merge", hint=f"pmerge verify {path}") from error
