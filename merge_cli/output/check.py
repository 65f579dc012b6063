"""A result against its record: the size and sha256 of every file that `pmerge.json` lists, headers,
the index against the shards, and what lies in the folder without having been written by pmerge.

Reads only, in bounded memory. Nothing is known here of the inputs: see `published.py`.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import InputError
from merge_cli.formats.index import read_index
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.formats.safetensors import BoundError, Header, SeenHeaders, read_header_at
from merge_cli.formats.side_files import list_side_files
from merge_cli.names import OTHER_WEIGHTS, is_below
from merge_cli.output.progress import Progress
from merge_cli.planning.plan import MergePlan
from merge_cli.stores.local import STORE as LOCAL
from merge_cli.system.files import pieces_of
from merge_cli.system.threads import map_in_threads

_WEIGHTS = (".safetensors", ".index.json", *OTHER_WEIGHTS, ".onnx", ".pkl", ".pickle")
_READ_BY_LOADERS = (".py", "/adapter_config.json", "/config.json", "/modules.json", "/.metadata")


@dataclass(frozen=True)
class Listed:
    """What `pmerge.json` says of a file."""

    file_bytes: int
    sha256: str


def listed_files(manifest: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, Listed]:
    """The files that `pmerge.json` lists under `key`; what is no such list is a problem."""
    found: dict[str, Listed] = {}
    listed = manifest.get(key, {})
    for name, entry in listed.items() if isinstance(listed, dict) else [("", None)]:
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if is_below(name) and type(size) is int and size >= 0 and isinstance(digest, str):
            found[name] = Listed(size, digest)
        else:
            problems.append(f"pmerge.json: `{key}` lists {name[:200]!r} without a size and a sha256, or outside the folder")
    return found


class Meter:
    """Counts the bytes that are read, from several threads, and reports them."""

    def __init__(self, hash_bytes: int, todo: MergePlan | None, report: Callable[[Progress], None] | None) -> None:
        self.bytes_read = 0
        self._total = hash_bytes + (0 if todo is None else todo.bytes_to_read)
        self._report = report
        self._began = time.perf_counter()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes_read += count
            if self._report is not None:
                self._report(Progress(self.bytes_read, self._total, 0, 0, time.perf_counter() - self._began))


def check_files(folder: Path, weights: Mapping[str, Listed], beside: Mapping[str, Listed], meter: Meter) -> dict[str, str]:
    """For each recorded file "ok", or what is wrong with it: size, sha256 and, for weights, header.
    Some files at a time.
    """
    stopped = threading.Event()

    def check(listed: tuple[str, Listed]) -> str:
        name, record = listed
        try:
            LOCAL.check_inside(str(folder), str(folder / name))
            found = _digest(folder / name, record.file_bytes, meter, stopped)
            if found != record.sha256:
                return f"its sha256 is {found}, not {record.sha256}"
            if name in weights and name.endswith(".safetensors"):
                read_header_at(str(folder / name))
            return "ok"
        except InputError as error:
            return error.message
        except BaseException:  # a signal: the other threads need not read to the end of their files
            stopped.set()
            raise

    recorded = {**weights, **beside}
    states = map_in_threads(check, list(recorded.items()), min(4, len(os.sched_getaffinity(0))))
    return dict(zip(recorded, states, strict=True))


def _digest(path: Path, file_bytes: int, meter: Meter, stopped: threading.Event) -> str:
    """The sha256 of a file of `file_bytes` bytes. Raises InputError where it cannot be read or has
    another size.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputError("is missing") from None
    except OSError as error:
        raise InputError(f"cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InputError("is not a regular file")
        if status.st_size != file_bytes:
            raise InputError(f"has {status.st_size} bytes, not {file_bytes}")
        hashed = hashlib.sha256()
        for piece in pieces_of(fd, 0, file_bytes):
            hashed.update(piece)
            meter.add(len(piece))
            if stopped.is_set():
                break
        return hashed.hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def check_index(folder: Path, weights: Mapping[str, Listed], indexes: Sequence[str], max_header: int) -> list[str]:
    """The index against the shards: every tensor in one file, the file that the index gives for it,
    and the right total size. Raises BoundError.
    """
    headers: dict[str, Header] = {}
    seen = SeenHeaders(max_header)
    for name in weights:
        try:
            headers[name] = read_header_at(str(folder / name), seen)
        except BoundError:
            raise  # nothing is wrong with the file
        except InputError:
            return []  # already reported
    if not indexes:
        return []
    try:
        weight_map, metadata = read_index(str(folder / indexes[0]))
    except InputError as error:
        return [error.message]
    counts = Counter(tensor for header in headers.values() for tensor in header.tensors)
    where = {tensor: name for name, header in headers.items() for tensor in header.tensors}
    problems = [f"{folder}: `{tensor}` is in {count} files" for tensor, count in counts.items() if count > 1]
    index = folder / indexes[0]
    problems += [f"{index}: `{tensor}` is missing in {name}" for tensor, name in weight_map.items() if where.get(tensor) != name]
    problems += [f"{index}: `{tensor}` of {name} is not listed" for tensor, name in where.items() if tensor not in weight_map]
    total = sum(info.end - info.start for header in headers.values() for info in header.tensors.values())
    if metadata.get("total_size") != total:
        problems.append(f"{index}: metadata.total_size is {metadata.get('total_size')!r:.40}, and the tensors have {total} bytes")
    return problems


def check_metadata(folder: Path, max_header: int) -> list[str]:
    """The metadata of a distributed checkpoint against its files, and the envelope of every chunk
    of the model. Raises BoundError.
    """
    try:
        open_checkpoint(folder, seen=Seen(max_header))
    except BoundError:
        raise
    except InputError as error:
        return [error.message]
    return []


def look_around(folder: Path, recorded: set[str], weights: Iterable[str] | None = None) -> tuple[list[str], list[str]]:
    """The files in the folder that are not recorded: weights, indexes, code and configurations,
    which a loader might take, are problems, the rest notes. Upper and lower case count alike.

    With the names of its `weights`, whatever a merge would copy from a base is a problem too
    (tokenizers, chat templates), but for documentation, which no loader reads.
    """
    problems, notes = [], []
    copied = () if weights is None else list_side_files(str(folder), set(weights)).kept
    for name in _names_in(folder, ""):
        if name in recorded:
            continue
        folded = f"/{name.casefold()}"
        if folded.endswith(_WEIGHTS):
            problems.append(f"{folder / name}: pmerge did not write these weights, and a loader may take them")
        elif folded.endswith(_READ_BY_LOADERS):
            problems.append(f"{folder / name}: pmerge did not write this file, and a loader may take it")
        elif name in copied and not folded.endswith(".md"):
            problems.append(f"{folder / name}: its inputs do not give this file, and a loader may take it")
        else:
            notes.append(f"{folder / name}: not written by pmerge")
    return problems, notes


def is_for_loaders(name: str) -> bool:
    """Whether a loader might take a file of this name: weights, an index, code, a configuration."""
    return f"/{name.casefold()}".endswith((*_WEIGHTS, *_READ_BY_LOADERS))


def _names_in(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder / prefix) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _names_in(folder, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name
