"""The folder of a result: as typed, or named after the method and the steps."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from merge_cli.errors import UsageError
from merge_cli.names import STAGING_SUFFIX
from merge_cli.request.labels import Candidate
from merge_cli.stores.store import StrPath, as_path, is_local, name_of


def destination_of(output: StrPath, example: str = "merged") -> Path:
    """The folder that `-o` names. Raises UsageError if it cannot be the name of a folder."""
    if not os.fspath(output):
        raise UsageError("-o is empty", hint=f"name the folder of the result:  -o {example}")
    if any(ord(character) < 32 for character in os.fspath(output)):
        raise UsageError("-o holds a line break or another control character", hint=f"name the folder of the result:  -o {example}")
    if not is_local(os.fspath(output)):
        made = example if example == "merged" else f"{example}/NAME"  # of a sweep each result by itself
        raise UsageError(
            f"the result is written to a folder of this machine, and {os.fspath(output)} is none",
            hint=f"-o {example}  and then  pmerge push {made} {shlex.quote(os.fspath(output))}",
        )
    destination = Path(as_path(output))
    if destination.suffix == ".safetensors":
        without = destination.with_suffix("")
        raise UsageError(f"the result is a folder, and {destination} looks like a file", hint=f"-o {without}")
    if destination.name in ("", ".."):
        destination = Path(os.path.realpath(destination))
        if not destination.name:
            raise UsageError(f"the result cannot be {destination}", hint=f"name the folder of the result:  -o {example}")
    return destination


def default_destination(name: str, candidates: Sequence[Candidate]) -> Path:
    """`<name>-<oldest step>-<newest step>` in the current folder."""
    ends = [candidates[0], candidates[-1]]
    labels = [str(c.step) if c.step is not None else name_of(c.path).removesuffix(".safetensors") for c in ends]
    return Path(f"{name}-{labels[0]}-{labels[1]}")


def default_destinations(name: str) -> list[Path]:
    """The destinations in the current folder that have such a name, finished or not."""
    there = Path().glob(f"{name}-*")
    return sorted({path.with_name(path.name.removesuffix(STAGING_SUFFIX)) for path in there})
