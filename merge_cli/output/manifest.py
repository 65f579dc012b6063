"""What a merged checkpoint says about itself: `pmerge.json`, the index, the copied config."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.formats.files import check_stays_inside, read_regular_file
from merge_cli.formats.quantization import QUANTIZATION_SIDE_FILES, without_quantization
from merge_cli.formats.side_files import MAX_SIDE_FILE_BYTES
from merge_cli.output.staging import Done, write_file
from merge_cli.plan import MergePlan, Output
from merge_cli.version import __version__

MANIFEST = "pmerge.json"


def input_fingerprints(plan: MergePlan) -> list[dict[str, Any]]:
    """What identifies each input: its files with size, modification time, inode and header hash."""
    return [
        {
            "path": str(checkpoint.path.resolve()),
            "files": [
                {
                    "name": file.name,
                    "file_bytes": file.file_bytes,
                    "mtime_ns": file.mtime_ns,
                    "inode": file.inode,
                    "header_sha256": file.header.sha256,
                }
                for file in checkpoint.files
            ],
        }
        for checkpoint in plan.inputs
    ]


def manifest(plan: MergePlan, output: Output, done: Mapping[str, Done], command: list[str]) -> dict[str, Any]:
    """The content of `pmerge.json`: where the checkpoint comes from and what its files must hash to."""
    import torch

    fingerprints = input_fingerprints(plan)
    return {
        "pmerge": __version__,
        "method": plan.spec.method,
        "parameters": dict(plan.spec.parameters),
        "inputs": [
            {
                "step": plan.steps[index],
                "coefficient": coefficient,
                "bytes": sum(file["file_bytes"] for file in fingerprints[index]["files"]),
                **fingerprints[index],
            }
            for index, coefficient in zip(output.inputs, output.coefficients.values, strict=True)
        ],
        "base": str(plan.inputs[plan.base].path.resolve()),
        "dtype": plan.spec.dtype,
        "accumulate": plan.spec.accumulate,
        "include": list(plan.spec.include),
        "exclude": list(plan.spec.exclude),
        "int_policy": plan.spec.int_policy,
        "allow_nonfinite": plan.spec.allow_nonfinite,
        "requantize": plan.spec.requantize,
        "nonfinite": count_nonfinite(done),
        "plan": plan.fingerprint(),
        "files": {name: {"bytes": entry.file_bytes, "sha256": entry.sha256} for name, entry in sorted(done.items())},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": command,
    }


def count_nonfinite(done: Mapping[str, Done]) -> dict[str, int]:
    """The elements of all inputs that were NaN or Inf, by tensor; a result that overflowed counts too."""
    return {key: count for _, entry in sorted(done.items()) for key, count in sorted(entry.nonfinite.items())}


def index_of(plan: MergePlan) -> tuple[str, bytes] | None:
    """The name and content of the index, None where the layout has none."""
    base = plan.inputs[plan.base]
    if base.layout == "ranks" or (len(plan.files) == 1 and not base.index_name):
        return None
    if plan.spec.shard_bytes is not None and len(plan.files) == 1:
        return None
    metadata = {**base.index_metadata, "total_size": total_tensor_bytes(plan)}
    weight_map = {name: file.name for file in plan.files for name in file.names}
    content = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    resharded = plan.spec.shard_bytes is not None
    name = base.index_name if base.index_name and not resharded else "model.safetensors.index.json"
    return name, content.encode()


def total_tensor_bytes(plan: MergePlan) -> int:
    """The bytes of all tensors of one output, headers not counted."""
    return sum(file.file_bytes - len(file.header) for file in plan.files)


def write_side_files(base: Checkpoint, folder: Path, dtype: str, dequantized: bool = False) -> None:
    """Copy the base's side files, following the umask; the config's dtype follows `dtype` unless that is "keep".

    The config of a checkpoint that is no longer quantised does not say that it is.
    """
    if base.root is None:
        return
    if dequantized and dtype == "keep":
        dtype = "bf16"
    for name in base.side_files.kept:
        if dequantized and name in QUANTIZATION_SIDE_FILES:
            continue
        source = base.root / name
        check_stays_inside(base.root, source)
        data = read_regular_file(source, MAX_SIDE_FILE_BYTES)
        if name == "config.json" and dtype != "keep":
            config = without_quantization(base.config) if dequantized else base.config
            data = json.dumps(with_dtype(config, dtype), indent=2).encode() + b"\n"
        write_file(folder / name, data)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with every statement of the weights' dtype changed to `dtype` ("bf16", "fp16", "fp32")."""
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            changed[key] = with_dtype(value, dtype)
        else:
            changed[key] = name if key in ("dtype", "torch_dtype") and isinstance(value, str) else value
    return changed
