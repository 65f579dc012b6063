"""Files of `torch.save` (`pytorch_model.bin`, `.pt`): where each tensor lies, without torch and
without unpickling.

The archive's pickle is read as inert values; the tensors in its dicts and lists are found, by their
path as one name. Values that are no tensors (numbers, strings) are passed over; a pickle that needs
anything else (an optimizer's own class, say) is refused by name, as are files older than torch 1.6,
which are no archives.

Tensors may share a storage (tied weights, views): each is reported with its own offset and strides.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import closing
from typing import Any, NamedTuple

from merge_cli.errors import IncompleteError, InputError, UnsupportedError
from merge_cli.formats.inert_pickle import Allowed, Global, Refused, loads
from merge_cli.formats.safetensors import DTYPES
from merge_cli.formats.stored_zip import Member, list_members
from merge_cli.formats.torch_pickle import TENSORS, PickledTensor, is_dense
from merge_cli.stores.store import Source, StrPath, as_path, open_store, read_bytes

MAX_PICKLE_BYTES = 64 << 20
MAX_ENTRIES = 1 << 20
_DEEPEST = 32
TRAINING_STATE = re.compile(r"(?:^|[_-])(?:opt|optims?|optimizers?|schedulers?|scalers?|rng)(?=[._-]|$)", re.IGNORECASE)
"""In the key or file name of what a trainer saves beside the model."""


class LocatedTensor(NamedTuple):
    """A tensor of the file: its first element is at the byte `offset`; `strides` are in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def is_contiguous(self) -> bool:
        """Whether its bytes are its elements in C order."""
        if not is_dense(self.shape, self.strides):
            return False
        strides = [stride for stride, n in zip(self.strides, self.shape, strict=True) if n != 1]
        return strides == sorted(strides, reverse=True)


def _shape(values: Any = ()) -> tuple[int, ...]:
    """Called in place of `torch.Size`."""
    if type(values) is not tuple or any(type(n) is not int for n in values):
        raise Refused("a torch.Size is not a tuple of integers")
    return values


_ALLOWED: Allowed = {**TENSORS, Global("torch", "Size"): _shape}


def list_tensors(path: StrPath) -> dict[str, LocatedTensor]:
    """The tensors of the file `path` by name. Raises InputError, or UnsupportedError for what is
    not plain.
    """
    path = as_path(path)
    with closing(open_store(path).open(path)) as source:
        return _list(source)


def _list(source: Source) -> dict[str, LocatedTensor]:
    path = source.path

    def read(offset: int, length: int) -> bytes:
        if offset + length > source.num_bytes:
            raise IncompleteError(f"{path} ends before what it promises")
        return bytes(read_bytes(source, offset, length))

    if source.num_bytes < 4:
        raise IncompleteError(f"{path} has {source.num_bytes} bytes, fewer than any archive")
    if read(0, 4) != b"PK\x03\x04":
        raise UnsupportedError(
            f"{path} is not an archive of torch.save, or older than torch 1.6",
            hint="load it with torch and save it again, or as safetensors",
        )
    members = list_members(read, source.num_bytes, path)
    root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if root is None or members[root + "data.pkl"].size > MAX_PICKLE_BYTES or root + "constants.pkl" in members:
        raise UnsupportedError(f"{path} is no archive of tensors", hint="name a file that torch.save wrote, not a TorchScript one")
    order = members.get(root + "byteorder")
    if order is not None and (order.size != 6 or read(order.data, 6) != b"little"):
        raise UnsupportedError(f"{path} holds big-endian values", hint="save it on a little-endian machine")
    pickled = members[root + "data.pkl"]
    value = loads(read(pickled.data, pickled.size), _ALLOWED, path)
    found = {name: _locate(tensor, name, members, root, path) for name, tensor in _tensors_in(value, path).items()}
    if not found:
        raise InputError(f"{path} holds no tensors")
    return found


def _tensors_in(value: Any, path: str) -> dict[str, PickledTensor]:
    """The tensors in dicts, lists and tuples, in order, by the keys that lead to them."""
    found: dict[str, PickledTensor] = {}
    nested: dict[str, bool] = {}  # the first keys that lead to tensors, and whether others follow
    pending: list[tuple[tuple[str, ...], Any]] = [((), value)]
    left = MAX_ENTRIES  # a few shared lists can mean any number of values
    while pending:
        keys, each = pending.pop()
        if type(each) is PickledTensor:
            name = ".".join(keys)
            if name in found:
                raise UnsupportedError(f"{path} has two tensors that would be called `{name[:200]}`", hint="rename one of them")
            found[name] = each
            if keys:
                nested[keys[0]] = len(keys) > 1
        elif type(each) in (dict, list, tuple):
            left -= len(each)
            if left < 0 or len(keys) == _DEEPEST:
                raise UnsupportedError(
                    f"{path} holds more than {MAX_ENTRIES} values, or is nested too deeply", hint="save the model's state alone"
                )
            inside = each.items() if type(each) is dict else enumerate(each)
            pending += reversed([((*keys, _key(key)), inner) for key, inner in inside])
    _check_is_model(nested, path)
    return found


def _check_is_model(nested: Mapping[str, bool], path: str) -> None:
    """Raise UnsupportedError for a trainer's file of everything: its optimizer would be averaged
    into the model.

    `nested` has the first keys that lead to tensors; those of a plain model are the tensors' names.
    """
    state = [key for key in nested if "." not in key and TRAINING_STATE.search(key)]
    models = [key for key in nested.keys() - set(state) if nested[key]]
    if state and models:
        model = min(models, key=lambda key: ("model" not in key, key))
        keep = f"import torch; torch.save(torch.load({path!r}, map_location='cpu')[{model[:100]!r}], 'model.pt')"
        raise UnsupportedError(
            f"{path} holds the state of training (`{state[0][:100]}`) beside the model",
            hint=f"save the model alone:  python -c {shlex.quote(keep)}",
        )


def _key(key: Any) -> str:
    return key if type(key) is str else str(key) if type(key) is int else "?"


def _locate(tensor: PickledTensor, name: str, members: Mapping[str, Member], root: str, path: str) -> LocatedTensor:
    member = members.get(f"{root}data/{tensor.key}")
    if member is None or member.size != tensor.storage_bytes:
        raise InputError(
            f"{path}: the storage of `{name[:200]}` is not in the archive, or of another size",
            hint="the file is damaged; copy or save it again",
        )
    offset = member.data + DTYPES[tensor.dtype].num_bytes(tensor.start)
    return LocatedTensor(tensor.dtype, tensor.shape, tensor.strides, offset)
