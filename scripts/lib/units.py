"""Sizes as people write them: `1.7GB` is decimal, `256MiB` is binary, as in pmerge's own `--memory`."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1}
for power, letter in enumerate("KMGT", start=1):
    UNITS[f"{letter}B"] = 1000**power
    UNITS[f"{letter}IB"] = 1024**power


def parse_size(text: str) -> int:
    """Number of bytes that `text` stands for; ValueError when it stands for none."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"not a size: {text!r} (write 1.7GB or 256MiB)")
    return round(float(match[1]) * UNITS[match[2].upper()])


def format_size(num_bytes: float) -> str:
    """`num_bytes` in decimal units with three significant digits: 1.7 GB, 512 MB."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if num_bytes < 999.5:
            break
        num_bytes, unit = num_bytes / 1000, larger
    return f"{num_bytes:.0f} {unit}" if num_bytes >= 100 else f"{num_bytes:.3g} {unit}"
