"""What a checkpoint is: numbers that its headers, names and config tell, without reading a weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_cli.agreement import config_differences
from merge_cli.formats.checkpoint import Checkpoint, open_checkpoint
from merge_cli.formats.safetensors import DTYPES, Header
from merge_cli.selection import discover, order_candidates, read_candidate

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


def inspect_checkpoints(paths: Sequence[Path]) -> tuple[list[Inspection], list[str]]:
    """Inspect the checkpoints at `paths` (or in a run folder), by step where all have one; and say what differs between them."""
    candidates = [read_candidate(path) for path in discover(paths)]
    if all(candidate.step is not None for candidate in candidates):
        candidates = sorted(candidates, key=lambda candidate: candidate.step or 0)
    else:
        candidates = list(order_candidates(candidates, "given", False))
    seen: dict[str, Header] = {}
    checkpoints = [open_checkpoint(candidate.path, seen=seen) for candidate in candidates]
    found = [_inspect(c, candidate.step) for c, candidate in zip(checkpoints, candidates, strict=True)]
    return found, _differences(checkpoints)


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
