"""Open a checkpoint: which files hold its weights, what tensors they hold, what else lies beside
them.

Reads headers, the index and `config.json`; never a weight. Six layouts are understood, four of
them here:

    single   one safetensors file
    index    shards named by a `*.safetensors.index.json`
    files    several safetensors files without an index, every tensor name in one of them only
    ranks    one file or folder per rank of expert, tensor or pipeline parallelism, names repeating between ranks
    dcp      a torch distributed checkpoint, each tensor in chunks (`dcp/checkpoint.py`)
    pickle   files of `torch.save`, which are read and never written (`pickled.py`, `universal.py`)

A tensor is known by its key: its name, or "file:name" in the `ranks` layout, where a name alone is
ambiguous.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from merge_cli.errors import IncompleteError, InputError, first_ten
from merge_cli.formats.alike import Moved, original_of
from merge_cli.formats.foreign import recognize
from merge_cli.formats.index import INDEX_SUFFIX, Index, choose_index, read_index
from merge_cli.formats.numbering import check_no_forgotten_shard, check_numbering
from merge_cli.formats.safetensors import MAX_HEADER_BYTES, SeenHeaders, TensorInfo, read_header
from merge_cli.formats.side_files import SideFiles, list_side_files, without_training_state
from merge_cli.formats.weight_file import Files, WeightFile
from merge_cli.stores.store import Entry, Store, StrPath, as_path, folder_of, is_local, join, name_of, open_store, read_file
from merge_cli.system.json_text import parse_json

if TYPE_CHECKING:
    from merge_cli.formats.dcp.clone import DcpParts

RANK_FOLDER = re.compile(r"^(?:[a-z]*_)?(?:mp|tp|pp|ep|dp|cp|rank)(?:_rank)?[_-]?\d+(?:[_-].*)?$", re.IGNORECASE)
MAX_CONFIG_BYTES = 16 << 20


class Stored(NamedTuple):
    """Where a tensor lies: its file, its name in that file, and its header entry."""

    file: WeightFile
    name: str
    info: TensorInfo

    @property
    def offset(self) -> int:
        """The byte offset of the tensor in its file."""
        return self.file.header.data_start + self.info.start

    def moved(self, files: Files) -> Stored:
        """The tensor of the same name and place in another file."""
        return Stored(self.file.moved(files), self.name, self.info)


class Contents(NamedTuple):
    """The tensors of a checkpoint's `files`, and `notes` on them for people."""

    layout: str
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, Stored]
    notes: tuple[str, ...] = ()

    def moved(self, files: tuple[WeightFile, ...]) -> Contents:
        """The contents of other files with the same names and headers, in the same order."""
        return self._replace(files=files, tensors=Moved(self.tensors, dict(zip(self.files, files, strict=True))))


