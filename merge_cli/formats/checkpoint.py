"""Open a checkpoint: which files hold its weights, what tensors they hold, what else lies beside them.

Reads headers, the index and `config.json`; never a weight. Four layouts are understood:

    single   one safetensors file
    index    shards named by a `*.safetensors.index.json`
    files    several safetensors files without an index, every tensor name in one of them only
    ranks    one file or folder per rank of expert, tensor or pipeline parallelism, names repeating between ranks

A tensor is known by its key: its name, or "file:name" in the `ranks` layout, where a name alone is ambiguous.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from merge_cli.errors import InputError, first_ten
from merge_cli.formats.safetensors import Header, TensorInfo, parse_json_object, read_header
from merge_cli.formats.side_files import SideFiles, list_side_files

INDEX_SUFFIX = ".safetensors.index.json"
SHARD_NUMBER = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
RANK_FOLDER = re.compile(r"^(?:[a-z]*_)?(?:mp|tp|pp|ep|dp|cp|rank)(?:_rank)?[_-]?\d+(?:[_-].*)?$", re.IGNORECASE)
_MAX_JSON_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class WeightFile:
    """One safetensors file of a checkpoint; `name` is its path inside the checkpoint, the rest fingerprints it."""

    path: Path
    name: str
    header: Header
    mtime_ns: int
    inode: int

    @property
    def file_bytes(self) -> int:
        return self.header.file_bytes


class Stored(NamedTuple):
    """Where a tensor lies: its file, its name in that file, and its header entry."""

    file: WeightFile
    name: str
    info: TensorInfo

    @property
    def offset(self) -> int:
        """The byte offset of the tensor in its file."""
        return self.file.header.data_start + self.info.start


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint. `root` is the folder of the side files (None for a single file given by itself)."""

    path: Path
    root: Path | None
    layout: str
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, Stored]
    index_name: str = ""
    index_metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    side_files: SideFiles = field(default_factory=SideFiles)
    notes: tuple[str, ...] = ()

    @property
    def tensor_bytes(self) -> int:
        """The bytes of all tensors, headers not counted."""
        return sum(stored.info.end - stored.info.start for stored in self.tensors.values())


def open_checkpoint(path: str | os.PathLike[str], *, seen: dict[str, Header] | None = None) -> Checkpoint:
    """Open the checkpoint at `path` (a folder, or one `.safetensors` file) and check that it is complete.

    `seen` shares parsed headers between checkpoints (see `read_header`). Raises InputError when a file is missing, broken or
    reaches outside the checkpoint, or when the index and the shards disagree.
    """
    path = Path(path)
    seen = {} if seen is None else seen
    if path.is_file():
        file = _weight_file(path, path.name, seen)
        tensors = {name: Stored(file, name, info) for name, info in file.header.tensors.items()}
        return Checkpoint(path, None, "single", (file,), tensors)
    if not path.is_dir():
        raise InputError(f"no such checkpoint: {path}", hint=f"ls -d {path.parent}/*")
    entries = sorted(entry.name for entry in os.scandir(path))
    found = [name for name in entries if name.endswith(".safetensors")]
    index_name = _choose_index(path, [name for name in entries if name.endswith(INDEX_SUFFIX)], found)
    notes: list[str] = []
    index_metadata: Mapping[str, Any] = {}
    if index_name:
        weight_map, index_metadata = read_index(path / index_name)
        names = sorted(set(weight_map.values()))
        stray = sorted(set(found) - set(names))
        notes += [f"{path / name}: not named by {index_name}, ignored" for name in stray]
        files = _open_files(path, names, seen)
        tensors, more_notes = _by_index(path, index_name, weight_map, files)
        notes += more_notes
        layout = "index"
    else:
        names = found or _rank_files(path, entries)
        if not names:
            raise InputError(f"no safetensors files in {path}", hint=_what_is_there(entries))
        _check_numbering(path, names)
        files = _open_files(path, names, seen)
        layout, tensors = _without_index(files)
    return Checkpoint(
        path=path,
        root=path,
        layout=layout,
        files=files,
        tensors=tensors,
        index_name=index_name,
        index_metadata=index_metadata,
        config=read_config(path / "config.json"),
        side_files=list_side_files(path, {file.name for file in files} | {index_name} | set(found)),
        notes=tuple(notes),
    )


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The `weight_map` (tensor name -> file name) and `metadata` of an index file, checked to be of that shape."""
    index = parse_json_object(_read_bounded(path), str(path))
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise InputError(f"{path}: expected an object `weight_map` that is not empty, and an object `metadata`")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_plain_path(file_name):
            raise InputError(
                f"{path}: weight_map[{name[:200]!r}] is {str(file_name)[:200]!r}, which is not a file name in this folder",
                hint="an index may only name files beside it, without '..' or a leading '/'",
            )
    return weight_map, metadata


def read_config(path: Path) -> dict[str, Any]:
    """The parsed `config.json`, {} where there is none."""
    if not path.exists():
        return {}
    try:
        config = json.loads(_read_bounded(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must be a JSON object")
    return config


def stays_inside(root: Path, path: Path) -> bool:
    """Whether `path`, links followed, lies in `root`, or is a link of a Hub cache snapshot into the same cache's blobs."""
    real, real_root = path.resolve(), root.resolve()
    if real.is_relative_to(real_root):
        return True
    snapshots = real_root.parent
    return snapshots.name == "snapshots" and real.parent == snapshots.parent / "blobs"


