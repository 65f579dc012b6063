"""Safetensors headers: parse what others wrote, lay out what pmerge writes.

A file is 8 bytes (little-endian header length), a JSON header, then the tensors' bytes. Two things
happen here and nothing else: `read_header` turns a file's first bytes into a `Header`, refusing
whatever the format's own library refuses (holes, overlaps, trailing bytes, wrong sizes) and
duplicate names; `lay_out` computes the header of a file to be written, and every offset in it,
before a byte is written. No more of a file is read than its first 32 KiB or its header.

A header is walked tensor by tensor rather than parsed whole: the first entry that is not one ends
the walk, so that a hostile header of 100 MB costs little more memory than its own text.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import threading
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from merge_cli.errors import IncompleteError, InputError, UnsupportedError
from merge_cli.formats.untrusted_json import DECODER, walk_object
from merge_cli.stores.store import Source, open_store, read_bytes
from merge_cli.system.json_text import may_hold_surrogates


class DType(NamedTuple):
    """`bits` per element, torch's name of the type ("" where torch has none), and how pmerge treats
    it.
    """

    bits: int
    torch: str
    kind: str  # "float": averaged; "integer": must be equal; "code": means nothing without a scale

    def num_bytes(self, count: int) -> int:
        """The bytes of `count` elements, which end at a whole byte."""
        return count * self.bits // 8

    @property
    def item_bytes(self) -> int:
        """The bytes that hold one element whole."""
        return max(1, self.bits // 8)


DTYPES: dict[str, DType] = {
    "BOOL": DType(8, "bool", "integer"),
    "F4": DType(4, "", "code"),
    "F6_E2M3": DType(6, "", "code"),
    "F6_E3M2": DType(6, "", "code"),
    "U8": DType(8, "uint8", "integer"),
    "I8": DType(8, "int8", "integer"),
    "F8_E5M2": DType(8, "float8_e5m2", "code"),
    "F8_E4M3": DType(8, "float8_e4m3fn", "code"),
    "F8_E8M0": DType(8, "float8_e8m0fnu", "code"),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz", "code"),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz", "code"),
    "I16": DType(16, "int16", "integer"),
    "U16": DType(16, "uint16", "integer"),
    "F16": DType(16, "float16", "float"),
    "BF16": DType(16, "bfloat16", "float"),
    "I32": DType(32, "int32", "integer"),
    "U32": DType(32, "uint32", "integer"),
    "F32": DType(32, "float32", "float"),
    "C64": DType(64, "complex64", "integer"),
    "F64": DType(64, "float64", "float"),
    "I64": DType(64, "int64", "integer"),
    "U64": DType(64, "uint64", "integer"),
}
"""The safetensors dtypes. Complex tensors (rotary tables) are treated like integers: equal in all
inputs, or an error.
"""

MAX_HEADER_BYTES = 100_000_000  # the format's own limit when reading
MAX_WRITTEN_HEADER_BYTES = 25_000_000  # the Hub refuses larger ones
DATA_ALIGNMENT = 4096  # the data of a written file begins on a page, so that it can be read and written directly
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FIRST_BYTES = 32 << 10  # most headers are shorter: one read brings them whole
_U64 = 1 << 64
_ENTRY = re.compile(r"\{[^{}]{0,4096}\}")  # a tensor's entry: nothing nested, and short
_NUMBER = "(?:0|[1-9][0-9]{0,19})"
_USUAL_ENTRY = re.compile(
    rf'{{"dtype":"([A-Z0-9_]+)","shape":\[((?:{_NUMBER}(?:,{_NUMBER})*)?)\],"data_offsets":\[({_NUMBER}),({_NUMBER})\]}}'
)
"""An entry as the format's own library writes it: taken apart in half the decoder's time."""
_FIELDS = "expected an object with exactly the fields dtype, shape and data_offsets"


class TensorInfo(NamedTuple):
    """One tensor of a file: `start` and `end` are byte offsets from the beginning of the file's
    data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        return num_elements(self.shape)


