"""Series for `scripts/bench --grow`: how time and memory grow when one thing does.

    n         number of checkpoints, each of 100 MB
    size      size of a checkpoint, 2 of them
    largest   size of the largest tensor of a checkpoint, 2 of them, each 100 MB larger than that
    tensors   number of tensors in a checkpoint of 1 GB, 2 of them (a mixture of experts)
    memory    `--memory`, 4 checkpoints of 1 GB

Points for which the folder has no room are left out, with a line that says so.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.contestants import Contestant
from bench.rounds import Result, contest, free_bytes, make_inputs
from units import format_size, parse_size

VALUES = {
    "n": ["2", "4", "8", "16", "32"],
    "size": ["100MB", "300MB", "1GB", "3GB", "10GB"],
    "largest": ["100MB", "500MB", "2GB"],
    "tensors": ["100", "1000", "10000", "100000"],
    "memory": ["64MiB", "128MiB", "256MiB", "512MiB", "1GiB"],
}


def point(what: str, value: str) -> tuple[int, str, dict[str, object]]:
    """For one point: number of checkpoints, size of each, further options of
    `scripts/make_checkpoints`.
    """
    match what:
        case "n":
            return int(value), "100MB", {"shape": "dense"}
        case "size":
            return 2, value, {"shape": "dense"}
        case "largest":
            return 2, str(parse_size(value) + 100_000_000), {"shape": "dense", "largest_tensor": value}
        case "tensors":
            return 2, "1GB", {"shape": "moe", "tensors": int(value)}
        case _:
            return 4, "1GB", {"shape": "dense"}


def grow(
    what: str, values: Sequence[str], contestants: Callable[[str], list[Contestant]], work: Path, rounds: int, sparse: bool
) -> Iterator[tuple[str, list[Result]]]:
    """Each value and its results. `contestants` gives those of a value (which may be a `--memory`);
    `sparse` inputs are holes.
    """
    for value in values:
        count, size, more = point(what, value)
        need, free = (1 if sparse else count + 1) * parse_size(size), free_bytes(work)
        if need > free:
            missing = f"needs {format_size(need)}, {format_size(free)} free"
            print(f"{what} {value}: left out: {missing}", file=sys.stderr)
            continue
        print(f"{what} {value}", file=sys.stderr)
        folder = work / "inputs"
        inputs = make_inputs(folder, count=count, size=size, sparse=sparse, **more)
        try:
            yield value, contest(contestants(value), inputs, work, rounds)
        finally:
            shutil.rmtree(folder)
