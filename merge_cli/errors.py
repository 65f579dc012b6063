"""Every error that a user can cause or meet, and the exit code that it ends with.

    PmergeError                    exit 1   something went wrong while working
    |-- UsageError                 exit 2   options that contradict each other or cannot be read
    |-- InputError                 exit 2   a checkpoint is missing, broken or hostile
    |   |-- IncompleteError        exit 2   files of a checkpoint are missing or too short: still being written, or copied in part
    |   |-- MismatchError          exit 2   the checkpoints do not fit together
    |   `-- UnsupportedError       exit 2   understood, but refused (GPTQ, pickles, ...)
    |-- NonFiniteError             exit 1   NaN or Inf in an input, overflow in the output
    |-- ChangedError               exit 1   an input changed while it was being read
    |-- StoreError                 exit 1   the storage of an input failed, or did not answer
    |-- OutputError                exit 1   the destination cannot be written (space, permission, lock)
    `-- Interrupted                exit 130, 143 or 129   SIGINT, SIGTERM or SIGHUP

An error is written for the person at the keyboard: `message` is one line saying what is wrong and
where, `details` are the lines below it (found, expected), `hint` is what to do, with a command that
can be run where there is one. Only the command line turns an error into text and an exit code; the
library raises.
"""

from __future__ import annotations

from collections.abc import Sequence


class PmergeError(Exception):
    """Base of all errors raised on purpose: one line `message`, optional `details` lines and a
    `hint`.
    """

    exit_code = 1

    def __init__(self, message: str, *, details: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message, *(f"  {line}" for line in self.details)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class UsageError(PmergeError):
    """Options that cannot be read, or that contradict each other."""

    exit_code = 2


class InputError(PmergeError):
    """A checkpoint is missing, incomplete, broken or hostile."""

    exit_code = 2


class IncompleteError(InputError):
    """Files of a checkpoint are missing or too short: it is being written, or a copy broke off."""

    def __init__(self, message: str, *, details: Sequence[str] = (), hint: str = "") -> None:
        remedy = hint or "it is still being written, or was copied in part: wait, or copy it again"
        super().__init__(message, details=details, hint=remedy)


class MismatchError(InputError):
    """The checkpoints do not fit together: names, shapes, dtypes, stages."""


class UnsupportedError(InputError):
    """The input is understood well enough to know that averaging it would be wrong."""


class NonFiniteError(PmergeError):
    """NaN or Inf in an input, or a result that the output dtype cannot hold."""


class _ReadError(PmergeError):
    """Reading an input failed; `offset` is the byte of its file, None where none is to blame."""

    def __init__(self, message: str, *, details: Sequence[str] = (), hint: str = "", offset: int | None = None) -> None:
        super().__init__(message, details=details, hint=hint)
        self.offset = offset


class ChangedError(_ReadError):
    """An input was truncated, replaced or rewritten while it was being read."""


class StoreError(_ReadError):
    """The storage of an input failed, or did not answer; the same command may work later."""


class OutputError(PmergeError):
    """The destination cannot be written: space, permission, existing files, another run."""


class Interrupted(PmergeError):
    """A signal asked the run to stop; `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int, *, hint: str = "") -> None:
        super().__init__(f"interrupted by signal {signal_number}", hint=hint)
        self.exit_code = 128 + signal_number


def first_ten(lines: Sequence[str], what: str = "more") -> list[str]:
    """The first ten of `lines`, and a last line that counts the rest."""
    if len(lines) <= 10:
        return list(lines)
    return [*lines[:10], f"... and {len(lines) - 10} {what}"]
