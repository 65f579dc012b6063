"""The only code that prints. stdout carries results; plans, progress, warnings and errors go to
stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from merge_cli.cli import layout
from merge_cli.errors import OutputError, PmergeError

if TYPE_CHECKING:
    from merge_cli.output.progress import Progress

_LINE_EVERY_S = 10.0
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_DIRECTION = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))  # and the two line separators
_CONTROL |= {code: f"\\u{code:04x}" for code in _DIRECTION}


_prefix = ""


def prefix_lines(name: str) -> None:
    """Begin every line on stderr with `name`, for one of several processes that write to one
    terminal.
    """
    global _prefix
    _prefix = name


def printable(text: object) -> str:
    """`text` with control characters escaped: tensor and file names come from others and may hold
    any.
    """
    return str(text).translate(_CONTROL).encode("utf-8", "backslashreplace").decode("utf-8")


def out(line: object) -> None:
    """One line of result on stdout. Raises OutputError if it cannot be written; a reader that went
    away is no error.
    """
    _print(printable(line))


def out_json(value: Any) -> None:
    """A result as JSON on stdout."""
    _print(json.dumps(value, indent=2, default=str))


def out_json_line(value: Any) -> None:
    """One event as a line of JSON on stdout."""
    _print(json.dumps(value, default=str))


def out_text(line: str) -> None:
    """Prose on stdout, broken between words on a terminal."""
    for part in layout.wrap(printable(line), layout.width_of(sys.stdout)):
        _print(part)


def err(line: str = "") -> None:
    """One line on stderr, broken between words on a terminal; a closed or broken stderr never stops
    a run.
    """
    for part in layout.wrap(printable(line), layout.width_of(sys.stderr)):
        _say(part)


def _say(line: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(_prefix + line, file=sys.stderr, flush=True)  # noqa: T201


def _print(text: str) -> None:
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:  # the reader has seen enough (`| head -1`): what was done stays done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def print_error(error: PmergeError, label: str = "error") -> None:
    """An error on stderr: the problem and its place, found and expected, the next command."""
    err(f"{label}: {error.message}")
    for line in error.details:
        err(f"  {line}")
    if error.hint:
        err(f"hint: {error.hint}")


def report_error(error: PmergeError) -> None:
    """An error that ends the command: on stderr, and with `--json` on stdout too, in place of the
    result.
    """
    print_error(error)
    if "--json" in sys.argv[1:] and not _prefix:  # of several ranks, those with a prefix leave stdout to another one
        with suppress(PmergeError):
            out_json({"error": error.message, "details": error.details, "hint": error.hint})


def dry_run_ended(findings: Sequence[PmergeError]) -> None:
    """The last line of --dry-run."""
    fine = "" if findings else "; nothing in the headers would stop this run (values were not read)"
    err(f"dry run: nothing was written{fine}")


@contextmanager
def doing(text: str, quiet: bool) -> Iterator[None]:
    """Show on a terminal, at once, what takes its time; the line is gone afterwards."""
    shown = not quiet and sys.stderr is not None and sys.stderr.isatty()
    if shown:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{text} ...")
            sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            with suppress(OSError, ValueError):
                sys.stderr.write("\r" + " " * (len(text) + 4) + "\r")
                sys.stderr.flush()


def count(number: int, noun: str) -> str:
    """A number of things: 1 file, 2 files."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def names(found: Sequence[str], most: int = 12) -> str:
    """The first names of a list on one line, and the number of the others."""
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], indent: str = "  ") -> list[str]:
    """Lines of a table for stdout; columns whose cells are all numbers are set to the right."""
    return layout.table(header, [[printable(cell) for cell in row] for row in rows], indent, layout.width_of(sys.stdout))


def err_table(header: Sequence[str], rows: Iterable[Sequence[object]], optional: Collection[str] = ()) -> None:
    """A table on stderr. On a terminal that is too narrow for it, `optional` columns are left out."""
    cells = [[printable(cell) for cell in row] for row in rows]
    for line in layout.table(header, cells, width=layout.width_of(sys.stderr), optional=optional):
        _say(line)


def out_table(header: Sequence[str], rows: Sequence[Sequence[object]], empty: Collection[str]) -> None:
    """A table on stdout without the columns that are `empty` in every row."""
    for line in layout.table(*layout.without_empty(header, [[printable(cell) for cell in row] for row in rows], empty), indent=""):
        _print(line)


def bar(value: float, largest: float) -> str:
    """A coefficient as a bar for stderr."""
    return layout.bar(value, largest, getattr(sys.stderr, "encoding", None))


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as storage is sold: 1.70 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_seconds(seconds: float) -> str:
    """A duration in the fitting unit: 4.2 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class ProgressLine:
    """A bar on a terminal, elsewhere a line every ten seconds, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._last_line = time.monotonic()

    def __enter__(self) -> ProgressLine:
        if not self._quiet and sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("average", total=None, text="")
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Show the share that is done, the speed and the time left."""
        if self._quiet:
            return
        total = progress.bytes_to_read + progress.bytes_to_write
        done = progress.bytes_read + progress.bytes_written
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done, text=_speed(progress, done, total))
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            err(f"{100 * done / max(total, 1):3.0f} %  {_speed(progress, done, total)}")


def _speed(progress: Progress, done: int, total: int) -> str:
    rate = done / max(progress.seconds, 1e-9)
    left = (total - done) / max(rate, 1.0)
    return f"{rate / 1e9:.2f} GB/s, {left:.0f} s left"
