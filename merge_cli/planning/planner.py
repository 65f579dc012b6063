"""From opened checkpoints to a plan: what happens to each tensor, and where each byte goes.

Works on names, shapes and dtypes only; a tensor that nobody has heard of is averaged like any
other. Every tensor of the base is in the plan, under its own name and shape, in the order of the
base's files. Quantized tensors are planned as what they mean (`formats/logical.py`): written as
plain values, or, on request, quantized again in the base's way.
"""

from __future__ import annotations

import fnmatch
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from merge_cli.errors import UnsupportedError, UsageError, first_ten
from merge_cli.formats.alike import Moved, original_of
from merge_cli.formats.checkpoint import Checkpoint, Stored
from merge_cli.formats.dcp.checkpoint import tensor_name
from merge_cli.formats.dcp.gather import as_chunks_of, whole
from merge_cli.formats.dcp.hf_files import OF_DCP, SHARDING_INFO
from merge_cli.formats.experts import as_dialect_of
from merge_cli.formats.logical import Coded, Logical, View, Viewed, kind_of, view
from merge_cli.formats.numbering import SHARD_NUMBER
from merge_cli.formats.safetensors import DTYPES
from merge_cli.formats.side_files import check_side_files
from merge_cli.planning.clone_files import check_clone, clone_files
from merge_cli.planning.compatibility import check_same_ranks, check_same_tensors, disagreements
from merge_cli.planning.extents import Entry, Inputs, add_entry, plan_file
from merge_cli.planning.plan import MergePlan, Output, OutputFile
from merge_cli.planning.sums import notes_on_weights
from merge_cli.request.methods import METHODS
from merge_cli.request.spec import MergeSpec

OUTPUT_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
DEQUANTIZED = "BF16"
SAFETENSORS = "safetensors"
SHARD_BYTES = 5_000_000_000  # of what has no shards of its own: the Hub's usual size
ROUTER_BIAS = "e_score_correction_bias"
_IN_ONE_FILE = ("adapter_model", "consolidated")
"""Stems of weights whose loaders (PEFT, Mistral) know no shards."""


def build_plan(
    spec: MergeSpec,
    inputs: Sequence[Checkpoint],
    steps: Sequence[int | None],
    base: int,
    outputs: Sequence[Output],
) -> MergePlan:
    """Plan the merge of `inputs` (oldest to newest) into `outputs`, with the layout of
    `inputs[base]`.

    Raises MismatchError when the checkpoints differ in their tensors, UnsupportedError for tensors
    that cannot be averaged, and UsageError for a glob that matches nothing, or globs that leave
    nothing to average.
    """
    seen = Viewed()
    if spec.format == SAFETENSORS:
        inputs = [whole(each) for each in inputs]
    views = [view(checkpoint, seen) for checkpoint in inputs]
    notes: list[str] = []
    tensors = [_with_cache_scales(views[base], other, _in_base_dialect(views[base], other, notes)) for other in views]
    for used in {base, *(output.base for output in outputs)}:
        check_side_files(inputs[used].path, inputs[used].side_files.kept)
    check_same_ranks(inputs, base)
    averaged = _glob_filter(spec, tensors, str if inputs[base].dcp is None else tensor_name)
    check_same_tensors(inputs, _compared(spec, tensors, base, averaged), steps, base)
    if spec.requantize and not views[base].owner:
        raise UsageError(
            f"--requantize writes the weights as the base has them, and {inputs[base].path} is not quantized",
            hint="leave --requantize out, or name a quantized checkpoint:  --base PATH",
        )
    entries = list(_entries(spec, views[base], tensors[base], base, len(inputs), averaged))
    _check_something_is_averaged(spec, entries, len(inputs))
    planned = Inputs(views, tensors, base)
    if inputs[base].dcp is None:
        files = tuple(plan_file(*file, planned) for file in _files_of(spec, inputs[base], entries))
    else:
        check_clone(spec, inputs[base], outputs)
        files = clone_files(inputs[base], entries, partial(add_entry, inputs=planned))
    if METHODS[spec.method].is_explicit and len(outputs) == 1:
        notes += _notes_on_weights(spec, outputs[0], files)
    return MergePlan(
        spec,
        tuple(inputs),
        tuple(steps),
        base,
        tuple(outputs),
        files,
        warnings=(*disagreements(inputs, tensors, base), *_leftover_configs(views)),
        notes=(*notes, *_what_happens(spec, views, base, entries)),
        dequantized=bool(views[base].owner) and not spec.requantize,
    )


