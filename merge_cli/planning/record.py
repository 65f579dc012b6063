"""A plan as JSON, and back: the one list of fields behind the fingerprint, `state.json` and
`pmerge.json`.

    describe, describe_result              for state.json: an unfinished run is continued only if it is equal;
                                           for pmerge.json: the same, with each input beside its
                                           coefficient
    from_state, from_result, replan        from either record to a plan equal to the one described

The fields of the request are those of `MergeSpec`; a record without one was made before that option
existed, and has its default. Not recorded: how the work was carried out, since no byte depends on
it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.planning.plan import ALGORITHM, MergePlan, Output
from merge_cli.planning.planner import build_plan
from merge_cli.request.coefficients import Coefficients
from merge_cli.request.spec import MergeSpec
from merge_cli.stores.store import resolve

_IMPLIED = ("method", "parameters", "shard_bytes")
"""Fields of the request that the fingerprint leaves out: the coefficients and the headers of the
files decide.
"""
_OF_DCP = ("training_state", "format")
_OLDEST = ("dtype", "accumulate", "include", "exclude", "int_policy", "allow_nonfinite", "requantize")
"""Fields in every fingerprint ever made. A younger one is in it unless it has its default: older
results keep theirs.
"""


@dataclass(frozen=True)
class Recorded:
    """The fields of a record from which a plan is made again; inputs by path, oldest to newest."""

    spec: MergeSpec
    paths: tuple[str, ...]
    steps: tuple[int | None, ...]
    base: str
    coefficients: Coefficients


def request_record(spec: MergeSpec) -> dict[str, Any]:
    """The options of a merge by field, as JSON has them; those that only distributed checkpoints
    have are left out if not given.
    """
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(spec).items()}
    return {name: value for name, value in found.items() if name not in _OF_DCP or value != getattr(MergeSpec, name)}


def fingerprint(plan: MergePlan) -> str:
    """The sha256 of everything that decides the output's bytes: request, coefficients, input
    headers, layout.
    """
    default = request_record(MergeSpec())
    request = {
        name: value
        for name, value in request_record(plan.spec).items()
        if name in _OLDEST or (name not in _IMPLIED and value != default.get(name))
    }
    described = {
        "algorithm": ALGORITHM,
        "spec": request,
        "inputs": [[[f.name, f.header.sha256, f.file_bytes] for f in c.files] for c in plan.inputs],
        "base": plan.base,
        "outputs": [[o.inputs, o.coefficients.values, o.coefficients.numerators, o.coefficients.denominator] for o in plan.outputs],
        "files": [[f.name, f.frame_sha256()] for f in plan.files],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def input_records(plan: MergePlan) -> list[dict[str, Any]]:
    """The identity of each input: its path, and its files with size, version and header hash."""
    return [
        {"path": resolve(each.path), "files": [{"name": file.name, **file.fingerprint} for file in each.files]}
        for each in plan.inputs
    ]


def describe(plan: MergePlan) -> dict[str, Any]:
    """The conditions under which an unfinished run is continued, in a form in which differences can
    be listed.
    """
    outputs = [output.coefficients for output in plan.outputs]
    return {
        "algorithm": ALGORITHM,
        "request": request_record(plan.spec),
        "base": resolve(plan.inputs[plan.base].path),
        "coefficients": [list(each.values) for each in outputs],
        "rational": [[each.numerators and list(each.numerators), each.denominator] for each in outputs],
        "steps": list(plan.steps),
        "inputs": {each["path"]: {file.pop("name"): file for file in each["files"]} for each in input_records(plan)},
        "plan": fingerprint(plan),
    }


def describe_result(plan: MergePlan) -> dict[str, Any]:
    """The origin of the one output of `plan`: request, inputs with coefficients, base."""
    request = request_record(plan.spec)
    (output,) = plan.outputs
    inputs = [
        {"step": step, "coefficient": coefficient, "bytes": sum(file["file_bytes"] for file in each["files"]), **each}
        for step, coefficient, each in zip(plan.steps, output.coefficients.values, input_records(plan), strict=True)
    ]
    return {
        "method": request.pop("method"),
        "parameters": request.pop("parameters"),
        "inputs": inputs,
        "numerators": output.coefficients.numerators,
        "denominator": output.coefficients.denominator,
        "base": resolve(plan.inputs[plan.base].path),
        **request,
        "plan": fingerprint(plan),
    }


def from_state(state: Mapping[str, Any]) -> Recorded:
    """The fields of what `describe` made. Raises KeyError, TypeError, ValueError or UsageError for
    another content.
    """
    (values,), ((numerators, denominator),) = state["coefficients"], state["rational"]
    return Recorded(
        spec=MergeSpec(**state["request"]),
        paths=tuple(state["inputs"]),
        steps=tuple(map(_step, state["steps"])),
        base=state["base"],
        coefficients=_coefficients(values, numerators, denominator),
    )


def from_result(manifest: Mapping[str, Any]) -> Recorded:
    """The fields of what `describe_result` made. Raises KeyError, TypeError, ValueError or
    UsageError for another content.
    """
    inputs = manifest["inputs"]
    fields = [each.name for each in dataclasses.fields(MergeSpec)]
    return Recorded(
        spec=MergeSpec(**{name: manifest[name] for name in fields if name in manifest}),
        paths=tuple(each["path"] for each in inputs),
        steps=tuple(_step(each["step"]) for each in inputs),
        base=manifest["base"],
        coefficients=_coefficients([each["coefficient"] for each in inputs], manifest["numerators"], manifest["denominator"]),
    )


def moved_paths(paths: Sequence[str], root: str) -> dict[str, str]:
    """The places of recorded inputs below `root`, the folder in which all of them lie now as they
    lay in their own.
    """
    above = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return {path: posixpath.join(root, posixpath.relpath(path, above)) for path in paths}


def with_inputs_below(manifest: Mapping[str, Any], root: str) -> dict[str, Any]:
    """A result's record whose inputs have moved to `root`; their times do not count, as a copy has
    others. Raises KeyError, TypeError or ValueError for another content.
    """
    places = moved_paths([each["path"] for each in manifest["inputs"]], root)
    inputs = [
        {
            **each,
            "path": places[each["path"]],
            "files": [{key: file[key] for key in file.keys() - {"version", "mtime_ns", "inode"}} for file in each["files"]],
        }
        for each in manifest["inputs"]
    ]
    return {**manifest, "inputs": inputs, "base": places[manifest["base"]]}


def replan(record: Recorded, inputs: Sequence[Checkpoint]) -> MergePlan:
    """The plan of a record, over its `inputs` as they are now. Raises ValueError, and what
    `build_plan` raises.
    """
    base = record.paths.index(record.base)
    output = Output(tuple(range(len(inputs))), record.coefficients, base)
    return build_plan(record.spec, inputs, record.steps, base, [output])


def _step(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise TypeError(f"a step is {value!r:.40}")
    return value


def _coefficients(values: Sequence[float], numerators: Sequence[int] | None, denominator: int | None) -> Coefficients:
    return Coefficients(tuple(map(float, values)), None if numerators is None else tuple(numerators), denominator)
