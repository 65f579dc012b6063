"""The schema of pmerge's own records: pmerge.json, sweep.json, and those of the staging folder.

Each record has its number under "schema". The number rises when an older version would misread a
record; a field that is added and may be ignored does not raise it. Version 0.1.0 wrote no number,
which counts as 0.

    0   0.1.0
    1   as 0, with "schema" in every record and "algorithm" in pmerge.json and sweep.json; files of inputs have a "version" in
        place of "mtime_ns" and "inode", which is not compared

Older records are read as long as their meaning is known. Newer ones are refused by name: they are
not damaged, and they are not overwritten unasked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_cli.errors import PmergeError
from merge_cli.version import __version__

SCHEMA = 1


def is_newer(record: Mapping[str, Any]) -> bool:
    """Whether a newer version of pmerge wrote `record`, in a schema that this one does not know."""
    found = record.get("schema", 0)
    return not isinstance(found, int) or found > SCHEMA


def check_schema(record: Mapping[str, Any], path: Path, hint: str, error: type[PmergeError]) -> None:
    """Raise `error` with `hint` unless this version of pmerge can read `record`, the content of the
    file `path`.
    """
    if is_newer(record):
        raise error(
            f"a newer version of pmerge wrote {path}",
            details=[
                f"found     schema {record['schema']!r:.40}",
                f"expected  at most schema {SCHEMA}, which is that of pmerge {__version__}",
            ],
            hint=hint,
        )