def _notes_on_weights(spec: MergeSpec, output: Output, files: Iterable[OutputFile]) -> list[str]:
    averaged = [each for file in files for each in file.extents if each.kind != "equal" and not each.is_copy]
    kinds = {(tuple(each.value_dtypes[i] for i in output.inputs), each.written_dtype) for each in averaged}
    return notes_on_weights(output.coefficients, spec.accumulate, sorted(kinds))


def _check_something_is_averaged(spec: MergeSpec, entries: Sequence[Entry], num_inputs: int) -> None:
    if any(entry.kind in ("average", "quantize") and len(entry.sources) == num_inputs for entry in entries):
        return
    if spec.include or spec.exclude:
        raise UsageError("nothing would be averaged: --include and --exclude leave no tensor of floats", hint="narrow --exclude")
    raise UsageError("nothing would be averaged: the checkpoints hold no tensor of floats")


def _compared(
    spec: MergeSpec, tensors: Sequence[Mapping[str, Logical]], base: int, averaged: Callable[[str], bool]
) -> list[Mapping[str, Logical]]:
    """The tensors that checkpoints must agree on: not those that are copied from the base.

    Integers that are taken from the newest must agree between it and the base; the others need not
    have them.
    """
    if not (spec.include or spec.exclude or spec.int_policy == "newest"):
        return list(tensors)
    kept: dict[int, Mapping[str, Logical]] = {}  # of the tensors with this id

    def narrowed(here: Mapping[str, Logical]) -> Mapping[str, Logical]:
        original = original_of(here)
        if id(original) not in kept:
            kept[id(original)] = {key: each for key, each in original.items() if averaged(key)}
        return here.like(kept[id(original)]) if isinstance(here, Moved) else kept[id(original)]

    found = [narrowed(here) for here in tensors]
    if spec.int_policy == "newest":
        integers = {key: each for key, each in found[base].items() if kind_of(each) == "integer"}
        different = [i for i, here in enumerate(found[:-1]) if original_of(here) is not original_of(found[base])]
        for i in different:
            found[i] = {**{key: each for key, each in found[i].items() if kind_of(each) != "integer"}, **integers}
    return found


def _with_cache_scales(base: View, other: View, tensors: Mapping[str, Logical]) -> Mapping[str, Logical]:
    """`tensors`, with the calibrated scales of `other` that are plain tensors in the base, where
    nothing is quantized.
    """
    scales = [key for key in other.activation_scales if isinstance(base.tensors.get(key), Stored)]
    return {**tensors, **{key: other.checkpoint.tensors[key] for key in scales}} if scales else tensors


def _in_base_dialect(base: View, other: View, notes: list[str]) -> Mapping[str, Logical]:
    if other is base:
        return base.tensors
    if base.checkpoint.dcp is not None and other.checkpoint.dcp is not None:
        chunks, gathered = as_chunks_of(base.checkpoint, other.checkpoint)
        if gathered:
            notes.append(f"{other.checkpoint.path} has other chunks: {gathered} tensors are gathered into those of the base")
        return chunks
    tensors, note = as_dialect_of(base.tensors, other.tensors, str(other.checkpoint.path))
    if note:
        notes.append(note)
    return tensors


def _leftover_configs(views: Sequence[View]) -> list[str]:
    """A warning, for all checkpoints together."""
    paths = [each.checkpoint.path for each in views if each.leftover_config]
    if not paths:
        return []
    more = f" (and of {len(paths) - 1} more)" if len(paths) > 1 else ""
    return [
        f"config.json of {paths[0]}{more} declares a quantization of which the tensors show nothing: they are averaged as they are,"
        " and the base's config.json is kept; remove `quantization_config` from it, or loaders will look for codes"
    ]


