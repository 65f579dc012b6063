"""A checkpoint of the base's layout around other values: the same files, names and chunks, without
what is left out.

    lay_out          where everything lies in the new files: a pure function of the base's metadata
    write_metadata   the bytes of the new `.metadata`

A file is a row of parts without holes: values between the `head` and `trailer(crc)` of their
envelope, and items that are copied. What the base's `.metadata` holds beside entries is not taken
over: the trainer's absolute path and the plans of its ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from merge_cli.formats.dcp.folder import DcpFolder, Payload
from merge_cli.formats.dcp.metadata import FILESYSTEM, METADATA, SIZE, Chunk, Item, Metadata, Tensor
from merge_cli.formats.dcp.trainers import DcpPlace
from merge_cli.formats.inert_pickle import Global, Inert
from merge_cli.formats.pickle_writer import dumps
from merge_cli.formats.safetensors import DTYPES

VERSION = "1.0.0"
_TRAINERS = {"torch": "torch distributed checkpoint", "olmo-core": "OLMo-core", "megatron": "Megatron", "nemo": "NeMo"}


class Values(NamedTuple):
    """New values of a chunk: they go to `offset` in the file, behind `payload.envelope.head` and
    before its `trailer(crc)`.
    """

    fqn: str
    chunk: Chunk
    payload: Payload
    offset: int

    @property
    def begin(self) -> int:
        """Where the head begins."""
        return self.offset - len(self.payload.envelope.head)

    @property
    def end(self) -> int:
        """Where the values end and the trailer begins."""
        return self.offset + self.payload.num_bytes


class Copied(NamedTuple):
    """An item of the base that goes to `offset` as it is."""

    fqn: str
    item: Item
    offset: int


@dataclass(frozen=True)
class CloneFile:
    """A file to be written: its parts in order; they fill it."""

    name: str
    num_bytes: int
    parts: tuple[Values | Copied, ...]


@dataclass(frozen=True)
class Clone:
    """The files of a checkpoint to be written, and its metadata."""

    files: tuple[CloneFile, ...]
    metadata: Metadata


@dataclass(frozen=True, eq=False)
class DcpParts:
    """An opened checkpoint of which the entries in `kept` are kept (see `entries.treat`); payloads
    are of those to be merged.
    """

    place: DcpPlace
    folder: DcpFolder
    training_state: str
    kept: Mapping[str, str]
    payloads: Mapping[Item, Payload]

    @property
    def num_merged(self) -> int:
        """The tensors that are merged, however many chunks they have."""
        return sum(treatment == "merge" for treatment in self.kept.values())

    def summary(self) -> list[str]:
        """Lines about the rest of the checkpoint, for people."""
        metadata = self.folder.metadata
        chunks = sum(len(metadata.tensors[fqn].chunks) for fqn, treatment in self.kept.items() if treatment == "merge")
        state = [fqn for fqn in (*metadata.tensors, *metadata.blobs) if fqn not in self.kept]
        lines = [f"{_TRAINERS[self.place.trainer]}: {self.num_merged} tensors in {chunks} chunks"]
        if state:
            kinds = dict.fromkeys(re.split(r"[./]", fqn)[0] for fqn in state)
            lines.append(f"training state: {len(state)} entries ({', '.join([*kinds][:6])}), kept by --training-state base")
        return lines

    @cached_property
    def clone(self) -> Clone:
        """The files of a result of this layout."""
        return lay_out(self.folder.metadata, self.kept, self.payloads)


def lay_out(base: Metadata, kept: Mapping[str, str], payloads: Mapping[Item, Payload]) -> Clone:
    """Lay out a clone of `base` with the entries of `kept` (see `entries.treat`); `payloads`
    locates the items to be merged.

    Entries keep their file and their order in it. A file of which nothing is kept is not written.
    """
    by_file: dict[str, list[tuple[Item, str, Chunk | None]]] = {}
    for fqn, item in base.blobs.items():
        if fqn in kept:
            by_file.setdefault(item.file, []).append((item, fqn, None))
    for fqn, tensor in base.tensors.items():
        if fqn in kept:
            for each in tensor.chunks:
                by_file.setdefault(each.item.file, []).append((each.item, fqn, each))
    files: list[CloneFile] = []
    moved: dict[Item, Item] = {}
    for name in sorted(by_file):
        parts: list[Values | Copied] = []
        at = 0
        for item, fqn, chunk in sorted(by_file[name], key=lambda each: each[0].offset):
            moved[item] = item._replace(offset=at)
            if chunk is not None and kept[fqn] == "merge":
                payload = payloads[item]
                parts.append(Values(fqn, chunk, payload, at + len(payload.envelope.head)))
            else:
                parts.append(Copied(fqn, item, at))
            at += item.length
        files.append(CloneFile(name, at, tuple(parts)))
    return Clone(tuple(files), _moved(base, moved))


def _moved(base: Metadata, moved: Mapping[Item, Item]) -> Metadata:
    """The metadata of the items that are in `moved`, where they are now."""
    tensors = {
        fqn: tensor._replace(chunks=tuple(chunk._replace(item=moved[chunk.item]) for chunk in tensor.chunks))
        for fqn, tensor in base.tensors.items()
        if all(chunk.item in moved for chunk in tensor.chunks)
    }
    blobs = {fqn: moved[item] for fqn, item in base.blobs.items() if item in moved}
    paths = None if base.paths is None else {fqn: path for fqn, path in base.paths.items() if fqn in tensors or fqn in blobs}
    legacy = None if base.megatron is None else {fqn: value for fqn, value in base.megatron.items() if fqn in tensors}
    return replace(base, tensors=tensors, blobs=blobs, paths=paths, megatron=legacy)


def write_metadata(metadata: Metadata) -> bytes:
    """The bytes of `.metadata`, as torch's own loader reads them. It records no path of whoever
    wrote it.
    """
    entries: dict[str, Inert] = {fqn: _new(METADATA, "TensorStorageMetadata", _tensor(t)) for fqn, t in metadata.tensors.items()}
    entries |= {fqn: Inert(Global(METADATA, "BytesStorageMetadata"), (), None, is_new=True) for fqn in metadata.blobs}
    storage: dict[Inert, Inert] = {}
    for fqn, item in metadata.blobs.items():
        storage[_new(METADATA, "MetadataIndex", {"fqn": fqn, "index": None})] = _storage(item)
    for fqn, tensor in metadata.tensors.items():
        for number, chunk in enumerate(tensor.chunks):
            index = {"fqn": fqn, "index": number, "offset": _size(chunk.offsets)}
            storage[_new(METADATA, "MetadataIndex", index)] = _storage(chunk.item)
    state: dict[str, Any] = {
        "state_dict_metadata": entries,
        "planner_data": None if metadata.paths is None else dict(metadata.paths),
        "storage_data": storage,
        "storage_meta": _new(METADATA, "StorageMeta", {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}),
        "version": VERSION,
    }
    if metadata.megatron is not None:
        state["mcore_data"] = {fqn: dict(value) for fqn, value in metadata.megatron.items()}
    return dumps(Inert(metadata.kind, (), state, is_new=True))


def _tensor(tensor: Tensor) -> dict[str, Any]:
    layout = Inert(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Inert(Global(METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (Global("torch", DTYPES[tensor.dtype].torch), layout, tensor.requires_grad, memory_format, False)
    return {
        "properties": _new(METADATA, "TensorProperties", properties),
        "size": _size(tensor.shape),
        "chunks": [
            _new(METADATA, "ChunkStorageMetadata", {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)})
            for chunk in tensor.chunks
        ],
    }


def _new(module: str, name: str, state: Any) -> Inert:
    return Inert(Global(module, name), (), state, is_new=True)


def _size(values: tuple[int, ...]) -> Inert:
    return Inert(SIZE, (tuple(values),))


def _storage(item: Item) -> Inert:
    """torch's own class, also where the base has OLMo-core's: OLMo-core reads both, torch only its
    own.
    """
    return _new(FILESYSTEM, "_StorageInfo", {"relative_path": item.file, "offset": item.offset, "length": item.length})
