"""Make the checkpoints of a benchmark and let the contestants average them, in turn, round after
round.

A round runs every contestant once (A B C, A B C, ...), so that a machine that slows down slows all
of them. The first round is the warm-up: not counted, but watched for memory, and its outputs are
checked. Outputs are deleted between runs, outside the time that is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.contestants import LIB, Contestant
from bench.measure import CommandFailed, Measured, measure
from units import format_size


@dataclass(frozen=True)
class Inputs:
    """Checkpoints on disk and what they amount to; all of them have the size of the first."""

    checkpoints: list[Path]
    checkpoint_bytes: int
    num_tensors: int
    num_shards: int
    quantized: bool

    def moved_bytes(self, outputs: int) -> int:
        """What has to be moved: every checkpoint in, `outputs` out."""
        return (len(self.checkpoints) + outputs) * self.checkpoint_bytes

    def __str__(self) -> str:
        return (
            f"{len(self.checkpoints)} checkpoints of {format_size(self.checkpoint_bytes)},"
            f" {self.num_tensors} tensors, {self.num_shards} shards"
        )


@dataclass
class Result:
    """All runs of one contestant. `check` is what peers.py found in its first output."""

    contestant: Contestant
    inputs: Inputs
    warm_up: Measured | None = None
    runs: list[Measured] = field(default_factory=list)
    check: dict[str, object] = field(default_factory=dict)
    failure: str = ""


def describe(checkpoints: Sequence[Path]) -> Inputs:
    first = checkpoints[0]
    shards = sorted(first.glob("*.safetensors"))
    num_tensors = 0
    for shard in shards:
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            num_tensors += len(header.keys() - {"__metadata__"})
    config = first / "config.json"
    quantized = config.exists() and "quantization_config" in json.loads(config.read_text())
    size = sum(path.stat().st_size for path in shards)
    return Inputs(list(checkpoints), size, num_tensors, len(shards), quantized)


def make_inputs(out: Path, **options: object) -> Inputs:
    """Checkpoints from `scripts/make_checkpoints`; `options` are its options, those that are 0 are
    left out.
    """
    names = {key: f"--{key.replace('_', '-')}" for key in options}
    flags = [names[key] if value is True else f"{names[key]}={value}" for key, value in options.items() if value]
    command = [sys.executable, "-m", "checkpoints", *flags, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(LIB)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip())
    return describe([Path(line) for line in done.stdout.splitlines()])


def free_bytes(folder: Path) -> int:
    """What may be written to `folder`; where that is memory, a fifth of it is left to the programs."""
    free = shutil.disk_usage(folder).free
    if filesystem(folder) != "tmpfs":
        return free
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min(free, int(memory["MemAvailable"].split()[0]) * 1024 * 4 // 5)


def filesystem(folder: Path) -> str:
    """Type of the file system that holds `folder`: tmpfs, ext4, ..."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(holding)[1]


def contest(contestants: Sequence[Contestant], inputs: Inputs, work: Path, rounds: int) -> list[Result]:
    """One warm-up round and `rounds` measured ones. A contestant that fails is left out from there
    on.
    """
    results = [Result(contestant, inputs) for contestant in contestants]
    out = work / "out"
    for turn in range(rounds + 1):
        for result in results:
            if result.failure:
                continue
            contestant = result.contestant
            command = contestant.command(inputs.checkpoints, out)
            try:
                measured = measure(command, contestant.environment, watch=turn == 0)
                if turn:
                    result.runs.append(measured)
                else:
                    result.warm_up = measured
                    result.check = check(out / contestant.mean, inputs)
            except CommandFailed as error:
                result.failure = str(error)
                print(f"{contestant.name}: {error}", file=sys.stderr)
            else:
                name = f"round {turn}" if turn else "warm-up"
                print(f"{name:8}  {contestant.name:10} {measured.wall_s:8.2f} s", file=sys.stderr)
            shutil.rmtree(out, ignore_errors=True)
    return results


def check(out: Path, inputs: Inputs) -> dict[str, object]:
    command = [str(LIB / "bench" / "peers.py"), "check", str(out), *map(str, inputs.checkpoints)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    found: dict[str, object] = json.loads(done.stdout)
    return found