def _what_happens(spec: MergeSpec, views: Sequence[View], base: int, entries: Sequence[Entry]) -> list[str]:
    """What the user should know about tensors that are not simply averaged as they are."""
    notes: list[str] = []
    for other in views:
        if other.owner and (other is views[base] or not views[base].owner):
            schemes = ", ".join(f"{count} tensors {scheme}" for scheme, count in other.schemes.items())
            notes.append(f"{other.checkpoint.path} is quantized: {schemes}; read as codes times scales")
    if views[base].owner and spec.requantize:
        notes.append("the averages are quantized again in the same way, with new scales where values changed")
    elif views[base].owner:
        dtype = OUTPUT_DTYPES.get(spec.dtype, DEQUANTIZED)
        dropped = f" and {len(views[base].activation_scales)} activation scales" if views[base].activation_scales else ""
        notes.append(f"dequantized weights are written as {dtype}; scales{dropped} and quantization_config are left out")
    if any(SHARDING_INFO in file.header.metadata for file in views[base].checkpoint.files):
        notes.append("files of ranks record no whole shapes: a tensor ends where the last of its parts does (docs/trainers.md)")
    elif views[base].checkpoint.layout == "whole":
        notes.append(
            "whole tensors keep the trainer's names and shapes; its own conversion makes another framework's (docs/trainers.md)"
        )
    biases = [entry.name for entry in entries if entry.name.endswith(ROUTER_BIAS) and entry.kind == "average"]
    if biases:
        dtypes = "/".join(sorted({entry.dtype for entry in entries if entry.name in biases}))
        notes.append(f"{len(biases)} router biases ({ROUTER_BIAS}) are averaged in fp32 or wider and kept in {dtypes}")
    return notes


def _entries(
    spec: MergeSpec,
    base_view: View,
    tensors: Mapping[str, Logical],
    base: int,
    num_inputs: int,
    averaged: Callable[[str], bool],
) -> Iterable[Entry]:
    """Every tensor of the output, in the order in which the base stores them.

    Raises UnsupportedError for codes without a meaning, UsageError for a glob that matches nothing.
    """
    everyone = tuple(range(num_inputs))
    equal = everyone[-1:] if spec.int_policy == "newest" else everyone
    equal_kind = "copy" if spec.int_policy == "newest" else "equal"
    activation = set(base_view.activation_scales)
    tensors = original_of(tensors)  # names, dtypes and shapes are the same there
    codes: list[str] = []
    for stored_key, stored in original_of(base_view.checkpoint.tensors).items():
        name, file, info = stored.name, stored.file.name, stored.info
        if stored_key in activation:
            if spec.requantize:
                yield Entry(stored_key, name, file, info.dtype, info.shape, equal_kind, equal)
            continue
        key = base_view.owner.get(stored_key, stored_key)
        tensor = tensors.get(key)
        if isinstance(tensor, Coded):
            role = next(role for role, part in tensor.parts if part.name == name)
            if spec.requantize:
                kind, sources = ("quantize", everyone) if averaged(key) else ("copy", (base,))
                yield Entry(key, name, file, info.dtype, info.shape, kind, sources, role)
            elif role == tensor.parts[0][0]:
                logical = key.removeprefix(f"{file}:") if base_view.checkpoint.layout == "ranks" else key
                dtype = OUTPUT_DTYPES.get(spec.dtype, DEQUANTIZED)
                yield Entry(key, logical, file, dtype, tensor.shape, "average", everyone if averaged(key) else (base,))
        elif not averaged(key):
            yield Entry(key, name, file, info.dtype, info.shape, "copy", (base,))
        elif DTYPES[info.dtype].kind == "float":
            yield Entry(key, name, file, _output_dtype(spec, name, info.dtype), info.shape, "average", everyone)
        elif DTYPES[info.dtype].kind == "code":
            codes.append(f"`{key}`  {info.dtype}  {base_view.checkpoint.tensors[stored_key].file.path}")
        else:
            yield Entry(key, name, file, info.dtype, info.shape, equal_kind, equal)
    if codes:
        raise UnsupportedError(
            f"{len(codes)} tensors hold quantized codes, and nothing says what they mean",
            details=first_ten(codes),
            hint="average the bf16 or fp32 checkpoints of the run instead, or copy these from the base:  --exclude GLOB",
        )


def _output_dtype(spec: MergeSpec, name: str, dtype: str) -> str:
    """The dtype of an averaged plain tensor. Router biases are balanced in steps that 16 bits
    cannot hold, and keep theirs.
    """
    return dtype if name.endswith(ROUTER_BIAS) else OUTPUT_DTYPES.get(spec.dtype, dtype)