@dataclass(frozen=True, eq=False)
class Header:
    """A parsed header. `tensors` is in the order of the data; `data_start` is where the data begins
    in the file, in bytes.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_bytes: int
    sha256: str


def num_elements(shape: Iterable[int]) -> int:
    """The number of elements of a tensor of `shape`; 1 for a scalar."""
    product = 1
    for dim in shape:
        product *= dim
    return product


class BoundError(InputError):
    """The headers of all checkpoints together are larger than --max-header."""


class SeenHeaders:
    """The parsed headers of the checkpoints of one run by their sha256: they are often the same
    bytes, and are then parsed and kept once. Of all together at most `max_bytes` are read, since
    memory grows with them; one that is there already counts an eighth. Safe to use from threads.
    """

    def __init__(self, max_bytes: int = MAX_HEADER_BYTES) -> None:
        self._headers: dict[str, Header] = {}
        self._max_bytes = max_bytes
        self._spent = 0
        self._lock = threading.Lock()

    def get(self, digest: str, file_bytes: int) -> Header | None:
        """The header with this sha256, of a file of that size."""
        header = self._headers.get(digest)
        return header if header is not None and header.file_bytes == file_bytes else None

    def add(self, digest: str, header: Header) -> None:
        """Keep a header."""
        self._headers[digest] = header

    def spend(self, num_bytes: int, path: str) -> None:
        """Count the header of the file `path`. Raises BoundError if all together are too large."""
        with self._lock:
            self._spent += num_bytes
            if self._spent <= self._max_bytes:
                return
        raise BoundError(
            f"the headers of all checkpoints together are larger than {self._max_bytes} bytes, at {path}",
            details=["memory grows with them: about ten times their size"],
            hint=f"fewer checkpoints, or a higher bound:  --max-header {4 * self._max_bytes >> 20}MiB",
        )


def read_header(source: Source, seen: SeenHeaders | None = None) -> Header:
    """Read and check the header of a safetensors file.

    `seen` are the headers of the other checkpoints. Raises InputError, naming the file and the
    field; ChangedError and StoreError where reading fails.
    """
    file_bytes = source.num_bytes
    if not file_bytes:
        raise IncompleteError(f"not a complete safetensors file: {source.path}", details=["found     an empty file"])
    first = read_bytes(source, 0, min(file_bytes, _FIRST_BYTES))
    length = int.from_bytes(first[:8], "little")
    if first.startswith(LFS_POINTER):
        raise UnsupportedError(
            f"{source.path} is a Git LFS pointer: the file itself was not fetched",
            hint=f"git -C {shlex.quote(str(Path(source.path).parent))} lfs pull",
        )
    if len(first) < 8 or 8 + length > file_bytes or length > MAX_HEADER_BYTES or length < 2:
        kind = InputError if length > MAX_HEADER_BYTES else IncompleteError
        raise kind(
            f"not a complete safetensors file: {source.path}",
            details=[
                f"found     a file of {file_bytes} bytes whose first 8 say that the header has {length} bytes",
                f"expected  a header of 2 to {min(MAX_HEADER_BYTES, max(file_bytes - 8, 2))} bytes",
            ],
            hint="the file is truncated or of another format; copy or save it again",
        )
    raw = memoryview(bytearray(8 + length))
    raw[: len(first)] = first[: len(raw)]
    if len(raw) > len(first):
        source.read_into(len(first), raw[len(first) :])
    digest = hashlib.sha256(raw).hexdigest()
    seen = seen or SeenHeaders()
    header = seen.get(digest, file_bytes)
    seen.spend(length if header is None else length // 8, source.path)
    if header is None:
        header = parse_header(raw[8:], file_bytes, source.path, digest)
        seen.add(digest, header)
    return header


def read_header_at(path: str, seen: SeenHeaders | None = None) -> Header:
    """Open the safetensors file at `path` and read its header. Raises what `read_header` raises."""
    with closing(open_store(path).open(path)) as source:
        return read_header(source, seen)


def parse_header(raw: bytes | memoryview, file_bytes: int, path: str, digest: str = "") -> Header:
    """Parse the JSON header `raw` of a file of `file_bytes` bytes; `path` is only named in errors."""
    try:
        metadata, tensors = _read_entries(str(raw, "utf-8"), path)
    except RecursionError:
        raise InputError(f"the header of {path} is nested too deeply") from None
    except ValueError as error:  # also UnicodeError and json.JSONDecodeError
        raise InputError(f"the header of {path} is not valid JSON: {error}") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for name, info in tensors.items():
        if info.start != end:
            raise InputError(
                f"the header of {path}: tensor `{name[:200]}` begins at byte {info.start} of the data, not at {end}",
                details=["data_offsets must follow each other without holes or overlaps"],
            )
        end = info.end
    data_start = 8 + len(raw)
    if data_start + end != file_bytes:
        kind = InputError if file_bytes > data_start + end else IncompleteError
        raise kind(
            f"the size of {path} does not fit its header",
            details=[
                f"found     {file_bytes} bytes",
                f"expected  {data_start + end} bytes (header {data_start}, tensors {end})",
            ],
            hint="the file is truncated or was not written completely; copy or save it again",
        )
    return Header(tensors, metadata, data_start, file_bytes, digest)


def _read_entries(text: str, path: str) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata and the tensors of a header. Raises ValueError where `text` is not JSON,
    InputError for what is not a header.
    """
    metadata: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    escapes = may_hold_surrogates(text)
    has_metadata = False

    def add_metadata(key: str, at: int) -> int:
        if key in metadata:
            raise InputError(f"the header of {path}: the key {key[:200]!r} of __metadata__ occurs twice")
        if not text.startswith('"', at):
            raise InputError(f"the header of {path}: __metadata__ must map strings to strings; {key[:200]!r} is something else")
        metadata[key], at = DECODER.raw_decode(text, at)
        if escapes:
            (key + metadata[key]).encode()
        return at

    def add(name: str, at: int) -> int:
        nonlocal has_metadata
        if name in tensors or (name == "__metadata__" and has_metadata):
            raise InputError(f"the header of {path}: the key {name[:200]!r} occurs twice")
        if name == "__metadata__":
            has_metadata = True
            if not text.startswith("{", at):
                raise InputError(f"the header of {path}: __metadata__ must be an object that maps strings to strings")
            return walk_object(text, at, add_metadata)
        if escapes:
            name.encode()
        usual = _USUAL_ENTRY.match(text, at)
        if usual is not None:
            dtype, shape, start, end = usual.groups()
            dims = [int(dim) for dim in shape.split(",")] if shape else []
            tensors[name] = _tensor_info(name, dtype, dims, [int(start), int(end)], path)
            return usual.end()
        entry, at = DECODER.raw_decode(text, at) if _ENTRY.match(text, at) else ({}, at)
        if entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise InputError(f"the header of {path}: tensor `{name[:200]}`: {_FIELDS}")
        tensors[name] = _tensor_info(name, entry["dtype"], entry["shape"], entry["data_offsets"], path)
        return at

    end = walk_object(text, 0, add)
    if text[end:].strip(" \t\n\r"):
        raise ValueError(f"more text after the end of the object, at character {end}")
    return metadata, tensors


