"""Do these checkpoints fit together: the same tensors, shapes and kinds of numbers, and configs
that say the same.

Everything here works on headers and config files; what cannot be averaged is refused before a
weight is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from merge_cli.errors import MismatchError, first_ten
from merge_cli.formats.alike import original_of
from merge_cli.formats.checkpoint import Checkpoint, Stored, read_config
from merge_cli.formats.dcp.hf_files import is_cut, offsets_of
from merge_cli.formats.logical import Logical, dtype_of, file_of, kind_of, shape_of
from merge_cli.formats.side_files import differing_files
from merge_cli.names import MANIFEST
from merge_cli.stores.store import join

_VOLATILE = {"transformers_version", "_name_or_path", "use_cache", "_commit_hash"}


def check_same_tensors(
    inputs: Sequence[Checkpoint], tensors: Sequence[Mapping[str, Logical]], steps: Sequence[int | None], base: int
) -> None:
    """Every input must hold the same tensors, of the same shapes, as the base; raises MismatchError
    with the list.

    `tensors[i]` are those of `inputs[i]`, as what they mean and under the base's names.
    """
    expected = tensors[base]
    absent: list[str] = []
    extra: list[str] = []
    shapes: list[tuple[str, int]] = []
    kinds: list[str] = []
    for index, (checkpoint, here) in enumerate(zip(inputs, tensors, strict=True)):
        if original_of(here) is original_of(expected):
            continue
        if here.keys() != expected.keys():
            absent += [f"`{k}`  missing in {checkpoint.path}" for k in expected if k not in here]
            extra += [f"`{k}`  only in {checkpoint.path}, not in {inputs[base].path}" for k in here if k not in expected]
        for key, wanted in expected.items():
            found = here.get(key)
            if found is None or _alike(found, wanted):
                continue
            if shape_of(found) != shape_of(wanted):
                shapes.append((key, index))
            elif {kind_of(found), kind_of(wanted)} != {"float"}:
                kinds.append(f"`{key}`  {dtype_of(found)} in {checkpoint.path}, {dtype_of(wanted)} in {inputs[base].path}")
    if absent or extra:
        verb = "copy them from the base with" if absent else "leave them out with"
        absent = [*absent[:5], *extra[:5], *absent[5:], *extra[5:]]  # names that changed show on both sides
        other = next(c for c, here in zip(inputs, tensors, strict=True) if here.keys() != expected.keys())
        raise MismatchError(
            f"checkpoints disagree on which tensors there are ({len(absent)} differences)",
            details=first_ten(absent),
            hint=f"{verb}  --exclude {_glob_of(absent)!r}, or compare:  pmerge inspect {inputs[base].path} {other.path}",
        )
    if shapes:
        raise _shape_error(shapes, inputs, tensors, steps, base)
    if kinds:
        raise MismatchError(
            f"checkpoints disagree on the dtype of {len(kinds)} tensors, and no average is defined between these",
            details=first_ten(kinds),
        )


def _glob_of(lines: Sequence[str]) -> str:
    """A glob for the tensors that `lines` begin with: the name, or the end that all names have."""
    names = [line.split("`")[1] for line in lines]
    last = {name.rpartition(".")[2] for name in names}
    return names[0] if len(set(names)) == 1 else f"*.{last.pop()}" if len(last) == 1 else names[0]


def _alike(found: Logical, wanted: Logical) -> bool:
    """Whether shape and dtype agree, for plain tensors without a look at more than the header's
    entry.
    """
    if isinstance(found, Stored) and isinstance(wanted, Stored):
        return found.info.shape == wanted.info.shape and found.info.dtype == wanted.info.dtype
    return shape_of(found) == shape_of(wanted) and kind_of(found) == kind_of(wanted) == "float"


def check_same_ranks(inputs: Sequence[Checkpoint], base: int) -> None:
    """Checkpoints with one file or folder per rank must have the same ranks; raises MismatchError
    with those that are missing.
    """
    expected = inputs[base]
    for checkpoint in inputs:
        _check_same_places(checkpoint, expected)
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


def _check_same_places(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Files of torch's distributed writer say which part of each tensor they hold; raises
    MismatchError where that differs.
    """
    headers = [[(file.name, id(file.header)) for file in each.files] for each in (checkpoint, base)]
    if headers[0] == headers[1] or not (is_cut(checkpoint) or is_cut(base)):
        return
    found, expected = offsets_of(checkpoint), offsets_of(base)
    every = "ranks" in (checkpoint.layout, base.layout)  # otherwise tensors that one has not are reported by name
    keys = found.keys() | expected.keys() if every else found.keys() & expected.keys()
    other = sorted(key for key in keys if found.get(key) != expected.get(key))
    if other:
        raise MismatchError(
            f"the files hold other parts of the tensors: {checkpoint.path} and {base.path} were saved by other meshes",
            details=first_ten(
                [f"`{key}`  at {_at(found.get(key))} in one, at {_at(expected.get(key))} in the other" for key in other]
            ),
            hint="write whole tensors, which are gathered from the parts:  --format safetensors",
        )


def _at(offsets: Sequence[int] | None) -> str:
    return "no offset" if offsets is None else str(list(offsets))


def _metadata_differences(inputs: Sequence[Checkpoint], base: Checkpoint) -> list[str]:
    """A warning where files of one rank differ in the metadata of their headers, which may say what
    they hold.
    """
    if base.layout != "ranks":
        return []
    expected = {file.name: dict(file.header.metadata) for file in base.files}
    return [
        f"{checkpoint.path}/{file.name}: the metadata in its header differs from that in {base.path}"
        for checkpoint in inputs
        for file in checkpoint.files
        if checkpoint.layout == "ranks" and expected.get(file.name, {}) != dict(file.header.metadata)
    ][:3]


