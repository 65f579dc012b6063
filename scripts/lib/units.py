"""Sizes as people write them, read as pmerge's own `--memory` is: `1.7GB` is decimal, `256MiB` is
binary.
"""

from __future__ import annotations

from merge_cli.errors import UsageError
from merge_cli.request import amounts


def parse_size(text: str) -> int:
    """The number of bytes in `text`. Raises ValueError, which argparse reports."""
    try:
        return amounts.parse_size(text, "a size")
    except UsageError as error:
        raise ValueError(f"not a size: {text!r} (write 1.7GB or 256MiB)") from error


def format_size(num_bytes: float) -> str:
    """`num_bytes` in decimal units with three significant digits: 1.7 GB, 512 MB."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if num_bytes < 999.5:
            break
        num_bytes, unit = num_bytes / 1000, larger
    return f"{num_bytes:.0f} {unit}" if num_bytes >= 100 else f"{num_bytes:.3g} {unit}"
