"""Turn measurements into JSON and Markdown tables, with the machine and the versions that they
belong to.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench import plot
from bench.contestants import MERGEKIT
from bench.measure import Measured
from bench.rounds import Result, filesystem
from units import format_size

Facts = dict[str, Any]  # as they go into JSON

NOTES = """\
wall, CPU: median (lowest-highest) of whole processes, start-up included. loop: what pmerge states itself.
GB/s: all inputs + the output, over wall time. x floor: wall time over that of the floor.
floor: cat of all inputs to /dev/null and cp of one checkpoint.
parallel floor: read all inputs, hash and write the output, by as many threads. x parallel: loop over its loop.
largest process: ru_maxrss, highest of all rounds; with several processes it is that of the largest one.
together: all processes at once, from /proc in the warm-up round; private: without files, shared memory.
tiny merge: the same for 2 checkpoints of 1 MB, that is, the fixed cost.
rounded: values of the output that equal the float64 mean, rounded once (other methods are not meant to)."""


def machine(folder: Path, device: str) -> dict[str, str]:
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    facts = {
        "cpu": f"{model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} cores usable",
        "memory": format_size(int(memory[1]) * 1024) if memory else "?",
        "kernel": platform.release(),
        "folder": filesystem(folder),
    }
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return facts


def versions(peers: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    if "mergekit" in peers:
        found["mergekit"] = MERGEKIT
    for name in ("pmerge", "torch", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def loop_s(run: Measured) -> float | None:
    """The time that pmerge's own `--json` states, where there is one."""
    try:
        stated = json.loads(run.stdout)
    except ValueError:
        return None
    return stated.get("seconds") if isinstance(stated, dict) else None


def as_json(result: Result, tiny: Result | None = None) -> Facts:
    """Everything measured for one contestant, in seconds and bytes."""
    facts: Facts = {
        "name": result.contestant.name,
        "what": result.contestant.what,
        "threads": result.contestant.threads,
        "failure": result.failure,
        "check": result.check,
    }
    if not result.runs or result.warm_up is None:
        return facts
    wall_s = [run.wall_s for run in result.runs]
    loops = [seconds for run in result.runs if (seconds := loop_s(run)) is not None]
    return facts | {
        "wall_s": wall_s,
        "wall_median_s": statistics.median(wall_s),
        "cpu_s": [run.cpu_s for run in result.runs],
        "loop_s": loops,
        "bytes_per_s": result.inputs.moved_bytes(result.contestant.outputs) / statistics.median(wall_s),
        "largest_process_bytes": max(run.largest_process_bytes for run in result.runs),
        "together_bytes": result.warm_up.together_bytes,
        "private_bytes": result.warm_up.private_bytes,
        "tiny_merge_s": [run.wall_s for run in tiny.runs] if tiny else [],
    }


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else ""


def megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f}"


def rounded(check: Facts) -> str:
    if "error" in check:
        return str(check["error"])
    missing = f", {check['num_missing']} tensors missing" if check["num_missing"] else ""
    return f"{100 * check['correctly_rounded']:.3f} %{missing}"


def figures(facts: Facts, floor_s: float | None, parallel_s: Mapping[int, float] | None = None) -> dict[str, str]:
    """The columns of the tables, from what `as_json` gives; `parallel_s` are the loop's seconds of
    the parallel floors, by threads.
    """
    if "wall_s" not in facts:
        return {"wall s": "failed"}
    median = facts["wall_median_s"]
    parallel = (parallel_s or {}).get(facts.get("threads", 0))
    return {
        "wall s": spread(facts["wall_s"]),
        "loop s": f"{statistics.median(facts['loop_s']):.2f}" if facts["loop_s"] else "",
        "CPU s": spread(facts["cpu_s"]),
        "GB/s": f"{facts['bytes_per_s'] / 1e9:.2f}",
        "x floor": f"{median / floor_s:.2f}" if floor_s else "",
        "x parallel": f"{statistics.median(facts['loop_s']) / parallel:.2f}" if parallel and facts["loop_s"] else "",
        "largest process MB": megabytes(facts["largest_process_bytes"]),
        "together MB (private)": (f"{megabytes(facts['together_bytes'])} ({megabytes(facts['private_bytes'])})"),
        "tiny merge s": f"{statistics.median(facts['tiny_merge_s']):.2f}" if facts["tiny_merge_s"] else "",
        "rounded": "" if "floor" in facts["name"] else rounded(facts["check"]),
    }


def of_pmerge(points: Sequence[Facts]) -> list[tuple[Facts, Facts]]:
    """The points of a series at which pmerge was measured, and what was."""
    found = [(point, facts) for point in points for facts in point["results"] if facts["name"] == "pmerge"]
    return [(point, facts) for point, facts in found if "wall_s" in facts]


def memory_plot(grow: str, memory: str, points: Sequence[Facts]) -> str:
    """An SVG drawing of pmerge's peak memory along a series."""
    bars = [(str(point["value"]), facts["largest_process_bytes"] / 1e6) for point, facts in of_pmerge(points)]
    title = f"Peak resident memory of pmerge average{'' if grow == 'memory' else f' --memory {memory}'}"
    return plot.bars(title, "MB", X_TITLES[grow], bars, limit=0 if grow == "memory" else 512)


X_TITLES = {
    "n": "number of checkpoints, 100 MB each",
    "size": "size of each of 2 checkpoints",
    "largest": "largest tensor of each of 2 checkpoints",
    "tensors": "tensors in each of 2 checkpoints of 1 GB",
    "memory": "--memory, 4 checkpoints of 1 GB",
}


def straightness(grow: str, points: Sequence[Facts]) -> None:
    """Print the straight line through pmerge's loop times, and how far each lies from it."""
    measured = [(point, statistics.median(facts["loop_s"])) for point, facts in of_pmerge(points) if facts["loop_s"]]
    if grow == "memory" or len(measured) < 3:
        return
    key, unit, each = ("tensors", 1000, "1000 tensors") if grow == "tensors" else ("moved_bytes", 1e9, "GB moved")
    fixed, slope, rest = plot.fit_line([(point[key], loop) for point, loop in measured])
    print(f"\nloop: {fixed:.3f} s + {slope * unit:.3f} s a {each}; off that line:", end=" ")
    print(", ".join(f"{point['value']} {100 * off:+.0f} %" for (point, _), off in zip(measured, rest, strict=True)))


def parallel_seconds(contest: Iterable[Facts]) -> dict[int, float]:
    """The seconds of the loop of each parallel floor, by its threads."""
    floors = [facts for facts in contest if facts["name"].startswith("parallel floor") and facts.get("loop_s")]
    return {facts["threads"]: statistics.median(facts["loop_s"]) for facts in floors}


def floor_seconds(contest: Iterable[Facts]) -> float | None:
    return next((facts.get("wall_median_s") for facts in contest if facts["name"] == "floor"), None)


def table(head: str, rows: Sequence[tuple[str, dict[str, str]]]) -> None:
    """A Markdown table: a row for each name and its figures, without the columns that are empty."""
    columns = list(dict.fromkeys(key for _, row in rows for key, value in row.items() if value))
    cells: list[Sequence[str]] = [
        (head, *columns),
        *((name, *(row.get(c, "") for c in columns)) for name, row in rows),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
