"""A torch distributed checkpoint as a `Checkpoint`: each chunk of a kept tensor is a tensor by
itself, raw bytes at an offset.

A chunk's key is the tensor's name, with the box if there are several (`wq.weight[0:64, 0:128]`) and
the strides if its values are not in C order (`w strides (1, 12)`). So checkpoints of one layout
have the same keys, and nothing has to be gathered; those of a run that changed its parallelism have
other keys, and are gathered into the base's chunks (`gather.py`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from merge_cli.errors import IncompleteError, InputError
from merge_cli.formats.checkpoint import Checkpoint, Stored, read_config
from merge_cli.formats.dcp.clone import DcpParts
from merge_cli.formats.dcp.entries import treat
from merge_cli.formats.dcp.folder import METADATA_FILE, Payload, locate, open_folder
from merge_cli.formats.dcp.metadata import Chunk, Item, Tensor
from merge_cli.formats.dcp.seen import SeenDcp
from merge_cli.formats.dcp.trainers import DcpPlace, files_beside
from merge_cli.formats.safetensors import Header, TensorInfo
from merge_cli.formats.side_files import SideFiles, list_side_files
from merge_cli.formats.weight_file import WeightFile
from merge_cli.stores.store import StrPath, as_path, join

_IN_KEY = re.compile(r"(?:\[\d+:\d+(?:, \d+:\d+)*\])?(?: strides \([\d, ]+\))?$")
_NOTHING = hashlib.sha256().hexdigest()


def open_dcp(path: StrPath, place: DcpPlace | None, training_state: str, seen: SeenDcp) -> Checkpoint:
    """Open the distributed checkpoint at `place`; without one, say what is missing at `path`.
    Raises InputError.
    """
    path = as_path(path)
    if place is None:
        open_folder(path)
        raise IncompleteError(f"{path} is not complete")
    folder = open_folder(place.folder, seen)
    kept = treat(folder.metadata, training_state)
    if "merge" not in kept.values():
        raise InputError(f"{place.folder} holds no weights of a model", hint="pmerge inspect  lists its entries")
    wanted = [
        (fqn, tensor, chunk)
        for fqn, tensor in folder.metadata.tensors.items()
        if kept.get(fqn) == "merge"
        for chunk in tensor.chunks
    ]
    found = list(locate(folder, wanted, seen.envelopes))
    parts = DcpParts(place, folder, training_state, kept, {chunk.item: payload for _, chunk, payload in found})
    files = _files(parts, found)
    tensors = {name: Stored(file, name, info) for file in files for name, info in file.header.tensors.items()}
    return Checkpoint(
        path=path,
        root=path,
        layout="dcp",
        files=files,
        tensors=tensors,
        config=read_config(join(path, "config.json")),
        side_files=_side_files(parts),
        notes=folder.notes,
        dcp=parts,
    )


def chunk_key(fqn: str, tensor: Tensor, chunk: Chunk, strides: Sequence[int]) -> str:
    """The key of a chunk: equal for chunks that can be averaged element by element."""
    ranges = ", ".join(f"{at}:{at + n}" for at, n in zip(chunk.offsets, chunk.sizes, strict=True))
    key = fqn if len(tensor.chunks) == 1 else f"{fqn}[{ranges}]"
    expected, strides_of = 1, []
    for n in reversed(chunk.sizes):
        strides_of.append(expected)
        expected *= n
    plain = all(n == 1 or a == b for n, a, b in zip(chunk.sizes, strides, reversed(strides_of), strict=True)) or expected == 0
    return key if plain else f"{key} strides {tuple(strides)}"


def tensor_name(key: str) -> str:
    """The name of the tensor that a chunk's key belongs to."""
    return _IN_KEY.sub("", key)


def _files(parts: DcpParts, found: Sequence[tuple[str, Chunk, Payload]]) -> tuple[WeightFile, ...]:
    """`.metadata`, all of which counts as its header, and the files of which something is kept."""
    folder, inside = parts.folder, parts.place.inside
    infos: dict[str, dict[str, TensorInfo]] = {item.file: {} for item in _kept_items(parts)}
    for fqn, chunk, payload in found:
        tensor = folder.metadata.tensors[fqn]
        key = chunk_key(fqn, tensor, chunk, payload.strides)
        end = payload.offset + payload.num_bytes
        infos[payload.file][key] = TensorInfo(tensor.dtype, tuple(chunk.sizes), payload.offset, end)

    def name_of(name: str) -> str:
        return join(inside, name) if inside else name

    size = folder.metadata_file.num_bytes
    first = WeightFile(folder.metadata_file.source, name_of(METADATA_FILE), Header({}, {}, size, size, folder.sha256))
    others = [
        WeightFile(folder.files[name].source, name_of(name), Header(infos[name], {}, 0, folder.files[name].num_bytes, _NOTHING))
        for name in sorted(infos)
    ]
    return (first, *others)


def _kept_items(parts: DcpParts) -> list[Item]:
    metadata = parts.folder.metadata
    items = [item for fqn, item in metadata.blobs.items() if fqn in parts.kept]
    return items + [chunk.item for fqn, tensor in metadata.tensors.items() if fqn in parts.kept for chunk in tensor.chunks]


def _side_files(parts: DcpParts) -> SideFiles:
    """Small files beside the weights, by the rule of all checkpoints, and those that the trainer's
    loader needs.
    """
    place, inside = parts.place, parts.place.inside
    own = {METADATA_FILE, *parts.folder.files}
    listed = list_side_files(place.path, {join(inside, name) if inside else name for name in own})
    needed = files_beside(place, parts.training_state)
    kept = dict.fromkeys((*(name for name in listed.kept if name not in own), *needed))
    return SideFiles(tuple(kept), tuple(name for name in listed.skipped if name not in kept and name.rstrip("/") != "train"))
