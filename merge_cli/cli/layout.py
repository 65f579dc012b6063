"""Text for a screen of some width: lines broken between words, tables that fit, bars. Pure.

A width of None stands for a file or a pipe: nothing is broken, and no column is left out.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import IO

BAR_WIDTH = 20
_LEAST_WIDTH = 40
_LEAST_CELL = 24


def wrap(line: str, width: int | None) -> list[str]:
    """`line` in lines of at most `width` columns, broken between words; what follows the first is
    indented by two more. A longer word (a path) keeps a line of its own.

    A command, which stands behind ":" and two spaces or is the line, gets a line of its own, to be
    copied whole.
    """
    if width is None or len(line) <= max(width, _LEAST_WIDTH) or line.lstrip().startswith("pmerge "):
        return [line]
    text, separator, command = line.partition(":  ")
    if separator and not text.startswith(" "):
        return [*wrap(text + ":", width), f"  {command}"]
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line.lstrip(),
        max(width, _LEAST_WIDTH),
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    indent: str = "  ",
    width: int | None = None,
    optional: Collection[str] = (),
) -> list[str]:
    """Lines of a table; columns whose cells are all numbers are set to the right.

    Columns of the names `optional` are left out, the last ones first, until the lines fit `width`;
    a last cell that is still too long is broken between words.
    """
    cells = [list(row) for row in rows]
    columns = list(range(len(header)))
    widths = [max([len(head), *(len(row[i]) for row in cells)]) for i, head in enumerate(header)]
    right = [any(row[i] for row in cells) and all(_is_number(row[i] or "0") for row in cells) for i in range(len(header))]

    def too_wide() -> bool:
        return width is not None and len(indent) + sum(widths[i] + 2 for i in columns) - 2 > width

    for i in reversed(range(len(header))):
        if header[i] in optional and too_wide():
            columns.remove(i)

    def lines(row: Sequence[str]) -> list[str]:
        parts = [row[i].rjust(widths[i]) if right[i] else row[i].ljust(widths[i]) for i in columns]
        whole = (indent + "  ".join(parts)).rstrip()
        before = len(indent + "  ".join([*parts[:-1], ""]))
        if width is None or len(whole) <= width or width - before < _LEAST_CELL:
            return [whole]
        last = textwrap.wrap(parts[-1], width - before, break_long_words=False, break_on_hyphens=False)
        return [whole[:before] + last[0], *(" " * before + more for more in last[1:])]

    return [part for row in (list(header), *cells) for part in lines(row)]


def without_empty(
    header: Sequence[str], rows: Sequence[Sequence[str]], empty: Collection[str]
) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that are `empty` in every row."""
    kept = [i for i in range(len(header)) if not rows or any(row[i] not in empty for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def common_folder(paths: Sequence[str]) -> str:
    """The folder in which all of several paths lie; "" if there is none, or if they are short as
    they are.
    """
    parts = [path.split("/") for path in paths]
    depth = 0
    while len(paths) > 1 and all(len(part) > depth + 1 and part[depth] == parts[0][depth] for part in parts):
        depth += 1
    folder = "/".join(parts[0][:depth])
    return "" if folder in ("", ".") or folder.endswith(":/") else folder


def bar(value: float, largest: float, encoding: str | None) -> str:
    """A coefficient as a bar; nothing for one that is not positive."""
    length = round(BAR_WIDTH * value / largest) if value > 0 and largest > 0 else 0
    block = "█" if (encoding or "").lower().replace("-", "") == "utf8" else "#"
    return block * max(length, 1 if value > 0 else 0)


def width_of(stream: IO[str] | None) -> int | None:
    """The columns of the terminal that `stream` writes to; None if it is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream is not None and stream.isatty() else None
    except (OSError, ValueError):
        return None


def _is_number(cell: str) -> bool:
    return cell.lstrip("+-").replace(",", "").replace(".", "", 1).removesuffix(" %").removesuffix("*").isdigit()
