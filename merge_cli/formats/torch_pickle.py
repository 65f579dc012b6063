"""Tensors as `torch.save` pickles them: a call that rebuilds each from a storage, which is a member
of the archive beside.

The pickle is read as inert values (`inert_pickle`): the calls become `PickledTensor`s, never
tensors.

Source: torch/_utils.py (`_rebuild_tensor_v2`, `_rebuild_tensor_v3`, `_rebuild_parameter`) and
torch/serialization.py of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from merge_cli.formats.inert_pickle import PERSISTENT, Allowed, Global, Inert, Refused, named
from merge_cli.formats.safetensors import DTYPES, num_elements

DTYPE_NAMES = {dtype.torch: name for name, dtype in DTYPES.items() if dtype.torch}
"""From torch's names of dtypes to those of safetensors."""
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}  # fmt: skip
_UNTYPED = (Global("torch.storage", "UntypedStorage"), Global("torch", "UntypedStorage"))
_LARGEST = 1 << 63


class PickledTensor(NamedTuple):
    """A tensor: elements `start` (in elements) on of the storage `key`, which has `storage_bytes`
    bytes, at these strides.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    storage_bytes: int

    @property
    def is_dense(self) -> bool:
        """Whether the elements lie one behind the other, in whatever order of the dimensions."""
        return is_dense(self.shape, self.strides)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of these strides fills its bytes, each element once, in the order of some
    permutation of its dimensions.
    """
    expected = 1
    for stride, n in sorted((stride, n) for stride, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected and num_elements(shape):
            return False
        expected *= n
    return True


def _rebuild(storage: Any, start: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, *more: Any) -> PickledTensor:
    """Called in place of `_rebuild_tensor_v2`."""
    key, dtype, num_bytes = _storage(storage)
    if dtype is None:
        raise Refused("the pickle rebuilds a tensor from a storage without a dtype")
    return _tensor(key, dtype, num_bytes, start, shape, strides, hooks, more)


def _rebuild_untyped(
    storage: Any, start: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any, *more: Any
) -> PickledTensor:
    """Called in place of `_rebuild_tensor_v3`."""
    key, none, num_bytes = _storage(storage)
    if none is not None or type(dtype) is not Global or dtype.name not in DTYPE_NAMES:
        raise Refused("the pickle rebuilds a tensor of an unknown dtype")
    return _tensor(key, DTYPE_NAMES[dtype.name], num_bytes, start, shape, strides, hooks, more)


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> PickledTensor:
    """Called in place of `_rebuild_parameter`: the tensor itself."""
    if type(tensor) is not PickledTensor or hooks != {}:
        raise Refused("the pickle rebuilds a parameter that is not a plain tensor")
    return tensor


def _storage(value: Any) -> tuple[str, str | None, int]:
    """The key, dtype (None if untyped) and bytes of a storage."""
    parts = value.args[0] if type(value) is Inert and value.of == PERSISTENT else None
    if type(parts) is not tuple or len(parts) != 5 or parts[0] != "storage":
        raise Refused("the pickle rebuilds a tensor from something other than a storage")
    _, kind, key, _, count = parts
    if type(kind) is not Global or type(key) is not str or type(count) is not int or not 0 <= count < _LARGEST:
        raise Refused("the pickle has a storage without a key or a size")
    dtype = None if kind in _UNTYPED else STORAGES[kind.name]
    return key, dtype, count if dtype is None else DTYPES[dtype].num_bytes(count)


def _tensor(
    key: str, dtype: str, num_bytes: int, start: Any, shape: Any, strides: Any, hooks: Any, more: Sequence[Any]
) -> PickledTensor:
    if any(more):
        flags = ", ".join(str(key)[:20] for key in [*more[0]][:3]) if type(more[0]) is dict else "something else"
        raise Refused(f"the pickle holds a view with a flag ({flags}), whose bytes are not its values")
    if not _is_size(shape) or not _is_size(strides) or len(shape) != len(strides) or not _is_size((start,)) or hooks != {}:
        raise Refused("the pickle rebuilds a tensor without a plain shape")
    last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if num_elements(shape) and DTYPES[dtype].num_bytes(last + 1) > num_bytes:
        raise Refused("the pickle rebuilds a tensor that is larger than its storage")
    return PickledTensor(key, dtype, tuple(shape), tuple(strides), start, num_bytes)


def _is_size(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= 64 and all(type(n) is int and 0 <= n < _LARGEST for n in values)


TENSORS: Allowed = {
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    Global("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Global("collections", "OrderedDict"): dict,
    **dict.fromkeys(_UNTYPED),
    **dict(named("torch", name) for name in (*STORAGES, *DTYPE_NAMES)),
}
"""The names that a pickle of plain tensors uses."""
