"""What a checkpoint is: numbers that its headers, names and config tell, without reading a weight."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from merge_cli.agreement import config_differences
from merge_cli.errors import InputError
from merge_cli.formats.checkpoint import Checkpoint, open_checkpoint
from merge_cli.formats.safetensors import DTYPES, Header
from merge_cli.selection import discover, read_candidate

_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d+)\.")
_FUSED = re.compile(r"^(?P<experts>.+\.experts)\.[^.]+$")


@dataclass(frozen=True)
class Inspection:
    """One checkpoint; `experts` maps a number of experts per layer to the number of layers that have it."""

    path: str
    step: int | None
    layout: str
    num_tensors: int
    num_files: int
    dtypes: dict[str, int]
    num_parameters: int
    tensor_bytes: int
    experts: dict[int, int]
    quantization: str
    side_files: list[str]
    skipped_files: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """The checkpoints that could be read, what differs between them, what discovery left out, and the errors of broken ones."""

    checkpoints: list[Inspection]
    differences: list[str]
    notes: list[str]
    broken: dict[str, InputError]


def inspect_checkpoints(paths: Sequence[str | os.PathLike[str]]) -> Report:
    """Inspect the checkpoints at `paths` (or in a run folder), by step where all have one; and say what differs between them.

    A broken checkpoint does not hide the others: its error is in `broken`, by path. Raises InputError where `paths` name nothing.
    """
    notes: list[str] = []
    candidates = [read_candidate(path) for path in discover(paths, notes.append)]
    if all(candidate.step is not None for candidate in candidates):
        candidates.sort(key=lambda candidate: candidate.step or 0)
    notes += [candidate.doubt.message for candidate in candidates if candidate.doubt is not None]
    seen: dict[str, Header] = {}
    checkpoints: list[Checkpoint] = []
    found: list[Inspection] = []
    broken: dict[str, InputError] = {}
    for candidate in candidates:
        try:
            checkpoint = open_checkpoint(candidate.path, seen=seen)
        except InputError as error:
            broken[str(candidate.path)] = error
        else:
            checkpoints.append(checkpoint)
            found.append(_inspect(checkpoint, candidate.step))
    return Report(found, _differences(checkpoints), notes, broken)


def _inspect(checkpoint: Checkpoint, step: int | None) -> Inspection:
    return Inspection(
        path=str(checkpoint.path),
        step=step,
        layout=checkpoint.layout,
        num_tensors=len(checkpoint.tensors),
        num_files=len(checkpoint.files),
        dtypes=dict(Counter(stored.info.dtype for stored in checkpoint.tensors.values()).most_common()),
        num_parameters=checkpoint.num_parameters,
        tensor_bytes=checkpoint.tensor_bytes,
        experts=experts_per_layer(checkpoint),
        quantization=_quantization(checkpoint),
        side_files=list(checkpoint.side_files.kept),
        skipped_files=list(checkpoint.side_files.skipped),
        notes=list(checkpoint.notes),
    )


def experts_per_layer(checkpoint: Checkpoint) -> dict[int, int]:
    """How many layers have how many routed experts, counted by names (`experts.7.`) or by the first dimension of fused ones."""
    numbers: dict[str, set[int]] = {}
    fused: dict[str, int] = {}
    for key, stored in checkpoint.tensors.items():
        if match := _EXPERT.match(key):
            numbers.setdefault(match["experts"], set()).add(int(match["number"]))
        elif (match := _FUSED.match(key)) and len(stored.info.shape) == 3:
            fused[match["experts"]] = stored.info.shape[0]
    counts = Counter(len(found) for found in numbers.values())
    counts.update(size for experts, size in fused.items() if experts not in numbers)
    return dict(sorted(counts.items()))


def _quantization(checkpoint: Checkpoint) -> str:
    config = checkpoint.config.get("quantization_config") or {}
    method = str(config.get("quant_method", "")) if isinstance(config, dict) else "unknown"
    codes = sum(DTYPES[stored.info.dtype].kind == "code" for stored in checkpoint.tensors.values())
    if not method and not codes:
        return "none"
    return f"{method or 'not stated in config.json'} ({codes} tensors of codes)"


def _differences(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What differs from the last checkpoint: tensors, shapes, dtypes, config; at most ten lines per checkpoint."""
    if not checkpoints:
        return []
    *others, newest = checkpoints
    lines: list[str] = []
    for checkpoint in others:
        here: list[str] = []
        here += [f"`{key}`  only in {newest.path}" for key in newest.tensors.keys() - checkpoint.tensors.keys()]
        here += [f"`{key}`  only in {checkpoint.path}" for key in checkpoint.tensors.keys() - newest.tensors.keys()]
        for key in newest.tensors.keys() & checkpoint.tensors.keys():
            a, b = checkpoint.tensors[key].info, newest.tensors[key].info
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                here.append(f"`{key}`  {a.dtype} {list(a.shape)} in {checkpoint.path}, {b.dtype} {list(b.shape)} in {newest.path}")
        here.sort()
        more = [f"... and {len(here) - 10} more between {checkpoint.path} and {newest.path}"] if len(here) > 10 else []
        lines += here[:10] + more
    return lines + config_differences(others, newest)