def _is_plain_path(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and "\0" not in name and "\\" not in name and all(p not in ("", ".", "..") for p in parts)


def _read_bounded(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise InputError(f"not a regular file: {path}")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InputError(f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB, which no such file is")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _choose_index(folder: Path, indexes: Sequence[str], found: Sequence[str]) -> str:
    if "model" + INDEX_SUFFIX in indexes:
        return "model" + INDEX_SUFFIX
    if len(indexes) > 1:
        raise InputError(f"several indexes in {folder}", details=indexes, hint="keep one of them")
    if indexes and not found:
        raise InputError(f"{folder} has {indexes[0]} but none of its shards", hint="copy the shards, or leave it out")
    return indexes[0] if indexes else ""


def _open_files(folder: Path, names: Sequence[str], seen: dict[str, Header]) -> tuple[WeightFile, ...]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} weight files are missing in {folder}",
            details=first_ten(missing),
            hint="the checkpoint is still being written or was copied in part: copy the missing files, or leave it out",
        )
    for name in names:
        if not stays_inside(folder, folder / name):
            raise InputError(
                f"{folder / name} is a link to {(folder / name).resolve()}, outside the checkpoint",
                hint="copy the file into the checkpoint, or name the folder that it really lies in",
            )
    return tuple(_weight_file(folder / name, name, seen) for name in names)


def _weight_file(path: Path, name: str, seen: dict[str, Header]) -> WeightFile:
    header = read_header(path, seen)
    status = path.stat()
    return WeightFile(path, name, header, status.st_mtime_ns, status.st_ino)


def _by_index(
    folder: Path, index_name: str, weight_map: Mapping[str, str], files: Sequence[WeightFile]
) -> tuple[dict[str, Stored], list[str]]:
    """Tensors in file order. Every name of the index must be in its shard; a tensor that the index forgot is kept, and reported;
    a copy in a shard that the index does not give for it is ignored, and reported."""
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
            f"{folder / index_name} names {len(absent)} tensors that are not in their shards",
            details=first_ten(absent),
            hint="the shards belong to another save than the index: save or copy the checkpoint again",
        )
    notes = [f"{folder}: {line}: not in {index_name}, kept" for line in first_ten(forgotten)]
    notes += [f"{folder}: {line}: a copy that {index_name} does not point to, ignored" for line in first_ten(copies)]
    return tensors, notes


def _rank_files(folder: Path, entries: Sequence[str]) -> list[str]:
    """The safetensors files in folders that are named like ranks, as paths relative to `folder`."""
    ranks = [name for name in entries if RANK_FOLDER.match(name) and (folder / name).is_dir()]
    return sorted(f"{rank}/{e.name}" for rank in ranks for e in os.scandir(folder / rank) if e.name.endswith(".safetensors"))


def _check_numbering(folder: Path, names: Sequence[str]) -> None:
    """Files named `x-00001-of-00003.safetensors` must be all there."""
    numbered = [match for match in map(SHARD_NUMBER.match, names) if match]
    for stem, count in sorted({(match["stem"], match["count"]) for match in numbered}):
        have = {int(match["number"]) for match in numbered if (match["stem"], match["count"]) == (stem, count)}
        missing = [n for n in range(1, int(count) + 1) if n not in have]
        if missing and 0 not in have:
            raise InputError(
                f"{len(missing)} of {int(count)} shards are missing in {folder}",
                details=first_ten([f"{stem}-{number:05d}-of-{count}.safetensors" for number in missing]),
                hint="the checkpoint was copied in part: copy the missing files, or leave it out",
            )


def _without_index(files: Sequence[WeightFile]) -> tuple[str, dict[str, Stored]]:
    counts = Counter(name for file in files for name in file.header.tensors)
    repeated = any(count > 1 for count in counts.values())
    per_rank = repeated or any("/" in file.name for file in files)
    layout = "ranks" if per_rank else "single" if len(files) == 1 else "files"
    return layout, {
        f"{file.name}:{name}" if per_rank else name: Stored(file, name, info)
        for file in files
        for name, info in file.header.tensors.items()
    }


def _what_is_there(entries: Sequence[str]) -> str:
    other = [name for name in entries if name.endswith((".bin", ".pt", ".pth", ".distcp", ".ckpt", ".gguf"))]
    if other:
        return f"pmerge reads safetensors; convert {other[0]} first (for example with transformers' save_pretrained)"
    return "name a folder with *.safetensors files, or a run folder that contains such folders"
