"""Tensors of distributed checkpoints gathered from whatever chunks they are stored in: for a run
that changed its parallelism, and for whole tensors.

    as_chunks_of   a checkpoint's tensors in the chunks of another one
    whole          a checkpoint's tensors each as one
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from merge_cli.errors import InputError, UnsupportedError
from merge_cli.formats.checkpoint import Checkpoint, Stored
from merge_cli.formats.dcp.checkpoint import chunk_key
from merge_cli.formats.dcp.clone import DcpParts
from merge_cli.formats.dcp.hf_files import chunks_of, is_cut
from merge_cli.formats.dcp.metadata import Chunk, Size, Tensor, check_chunks
from merge_cli.formats.gathered import Box, gathered, piece_of, row_major
from merge_cli.formats.safetensors import DTYPES
from merge_cli.formats.side_files import list_side_files
from merge_cli.stores.store import join

_LARGEST_PERMUTED = 64 << 20


def as_chunks_of(base: Checkpoint, other: Checkpoint) -> tuple[Mapping[str, Stored], int]:
    """The tensors of `other`, in the chunks of `base` wherever both hold a tensor of one shape in
    different chunks; and how many tensors those are. Both are distributed checkpoints.
    """
    assert base.dcp is not None and other.dcp is not None
    result, gatherer = dict(other.tensors), _Gatherer(other)
    gathered = 0
    for fqn, wanted in _merged(base.dcp):
        found = other.dcp.folder.metadata.tensors.get(fqn)
        if found is None or other.dcp.kept.get(fqn) != "merge" or found.shape != wanted.shape:
            continue
        own = {_key(other.dcp, fqn, found, chunk): chunk for chunk in found.chunks}
        keys = {_key(base.dcp, fqn, wanted, chunk): chunk for chunk in wanted.chunks}
        if own.keys() == keys.keys() or any(" strides " in key for key in keys):
            continue
        for key in own:
            del result[key]
        for key, chunk in keys.items():
            result[key] = gatherer.box(key, fqn, found, chunk.offsets, chunk.sizes)
        gathered += 1
    in_order = [*(key for key in base.tensors if key in result), *(key for key in result if key not in base.tensors)]
    return {key: result[key] for key in in_order}, gathered


def whole(checkpoint: Checkpoint) -> Checkpoint:
    """A distributed checkpoint, or files of DCP's safetensors writer, as a checkpoint of whole
    tensors without a layout of its own; others as they are. What a trainer's loader needs beside it
    is left out.
    """
    parts = checkpoint.dcp
    if parts is None:
        return _whole_of_files(checkpoint) if is_cut(checkpoint) else checkpoint
    tensors: dict[str, Stored] = {}
    gatherer = _Gatherer(checkpoint)
    for fqn, tensor in _merged(parts):
        keys = [_key(parts, fqn, tensor, chunk) for chunk in tensor.chunks]
        tensors[fqn] = (
            checkpoint.tensors[keys[0]]._replace(name=fqn)
            if keys == [fqn]
            else gatherer.box(fqn, fqn, tensor, (0,) * len(tensor.shape), tensor.shape)
        )
    inside = parts.place.inside
    own = {join(inside, name) if inside else name for name in (".metadata", *parts.folder.files)}
    side = list_side_files(parts.place.path, own)
    trainers = {".metadata", ".metadata.json", "metadata.json", "common.pt"}
    kept = tuple(name for name in side.kept if name not in trainers)
    side = replace(side, kept=kept, skipped=(*side.skipped, *(name for name in side.kept if name in trainers)))
    return replace(checkpoint, layout="whole", tensors=tensors, side_files=side, dcp=None)


def _whole_of_files(checkpoint: Checkpoint) -> Checkpoint:
    tensors: dict[str, Stored] = {}
    for name, found in chunks_of(checkpoint).items():
        chunks = [chunk for chunk, _ in found]
        kinds = {(stored.info.dtype, len(stored.info.shape)) for _, stored in found}
        if len(kinds) > 1:
            raise InputError(f"{checkpoint.path}: the parts of `{name}` are not of one dtype and number of dimensions")
        ((dtype, dims),) = kinds
        shape = Size(max(chunk.offsets[d] + chunk.sizes[d] for chunk in chunks) for d in range(dims))
        check_chunks(checkpoint.path, name, shape, chunks)
        if len(found) == 1:
            tensors[name] = found[0][1]
            continue
        item = DTYPES[dtype].item_bytes
        if DTYPES[dtype].bits < 8:
            raise UnsupportedError(f"{checkpoint.path}: `{name}` is {dtype}, whose parts cannot be put together")
        box = Box((0,) * dims, shape)
        pieces = (
            piece_of(stored.file, stored.offset, row_major(chunk.sizes), Box(*chunk[:2]), box, item) for chunk, stored in found
        )
        tensors[name] = gathered(checkpoint.files[0].source, checkpoint.path, name, dtype, shape, pieces)
    return replace(checkpoint, layout="whole", tensors=tensors)


def _merged(parts: DcpParts) -> Iterator[tuple[str, Tensor]]:
    for fqn, tensor in parts.folder.metadata.tensors.items():
        if parts.kept.get(fqn) == "merge":
            yield fqn, tensor


def _key(parts: DcpParts, fqn: str, tensor: Tensor, chunk: Chunk) -> str:
    return chunk_key(fqn, tensor, chunk, parts.payloads[chunk.item].strides)


class _Gatherer:
    """Makes boxes of the tensors of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.dcp is not None
        self._parts = checkpoint.dcp
        self._source = checkpoint.files[0].source
        self._files = {file.name: file for file in checkpoint.files}
        self._sorted: dict[str, tuple[list[Chunk], list[int], int]] = {}

    def box(self, key: str, fqn: str, tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Stored:
        """The box of `sizes` from `offsets` on, gathered from the chunks of `tensor`. Raises
        UnsupportedError.
        """
        place = self._parts.place
        item, box = DTYPES[tensor.dtype].item_bytes, Box(offsets, sizes)
        pieces = []
        for chunk in self._near(fqn, tensor, offsets, sizes):
            payload = self._parts.payloads[chunk.item]
            file = self._files[join(place.inside, payload.file) if place.inside else payload.file]
            piece = piece_of(file, payload.offset, payload.strides, Box(*chunk[:2]), box, item)
            if piece is not None and piece.item_step != item and payload.num_bytes > _LARGEST_PERMUTED:
                raise UnsupportedError(
                    f"`{fqn}` in {place.folder} is stored permuted (strides {payload.strides}) and too large to be gathered",
                    details=[f"found     {payload.num_bytes} bytes", f"expected  at most {_LARGEST_PERMUTED} bytes"],
                    hint=f"copy it from the base:  --exclude {fqn!r}",
                )
            pieces.append(piece)
        return gathered(self._source, place.folder, key, tensor.dtype, sizes, pieces)

    def _near(self, fqn: str, tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Sequence[Chunk]:
        """The chunks that may share elements with a box, by their rows: a tensor on hundreds of
        ranks has hundreds of chunks and boxes.
        """
        if not tensor.shape:
            return tensor.chunks
        if fqn not in self._sorted:
            chunks = sorted(tensor.chunks, key=lambda chunk: chunk.offsets)
            self._sorted[fqn] = chunks, [chunk.offsets[0] for chunk in chunks], max(chunk.sizes[0] for chunk in chunks)
        chunks, starts, longest = self._sorted[fqn]
        return chunks[bisect.bisect_right(starts, offsets[0] - longest) : bisect.bisect_left(starts, offsets[0] + sizes[0])]