def _glob_filter(spec: MergeSpec, tensors: Sequence[Mapping[str, Logical]], name_of: Callable[[str], str]) -> Callable[[str], bool]:
    """Which tensors are averaged: those that match an --include (all, where none is given) and no
    --exclude, by `name_of(key)`.
    """
    different = {id(original_of(each)): each for each in reversed(tensors)}.values()
    names = list(dict.fromkeys(name_of(key) for each in different for key in each))
    patterns = {glob: re.compile(fnmatch.translate(glob)) for glob in (*spec.include, *spec.exclude)}
    for glob, pattern in patterns.items():
        if not any(map(pattern.match, names)):
            flag = "--include" if glob in spec.include else "--exclude"
            raise UsageError(
                f"no tensor matches the glob {glob!r}",
                details=[f"names look like `{name}`" for name in names[:3]],
                hint=f"globs match whole names:  {flag} {shlex.quote('*' + names[0].rpartition('.')[2])}",
            )
    include = [patterns[glob] for glob in spec.include]
    exclude = [patterns[glob] for glob in spec.exclude]

    def averaged(key: str) -> bool:
        name = name_of(key)
        if exclude and any(p.match(name) for p in exclude):
            return False
        return not include or any(p.match(name) for p in include)

    return averaged


def _files_of(spec: MergeSpec, base: Checkpoint, entries: Sequence[Entry]) -> list[tuple[str, Mapping[str, str], list[Entry]]]:
    """The output files: name, metadata and their tensors, in order. A file of the base that held
    only scales is not written.
    """
    if spec.shard_bytes is not None or _is_written_anew(base):
        return _resharded(spec.shard_bytes or SHARD_BYTES, base, entries)
    by_file: dict[str, list[Entry]] = {file.name: [] for file in base.files}
    for entry in entries:
        by_file[entry.file].append(entry)
    renamed = {base.files[0].name: "model.safetensors"} if base.root is None else {}
    return [
        (renamed.get(file.name, file.name), {"format": "pt", **file.header.metadata}, by_file[file.name])
        for file in base.files
        if by_file[file.name] or not file.header.tensors
    ]


def _is_written_anew(base: Checkpoint) -> bool:
    """Whether the files of the base are none that could be written again, with other values."""
    return base.layout in ("pickle", "whole")


def _resharded(shard_bytes: int, base: Checkpoint, entries: Sequence[Entry]) -> list[tuple[str, Mapping[str, str], list[Entry]]]:
    """The Hub's naming and splitting rule."""
    from huggingface_hub import split_state_dict_into_shards_factory

    if base.layout == "ranks":
        raise UsageError("--shard-size cannot be used with one file per rank: names repeat between the files")
    by_name = {entry.name: entry for entry in entries}
    stem = stem_of(base)
    split = split_state_dict_into_shards_factory(
        {name: (name,) for name in by_name},
        get_storage_size=lambda tensor: DTYPES[by_name[tensor[0]].dtype].num_bytes(math.prod(by_name[tensor[0]].shape)),
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    if len(split.filename_to_tensors) > 1 and stem in _IN_ONE_FILE:
        raise UsageError(
            f"--shard-size would cut {stem}.safetensors, which its loader reads in one file only",
            details=[f"found     {len(split.filename_to_tensors)} files of at most {shard_bytes} bytes"],
            hint="leave --shard-size out",
        )
    kept = {name: value for name, value in base.files[0].header.metadata.items() if name not in OF_DCP}
    metadata = {"format": "pt", **kept}
    return [(name, metadata, [by_name[key] for key in keys]) for name, keys in split.filename_to_tensors.items()]


def stem_of(base: Checkpoint) -> str:
    """The name of a checkpoint's weights without number and ending, which its loader looks for:
    `model`, `adapter_model` ...
    """
    if base.root is None or _is_written_anew(base):
        return "model"
    shards = [(SHARD_NUMBER.match(file.name), file.name) for file in base.files]
    stems = {shard["stem"] if shard else name.removesuffix(".safetensors") for shard, name in shards}
    return stems.pop() if len(stems) == 1 else "model"
