"""Lists as they are typed: values with commas, and JSON files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from merge_cli.errors import InputError, UsageError
from merge_cli.request.grid import EXAMPLE_LIST
from merge_cli.stores.store import as_path
from merge_cli.system.json_text import parse_json

_MAX_LIST_BYTES = 64 << 20


def split_list(flag: str, text: str | None, expected: str = "values with commas between them") -> list[str]:
    """The values of "a,b,c", none for None. Raises UsageError for an empty one."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(parts):
        raise UsageError(f"{flag} cannot be {text!r}", details=[f"expected  {expected}"])
    return parts


def read_list(path: str) -> list[Any]:
    """The entries of a JSON array in a file or a pipe, with the options of an average each. Raises
    InputError or UsageError.
    """
    try:
        entries = parse_json(_read(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint=f"ls -l {path}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(each, dict) for each in entries):
        raise UsageError(f"{path} does not hold a JSON array of objects", hint=f"as  {EXAMPLE_LIST}")
    return entries


def _read(path: str) -> bytes:
    with Path(as_path(path)).open("rb") as file:
        if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty():
            raise OSError(errno.EINVAL, "it is a device")
        raw = file.read(_MAX_LIST_BYTES + 1)
    if len(raw) > _MAX_LIST_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {_MAX_LIST_BYTES >> 20} MiB")
    return raw
