"""The `.metadata` of a torch distributed checkpoint: its tensors, the chunks that they are cut
into, and the bytes that hold them.

The file is a pickle; it is read as inert values (`inert_pickle`), and each of them is checked
before anything relies on it: sizes are integers, chunks cover their tensor exactly once, every
chunk and every other entry has bytes of its own in a file of the checkpoint. Streams behind an
extension (compression) and dtypes without a name in safetensors are refused.

Not read: `storage_meta` (the trainer's own path) and `all_local_plans` (the saving ranks' plans, in
Megatron's).

Source: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.13.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from merge_cli.errors import InputError, UnsupportedError
from merge_cli.formats.inert_pickle import Allowed, Global, Inert, Refused, inert, loads, named
from merge_cli.formats.safetensors import DTYPES
from merge_cli.formats.torch_pickle import DTYPE_NAMES

MAX_METADATA_BYTES = 256 << 20  # 1.8 million chunks
MAX_DIMS = 64  # torch's own limit
MAX_CUT_DIMS = 6
_LARGEST = 1 << 63

METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_OLD_PROPERTIES = "torch.distributed._shard.sharded_tensor.metadata"
OLMO_CORE = "olmo_core.distributed.checkpoint.filesystem"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_PLAN_CLASSES = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
SIZE = Global("torch", "Size")


class Size(tuple[int, ...]):
    """A checked `torch.Size`: at most 64 integers, none of them negative or beyond any file."""

    __slots__ = ()


def _size(values: Any = ()) -> Size:
    """Called in place of `torch.Size`."""
    if type(values) is not tuple or len(values) > MAX_DIMS or any(type(n) is not int or not 0 <= n < _LARGEST for n in values):
        raise Refused("a torch.Size is not a tuple of integers")
    return Size(values)


ALLOWED: Allowed = {
    SIZE: _size,
    Global("collections", "OrderedDict"): dict,
    **dict(named("torch", name) for name in DTYPE_NAMES),
    **dict(named("torch", name) for name in ("complex32", "complex128", "float4_e2m1fn_x2")),  # named so that errors can
    **dict(
        inert(module, name)
        for module, names in {
            METADATA: (
                "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
                "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
            ),
            FILESYSTEM: ("_StorageInfo", "_StoragePrefix"),
            OLMO_CORE: ("_StorageInfo", "_StoragePrefix"),
            "torch.distributed.checkpoint.planner": _PLAN_CLASSES,
            _OLD_PROPERTIES: ("TensorProperties", "MEM_FORMAT_ENCODING"),
            _MEGATRON: ("MCoreMetadata", "MCoreSavePlan"),
            "torch.serialization": ("_get_layout",),
            "pathlib": ("PosixPath", "PurePosixPath"),
            "pathlib._local": ("PosixPath", "PurePosixPath"),
        }.items()
        for name in names
    ),
}  # fmt: skip
"""The names that `.metadata` may use; all are inert."""


class Item(NamedTuple):
    """The bytes of one entry: `length` bytes from `offset` in `file`, a path inside the checkpoint."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A box of a tensor, from `offsets` on and of `sizes`, in elements."""

    offsets: Size
    sizes: Size
    item: Item


class Tensor(NamedTuple):
    """A tensor; `dtype` as safetensors names it. Its chunks cover it exactly once."""

    dtype: str
    shape: Size
    chunks: tuple[Chunk, ...]
    requires_grad: bool = False


@dataclass(frozen=True, eq=False)
class Metadata:
    """A checked `.metadata`: tensors, and `blobs`, which are entries that are no tensors (numbers,
    strings, pickles of a trainer).

    `paths` gives where entries lie in the trainer's nested state, None if it is not recorded.
    `megatron` is what older versions of Megatron add, `kind` the class of the whole.
    """

    tensors: Mapping[str, Tensor]
    blobs: Mapping[str, Item]
    paths: Mapping[str, tuple[str | int, ...]] | None
    kind: Global
    megatron: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def num_chunks(self) -> int:
        return sum(len(tensor.chunks) for tensor in self.tensors.values())


def parse_metadata(raw: bytes, what: str) -> Metadata:
    """Parse the `.metadata` file `what`, whose bytes are `raw`. Raises InputError or
    UnsupportedError, naming file and entry.
    """
    top = loads(raw, ALLOWED, what)
    with _errors_of(what):
        return _metadata(top)


def check_chunks(path: str, fqn: str, shape: Size, chunks: Sequence[Chunk]) -> None:
    """Raise InputError or UnsupportedError unless `chunks` hold every element of the tensor `fqn`
    of the checkpoint at `path` exactly once.
    """
    with _errors_of(path):
        check_cover(f"`{fqn[:200]}`", shape, chunks)


