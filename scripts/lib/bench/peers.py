"""What people write when they have no tool: two loops that average safetensors checkpoints, and a
check of any average.

    peers.py naive OUT CKPT...       load whole state dicts, sum in float32, write shard by shard
    peers.py safe_open OUT CKPT...   one shard at a time with safe_open, sum in float32, save_file
    peers.py check OUT CKPT...       print as JSON how OUT compares with the average in float64

Both loops take the same shortcuts: every checkpoint has the shards of the first, weights are plain
floats, nothing is checked and nothing is published atomically. They are here to be measured, not to
be used.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CHECKED_TENSORS = 64
CHECKED_ELEMENTS = 1_000_000


def shard_names(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.glob("*.safetensors"))


def copy_side_files(checkpoint: Path, out: Path) -> None:
    for path in checkpoint.glob("*.json"):
        shutil.copy(path, out)


def naive(out: Path, checkpoints: list[Path]) -> None:
    sums: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    shard_of: dict[str, str] = {}
    for checkpoint in checkpoints:
        for shard in shard_names(checkpoint):
            for name, tensor in load_file(checkpoint / shard).items():
                if name in sums:
                    sums[name] += tensor.float()
                else:
                    sums[name], dtypes[name], shard_of[name] = tensor.float(), tensor.dtype, shard
    out.mkdir()
    for shard in shard_names(checkpoints[0]):
        names = [name for name in sums if shard_of[name] == shard]
        averages = {name: (sums.pop(name) / len(checkpoints)).to(dtypes[name]) for name in names}
        save_file(averages, out / shard, metadata={"format": "pt"})
    copy_side_files(checkpoints[0], out)


def shard_by_shard(out: Path, checkpoints: list[Path]) -> None:
    out.mkdir()
    for shard in shard_names(checkpoints[0]):
        averages = {}
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(c / shard, "pt")) for c in checkpoints]
            for name in files[0].offset_keys():
                first = files[0].get_tensor(name)
                total = first.float()
                for file in files[1:]:
                    total += file.get_tensor(name).float()
                averages[name] = (total / len(checkpoints)).to(first.dtype)
            save_file(averages, out / shard, metadata={"format": "pt"})
    copy_side_files(checkpoints[0], out)


def check(out: Path, checkpoints: list[Path]) -> dict[str, Any]:
    """All names; for some tensors shape, dtype and the first million values against the mean in
    float64.
    """

    def places(folder: Path) -> dict[str, Path]:
        found = {}
        for shard in shard_names(folder):
            with safe_open(folder / shard, "pt") as file:
                found.update(dict.fromkeys(file.keys(), folder / shard))
        return found

    def values(places: dict[str, Path], name: str) -> torch.Tensor:
        with safe_open(places[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    if (out / ".metadata").exists():
        return check_dcp(out, checkpoints)
    inputs, output = [places(c) for c in checkpoints], places(out)
    shared = [name for name in inputs[0] if name in output]
    plain = [name for name in shared if f"{name}_scale_inv" not in inputs[0] and not name.endswith("_scale_inv")]
    num_values = num_exact = 0
    for name in plain[:: max(1, len(plain) // CHECKED_TENSORS)]:
        got = values(output, name)
        given = [values(source, name) for source in inputs]
        if got.shape != given[0].shape or got.dtype != given[0].dtype:
            return {"error": f"{name} is {got.dtype} {list(got.shape)}"}
        parts = [g.flatten()[:CHECKED_ELEMENTS].double() for g in given]
        mean = sum(parts, torch.zeros((), dtype=torch.float64)) / len(given)
        exact = got.flatten()[:CHECKED_ELEMENTS] == mean.to(got.dtype)
        num_exact += int(exact.sum())
        num_values += exact.numel()
    return {
        "num_tensors": len(inputs[0]),
        "num_missing": sum(name not in output and not name.endswith("_scale_inv") for name in inputs[0]),
        "num_added": len(output.keys() - inputs[0].keys()),
        "num_values_checked": num_values,
        "correctly_rounded": num_exact / max(1, num_values),
    }


def check_dcp(out: Path, checkpoints: list[Path]) -> dict[str, Any]:
    """The same of a distributed checkpoint, all values, by torch's own loader."""
    from torch.distributed.checkpoint.state_dict_loader import load

    given = [{name: t for shard in shard_names(c) for name, t in load_file(c / shard).items()} for c in checkpoints]
    found = {name: torch.empty_like(tensor) for name, tensor in given[0].items()}
    load(found, checkpoint_id=out, no_dist=True)
    exact = sum(
        int((found[name] == torch.stack([each[name].double() for each in given]).mean(0).to(found[name].dtype)).sum())
        for name in found
    )
    num_values = sum(tensor.numel() for tensor in found.values())
    return {
        "num_tensors": len(found),
        "num_missing": 0,
        "num_added": 0,
        "num_values_checked": num_values,
        "correctly_rounded": exact / num_values,
    }


def main(how: str, out: str, *checkpoints: str) -> None:
    folders = [Path(checkpoint) for checkpoint in checkpoints]
    if how == "check":
        print(json.dumps(check(Path(out), folders)))
    else:
        {"naive": naive, "safe_open": shard_by_shard}[how](Path(out), folders)


if __name__ == "__main__":
    main(*sys.argv[1:])
