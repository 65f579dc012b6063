"""Weights that `torch.save` wrote (`pytorch_model.bin`, in shards or not; one `.bin`, `.pt` or
`.pth` file) as a checkpoint: read only, and never unpickled (`torch_zip.py`).

Results are written as safetensors. Tied weights are stored once and named several times; each name
becomes a tensor of its own. The index is not needed: shards are numbered, and each lists its
tensors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import closing

from merge_cli.errors import IncompleteError, InputError, UnsupportedError, first_ten
from merge_cli.formats.checkpoint import Checkpoint, Stored, read_config
from merge_cli.formats.gathered import Box, gathered, piece_of
from merge_cli.formats.safetensors import DTYPES, Header, TensorInfo, num_elements
from merge_cli.formats.side_files import list_side_files
from merge_cli.formats.torch_zip import LocatedTensor, list_tensors
from merge_cli.formats.weight_file import WeightFile
from merge_cli.stores.store import StrPath, as_path, join, name_of, open_store

LAYOUT = "pickle"
ENDINGS = (".bin", ".pt", ".pth")
_FILE = re.compile(r"^pytorch_model(?:-(?P<number>\d{1,7})-of-(?P<count>\d{1,7}))?\.bin$")
_NOTHING = hashlib.sha256().hexdigest()


def pickled_files(names: Sequence[str]) -> list[str]:
    """The files of a checkpoint among the `names` in a folder; none where there is safetensors."""
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return []
    return sorted(name for name in names if _FILE.match(name))


def is_shard(name: str) -> bool:
    """Whether a file is one of several of its checkpoint."""
    match = _FILE.match(name)
    return match is not None and int(match["count"] or 1) > 1


def open_pickled(path: StrPath) -> Checkpoint:
    """Open the checkpoint at `path`, a folder with `pickled_files`, or one file. Raises InputError."""
    path = as_path(path)
    store = open_store(path)
    status = store.stat(path)
    if status is not None and status.kind == "file":
        file, tensors = open_archive(path, name_of(path))
        return Checkpoint(path, None, LAYOUT, (file,), tensors)
    listed = [entry.name for entry in store.list(path)]
    names = pickled_files(listed)
    _check_numbers(path, names)
    for name in (*names, "config.json"):
        store.check_inside(path, join(path, name))
    opened = [open_archive(join(path, name), name) for name in names]
    return Checkpoint(
        path=path,
        root=path,
        layout=LAYOUT,
        files=tuple(file for file, _ in opened),
        tensors=_tensors(opened),
        config=read_config(join(path, "config.json")),
        side_files=list_side_files(path, set(names)),
    )


def open_archive(path: str, name: str) -> tuple[WeightFile, dict[str, Stored]]:
    """The archive `path`, which the checkpoint calls `name`, and its tensors. Raises InputError.

    A view whose rows lie apart in a larger storage is gathered row by row.
    """
    with closing(open_store(path).open(path)) as source:
        infos, apart = {}, {}
        for key, tensor in list_tensors(path).items():
            if not tensor.is_contiguous:
                apart[key] = tensor
                continue
            end = tensor.offset + DTYPES[tensor.dtype].num_bytes(num_elements(tensor.shape))
            infos[key] = TensorInfo(tensor.dtype, tensor.shape, tensor.offset, end)
        file = WeightFile(source, name, Header(infos, {}, 0, source.num_bytes, _NOTHING))
        tensors = {key: Stored(file, key, info) for key, info in infos.items()}
        return file, tensors | {key: _rows(file, key, tensor) for key, tensor in apart.items()}


def _rows(file: WeightFile, key: str, tensor: LocatedTensor) -> Stored:
    item, box = DTYPES[tensor.dtype].item_bytes, Box((0,) * len(tensor.shape), tensor.shape)
    piece = piece_of(file, tensor.offset, tensor.strides, box, box, item)
    if piece is not None and (piece.item_step != item or any(axis.source == 0 for axis in piece.axes)):
        raise UnsupportedError(
            f"`{key[:200]}` in {file.path} is stored as a view whose rows are not in one piece (strides {tensor.strides})",
            hint="save it with  tensor.contiguous(), or as safetensors",
        )
    return gathered(file.source, file.path, key, tensor.dtype, tensor.shape, [piece])


def _tensors(opened: Sequence[tuple[WeightFile, Mapping[str, Stored]]]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for _, found in opened:
        for key, stored in found.items():
            if key in tensors:
                raise InputError(f"`{key[:200]}` is in two files: {tensors[key].file.path} and {stored.file.path}")
            tensors[key] = stored
    return tensors


def _check_numbers(folder: str, names: Sequence[str]) -> None:
    """Raise IncompleteError for a hole in the numbers, InputError for two sets of files."""
    numbered = [match for name in names if (match := _FILE.match(name)) and match["number"] is not None]
    counts = {int(match["count"]) for match in numbered}
    if len(counts) + (len(numbered) < len(names)) > 1:
        raise InputError(f"{folder} holds several sets of weights", details=first_ten(names), hint="keep one of them")
    there = {int(match["number"]) for match in numbered}
    missing = [number for count in counts for number in range(1, count + 1) if number not in there]
    if missing:
        shown = [f"number {number} of {max(counts)}" for number in missing]
        raise IncompleteError(f"{len(missing)} of {max(counts)} shards are missing in {folder}", details=first_ten(shown))