class _Wrong(Exception):
    """A part of the metadata that is not as it has to be; `refused` where it is understood and
    cannot be averaged.
    """

    def __init__(self, message: str, refused: bool = False, hint: str = "") -> None:
        super().__init__(message)
        self.refused = refused
        self.hint = hint or "the file is damaged, or of a version that pmerge does not know: save it again with torch's own writer"


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    try:
        yield
    except _Wrong as error:
        kind = UnsupportedError if error.refused else InputError
        raise kind(f"{what}: {error}", hint=error.hint) from None


def _metadata(top: Any) -> Metadata:
    fields = _fields(top, ("Metadata", "MCoreMetadata"), "the metadata")
    items = dict(_items(_mapping(fields.get("storage_data"), "storage_data")))
    tensors: dict[str, Tensor] = {}
    blobs: dict[str, Item] = {}
    for fqn, entry in _mapping(fields.get("state_dict_metadata"), "state_dict_metadata").items():
        if type(fqn) is not str:
            raise _Wrong("state_dict_metadata has an entry whose name is not a string")
        if type(entry) is Inert and entry.of.name == "BytesStorageMetadata":
            blobs[fqn] = _item_of(items, fqn, None)
        else:
            tensors[fqn] = _tensor(fqn, entry, items)
    check_apart([(f"`{fqn[:200]}`", item) for fqn, item in [*blobs.items(), *_chunk_items(tensors)]])
    megatron = fields.get("mcore_data")
    return Metadata(
        tensors=tensors,
        blobs=blobs,
        paths=_paths(fields.get("planner_data")),
        kind=top.of,
        megatron=None if megatron is None else _flat_mapping(megatron),
    )


def _chunk_items(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Item]]:
    return ((fqn, chunk.item) for fqn, tensor in tensors.items() for chunk in tensor.chunks)


