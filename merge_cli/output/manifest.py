"""What a merged checkpoint says about itself: `pmerge.json`, the index, the copied config."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_cli.engine.writer import CHECKPOINT
from merge_cli.errors import InputError, OutputError
from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.formats.dcp.clone import DcpParts, write_metadata
from merge_cli.formats.dcp.folder import METADATA_FILE, locate, open_folder
from merge_cli.formats.dcp.item import Envelopes
from merge_cli.formats.index import INDEX_SUFFIX
from merge_cli.formats.quantization import QUANTIZATION_SIDE_FILES, without_declared_quantization, without_quantization
from merge_cli.formats.safetensors import read_header_at
from merge_cli.formats.side_files import MAX_SIDE_FILE_BYTES, check_side_files
from merge_cli.names import MANIFEST
from merge_cli.output.records import FileRecord
from merge_cli.output.schema import SCHEMA
from merge_cli.planning.plan import ALGORITHM, MergePlan
from merge_cli.planning.planner import stem_of
from merge_cli.planning.record import describe_result
from merge_cli.stores.store import join, read_file
from merge_cli.system.held import HeldFolder
from merge_cli.system.json_text import parse_json
from merge_cli.version import __version__

MAX_MANIFEST_BYTES = 64 << 20
_SEAL = b',\n  "sha256": "%s"\n}\n'


def manifest(
    plan: MergePlan, done: Mapping[str, FileRecord], command: list[str], beside: Mapping[str, FileRecord]
) -> dict[str, Any]:
    """The content of `pmerge.json`: where the checkpoint comes from and what its files must hash
    to.

    `done` are the weight files, `beside` the side files and the index.
    """
    return {
        "pmerge": __version__,
        "schema": SCHEMA,
        "algorithm": ALGORITHM,
        **describe_result(plan),
        "nonfinite": count_nonfinite(done),
        "files": {name: {"bytes": entry.file_bytes, "sha256": entry.sha256} for name, entry in sorted(done.items())},
        "side_files": {name: {"bytes": entry.file_bytes, "sha256": entry.sha256} for name, entry in sorted(beside.items())},
        "versions": {"python": platform.python_version(), "torch": _version_of("torch")},
        "command": command,
    }


def count_nonfinite(done: Mapping[str, FileRecord]) -> dict[str, int]:
    """The elements of all inputs that were NaN or Inf, by tensor; a result that overflowed counts
    too.
    """
    return {key: count for _, entry in sorted(done.items()) for key, count in sorted(entry.nonfinite.items())}


def seal(content: Mapping[str, Any]) -> bytes:
    """`content` as the bytes of `pmerge.json`, which end with the sha256 of all that stands before
    it.
    """
    text = json.dumps(content, indent=2, default=list).encode().removesuffix(b"\n}")
    return text + _SEAL % hashlib.sha256(text).hexdigest().encode()


def is_sealed(raw: bytes) -> bool:
    """Whether the bytes of `pmerge.json` end with the sha256 of what stands before it: no bit of
    them has changed.
    """
    text = raw[: -len(_SEAL % bytes(64))]
    return raw == text + _SEAL % hashlib.sha256(text).hexdigest().encode()


def index_of(plan: MergePlan) -> tuple[str, bytes] | None:
    """The name and content of the index, None where the layout has none."""
    base = plan.inputs[plan.base]
    if base.dcp is not None:
        name = join(base.dcp.place.inside, METADATA_FILE) if base.dcp.place.inside else METADATA_FILE
        return name, write_metadata(base.dcp.clone.metadata)
    if base.layout == "ranks" or (len(plan.files) == 1 and not base.index_name):
        return None
    if plan.spec.shard_bytes is not None and len(plan.files) == 1:
        return None
    metadata = {**base.index_metadata, "total_size": total_tensor_bytes(plan)}
    weight_map = {name: file.name for file in plan.files for name in file.names}
    content = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    resharded = plan.spec.shard_bytes is not None
    name = base.index_name if base.index_name and not resharded else stem_of(base) + INDEX_SUFFIX
    return name, content.encode()


def total_tensor_bytes(plan: MergePlan) -> int:
    """The bytes of all tensors of one output, headers not counted."""
    return sum(file.file_bytes - len(file.header) for file in plan.files)


def side_files(base: Checkpoint, dtype: str, dequantized: bool = False) -> Iterator[tuple[str, bytes]]:
    """The side files of a result, name and content: those of the base; the config's dtype follows
    `dtype` unless that is "keep".

    The config of a checkpoint that is no longer quantized does not say that it is.
    """
    if base.root is None:
        return
    if dequantized and dtype == "keep":
        dtype = "bf16"
    for name in base.side_files.kept:
        if dequantized and name in QUANTIZATION_SIDE_FILES:
            continue
        check_side_files(base.root, [name])
        data = read_file(join(base.root, name), MAX_SIDE_FILE_BYTES)
        check_side_files(base.root, [name])  # again: it may have become a link to a file elsewhere before it was opened
        if name == "config.json" and dtype != "keep":
            config = without_quantization(base.config) if dequantized else base.config
            data = json.dumps(with_dtype(config, dtype), indent=2).encode() + b"\n"
        if name == "params.json" and dequantized:
            data = _without_declaration(data)
        yield name, data


def write_side_files(base: Checkpoint, staging: HeldFolder, dtype: str, dequantized: bool = False) -> dict[str, FileRecord]:
    """Write the side files of a result, following the umask. Returns size and sha256 of each."""
    written: dict[str, FileRecord] = {}
    for name, data in side_files(base, dtype, dequantized):
        staging.write_file(f"{CHECKPOINT}/{name}", data)
        written[name] = digest(data)
    return written


def _without_declaration(data: bytes) -> bytes:
    """The bytes of a params.json without its declaration of quantized weights; as they are where it
    is no JSON object.
    """
    try:
        params = parse_json(data)
    except ValueError:
        return data
    if not isinstance(params, dict) or "quantization" not in params:
        return data
    return json.dumps(without_declared_quantization(params), indent=2).encode() + b"\n"


def digest(data: bytes) -> FileRecord:
    """Size and sha256 of a small file's bytes."""
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with every statement of the weights' dtype changed to `dtype` ("bf16", "fp16",
    "fp32").
    """
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            changed[key] = with_dtype(value, dtype)
        else:
            changed[key] = name if key in ("dtype", "torch_dtype") and isinstance(value, str) else value
    return changed


def write_metadata_files(
    merge: MergePlan, staging: HeldFolder, done: Mapping[str, FileRecord], command: Sequence[str]
) -> dict[str, FileRecord]:
    """Write the files of a checkpoint that are not weights: side files, pmerge.json, the index
    last; their records.

    `done` are the records of the weight files. Every header is read back, and nothing is published
    if one is wrong.
    """
    beside = write_side_files(merge.inputs[merge.base], staging, merge.spec.dtype, merge.dequantized)
    index = index_of(merge)
    if index is not None:
        beside[index[0]] = digest(index[1])
    content = seal(manifest(merge, done, list(command or sys.argv), beside))
    staging.write_file(f"{CHECKPOINT}/{MANIFEST}", content)
    if index is not None:
        staging.write_file(f"{CHECKPOINT}/{index[0]}", index[1])
    _check_complete(merge, staging.path / CHECKPOINT)
    return {**beside, MANIFEST: digest(content)}


def _check_complete(merge: MergePlan, folder: Path) -> None:
    """Read back every header: each planned tensor must be in its file, or nothing is published."""
    base = merge.inputs[merge.base]
    if base.dcp is not None:
        _check_clone(base.dcp, folder)
        return
    for file in merge.files:
        try:
            header = read_header_at(str(folder / file.name))
        except InputError as error:
            raise OutputError(f"cannot read back what was written: {error.message}", details=error.details) from error
        if tuple(header.tensors) != file.names and set(header.tensors) != set(file.names):
            raise OutputError(f"{folder / file.name} does not hold the tensors that were planned")


def _version_of(package: str) -> str:
    """The version of an installed package, which is not imported for that; "" where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _check_clone(parts: DcpParts, folder: Path) -> None:
    """Read back the metadata and the envelope of every chunk."""
    expected = parts.clone.metadata
    try:
        found = open_folder(folder / parts.place.inside)
        tensors = found.metadata.tensors
        merged = [(name, tensors[name], chunk) for name in tensors if parts.kept[name] == "merge" for chunk in tensors[name].chunks]
        for _ in locate(found, merged, Envelopes()):
            pass
    except InputError as error:
        raise OutputError(f"cannot read back what was written: {error.message}", details=error.details) from error
    if (tensors, found.metadata.blobs) != (expected.tensors, expected.blobs):
        raise OutputError(f"{folder} does not hold the tensors that were planned")