def _tensor_info(name: str, dtype: Any, shape: Any, offsets: Any, path: str) -> TensorInfo:
    def refuse(what: str) -> InputError:
        return InputError(f"the header of {path}: tensor `{name[:200]}`: {what}")

    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        raise refuse(f"unknown dtype {dtype!r:.40}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise refuse("shape must be a list and data_offsets a list of two")
    bits = known.bits
    for dim in shape:
        if type(dim) is not int or dim >= _U64:
            raise refuse(f"shape: every dimension must be an unsigned 64-bit integer, not {dim!r:.40}")
        bits *= dim
        if bits >= _U64:
            raise refuse(f"shape {shape!r:.80} is larger than any file")
    start, end = offsets
    if type(start) is not int or type(end) is not int or end < start or end >= _U64:
        raise refuse(f"data_offsets {offsets!r:.80} are not two ascending integers")
    if bits % 8 or bits // 8 != end - start:
        raise refuse(f"shape {shape!r:.80} of {dtype} takes {bits / 8:g} bytes, but data_offsets span {end - start}")
    return TensorInfo(dtype, tuple(shape), start, end)


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """Lay out a file: the bytes of its header (length prefix and padding included), and the header
    as it will be read back.

    `tensors` gives (name, dtype, shape) in the order of the data. The header is padded with spaces
    so that the data begins at a multiple of 4096 bytes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    infos: dict[str, TensorInfo] = {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + DTYPES[dtype].num_bytes(num_elements(shape))
        infos[name] = TensorInfo(dtype, shape, start, end)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-(8 + len(raw)) % DATA_ALIGNMENT)
    if len(raw) > MAX_WRITTEN_HEADER_BYTES:
        raise InputError(
            f"the header of one output file would take {len(raw)} bytes; the Hub accepts {MAX_WRITTEN_HEADER_BYTES}",
            hint="write more, smaller shards: --shard-size 5GB",
        )
    prefixed = len(raw).to_bytes(8, "little") + raw
    header = Header(infos, dict(metadata), len(prefixed), len(prefixed) + end, hashlib.sha256(prefixed).hexdigest())
    return prefixed, header