class Opened:
    """The parts that the checkpoints of a run often share, of those opened so far: headers (at most
    `max_bytes`) and indexes by their sha256, contents by both.
    """

    def __init__(self, max_bytes: int = MAX_HEADER_BYTES) -> None:
        self.headers = SeenHeaders(max_bytes)
        self.indexes: dict[str, Index] = {}
        self.contents: dict[object, Contents] = {}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint. `root` is the folder of the side files (None for a single file given by
    itself).

    `dcp` is what a distributed checkpoint has more: the items around its values, and entries that
    are taken over unopened.
    """

    path: str
    root: str | None
    layout: str
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, Stored]
    index_name: str = ""
    index_metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    side_files: SideFiles = field(default_factory=SideFiles)
    notes: tuple[str, ...] = ()
    dcp: DcpParts | None = None

    @cached_property
    def tensor_bytes(self) -> int:
        """The bytes of all tensors, headers not counted."""
        return sum(stored.info.end - stored.info.start for stored in original_of(self.tensors).values())


def open_safetensors(path: StrPath, *, seen: Opened | None = None) -> Checkpoint:
    """Open the checkpoint at `path` (a folder, or one `.safetensors` file) and check that it is
    complete.

    `seen` shares parsed headers and indexes between checkpoints. Raises InputError when a file is
    missing, broken or reaches outside the checkpoint, or when the index and the shards disagree.
    """
    path = as_path(path)
    store = open_store(path)
    status = store.stat(path)
    seen = seen or Opened()
    if status is not None and status.kind == "file":
        file = _weight_file(store, path, name_of(path), seen)
        alone = _contents((file,), seen, ("one file", file.name), lambda: Contents("single", (file,), _stored((file,))))
        return Checkpoint(path, None, alone.layout, alone.files, alone.tensors)
    if status is None or status.kind != "folder":
        raise InputError(f"no such checkpoint: {path}", hint=f"ls -d {folder_of(path)}/*" if is_local(path) else "")
    entries = store.list(path)
    names = [entry.name for entry in entries]
    found = without_training_state([name for name in names if name.endswith(".safetensors")])
    index_name = choose_index(path, [name for name in names if name.endswith(INDEX_SUFFIX)], found)
    index_metadata: Mapping[str, Any] = {}
    if index_name:
        index = join(path, index_name)
        store.check_inside(path, index)
        weight_map, index_metadata = read_index(index, seen.indexes)
        wanted = sorted(set(weight_map.values()))
        stray = sorted(set(found) - set(wanted))
        named = _open_files(store, path, wanted, names, seen)
        beside = _open_files(store, path, stray, names, seen)
        files = (*named, *beside)

        by = (index_name, id(weight_map), *wanted, *stray)
        contents = _contents(files, seen, by, lambda: _by_index(path, index_name, weight_map, files, beside))
    else:
        wanted = found or _rank_files(store, path, entries)
        if not wanted:
            raise InputError(f"no safetensors files in {path}", hint=_next_command(path))
        check_numbering(path, wanted)
        files = _open_files(store, path, wanted, names, seen)
        contents = _contents(files, seen, tuple(wanted), lambda: _without_index(files))
    store.check_inside(path, join(path, "config.json"))
    return Checkpoint(
        path=path,
        root=path,
        layout=contents.layout,
        files=contents.files,
        tensors=contents.tensors,
        index_name=index_name,
        index_metadata=index_metadata,
        config=read_config(join(path, "config.json")),
        side_files=list_side_files(path, {file.name for file in contents.files} | {index_name} | set(found)),
        notes=tuple(f"{path}: {note}" for note in contents.notes),
    )


def _contents(files: tuple[WeightFile, ...], seen: Opened, by: tuple[object, ...], read: Callable[[], Contents]) -> Contents:
    """The contents that `read` finds in `files`, or those of other files with the same headers, if
    these were read `by` the same index and names.
    """
    key = (*by, *(file.header for file in files))
    if key in seen.contents:
        return seen.contents[key].moved(files)
    return seen.contents.setdefault(key, read())


def read_config(path: str) -> dict[str, Any]:
    """The parsed `config.json`, {} where there is none."""
    if open_store(path).stat(path) is None:
        return {}
    try:
        config = parse_json(read_file(path, MAX_CONFIG_BYTES))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must be a JSON object", hint="copy the file again, or that of another checkpoint of the run")
    return config


def _open_files(store: Store, folder: str, names: Sequence[str], listed: Sequence[str], seen: Opened) -> tuple[WeightFile, ...]:
    there = set(listed)
    missing = [n for n in names if n.split("/")[0] not in there or ("/" in n and store.stat(join(folder, n)) is None)]
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {len(names)} weight files are missing in {folder}",
            details=[
                *first_ten(missing),
                *(_beside(name) for name in listed if name.endswith(".safetensors") and name not in names),
            ],
        )
    for name in names:
        store.check_inside(folder, join(folder, name))

    def open_file(name: str) -> WeightFile:
        return _weight_file(store, join(folder, name), name, seen)

    if store.requests_at_once == 1:
        return tuple(map(open_file, names))
    with ThreadPoolExecutor(store.requests_at_once) as pool:
        return tuple(pool.map(open_file, names))


def _weight_file(store: Store, path: str, name: str, seen: Opened) -> WeightFile:
    with closing(store.open(path)) as source:
        return WeightFile(source, name, read_header(source, seen.headers))


def _by_index(
    folder: str, index_name: str, weight_map: Mapping[str, str], files: tuple[WeightFile, ...], beside: Sequence[WeightFile]
) -> Contents:
    """Tensors in file order; `beside` are the files that the index does not name.

    Every name of the index must be in its shard; a tensor that the index forgot is kept, and
    reported; a copy in a shard that the index does not give for it is ignored, and reported.
    """
    tensors: dict[str, Stored] = {}
    forgotten: list[str] = []
    copies: list[str] = []
    for file in files:
        for name, info in file.header.tensors.items():
            owner = weight_map.get(name)
            if owner == file.name:
                tensors[name] = Stored(file, name, info)
            elif owner is not None:
                copies.append(f"`{name}` in {file.name}")
            elif name in tensors:
                raise InputError(f"`{name}` is in {tensors[name].file.path} and in {file.path}, and {index_name} names neither")
            else:
                tensors[name] = Stored(file, name, info)
                forgotten.append(f"`{name}` in {file.name}")
    absent = [f"`{name}` in {file_name}" for name, file_name in weight_map.items() if name not in tensors]
    if absent:
        raise InputError(
            f"{join(folder, index_name)} names {len(absent)} tensors that are not in their shards",
            details=first_ten(absent),
            hint="the shards belong to another save than the index: save or copy the checkpoint again",
        )
    stray = [file.name for file in beside]
    check_no_forgotten_shard(folder, index_name, [file.name for file in files if file.name not in stray], stray)
    _check_no_second_set(folder, index_name, weight_map, beside)
    notes = [f"{line}: not in {index_name}, kept" for line in first_ten(forgotten)]
    notes += [f"{line}: a copy that {index_name} does not point to, ignored" for line in first_ten(copies)]
    return Contents("index", files, tensors, tuple(notes))


def _rank_files(store: Store, folder: str, entries: Sequence[Entry]) -> list[str]:
    """The safetensors files in folders that are named like ranks, as paths relative to `folder`."""
    ranks = [entry.name for entry in entries if RANK_FOLDER.match(entry.name) and entry.kind == "folder"]
    inside = [f"{rank}/{entry.name}" for rank in ranks for entry in store.list(join(folder, rank))]
    return sorted(name for name in inside if name.endswith(".safetensors"))


def holds_safetensors(folder: str, entries: Sequence[Entry]) -> bool:
    """Whether `folder`, which has the `entries`, holds safetensors, directly or in those of ranks."""
    named = any(entry.name.endswith((".safetensors", INDEX_SUFFIX)) for entry in entries)
    return named or bool(_rank_files(open_store(folder), folder, entries))


def _check_no_second_set(folder: str, index_name: str, weight_map: Mapping[str, str], beside: Sequence[WeightFile]) -> None:
    """Raise InputError where files that the index does not name hold what it names: two sets of
    weights, and loaders differ.
    """
    for file in beside:
        twice = [name for name in file.header.tensors if name in weight_map]
        if twice:
            raise InputError(
                f"{folder} holds two sets of weights: {index_name} and {file.name}",
                details=[
                    f"found     {len(twice)} of {len(weight_map)} tensors in both",
                    "loaders   transformers takes model.safetensors, others the shards of the index",
                ],
                hint=f"move away the set that is not meant, {file.name} or the index with its shards",
            )


def _without_index(files: tuple[WeightFile, ...]) -> Contents:
    counts = Counter(name for file in files for name in file.header.tensors)
    repeated = any(count > 1 for count in counts.values())
    per_rank = repeated or any("/" in file.name for file in files)
    layout = "ranks" if per_rank else "single" if len(files) == 1 else "files"
    return Contents(layout, files, _stored(files, per_rank))


def _stored(files: Sequence[WeightFile], per_rank: bool = False) -> dict[str, Stored]:
    return {
        f"{file.name}:{name}" if per_rank else name: Stored(file, name, info)
        for file in files
        for name, info in file.header.tensors.items()
    }


def _beside(name: str) -> str:
    return f"{name} is there, and the index does not name it: if it has all weights, remove the index"


def _next_command(folder: str) -> str:
    foreign = recognize(folder)
    return foreign.hint if foreign else "name a folder with *.safetensors files, or a run folder that contains such folders"
