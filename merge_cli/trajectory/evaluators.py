"""What measures a checkpoint: the user's own command, or the built-in loss on a text (see
`heldout.py`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from merge_cli.errors import PmergeError
from merge_cli.system.tether import Tether
from merge_cli.trajectory.command import check_command, fill, variables
from merge_cli.trajectory.results import Result, pick, read_result

_SHOWN_LINES = 20
_SHOWN_BYTES = 20_000


class Subject(NamedTuple):
    """A checkpoint to be measured: its name, its folder or file, its step ("" where not known)."""

    name: str
    path: Path
    step: str


class EvaluationError(PmergeError):
    """An evaluation failed, or its result cannot be believed."""


class Evaluator(Protocol):
    """Measures checkpoints. `identity` is part of the key of a row: whatever changes results must
    change it.

    `warnings` are known from the start; `at_once` is how many may run at the same time.
    """

    identity: str
    warnings: Sequence[str]
    at_once: int

    def measure(self, subject: Subject, folder: Path, slot: int) -> Result:
        """The result for one checkpoint. `folder` is empty, and kept; `slot` counts from 0 below
        `at_once`.

        Raises PmergeError.
        """
        ...

    def stop(self) -> None:
        """End whatever is being measured: nobody waits for it any more."""
        ...


class CommandEvaluator:
    """A command of the user's, run by the shell once for each checkpoint. Slot i has only the i-th
    of `gpus`, if any are given.
    """

    def __init__(self, command: str, metrics: Sequence[str] = (), jobs: int = 1, gpus: Sequence[str] = ()) -> None:
        """Raises UsageError where the command cannot be filled in safely."""
        self.warnings: Sequence[str] = check_command(command)
        self.identity = command
        self.at_once = max(jobs, len(gpus))
        self._metrics = metrics
        self._gpus = gpus
        self._running: dict[int, Tether] = {}

    def measure(self, subject: Subject, folder: Path, slot: int) -> Result:
        out, result = folder / "out", folder / "result.json"
        out.mkdir()
        values = {"path": str(subject.path.absolute()), "name": subject.name, "step": subject.step, "out": str(out.absolute())}
        environment = {**os.environ, **variables(values, result.absolute())}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        stdout, stderr = folder / "stdout", folder / "stderr"
        self._running[slot] = Tether(fill(self.identity, values), environment, stdout, stderr)
        code = self._running[slot].wait()
        if code != 0:
            raise EvaluationError(
                f"the evaluation of {subject.name} ended with exit code {code}",
                details=_tail(stderr) or _tail(stdout),
                hint=f"its output is in {folder}",
            )
        try:
            found = read_result(result, out, stdout.read_text(errors="replace"))
            pick(found.metrics, self._metrics)
        except PmergeError as error:
            raise EvaluationError(
                f"{subject.name}: {error.message}", details=error.details, hint=f"the command's output is in {folder}"
            ) from error
        return found

    def stop(self) -> None:
        for tether in list(self._running.values()):
            tether.cut()


def empty_folder(folder: Path) -> None:
    """Make `folder` with nothing in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _SHOWN_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()[-_SHOWN_LINES:]
