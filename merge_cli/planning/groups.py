"""The outputs of a sweep in groups: those that share a layout are planned together, and read their
inputs once. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.planning.plan import MergePlan, Output
from merge_cli.planning.planner import build_plan
from merge_cli.request.combinations import Chosen
from merge_cli.request.labels import Candidate
from merge_cli.request.spec import MergeSpec


def candidates_used(chosen: Sequence[Chosen]) -> dict[str, Candidate]:
    """The checkpoints that any output uses, by path: by step where all have one."""
    used = {candidate.path: candidate for each in chosen for candidate in each.candidates}
    if all(candidate.step is not None for candidate in used.values()):
        used = dict(sorted(used.items(), key=lambda item: item[1].step or 0))
    return used


def plan_groups(
    spec: MergeSpec, chosen: Sequence[Chosen], opened: Mapping[str, Checkpoint]
) -> list[tuple[MergePlan, list[Chosen]]]:
    """One plan for the outputs whose bases, the newest of their inputs, have one layout; `opened`
    has every checkpoint of `candidates_used` by its path.
    """
    used = candidates_used(chosen)
    groups: dict[tuple[object, tuple[str, ...] | None], list[Chosen]] = {}
    for each in chosen:
        own = [candidate.path for candidate in each.candidates]
        order = None if own == [path for path in used if path in own] else tuple(own)  # weights, in the order given
        groups.setdefault((_layout(opened[own[-1]], spec), order), []).append(each)
    plans = []
    for (_, order), members in groups.items():
        inside = {candidate.path for each in members for candidate in each.candidates}
        paths = order or [path for path in used if path in inside]
        place = {path: i for i, path in enumerate(paths)}
        outputs = []
        for each in members:
            inputs = tuple(place[candidate.path] for candidate in each.candidates)
            outputs.append(Output(inputs, each.coefficients, inputs[-1]))
        base = max(output.base for output in outputs)
        merge = build_plan(spec, [opened[path] for path in paths], [used[path].step for path in paths], base, outputs)
        plans.append((merge, members))
    return plans


def _layout(base: Checkpoint, spec: MergeSpec) -> object:
    """Equal for checkpoints that give, as the base, the same files: with the same headers, and
    with nothing in them that is taken over from this very one.
    """
    if spec.copies_from_base or not all(file.header.data_start for file in base.files):  # only safetensors has headers
        return base.path
    quantization = json.dumps(base.config.get("quantization_config"), sort_keys=True, default=str)
    files = tuple((file.name, file.header.sha256) for file in base.files)
    places = tuple((stored.file.name, stored.name) for stored in base.tensors.values())
    return base.layout, base.root is None, files, hash(places), quantization
