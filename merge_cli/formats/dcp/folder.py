"""An opened folder of a torch distributed checkpoint: its metadata, its files, and where the values
of each chunk lie.

`.metadata` is the last file that a save writes, so a folder without one is unfinished. Only
metadata and envelopes are read here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from merge_cli.errors import IncompleteError, InputError, UnsupportedError, first_ten
from merge_cli.formats.dcp.item import Envelope, Envelopes
from merge_cli.formats.dcp.metadata import MAX_METADATA_BYTES, Chunk, Item, Metadata, Tensor
from merge_cli.formats.dcp.seen import SeenDcp
from merge_cli.stores.store import Source, StrPath, as_path, join, open_store, read_bytes

METADATA_FILE = ".metadata"


class DcpFile(NamedTuple):
    """A file of the checkpoint; `name` is its path inside it."""

    source: Source
    name: str

    @property
    def path(self) -> str:
        return self.source.path

    @property
    def num_bytes(self) -> int:
        return self.source.num_bytes


class Payload(NamedTuple):
    """Where the values of a chunk lie: `num_bytes` bytes from `offset` in `file`, in the order of
    `strides` (elements).
    """

    file: str
    offset: int
    num_bytes: int
    strides: tuple[int, ...]
    envelope: Envelope


@dataclass(frozen=True, eq=False)
class DcpFolder:
    """A checked folder. `sha256` is that of `.metadata`; `notes` name files that the metadata does
    not know.
    """

    path: str
    metadata: Metadata
    metadata_file: DcpFile
    sha256: str
    files: Mapping[str, DcpFile]
    notes: tuple[str, ...] = ()


def open_folder(path: StrPath, seen: SeenDcp | None = None) -> DcpFolder:
    """Open the folder that holds `.metadata` and its files, and check that all of them are there
    and long enough. `seen` shares parsed metadata between checkpoints.

    Raises InputError or UnsupportedError.
    """
    path = as_path(path)
    store = open_store(path)
    there = [entry.name for entry in store.list(path)]
    if METADATA_FILE not in there:
        raise _without_metadata(path, there)
    where = join(path, METADATA_FILE)
    store.check_inside(path, where)
    raw, metadata_file = _read_metadata(where)
    metadata = (seen or SeenDcp()).parse(raw, where)
    if not metadata.tensors:
        raise InputError(f"{where} names no tensors", hint="name the folder of the model's own checkpoint")
    files = _open_files(path, metadata)
    stray = [name for name in there if name.endswith(".distcp") and name not in files]
    notes = tuple(f"{join(path, name)}: not named by .metadata, ignored" for name in first_ten(stray))
    return DcpFolder(path, metadata, metadata_file, hashlib.sha256(raw).hexdigest(), files, notes)


def _read_metadata(path: str) -> tuple[bytes, DcpFile]:
    with closing(open_store(path).open(path)) as source:
        if source.num_bytes > MAX_METADATA_BYTES:
            raise InputError(
                f"{path} is too large to be what its name says",
                details=[f"found     {source.num_bytes} bytes", f"expected  at most {MAX_METADATA_BYTES} bytes"],
            )
        return bytes(read_bytes(source, 0, source.num_bytes)), DcpFile(source, METADATA_FILE)


def _without_metadata(path: str, there: list[str]) -> InputError:
    if any(name.startswith("__") and name.endswith(".metadata") for name in there):
        return UnsupportedError(
            f"{path} was saved with use_collectives=False: each rank has metadata of its own",
            hint="save it with collectives (the default), so that there is one .metadata",
        )
    return IncompleteError(
        f"{path} has no .metadata",
        details=["a save writes it last, so this one is unfinished or was copied in part"],
    )


def items_of(metadata: Metadata) -> Iterator[tuple[str, Item]]:
    """Each entry's name with each of its items."""
    yield from metadata.blobs.items()
    for fqn, tensor in metadata.tensors.items():
        for chunk in tensor.chunks:
            yield fqn, chunk.item


def _open_files(path: str, metadata: Metadata) -> dict[str, DcpFile]:
    ends: dict[str, tuple[int, str]] = {}
    for fqn, item in items_of(metadata):
        ends[item.file] = max(ends.get(item.file, (0, "")), (item.offset + item.length, fqn))
    store = open_store(path)
    missing = [name for name in sorted(ends) if store.stat(join(path, name)) is None]
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {len(ends)} files are missing in {path}",
            details=first_ten(missing),
        )
    files = {}
    for name, (end, fqn) in sorted(ends.items()):
        store.check_inside(path, join(path, name))
        with closing(store.open(join(path, name))) as source:
            files[name] = DcpFile(source, name)
        if source.num_bytes < end:
            raise IncompleteError(
                f"{source.path} ends before `{fqn[:200]}` does",
                details=[f"found     {source.num_bytes} bytes", f"expected  at least {end} bytes"],
                hint="the file is truncated or belongs to another save; copy or save it again",
            )
    return files


def locate(
    folder: DcpFolder, wanted: Iterable[tuple[str, Tensor, Chunk]], envelopes: Envelopes
) -> Iterator[tuple[str, Chunk, Payload]]:
    """The payload of each wanted (name, tensor, chunk), file by file. `envelopes` may be shared
    between checkpoints.
    """
    by_file: dict[str, list[tuple[str, Tensor, Chunk]]] = {}
    for each in wanted:
        by_file.setdefault(each[2].item.file, []).append(each)
    for name, entries in by_file.items():
        with closing(folder.files[name].source) as source:
            for fqn, tensor, chunk in sorted(entries, key=lambda each: each[2].item.offset):
                yield fqn, chunk, _payload(source, fqn, tensor, chunk, envelopes)


def _payload(source: Source, fqn: str, tensor: Tensor, chunk: Chunk, envelopes: Envelopes) -> Payload:
    item = chunk.item

    def read(offset: int, length: int) -> bytes:
        if item.offset + offset + length > source.num_bytes:
            raise InputError(f"{source.path} ends before `{fqn[:200]}` does", hint="the file is truncated; copy or save it again")
        return bytes(read_bytes(source, item.offset + offset, length))

    what = f"{source.path}, `{fqn[:200]}` at byte {item.offset}"
    found = envelopes.find(read, item.length, tensor.dtype, tuple(chunk.sizes), what)
    return Payload(item.file, item.offset + len(found.head), found.num_bytes, found.tensor.strides, found)
