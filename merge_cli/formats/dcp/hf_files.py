"""Files of DCP's safetensors writer (`HuggingFaceStorageWriter`): one or more a rank, each with a
part of every tensor, and in its header the offsets at which the parts begin.

No file holds a tensor's whole shape: it is where the last part ends. So a missing last rank shows
only beside a checkpoint that has it.

Source: torch/distributed/checkpoint/hf_storage.py and filesystem.py of torch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from merge_cli.errors import InputError
from merge_cli.formats.checkpoint import Checkpoint, Stored
from merge_cli.formats.dcp.metadata import MAX_DIMS, Chunk, Item, Size
from merge_cli.formats.untrusted_json import walk_object
from merge_cli.formats.weight_file import WeightFile

SHARDING_INFO = "DCP_SHARDING_INFO"
OF_DCP = (SHARDING_INFO, "DCP_VERSION")
"""The metadata that mean nothing beside whole tensors."""
_ENTRY = re.compile(r'\{\s*"saved_offsets"\s*:\s*\[((?:\s*\d{1,18}\s*(?:,\s*\d{1,18}\s*){0,63})?)\s*\]\s*\}')


def is_cut(checkpoint: Checkpoint) -> bool:
    """Whether the headers of `checkpoint` give the offsets of its tensors."""
    return checkpoint.layout != "whole" and any(SHARDING_INFO in file.header.metadata for file in checkpoint.files)


def offsets_of(checkpoint: Checkpoint) -> dict[str, Size]:
    """Where in the whole tensor each stored one begins, by key; zeros in files without offsets.
    Raises InputError.
    """
    found = {file.name: _offsets(file) for file in checkpoint.files}
    return {key: found[stored.file.name][stored.name] for key, stored in checkpoint.tensors.items()}


def chunks_of(checkpoint: Checkpoint) -> Mapping[str, list[tuple[Chunk, Stored]]]:
    """The parts of each tensor, by its name. Raises InputError."""
    parts: dict[str, list[tuple[Chunk, Stored]]] = {}
    offsets = offsets_of(checkpoint)
    for key, stored in checkpoint.tensors.items():
        item = Item(stored.file.name, stored.offset, stored.info.end - stored.info.start)
        parts.setdefault(stored.name, []).append((Chunk(offsets[key], Size(stored.info.shape), item), stored))
    return parts


def _offsets(file: WeightFile) -> dict[str, Size]:
    text = file.header.metadata.get(SHARDING_INFO)
    tensors = file.header.tensors
    if text is None:
        return {name: Size([0] * len(info.shape)) for name, info in tensors.items()}
    found: dict[str, Size] = {}

    def add(name: str, at: int) -> int:
        entry = _ENTRY.match(text, at)
        if entry is None or name in found:
            raise ValueError(f"`{name[:200]}` must be there once, with a list of offsets")
        found[name] = Size(int(number) for number in entry[1].split(",")) if entry[1].strip() else Size()
        return entry.end()

    try:
        if text[walk_object(text, 0, add) :].strip():
            raise ValueError("more text after the end of the object")
        for name, info in tensors.items():
            if len(found.get(name, ())) != len(info.shape) or name not in found or len(info.shape) > MAX_DIMS:
                raise ValueError(f"`{name[:200]}` of {len(info.shape)} dimensions has no offsets of as many")
    except ValueError as error:
        raise InputError(f"{file.path}: {SHARDING_INFO} in its header is not as torch writes it: {error}") from None
    return found
