"""From opened checkpoints to a plan: do they fit together, what happens to each tensor, where does each byte go.

Works on names, shapes and dtypes only; a tensor that nobody has heard of is averaged like any other. Every tensor of the base is
in the plan, under its own name and shape, in the order of the base's files.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merge_cli.errors import MismatchError, UnsupportedError, UsageError, first_ten
from merge_cli.formats.checkpoint import Checkpoint, Stored
from merge_cli.formats.safetensors import DTYPES, lay_out
from merge_cli.formats.side_files import differing_files
from merge_cli.plan import MergePlan, MergeSpec, Output, OutputFile, RunBuilder, Source

OUTPUT_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_VOLATILE = {"transformers_version", "_name_or_path", "use_cache", "_commit_hash"}


def build_plan(
    spec: MergeSpec,
    inputs: Sequence[Checkpoint],
    steps: Sequence[int | None],
    base: int,
    outputs: Sequence[Output],
) -> MergePlan:
    """Plan the merge of `inputs` (oldest to newest) into `outputs`, with the layout of `inputs[base]`.

    Raises MismatchError when the checkpoints differ in their tensors, UnsupportedError for tensors that cannot be averaged, and
    UsageError for a glob that matches nothing.
    """
    check_same_tensors(inputs, steps, base)
    treatment = _treatments(spec, inputs, base)
    files = tuple(
        _plan_file(name, metadata, keys, inputs, base, treatment)
        for name, metadata, keys in _files_of(spec, inputs[base], treatment)
    )
    warnings = [note for checkpoint in inputs for note in checkpoint.notes]
    warnings += _mixed_dtypes(inputs, inputs[base])
    warnings += config_differences(inputs, inputs[base])
    warnings += _side_file_warnings(inputs, inputs[base])
    return MergePlan(spec, tuple(inputs), tuple(steps), base, tuple(outputs), files, tuple(warnings))


def check_same_tensors(inputs: Sequence[Checkpoint], steps: Sequence[int | None], base: int) -> None:
    """Every input must hold the same tensors, of the same shapes, as `inputs[base]`; raises MismatchError with the list."""
    expected = inputs[base]
    _check_same_ranks(inputs, expected)
    absent: list[str] = []
    shapes: list[tuple[str, Checkpoint]] = []
    kinds: list[str] = []
    for checkpoint in inputs:
        if checkpoint is expected:
            continue
        if checkpoint.tensors.keys() != expected.tensors.keys():
            absent += [f"`{k}`  missing in {checkpoint.path}" for k in expected.tensors if k not in checkpoint.tensors]
            absent += [
                f"`{k}`  only in {checkpoint.path}, not in {expected.path}" for k in checkpoint.tensors if k not in expected.tensors
            ]
        for key, stored in expected.tensors.items():
            other = checkpoint.tensors.get(key)
            if other is None or (other.info.shape == stored.info.shape and other.info.dtype == stored.info.dtype):
                continue
            if other.info.shape != stored.info.shape:
                shapes.append((key, checkpoint))
            elif {DTYPES[other.info.dtype].kind, DTYPES[stored.info.dtype].kind} != {"float"}:
                kinds.append(f"`{key}`  {other.info.dtype} in {checkpoint.path}, {stored.info.dtype} in {expected.path}")
    if absent:
        raise MismatchError(
            f"checkpoints disagree on which tensors there are ({len(absent)} differences)",
            details=first_ten(absent),
            hint=f"compare them:  pmerge inspect {expected.path} {_other(inputs, expected).path}",
        )
    if shapes:
        raise _shape_error(shapes, inputs, steps, expected)
    if kinds:
        raise MismatchError(
            f"checkpoints disagree on the dtype of {len(kinds)} tensors, and no average is defined between these",
            details=first_ten(kinds),
        )


def _check_same_ranks(inputs: Sequence[Checkpoint], expected: Checkpoint) -> None:
    if expected.layout != "ranks":
        return
    want = {file.name for file in expected.files}
    for checkpoint in inputs:
        have = {file.name for file in checkpoint.files}
        if checkpoint.layout == "ranks" and have != want:
            raise MismatchError(
                f"checkpoints disagree on their ranks: {checkpoint.path} and {expected.path}",
                details=first_ten(
                    [f"{name}  missing in {checkpoint.path}" for name in sorted(want - have)]
                    + [f"{name}  missing in {expected.path}" for name in sorted(have - want)]
                ),
                hint="copy the missing rank, or leave that checkpoint out",
            )


def _shape_error(
    shapes: Sequence[tuple[str, Checkpoint]],
    inputs: Sequence[Checkpoint],
    steps: Sequence[int | None],
    expected: Checkpoint,
) -> MismatchError:
    key, wrong = shapes[0]
    lines = []
    for checkpoint, step in zip(inputs, steps, strict=True):
        stored = checkpoint.tensors[key]
        label = "" if step is None else f"step {step}  "
        lines.append(f"{label}{list(stored.info.shape)}  {stored.file.path}")
    more = len({k for k, _ in shapes}) - 1
    return MismatchError(
        f"checkpoints disagree on the shape of `{key}`" + (f" and of {more} more tensors" if more else ""),
        details=first_ten(lines),
        hint=f"leave {wrong.path} out, or compare:  pmerge inspect {expected.path} {wrong.path}",
    )


def _other(inputs: Sequence[Checkpoint], expected: Checkpoint) -> Checkpoint:
    return next(c for c in inputs if c.tensors.keys() != expected.tensors.keys())


def _treatments(spec: MergeSpec, inputs: Sequence[Checkpoint], base: int) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """For each tensor of the base: what is done, the output dtype, and the inputs that it is read from."""
    averaged = _glob_filter(spec, inputs[base].tensors)
    everyone = tuple(range(len(inputs)))
    treatment: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    codes: list[str] = []
    for key, stored in inputs[base].tensors.items():
        dtype = stored.info.dtype
        kind = DTYPES[dtype].kind
        if not averaged(key):
            treatment[key] = ("copy", dtype, (base,))
        elif kind == "float":
            treatment[key] = ("average", OUTPUT_DTYPES.get(spec.dtype, dtype), everyone)
        elif kind == "code":
            codes.append(f"`{key}`  {dtype}  {stored.file.path}")
        elif spec.int_policy == "newest":
            treatment[key] = ("copy", dtype, (everyone[-1],))
        else:
            treatment[key] = ("equal", dtype, (base, *(i for i in everyone if i != base)))
    if codes:
        raise UnsupportedError(
            f"{len(codes)} tensors hold quantised codes, which cannot be averaged without their scales",
            details=first_ten(codes),
            hint="average the bf16 or fp32 checkpoints of the run instead, or dequantise these first",
        )
    return treatment


def _glob_filter(spec: MergeSpec, tensors: Mapping[str, Stored]) -> Callable[[str], bool]:
    """Which tensors are averaged: those that match an --include (all, where none is given) and no --exclude."""
    patterns = {glob: re.compile(fnmatch.translate(glob)) for glob in (*spec.include, *spec.exclude)}
    for glob, pattern in patterns.items():
        if not any(map(pattern.match, tensors)):
            raise UsageError(
                f"no tensor matches the glob {glob!r}",
                details=[f"names look like `{key}`" for key in list(tensors)[:3]],
                hint="globs match whole names: '*.experts.*', 'model.layers.3.*'",
            )
    include = [patterns[glob] for glob in spec.include]
    exclude = [patterns[glob] for glob in spec.exclude]

    def averaged(key: str) -> bool:
        if exclude and any(p.match(key) for p in exclude):
            return False
        return not include or any(p.match(key) for p in include)

    return averaged


def _files_of(
    spec: MergeSpec, base: Checkpoint, treatment: Mapping[str, tuple[str, str, tuple[int, ...]]]
) -> list[tuple[str, Mapping[str, str], list[str]]]:
    """The output files: name, metadata and the keys of their tensors, in order."""
    if spec.shard_bytes is not None:
        return _resharded(spec.shard_bytes, base, treatment)
    by_file: dict[str, list[str]] = {file.name: [] for file in base.files}
    for key, stored in base.tensors.items():
        by_file[stored.file.name].append(key)
    renamed = {base.files[0].name: "model.safetensors"} if base.root is None else {}
    return [
        (renamed.get(file.name, file.name), {"format": "pt", **file.header.metadata}, by_file[file.name]) for file in base.files
    ]


def _resharded(
    shard_bytes: int, base: Checkpoint, treatment: Mapping[str, tuple[str, str, tuple[int, ...]]]
) -> list[tuple[str, Mapping[str, str], list[str]]]:
    """The Hub's naming and splitting rule."""
    from huggingface_hub import split_state_dict_into_shards_factory

    if base.layout == "ranks":
        raise UsageError("--shard-size cannot be used with one file per rank: names repeat between the files")
    sizes = {key: stored.info.num_elements * DTYPES[treatment[key][1]].bits // 8 for key, stored in base.tensors.items()}
    split = split_state_dict_into_shards_factory(
        {key: (key,) for key in sizes},
        get_storage_size=lambda tensor: sizes[tensor[0]],
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    metadata = {"format": "pt", **base.files[0].header.metadata}
    return [(name, metadata, list(keys)) for name, keys in split.filename_to_tensors.items()]


def _plan_file(
    name: str,
    metadata: Mapping[str, str],
    keys: Sequence[str],
    inputs: Sequence[Checkpoint],
    base: int,
    treatment: Mapping[str, tuple[str, str, tuple[int, ...]]],
) -> OutputFile:
    stored_of = inputs[base].tensors
    raw, header = lay_out([(stored_of[k].name, treatment[k][1], stored_of[k].info.shape) for k in keys], metadata)
    builder = RunBuilder()
    for key in keys:
        kind, dtype, indices = treatment[key]
        info = header.tensors[stored_of[key].name]
        sources = []
        for index in indices:
            stored = inputs[index].tensors[key]
            source = Source(stored.file, stored.file.header.data_start + stored.info.start, stored.info.dtype)
            sources.append((source, stored.info.end - stored.info.start))
        offset = header.data_start + info.start
        builder.add(key, kind, dtype, offset, header.data_start + info.end, info.num_elements, sources)
    return OutputFile(name, raw, header.file_bytes, builder.finish(), tuple(stored_of[key].name for key in keys))


def _mixed_dtypes(inputs: Sequence[Checkpoint], base: Checkpoint) -> list[str]:
    """A warning where the inputs hold a tensor in other dtypes than the base, which decides the output's."""
    mixed = [
        key
        for key, stored in base.tensors.items()
        if any(checkpoint.tensors[key].info.dtype != stored.info.dtype for checkpoint in inputs)
    ]
    if not mixed:
        return []
    return [f"{len(mixed)} tensors differ in dtype between the checkpoints; {base.path} decides (first: `{mixed[0]}`)"]


def config_differences(inputs: Sequence[Checkpoint], base: Checkpoint) -> list[str]:
    """Where the inputs' `config.json` differ in anything but versions and paths, as warnings."""
    warnings = []
    expected = _flatten(base.config)
    for checkpoint in inputs:
        found = _flatten(checkpoint.config)
        keys = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        if keys:
            shown = "; ".join(f"{k}: {found.get(k, 'absent')!r} against {expected.get(k, 'absent')!r}" for k in keys[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            warnings.append(f"config.json of {checkpoint.path} differs from {base.path}, which is kept: {shown}{more}")
    return warnings


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in _VOLATILE:
            continue
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _side_file_warnings(inputs: Sequence[Checkpoint], base: Checkpoint) -> list[str]:
    warnings = []
    if base.root is not None:
        folders = [checkpoint.root for checkpoint in inputs if checkpoint.root is not None]
        warnings += differing_files(folders, base.side_files.kept, base.root)
        if (base.root / "adapter_config.json").exists():
            warnings.append(
                f"{base.path} is a LoRA adapter: averaging its A and B is not averaging the products B A that they stand for"
            )
    return warnings
