"""The content of checkpoints: numbers from headers, names and config, without reading a weight."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from merge_cli.errors import ChangedError, InputError, PmergeError, StoreError, UnsupportedError
from merge_cli.formats.alike import original_of
from merge_cli.formats.logical import View, Viewed, dtype_of, shape_of, view
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.formats.safetensors import MAX_HEADER_BYTES
from merge_cli.planning.compatibility import config_differences
from merge_cli.request.candidates import read_candidate
from merge_cli.request.discovery import discover

_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d+)\.")
_FUSED = re.compile(r"^(?P<experts>.+\.experts)\.[^.]+$")


@dataclass(frozen=True)
class Inspection:
    """One checkpoint. `num_tensors` and `dtypes` count stored tensors, `num_parameters` the values
    that they encode.

    `experts` maps a number of experts per layer to the number of layers that have it,
    `quantization` a scheme to its number of tensors; `unreadable` is the reason why quantized
    tensors cannot be averaged ("" if they can, or if there are none).
    """

    path: str
    step: int | None
    layout: str
    num_tensors: int
    num_files: int
    dtypes: dict[str, int]
    num_parameters: int
    tensor_bytes: int
    experts: dict[int, int]
    quantization: dict[str, int]
    unreadable: str
    side_files: list[str]
    skipped_files: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """The checkpoints that could be read, their differences, the notes of discovery, and the errors
    of broken ones.
    """

    checkpoints: list[Inspection]
    differences: list[str]
    notes: list[str]
    broken: dict[str, PmergeError]


def inspect_checkpoints(paths: Sequence[str | os.PathLike[str]], *, max_header: int = MAX_HEADER_BYTES) -> Report:
    """Inspect the checkpoints at `paths` (or in a run folder), by step if all have one, and list
    their differences.

    A broken checkpoint does not hide the others: its error is in `broken`, by path. Raises
    InputError if no checkpoint is found.
    """
    notes: list[str] = []
    candidates = [read_candidate(path) for path in discover(paths, notes.append)]
    if all(candidate.step is not None for candidate in candidates):
        candidates.sort(key=lambda candidate: candidate.step or 0)
    notes += [candidate.step_warning.message for candidate in candidates if candidate.step_warning is not None]
    seen = Seen(max_header)
    seen_views = Viewed()
    views: list[View] = []
    found: list[Inspection] = []
    counted: dict[int, Inspection] = {}
    broken: dict[str, PmergeError] = {}
    for candidate in candidates:
        try:
            checkpoint = open_checkpoint(candidate.path, seen=seen)
        except (InputError, ChangedError, StoreError) as error:
            broken[candidate.path] = error
            continue
        unreadable = ""
        try:
            views.append(view(checkpoint, seen_views))
        except UnsupportedError as error:
            unreadable = error.message
            views.append(View(checkpoint, checkpoint.tensors))
        alike = counted.get(id(original_of(views[-1].tensors)))
        found.append(_inspect(views[-1], candidate.step, unreadable, alike))
        counted[id(original_of(views[-1].tensors))] = found[-1]
    return Report(found, _differences(views), notes, broken)


def _inspect(seen: View, step: int | None, unreadable: str, alike: Inspection | None) -> Inspection:
    """The numbers of one checkpoint; `alike` are those of one with the same tensors, counted once."""
    checkpoint = seen.checkpoint
    tensors = original_of(checkpoint.tensors)
    return Inspection(
        path=checkpoint.path,
        step=step,
        layout=checkpoint.layout,
        num_tensors=len(tensors) if checkpoint.dcp is None else checkpoint.dcp.num_merged,
        num_files=len(checkpoint.files),
        dtypes=alike.dtypes if alike else dict(Counter(stored.info.dtype for stored in tensors.values()).most_common()),
        num_parameters=alike.num_parameters if alike else seen.num_parameters,
        tensor_bytes=alike.tensor_bytes if alike else checkpoint.tensor_bytes,
        experts=alike.experts if alike else experts_per_layer(seen),
        quantization=alike.quantization if alike else seen.schemes,
        unreadable=unreadable,
        side_files=list(checkpoint.side_files.kept),
        skipped_files=list(checkpoint.side_files.skipped),
        notes=[*checkpoint.notes, *([] if checkpoint.dcp is None else checkpoint.dcp.summary())],
    )


def experts_per_layer(seen: View) -> dict[int, int]:
    """How many layers have how many routed experts, counted by names (`experts.7.`) or by the first
    dimension of fused ones.
    """
    numbers: dict[str, set[int]] = {}
    fused: dict[str, int] = {}
    for key, tensor in original_of(seen.tensors).items():
        if ".experts." not in key:
            continue
        if match := _EXPERT.match(key):
            numbers.setdefault(match["experts"], set()).add(int(match["number"]))
        elif (match := _FUSED.match(key)) and len(shape_of(tensor)) == 3:
            fused[match["experts"]] = shape_of(tensor)[0]
    counts = Counter(len(found) for found in numbers.values())
    counts.update(size for experts, size in fused.items() if experts not in numbers)
    return dict(sorted(counts.items()))


def _differences(views: Sequence[View]) -> list[str]:
    """What differs from the last checkpoint: tensors, shapes, dtypes, config; at most ten lines per
    checkpoint.
    """
    if not views:
        return []
    *others, newest = views
    lines: list[str] = []
    there, expected = newest.checkpoint.path, original_of(newest.tensors)
    for other in others:
        path, tensors = other.checkpoint.path, original_of(other.tensors)
        if tensors is expected:
            continue
        here = [f"`{key}`  only in {there}" for key in expected.keys() - tensors.keys()]
        here += [f"`{key}`  only in {path}" for key in tensors.keys() - expected.keys()]
        for key in expected.keys() & tensors.keys():
            a, b = tensors[key], expected[key]
            if shape_of(a) != shape_of(b) or dtype_of(a) != dtype_of(b):
                here.append(f"`{key}`  {dtype_of(a)} {list(shape_of(a))} in {path}, {dtype_of(b)} {list(shape_of(b))} in {there}")
        here.sort()
        more = [f"... and {len(here) - 10} more between {path} and {there}"] if len(here) > 10 else []
        lines += here[:10] + more
    return lines + config_differences([other.checkpoint for other in others], newest.checkpoint)