def _fields(value: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    if type(value) is not Inert or value.of.name not in names or type(value.state) is not dict:
        raise _Wrong(f"{what} is not a {names[0]}")
    return value.state


def _mapping(value: Any, what: str) -> dict[Any, Any]:
    if type(value) is not dict:
        raise _Wrong(f"{what} is not a dict")
    return value


def _items(storage: Mapping[Any, Any]) -> Iterable[tuple[tuple[str, Size | None], Item]]:
    """The item of each (entry, offsets); offsets are None for what is no tensor."""
    files: dict[str, str] = {}
    seen: set[tuple[str, Size | None]] = set()
    for index, info in storage.items():
        at = _fields(index, ("MetadataIndex",), "a key of storage_data")
        fqn, offsets = at.get("fqn"), at.get("offset")
        if type(fqn) is not str or (offsets is not None and type(offsets) is not Size):
            raise _Wrong("a key of storage_data is not a name with offsets")
        found = _fields(info, ("_StorageInfo",), f"the storage of `{fqn[:200]}`")
        file, offset, length = (found.get(name) for name in ("relative_path", "offset", "length"))
        if type(file) is not str or type(offset) is not int or type(length) is not int or not _fits(offset, length):
            raise _Wrong(f"the storage of `{fqn[:200]}` is not a file, an offset and a length")
        if file not in files and not is_plain_path(file):
            raise _Wrong(f"`{fqn[:200]}` is stored in {file[:200]!r}, which is not the name of a file in the checkpoint")
        if found.get("transform_descriptors"):
            raise _Wrong(
                f"`{fqn[:200]}` is stored behind an extension: {_short(found['transform_descriptors'])}",
                refused=True,
                hint="save the checkpoint without `_extensions`: compressed streams cannot be read by ranges",
            )
        if (fqn, offsets) in seen:
            raise _Wrong(f"`{fqn[:200]}` has two storages for one chunk")
        seen.add((fqn, offsets))
        yield (fqn, offsets), Item(files.setdefault(file, file), offset, length)


def _fits(offset: int, length: int) -> bool:
    return 0 <= offset < _LARGEST and 0 <= length < _LARGEST


def _short(value: Any) -> str:
    """A few strings of a list, for a message."""
    return ", ".join(str(each)[:40] for each in value[:3] if type(each) is str) if type(value) in (list, tuple) else "unknown"


def _item_of(items: Mapping[tuple[str, Size | None], Item], fqn: str, offsets: Size | None) -> Item:
    item = items.get((fqn, offsets))
    if item is None:
        where = "" if offsets is None else f", the chunk at {list(offsets)},"
        raise _Wrong(f"`{fqn[:200]}`{where} has no storage")
    return item


def _tensor(fqn: str, entry: Any, items: Mapping[tuple[str, Size | None], Item]) -> Tensor:
    what = f"`{fqn[:200]}`"
    fields = _fields(entry, ("TensorStorageMetadata",), what)
    properties, shape, chunks = (fields.get(name) for name in ("properties", "size", "chunks"))
    if type(properties) is not Inert or properties.of.name != "TensorProperties":
        raise _Wrong(f"{what} has no properties")
    if type(shape) is not Size or type(chunks) is not list:
        raise _Wrong(f"{what} has no size, or no list of chunks")
    dtype = _dtype(what, properties)
    if math.prod(shape) * DTYPES[dtype].bits >= _LARGEST:
        raise _Wrong(f"{what} has the size {list(shape)}, which is larger than any file")
    found = []
    for chunk in chunks:
        box = _fields(chunk, ("ChunkStorageMetadata",), f"a chunk of {what}")
        offsets, sizes = box.get("offsets"), box.get("sizes")
        if type(offsets) is not Size or type(sizes) is not Size or not len(offsets) == len(sizes) == len(shape):
            raise _Wrong(f"a chunk of {what} has no offsets and sizes of {len(shape)} dimensions")
        if any(at + n > end for at, n, end in zip(offsets, sizes, shape, strict=True)):
            raise _Wrong(f"{what}: the chunk at {list(offsets)} of size {list(sizes)} lies outside {list(shape)}")
        found.append(Chunk(offsets, sizes, _item_of(items, fqn, offsets)))
    check_cover(what, shape, found)
    return Tensor(dtype, shape, tuple(found), type(properties.state) is tuple and True in properties.state[2:3])


def _dtype(what: str, properties: Inert) -> str:
    """The dtype in the properties: first of a tuple since torch 2.1, an attribute before."""
    state = properties.state
    dtype = state[0] if type(state) is tuple and state else state.get("dtype") if type(state) is dict else None
    if type(dtype) is not Global:
        raise _Wrong(f"{what} has no dtype")
    if dtype.name not in DTYPE_NAMES:
        raise _Wrong(
            f"{what} has the dtype {dtype}, which pmerge cannot read", refused=True, hint="leave the tensor out of the save"
        )
    layout = state[1] if type(state) is tuple and len(state) > 1 else None
    if type(layout) is Inert and layout.args != ("torch.strided",):
        raise _Wrong(f"{what} is not a dense tensor", refused=True, hint="save it as a dense tensor, or leave it out")
    return DTYPE_NAMES[dtype.name]


def check_cover(what: str, shape: Size, chunks: Sequence[Chunk]) -> None:
    """Raise unless the chunks, each inside `shape`, hold every element exactly once.

    The indicator of a box is determined by its corners with alternating signs; a set of boxes is
    one box, each point counted once, exactly if all other corners cancel. That takes time in
    proportion to the chunks, however they are arranged.
    """
    full = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    cut = [d for d, n in enumerate(shape) if any(chunk.sizes[d] != n for chunk in full)]
    if len(cut) > MAX_CUT_DIMS:
        raise _Wrong(f"{what} is cut along more than {MAX_CUT_DIMS} dimensions", refused=True, hint="save it with fewer cuts")
    signs = [1 - 2 * (sum(ends) % 2) for ends in itertools.product((0, 1), repeat=len(cut))]
    corners: dict[tuple[int, ...], int] = {}
    whole = [((0,) * len(shape), shape, -1)] if math.prod(shape) else []
    for starts, sizes, count in itertools.chain(whole, ((chunk.offsets, chunk.sizes, 1) for chunk in full)):
        for corner, sign in zip(itertools.product(*[(starts[d], starts[d] + sizes[d]) for d in cut]), signs, strict=True):
            corners[corner] = corners.get(corner, 0) + count * sign
    if any(corners.values()):
        raise _Wrong(f"the chunks of {what} do not cover its size {list(shape)} exactly once")


def check_apart(items: Iterable[tuple[str, Item]]) -> None:
    """Raise where two items share bytes of a file."""
    ordered = sorted(items, key=lambda pair: pair[1])
    for (one, a), (other, b) in itertools.pairwise(ordered):
        if a.file == b.file and a.offset + a.length > b.offset:
            raise _Wrong(f"{one} and {other} share bytes of {a.file[:200]}")


def _paths(value: Any) -> dict[str, tuple[str | int, ...]] | None:
    """`planner_data`: entry -> path in the nested state. Other planners' data mean nothing here,
    and are left out.
    """
    if type(value) is not dict:
        return None
    for fqn, path in value.items():
        if type(fqn) is not str or type(path) is not tuple or any(type(part) not in (str, int) for part in path):
            raise _Wrong("planner_data does not map entries to paths")
    return value


def _flat_mapping(value: Any) -> dict[str, dict[str, Any]]:
    """Megatron's `mcore_data`: entry -> {property: shape}."""
    flat = _mapping(value, "mcore_data")
    for key, inner in flat.items():
        for name, shape in _mapping(inner, "mcore_data").items():
            if (
                type(key) is not str
                or type(name) is not str
                or not isinstance(shape, tuple)
                or any(type(n) is not int for n in shape)
            ):
                raise _Wrong("mcore_data does not map entries to shapes")
    return flat


def is_plain_path(name: str) -> bool:
    """Whether `name` is a path that stays inside the folder it is relative to."""
    parts = name.split("/")
    return 0 < len(name) <= 1000 and "\0" not in name and "\\" not in name and all(p not in ("", ".", "..") for p in parts)