def _shape_error(
    shapes: Sequence[tuple[str, int]],
    inputs: Sequence[Checkpoint],
    tensors: Sequence[Mapping[str, Logical]],
    steps: Sequence[int | None],
    base: int,
) -> MismatchError:
    key, wrong = shapes[0]
    rare = Counter(shape_of(here[key]) for here in tensors if key in here).most_common()[-1][0]
    odd = next(i for i, here in enumerate(tensors) if key in here and shape_of(here[key]) == rare)
    lines = []
    for here, step in zip(tensors, steps, strict=True):
        if key not in here:
            continue
        label = "" if step is None else f"step {step}  "
        lines.append(f"{label}{list(shape_of(here[key]))}  {file_of(here[key])}")
    more = len({k for k, _ in shapes}) - 1
    return MismatchError(
        f"checkpoints disagree on the shape of `{key}`" + (f" and of {more} more tensors" if more else ""),
        details=first_ten(lines),
        hint=f"leave {inputs[odd].path} out, copy the tensor from the base with  --exclude {key!r},"
        f" or compare:  pmerge inspect {inputs[base].path} {inputs[wrong].path}",
    )


def disagreements(inputs: Sequence[Checkpoint], tensors: Sequence[Mapping[str, Logical]], base: int) -> list[str]:
    """What may be wrong with averaging these, as warnings: results, LoRA, dtypes, configs and
    tokenizers that differ.
    """
    merged = [checkpoint.path for checkpoint in inputs if MANIFEST in checkpoint.side_files.skipped]
    warnings = [f"results of pmerge are averaged again: {', '.join(first_ten(merged))}"] if merged else []
    warnings += _mixed_dtypes(tensors, base, inputs[base])
    warnings += config_differences(inputs, inputs[base])
    warnings += _metadata_differences(inputs, inputs[base])
    without = [
        checkpoint for checkpoint in inputs if checkpoint.root is not None and "config.json" not in checkpoint.side_files.kept
    ]
    if inputs[base] in without and len(without) < len(inputs):
        has = next(checkpoint for checkpoint in inputs if checkpoint not in without)
        warnings.append(f"{inputs[base].path}, the base, has no config.json, so the result has none; --base {has.path} has one")
    copied = [name for name in inputs[base].side_files.kept if name.endswith(".safetensors")]
    if copied:
        warnings.append(
            f"weights of modules beside the model are copied from the base, not averaged: {', '.join(first_ten(copied))}"
        )
    if (root := inputs[base].root) is not None:
        folders = [checkpoint.root for checkpoint in inputs if checkpoint.root is not None]
        warnings += differing_files(folders, inputs[base].side_files.kept, root)
        if "adapter_config.json" in inputs[base].side_files.kept:
            warnings.append(
                f"{root} is a LoRA adapter: averaging its A and B is not averaging the products B A that they stand for"
            )
            warnings += _adapter_differences(folders, root)
    return warnings


def _adapter_differences(folders: Sequence[str], base: str) -> list[str]:
    """Where `adapter_config.json` differs (alpha, rank, target modules): the same A and B then
    stand for other products.
    """
    expected = _flatten(read_config(join(base, "adapter_config.json")))
    warnings = []
    for folder in folders:
        found = _flatten(read_config(join(folder, "adapter_config.json")))
        keys = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        if keys:
            shown = "; ".join(f"{k}: {found.get(k, 'absent')!r} against {expected.get(k, 'absent')!r}" for k in keys[:3])
            warnings.append(f"adapter_config.json of {folder} differs from {base}, which is kept: {shown}")
    return warnings


def _mixed_dtypes(tensors: Sequence[Mapping[str, Logical]], base: int, checkpoint: Checkpoint) -> list[str]:
    """A warning where the inputs hold a tensor in other dtypes than the base, which decides the
    output's.
    """
    others = [here for here in tensors if original_of(here) is not original_of(tensors[base])]
    mixed = [
        key
        for key, wanted in (tensors[base].items() if others else ())
        if any(key in here and dtype_of(here[key]) != dtype_of(wanted) for here in others)
    ]
    if not mixed:
        return []
    return [f"{len(mixed)} tensors differ in dtype between the checkpoints; {checkpoint.path} decides (first: `{mixed[0]}`)"]


def config_differences(inputs: Sequence[Checkpoint], base: Checkpoint) -> list[str]:
    """Where the inputs' `config.json` differ in anything but versions and paths, as warnings: one
    for all that differ in the same fields, with the values of the first.
    """
    warnings: dict[tuple[str, ...], tuple[str, str]] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    if not base.config:
        return []
    expected = _flatten(base.config)
    for checkpoint in inputs:
        found = _flatten(checkpoint.config)
        keys = tuple(sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)))
        if keys:
            counts[keys] += 1
            shown = "; ".join(f"{k}: {found.get(k, 'absent')!r} against {expected.get(k, 'absent')!r}" for k in keys[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            warnings.setdefault(keys, (checkpoint.path, f"differs from {base.path}, which is kept: {shown}{more}"))
    others = {keys: f" (and of {count - 1} more)" if count > 1 else "" for keys, count in counts.items()}
    return [f"config.json of {path}{others[keys]} {difference}" for keys, (path, difference) in warnings.items()]


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
