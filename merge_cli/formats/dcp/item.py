"""One item of a `.distcp` file: a whole `torch.save` archive of one tensor, whose values are plain
bytes inside it.

An `Envelope` is all of an item but those values: the bytes before them, and the bytes behind them,
which depend on the values by their CRC-32 alone. So the item of other values is `head`, the values,
`trailer(crc)`; it is what torch.save writes for them, byte for byte. Items of equal dtype and shape
have equal envelopes; `Envelopes` parses each kind once and compares the others with it.

Refused: what is not one plain tensor (subclasses, sparse, quantized, conjugated or negated views,
values that share elements), big-endian values, archives that compress.

Source: caffe2/serialize/inline_container.cc of torch 2.13 (PyTorchStreamWriter) for the members and
the serialization id.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from merge_cli.errors import InputError, UnsupportedError
from merge_cli.formats.inert_pickle import loads
from merge_cli.formats.safetensors import DTYPES, num_elements
from merge_cli.formats.stored_zip import Member, Read, list_members
from merge_cli.formats.torch_pickle import TENSORS, PickledTensor

_MAX_PICKLE_BYTES = 64 << 10
_WINDOW = 2048  # bytes at either end of an item that are read at once: all of its envelope
_BESIDE = ("byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id")
_U4 = struct.Struct("<I")
_ENTRY_CRC, _DESCRIPTOR_CRC = 16, 4  # where the CRC is, in an entry of the directory and in a data descriptor


class _Id(NamedTuple):
    """The serialization id in the bytes behind the values: 40 digits, of which the last 20 hash the
    CRCs of all members.
    """

    at: int
    names_hash: bytes
    crcs: tuple[int | None, ...]  # in the order of writing; None for the values
    crc_at: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Envelope:
    """The bytes around the values of an item; `tensor` is what its pickle says. The values have
    `num_bytes` bytes.
    """

    tensor: PickledTensor
    head: bytes
    num_bytes: int
    _tail: bytes
    _crc_at: tuple[int, ...]
    _id: _Id | None

    @property
    def tail_bytes(self) -> int:
        """The length of every trailer."""
        return len(self._tail)

    def crc_in(self, tail: bytes) -> int:
        """The CRC-32 that the bytes behind other values of this envelope record; 0 if there are no
        values.
        """
        return int(_U4.unpack_from(tail, self._crc_at[0])[0]) if self._crc_at else 0

    def trailer(self, crc: int) -> bytes:
        """The bytes behind values of this CRC-32."""
        tail = bytearray(self._tail)
        for at in self._crc_at:
            _U4.pack_into(tail, at, crc)
        if self._id is not None:
            digits = self._id.names_hash + b"%020d" % _combined(self._id.crcs, crc)
            tail[self._id.at : self._id.at + len(digits)] = digits
            for at in self._id.crc_at:
                _U4.pack_into(tail, at, zlib.crc32(digits))
        return bytes(tail)


def _combined(crcs: Sequence[int | None], crc: int) -> int:
    """The hash of the CRCs of all members, in 64 bits."""
    seed = 0
    for each in crcs:
        value = crc if each is None else each
        seed ^= (value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & 0xFFFFFFFFFFFFFFFF
    return seed


def parse_item(read: Read, length: int, what: str) -> Envelope:
    """Parse the item `what` of `length` bytes; `read` gives ranges of it. Raises InputError or
    UnsupportedError.
    """
    read = _windowed(read, length)
    members = list_members(read, length, what)
    root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if root is None or members[root + "data.pkl"].size > _MAX_PICKLE_BYTES:
        raise UnsupportedError(f"{what} is not an archive of one tensor", hint=_HINT)
    order = members.get(root + "byteorder")
    if order is not None and (order.size != 6 or read(order.data, 6) != b"little"):
        raise UnsupportedError(f"{what} holds big-endian values", hint="save it on a little-endian machine")
    pickled = members[root + "data.pkl"]
    tensor = loads(read(pickled.data, pickled.size), TENSORS, what)
    if type(tensor) is not PickledTensor:
        raise UnsupportedError(f"{what} holds a {type(tensor).__name__}, not a tensor", hint=_HINT)
    values = members.get(f"{root}data/{tensor.key}")
    if values is None or members.keys() - {root + name for name in (*_BESIDE, "data.pkl", f"data/{tensor.key}")}:
        raise UnsupportedError(f"{what} holds other members than one tensor's", details=[_names(members)], hint=_HINT)
    _check_plain(tensor, values, what)
    head, tail = read(0, values.data), read(values.end, length - values.end)
    crc_at = (_DESCRIPTOR_CRC, values.entry + _ENTRY_CRC - values.end) if values.size else ()  # no values, no descriptor
    if crc_at and tail[:_DESCRIPTOR_CRC] != b"PK\x07\x08":
        raise UnsupportedError(f"{what} has its CRC-32 before the values", hint=_HINT)
    if any(_U4.unpack_from(tail, at)[0] != values.crc for at in crc_at):
        raise InputError(f"{what} has two different CRC-32s for its values", hint=_HINT)
    serial = members.get(root + ".data/serialization_id")
    return Envelope(tensor, head, values.size, tail, crc_at, serial and _find_id(serial, values, list(members.values()), tail))


_HINT = "save the checkpoint again with torch.distributed.checkpoint.save, and as plain tensors"


def _names(members: dict[str, Member]) -> str:
    return "found     " + ", ".join(name[:60] for name in [*members][:8])


def _check_plain(tensor: PickledTensor, values: Member, what: str) -> None:
    """The storage must be the values of this tensor, all of them, and nothing else."""
    expected = DTYPES[tensor.dtype].num_bytes(num_elements(tensor.shape))
    if tensor.start or not tensor.is_dense or not values.size == tensor.storage_bytes == expected:
        raise UnsupportedError(
            f"{what} holds a view of other values",
            details=[
                f"found     {tensor.dtype} {list(tensor.shape)}, strides {list(tensor.strides)}, from element {tensor.start} on",
                f"          of a storage of {tensor.storage_bytes} bytes, of which the archive has {values.size}",
                f"expected  {expected} bytes, each element once",
            ],
            hint="save a copy:  tensor.clone()",
        )


def _find_id(serial: Member, values: Member, members: Sequence[Member], tail: bytes) -> _Id | None:
    """Where the serialization id is to be renewed; None if it was made in another way, and stays as
    it is.
    """
    at = serial.data - values.end
    crc_at = (at + 40 + _DESCRIPTOR_CRC, serial.entry + _ENTRY_CRC - values.end)
    crcs = tuple(None if member is values else member.crc for member in members if member.header < serial.header)
    if serial.size != 40 or at < 0 or tail[at + 20 : at + 40] != b"%020d" % _combined(crcs, values.crc):
        return None
    if any(tail[each : each + 4] != _U4.pack(serial.crc) for each in crc_at) or serial.crc != zlib.crc32(tail[at : at + 40]):
        return None
    return _Id(at, tail[at : at + 20], crcs, crc_at)


def _windowed(read: Read, length: int) -> Read:
    """`read` with both ends of the item at hand."""
    first = read(0, min(length, _WINDOW))
    last_at = max(0, length - _WINDOW)
    last = read(last_at, length - last_at)

    def windowed(offset: int, size: int) -> bytes:
        if offset + size <= len(first):
            return first[offset : offset + size]
        if offset >= last_at:
            return last[offset - last_at : offset - last_at + size]
        return read(offset, size)

    return windowed


class Envelopes:
    """Finds the envelope of each item, parsing only those that are not like one seen before."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str, tuple[int, ...]], Envelope] = {}

    def find(self, read: Read, length: int, dtype: str, shape: tuple[int, ...], what: str) -> Envelope:
        """The envelope of the item `what` of `length` bytes, which has to be a tensor of this dtype
        and shape.
        """
        like = self._seen.get((length, dtype, shape))
        if like is not None and read(0, len(like.head)) == like.head:
            tail = read(length - like.tail_bytes, like.tail_bytes)
            if like.trailer(like.crc_in(tail)) == tail:
                return like
        found = parse_item(read, length, what)
        if (found.tensor.dtype, found.tensor.shape) != (dtype, shape):
            raise InputError(
                f"{what} is not the chunk that the metadata says",
                details=[f"found     {found.tensor.dtype} {list(found.tensor.shape)}", f"expected  {dtype} {list(shape)}"],
                hint="the files belong to another save than .metadata: copy or save the checkpoint again",
            )
        self._seen[length, dtype, shape] = found
        return found
