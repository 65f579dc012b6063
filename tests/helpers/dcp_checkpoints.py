"""Torch distributed checkpoints for the tests, written by torch's own writer; and a clone written
by a simple loop.

A tensor is cut into boxes by a planner that splits it as ranks would have, so that one process is
enough: the writer, the metadata and the checks of the plan are torch's.
"""

from __future__ import annotations

import io
import itertools
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from merge_cli.formats.dcp.clone import Clone, Values, lay_out, write_metadata
from merge_cli.formats.dcp.entries import treat
from merge_cli.formats.dcp.folder import DcpFolder, Payload, locate
from merge_cli.formats.dcp.item import Envelopes
from merge_cli.formats.dcp.metadata import Item

Box = tuple[tuple[int, ...], tuple[int, ...]]
Transform = Callable[[str, bytes], bytes]


def grid(shape: Sequence[int], parts: Sequence[int]) -> list[Box]:
    """The boxes (offsets, sizes) of a tensor of `shape` cut into `parts[d]` nearly equal parts
    along each dimension `d`.
    """
    cuts = [[(n * i // k, n * (i + 1) // k - n * i // k) for i in range(k)] for n, k in zip(shape, parts, strict=True)]
    return [(tuple(at for at, _ in box), tuple(n for _, n in box)) for box in itertools.product(*cuts)]


class CutPlanner(DefaultSavePlanner):
    """Saves the tensors of `cuts` in boxes, which must cover them."""

    def __init__(self, cuts: Mapping[str, Sequence[Box]]) -> None:
        super().__init__()
        self.cuts = cuts

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [part for item in plan.items for part in self._parts(item)]
        self.plan = replace(plan, items=items)
        return self.plan

    def _parts(self, item: WriteItem) -> list[WriteItem]:
        boxes = self.cuts.get(item.index.fqn)
        if boxes is None:
            return [item]
        assert item.tensor_data is not None
        return [
            WriteItem(
                index=MetadataIndex(item.index.fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=replace(item.tensor_data, chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))),
            )
            for offsets, sizes in boxes
        ]

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.index.fqn not in self.cuts:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        found = self.state_dict[write_item.index.fqn]
        assert isinstance(found, Tensor)
        return found[tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))]


def save_dcp(folder: Path, state: Mapping[str, Any], cuts: Mapping[str, Sequence[Box]] | None = None, files: int = 1) -> Path:
    """Save `state` as torch does, spread over `files` files; keys of `cuts` are flattened names."""
    writer = FileSystemWriter(folder, thread_count=files)
    with _alone():
        dcp_save(dict(state), storage_writer=writer, planner=CutPlanner(cuts or {}), no_dist=True)
    return folder


def save_hf_files(folder: Path, state: Mapping[str, Tensor], cuts: Mapping[str, Sequence[Box]]) -> Path:
    """Save `state` as torch's writer of safetensors does on several ranks: rank `r` has box `r` of
    each tensor in `cuts`, and the last rank the others.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    planner = CutPlanner(cuts)
    planner.set_up_planner(dict(state), None, True)
    writer.set_up_storage_writer(True)
    items = writer.prepare_local_plan(planner.create_local_plan()).items
    ranks: list[list[WriteItem]] = [[] for _ in range(max(map(len, cuts.values())))]
    for fqn in state:
        of_it = [item for item in items if item.index.fqn == fqn]
        for rank, item in enumerate(of_it):
            ranks[rank if len(of_it) > 1 else -1].append(item)
    for plan in writer.prepare_global_plan([SavePlan(each) for each in ranks]):
        writer.write_data(plan, planner).wait()
    return folder


def load_hf_files(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `like`, by torch's reader of such files."""
    state = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    with _alone():
        dcp_load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warnings that a single process is meant, and that torch still makes typed
    storages.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield


def load_state(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `like` (values of the right kind), by torch's own loader."""
    state = dict(like)
    with _alone():
        dcp_load(state, checkpoint_id=folder, no_dist=True)
    return state


def load_dcp(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, by torch's own loader."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return load_state(folder, found)


def payloads_of(folder: DcpFolder, names: Sequence[str] | None = None) -> dict[Item, Payload]:
    """Where the values of each chunk of these tensors (all) lie."""
    tensors = folder.metadata.tensors
    wanted = [(name, tensors[name], chunk) for name in (tensors if names is None else names) for chunk in tensors[name].chunks]
    return {chunk.item: payload for _, chunk, payload in locate(folder, wanted, Envelopes())}


def read_values(folder: DcpFolder, payload: Payload) -> bytes:
    with Path(folder.files[payload.file].path).open("rb") as file:
        file.seek(payload.offset)
        return file.read(payload.num_bytes)


def write_clone(folder: DcpFolder, out: Path, training_state: str, change: Transform) -> Clone:
    """Write the clone whose values are those that `change(name, values)` makes of the base's, file
    by file, part by part.
    """
    kept = treat(folder.metadata, training_state)
    merged = [name for name, treatment in kept.items() if treatment == "merge"]
    clone = lay_out(folder.metadata, kept, payloads_of(folder, merged))
    out.mkdir()
    for file in clone.files:
        written = bytearray()
        for part in file.parts:
            if isinstance(part, Values):
                values = change(part.fqn, read_values(folder, part.payload))
                envelope = part.payload.envelope
                assert len(written) == part.begin and len(written) + len(envelope.head) == part.offset
                written += envelope.head + values + envelope.trailer(zlib.crc32(values))
            else:
                assert len(written) == part.offset
                raw = Path(folder.files[part.item.file].path).read_bytes()
                written += raw[part.item.offset : part.item.offset + part.item.length]
        assert len(written) == file.num_bytes
        (out / file.name).write_bytes(written)
    (out / ".metadata").write_bytes(write_metadata(clone.metadata))
    return clone
