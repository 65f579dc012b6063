"""Shared by the scripts that run in the trainers' own environments: results, and the averages made
by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader


def load_tensors(folder: Path, reader: Callable[[Path], StorageReader]) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint, by torch's own loader."""
    entries = reader(folder).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(found, storage_reader=reader(folder), no_dist=True)
    return found


def mean_of(folders: list[Path], reader: Callable[[Path], StorageReader] = FileSystemReader) -> dict[str, torch.Tensor]:
    """The mean of floats in float64, by torch's own loader; everything else from the last."""
    loaded = [load_tensors(folder, reader) for folder in folders]
    return {
        name: torch.stack([each[name].double() for each in loaded]).mean(0).to(last.dtype) if last.is_floating_point() else last
        for name, last in loaded[-1].items()
    }


def check(trainer: str, what: str, passed: bool) -> None:
    """Print a line of the report, on rank 0; fail if it did not pass."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"| {trainer} | {what} | {'yes' if passed else 'NO'} |", flush=True)
    if not passed:
        sys.stdout.flush()
        os._exit(1)


def all_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether each tensor of `found` has the bits of the one of the same name."""
    return bool(found) and all(torch.equal(tensor.detach().cpu(), expected[name]) for name, tensor in found.items())
