"""A checkpoint's tensors as what they mean: plain ones as they are stored, quantized ones as one
tensor of values.

A quantized weight is stored as codes and scales, in one shard or in several. Here it becomes one
`Coded` tensor under the name and the shape of its values; scales are no tensors of their own, so
that none can ever be averaged by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from merge_cli.formats.alike import Moved, original_of
from merge_cli.formats.checkpoint import Checkpoint, Stored
from merge_cli.formats.quantization import Codec, Found, find_quantized
from merge_cli.formats.safetensors import DTYPES
from merge_cli.formats.weight_file import Files

Shape = tuple[int, ...]


class Coded(NamedTuple):
    """A quantized tensor: the `shape` of its values, and where its parts (codes, scales ...) are
    stored, by role.
    """

    shape: Shape
    codec: Codec
    parts: tuple[tuple[str, Stored], ...]

    def moved(self, files: Files) -> Coded:
        """The same tensor in other files."""
        return Coded(self.shape, self.codec, tuple((role, part.moved(files)) for role, part in self.parts))


class Stacked(NamedTuple):
    """A tensor whose rows are stored as several tensors of equal width, one below the other (see
    `experts.py`).
    """

    shape: Shape
    pieces: tuple[Stored | Coded, ...]

    def moved(self, files: Files) -> Stacked:
        """The same rows in other files."""
        return Stacked(self.shape, tuple(piece.moved(files) for piece in self.pieces))


Logical = Stored | Coded | Stacked


def shape_of(tensor: Logical) -> Shape:
    """The shape of the values."""
    return tensor.info.shape if isinstance(tensor, Stored) else tensor.shape


def dtype_of(tensor: Logical) -> str:
    """The safetensors dtype; for a quantized tensor its scheme."""
    if isinstance(tensor, Stored):
        return tensor.info.dtype
    return tensor.codec.scheme if isinstance(tensor, Coded) else dtype_of(tensor.pieces[0])


def kind_of(tensor: Logical) -> str:
    """How the values are treated: "float", "integer" or "code" (see `DTYPES`)."""
    if isinstance(tensor, Stored):
        return DTYPES[tensor.info.dtype].kind
    return "float" if isinstance(tensor, Coded) else kind_of(tensor.pieces[0])


def file_of(tensor: Logical) -> str:
    """The path of the file that holds the tensor, or the first of its parts."""
    if isinstance(tensor, Stored):
        return str(tensor.file.path)
    return file_of(tensor.parts[0][1]) if isinstance(tensor, Coded) else file_of(tensor.pieces[0])


@dataclass(frozen=True, eq=False)
class View:
    """The tensors of a checkpoint by key, in stored order.

    `owner` gives, for the key of each stored part of a quantized tensor, the key of that tensor;
    `activation_scales` are the keys of calibrated scales, which belong to the quantized form only.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, Logical]
    owner: Mapping[str, str] = field(default_factory=dict)
    activation_scales: tuple[str, ...] = ()
    leftover_config: bool = False

    @property
    def schemes(self) -> dict[str, int]:
        """How many tensors are quantized by which scheme."""
        counts: dict[str, int] = {}
        tensors = original_of(self.tensors)
        for key in dict.fromkeys(self.owner.values()):
            scheme = dtype_of(tensors[key])
            counts[scheme] = counts.get(scheme, 0) + 1
        return counts

    @property
    def num_parameters(self) -> int:
        """The values of all tensors, quantized ones counted as what they stand for."""
        return sum(math.prod(shape_of(tensor)) for tensor in original_of(self.tensors).values())


class Viewed:
    """Checkpoints seen so far, to share the pairing of codes and scales between those with equal
    headers and configs.
    """

    def __init__(self) -> None:
        self.found: dict[object, Found] = {}
        self.views: dict[object, View] = {}


def view(checkpoint: Checkpoint, seen: Viewed | None = None) -> View:
    """What the tensors of `checkpoint` mean; `seen` shares it between checkpoints.

    Raises UnsupportedError, naming scheme and tensor, for what is quantized and cannot be read.
    """
    seen = seen or Viewed()
    same = (id(original_of(checkpoint.tensors)), repr(checkpoint.config))
    first = seen.views.get(same)
    if first is None:
        return seen.views.setdefault(same, _first_view(checkpoint, seen))
    if first.tensors is first.checkpoint.tensors:
        return replace(first, checkpoint=checkpoint, tensors=checkpoint.tensors)
    files = dict(zip(first.checkpoint.files, checkpoint.files, strict=True))
    return replace(first, checkpoint=checkpoint, tensors=Moved(first.tensors, files))


def _first_view(checkpoint: Checkpoint, seen: Viewed) -> View:
    if checkpoint.layout != "ranks":
        return _view(checkpoint, "", checkpoint.tensors, seen)
    by_file: dict[str, dict[str, Stored]] = {file.name: {} for file in checkpoint.files}
    for stored in checkpoint.tensors.values():
        by_file[stored.file.name][stored.name] = stored
    parts = [_view(checkpoint, f"{name}:", own, seen) for name, own in by_file.items()]
    return View(
        checkpoint,
        {key: tensor for part in parts for key, tensor in part.tensors.items()},
        {key: owner for part in parts for key, owner in part.owner.items()},
        tuple(key for part in parts for key in part.activation_scales),
        any(part.leftover_config for part in parts),
    )


def _view(checkpoint: Checkpoint, prefix: str, stored: Mapping[str, Stored], seen: Viewed) -> View:
    """The view of tensors by name; keys are the names after `prefix`."""
    same = (prefix, repr(checkpoint.config), tuple(f.header.sha256 for f in checkpoint.files), len(stored))
    found = seen.found.get(same)
    if found is None:
        found = seen.found[same] = find_quantized({name: tensor.info for name, tensor in stored.items()}, checkpoint.config)
    if not found.tensors and not found.activation_scales:
        named = stored if not prefix else {prefix + name: tensor for name, tensor in stored.items()}
        return View(checkpoint, named, leftover_config=found.leftover_config)
    tensors: dict[str, Logical] = {}
    activation = set(found.activation_scales)
    for name, tensor in stored.items():
        owner = found.owner.get(name)
        if owner is None:
            if name not in activation:
                tensors[prefix + name] = tensor
            continue
        quantized = found.tensors[owner]
        if quantized.parts[0][1] == name:
            parts = tuple((role, stored[part]) for role, part in quantized.parts)
            tensors[prefix + owner] = Coded(quantized.shape, quantized.codec, parts)
    owners = {prefix + name: prefix + owner for name, owner in found.owner.items()}
    return View(checkpoint, tensors, owners, tuple(prefix + name for name in found.activation_scales))
