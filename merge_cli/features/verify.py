"""Is a merged checkpoint still what pmerge wrote? The feature behind `pmerge verify`, as a library.

Everything is compared with `pmerge.json`, which ends with its own sha256: the size and sha256 of
every file, the headers, the index against the shards, and what lies in the folder without having
been written by pmerge. With `against_inputs` tensors are computed again from the recorded inputs
and coefficients, by the engine and the plan that made them, and compared bit for bit in place of
being written. Reads only, in bounded memory.

What cannot be found: a checkpoint replaced as a whole, `pmerge.json` and its checksum included. The
checksums guard against accidents; they are no signature. `against_inputs` does find weights that
are not the average of the inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.errors import ChangedError, InputError, MismatchError, NonFiniteError, PmergeError, UsageError
from merge_cli.formats.checkpoint import INDEX_SUFFIX, read_index, recorded_fingerprint
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.formats.safetensors import DTYPES, Header, parse_header, read_header_at
from merge_cli.formats.untrusted_json import check_depth
from merge_cli.names import MANIFEST, OTHER_WEIGHTS
from merge_cli.output.manifest import MAX_MANIFEST_BYTES
from merge_cli.output.progress import Progress
from merge_cli.planning.plan import ALGORITHM, Extent, Location, MergePlan, OutputFile, QuantizedExtent, WorkItem
from merge_cli.planning.record import fingerprint, from_result, replan
from merge_cli.request.spec import RunConfig
from merge_cli.stores.local import STORE as LOCAL
from merge_cli.stores.store import as_path, join, read_file
from merge_cli.system.files import pieces_of, read_up_to

_WEIGHTS = (".safetensors", INDEX_SUFFIX, *OTHER_WEIGHTS)


@dataclass(frozen=True)
class Verification:
    """What was found. `files` maps each recorded file to "ok" or what is wrong with it; `problems`
    is empty where all holds.

    `notes` are files that pmerge did not write and that do no harm. `recomputed` of `num_tensors`
    tensors were computed again.
    """

    path: Path
    files: Mapping[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_read: int
    seconds: float
    recomputed: int = 0
    num_tensors: int = 0

    @property
    def ok(self) -> bool:
        """Whether all holds."""
        return not self.problems


@dataclass(frozen=True)
class _Record:
    """What `pmerge.json` says of a file."""

    file_bytes: int
    sha256: str


def verify(
    path: str | os.PathLike[str],
    *,
    against_inputs: bool = False,
    sample: int | None = 64,
    device: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Check the merged checkpoint in the folder `path` against its `pmerge.json`.

    `against_inputs` also computes `sample` tensors, drawn at random (None: all), again from the
    recorded inputs, on `device`. What does not hold is in the result. Raises UsageError or
    InputError where there is no result of pmerge to check.
    """
    folder = Path(as_path(path))
    if sample is not None and sample < 1:
        raise UsageError(f"a sample of {sample} tensors checks nothing", hint="--sample 64, or --sample all")
    if not folder.is_dir() or not os.path.lexists(folder / MANIFEST):
        raise InputError(
            f"no result of pmerge: {folder}",
            details=["expected  a folder with a pmerge.json"],
            hint="name what pmerge average has written:  pmerge verify merged-ema-1000-10000",
        )
    began = time.perf_counter()
    manifest, state = _read_manifest(folder / MANIFEST)
    if state == "ok":
        _check_versions(manifest, folder, against_inputs)
    problems: list[str] = []
    weights, beside = _records(manifest, "files", problems), _records(manifest, "side_files", problems)
    plan = _plan_again(manifest, problems) if against_inputs and state == "ok" and not problems else None
    todo = None if plan is None else _restricted(plan, sample)
    meter = _Meter(sum(r.file_bytes for r in (*weights.values(), *beside.values())), todo, on_progress)
    files = {MANIFEST: state, **_check_files(folder, weights, beside, meter)}
    problems = [f"{folder / name}: {found}" for name, found in files.items() if found != "ok"] + problems
    if state == "ok":
        if any(name.endswith(".safetensors") for name in weights):
            problems += _check_index(folder, weights, [name for name in beside if name.endswith(INDEX_SUFFIX)])
        else:
            problems += _check_metadata(folder)
    strangers, notes = _look_around(folder, {*weights, *beside, MANIFEST})
    problems += strangers
    if todo is not None:
        problems += _compare(todo, folder, device, meter)
    return Verification(
        folder,
        files,
        tuple(problems),
        tuple(notes),
        meter.bytes_read,
        time.perf_counter() - began,
        0 if todo is None else len(_keys(todo)),
        0 if plan is None else len(_keys(plan)),
    )


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The content of `pmerge.json` ({} where it cannot be read), and "ok" or what is wrong with it."""
    from merge_cli.output.manifest import is_sealed

    try:
        LOCAL.check_inside(str(path.parent), str(path))
        raw = read_file(str(path), MAX_MANIFEST_BYTES)
        content = json.loads(raw)
        check_depth(content, str(path))
    except (ValueError, RecursionError) as error:
        return {}, f"is not valid JSON: {error}"
    except InputError as error:
        return {}, error.message
    if not isinstance(content, dict):
        return {}, "is not a JSON object"
    return content, "ok" if is_sealed(raw) else "does not fit the sha256 at its own end: it was changed"


def _check_versions(manifest: Mapping[str, Any], folder: Path, against_inputs: bool) -> None:
    """Raise InputError for a result that this version of pmerge cannot judge; 0.1.0 recorded
    neither number.
    """
    from merge_cli.output.schema import check_schema

    check_schema(manifest, folder / MANIFEST, "check it with that version of pmerge, or a newer one", InputError)
    if against_inputs and (found := manifest.get("algorithm", 1)) != ALGORITHM:
        raise InputError(
            f"{folder} was computed by another version of pmerge, and its tensors cannot be computed again by this one",
            details=[f"found     algorithm {found!r:.40}", f"expected  algorithm {ALGORITHM}"],
            hint=f"pmerge verify {shlex.quote(str(folder))}  checks all the rest",
        )


def _records(manifest: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, _Record]:
    """The files that `pmerge.json` lists under `key`; what is no such list is a problem."""
    found: dict[str, _Record] = {}
    listed = manifest.get(key, {})
    for name, entry in listed.items() if isinstance(listed, dict) else [("", None)]:
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        plain = name and "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))
        if plain and type(size) is int and size >= 0 and isinstance(digest, str):
            found[name] = _Record(size, digest)
        else:
            problems.append(f"pmerge.json: `{key}` lists {name[:200]!r} without a size and a sha256, or outside the folder")
    return found


class _Meter:
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


def _check_files(folder: Path, weights: Mapping[str, _Record], beside: Mapping[str, _Record], meter: _Meter) -> dict[str, str]:
    """For each recorded file "ok", or what is wrong with it: size, sha256 and, for weights, header.
    Some files at a time.
    """
    stopped = threading.Event()

    def check(name: str, record: _Record) -> str:
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

    recorded = {**weights, **beside}
    pool = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))
    try:
        return dict(zip(recorded, pool.map(check, recorded, recorded.values()), strict=True))
    finally:
        stopped.set()  # after a signal: let the threads reach the end of what they read
        pool.shutdown(cancel_futures=True)


def _digest(path: Path, file_bytes: int, meter: _Meter, stopped: threading.Event) -> str:
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


def _check_index(folder: Path, weights: Mapping[str, _Record], indexes: Sequence[str]) -> list[str]:
    """The index against the shards: every tensor in one file, the file that the index gives for it,
    and the right total size.
    """
    headers: dict[str, Header] = {}
    for name in weights:
        try:
            headers[name] = read_header_at(str(folder / name))
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


def _check_metadata(folder: Path) -> list[str]:
    """The metadata of a distributed checkpoint against its files, and the envelope of every chunk
    of the model.
    """
    try:
        open_checkpoint(folder)
    except InputError as error:
        return [error.message]
    return []


def _look_around(folder: Path, recorded: set[str]) -> tuple[list[str], list[str]]:
    """What lies in the folder and is not recorded: weights and indexes, which a loader might take,
    are problems, the rest notes.
    """
    problems, notes = [], []
    for name in _names_in(folder, ""):
        if name not in recorded:
            if name.endswith(_WEIGHTS):
                problems.append(f"{folder / name}: pmerge did not write these weights, and a loader may take them")
            else:
                notes.append(f"{folder / name}: not written by pmerge")
    return problems, notes


def _names_in(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder / prefix) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _names_in(folder, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name


def _plan_again(manifest: Mapping[str, Any], problems: list[str]) -> MergePlan | None:
    """The plan that `pmerge.json` describes, made from its inputs; None, and what has changed,
    where they are not the same.
    """
    try:
        seen = Seen()
        inputs = []
        for entry in manifest["inputs"]:
            checkpoint = open_checkpoint(entry["path"], seen=seen, training_state=manifest.get("training_state", "drop"))
            now = {file.name: {"name": file.name, **file.fingerprint} for file in checkpoint.files}
            then = {file["name"]: recorded_fingerprint(file) for file in entry["files"]}
            problems += [
                f"{join(checkpoint.path, name)}: this input has changed since it was averaged, so nothing can be computed again"
                for name in sorted(now.keys() | then.keys())
                if now.get(name) != then.get(name)
            ]
            inputs.append(checkpoint)
        if problems:
            return None
        plan = replan(from_result(manifest), inputs)
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"pmerge.json does not describe a run of this version of pmerge: {error!r:.200}")
        return None
    except PmergeError as error:
        problems.append(f"the inputs cannot be averaged again: {error.message}")
        return None
    if fingerprint(plan) != manifest.get("plan"):
        problems.append(
            "pmerge.json and its inputs give another plan than the one that was carried out; another version of pmerge?"
        )
        return None
    return plan


def _keys(plan: MergePlan) -> set[str]:
    """The tensors of the plan that have elements."""
    return {key for file in plan.files for extent in file.extents for key in extent.keys}


def _restricted(plan: MergePlan, sample: int | None) -> MergePlan:
    """The same plan for `sample` tensors drawn at random, all of them for None."""
    keys = sorted(_keys(plan))
    chosen = set(keys) if sample is None or sample >= len(keys) else set(random.sample(keys, sample))
    files = [
        replace(f, extents=tuple(part for extent in f.extents for part in _restricted_extent(extent, chosen))) for f in plan.files
    ]
    return replace(plan, files=tuple(file for file in files if file.extents))


def _restricted_extent(extent: Extent | QuantizedExtent, chosen: set[str]) -> Iterator[Extent | QuantizedExtent]:
    if chosen.issuperset(extent.keys):
        yield extent
    elif isinstance(extent, Extent):
        for key, start, end in zip(extent.keys, extent.starts, (*extent.starts[1:], extent.num_elements), strict=True):
            if key in chosen:
                sources = tuple(Location(s.file, s.offset + DTYPES[s.dtype].num_bytes(start), s.dtype) for s in extent.sources)
                offset = extent.byte_at(start)
                yield replace(extent, offset=offset, num_elements=end - start, sources=sources, keys=(key,), starts=(0,))


def _compare(todo: MergePlan, folder: Path, device: str, meter: _Meter) -> list[str]:
    """Carry out the plan, with a comparison in place of every write: a line for each tensor that
    differs.
    """
    from merge_cli.engine.chunk import Statistics
    from merge_cli.engine.input_checks import check_inputs_unchanged
    from merge_cli.engine.sink import NoSink
    from merge_cli.engine.stream import stream
    from merge_cli.tuning.tune import tune

    different: dict[str, set[str]] = {}

    class Comparing(NoSink):
        bytes_read = 0

        def open(self, item: WorkItem, k: int) -> _Comparer:
            return _Comparer(item.file, folder, different)

        def progress(self, statistics: Statistics) -> None:
            meter.add(statistics.bytes_read - self.bytes_read)
            self.bytes_read = statistics.bytes_read

    try:
        budget = tune(todo, RunConfig(device=device, direct="off")).fit(todo)
        stream(todo, [WorkItem.whole(file) for file in todo.files], Comparing(), budget)
        check_inputs_unchanged(todo)
    except (ChangedError, MismatchError, NonFiniteError) as error:
        return [f"the inputs cannot be averaged again: {error.message}"]
    return [
        f"{folder / name}: `{key}` is not what its inputs and coefficients give"
        for name, keys in sorted(different.items())
        for key in sorted(keys)
    ]


class _Comparer:
    """Takes the place of a file's writer: what would be written is compared with what is there."""

    is_finished = False

    def __init__(self, file: OutputFile, folder: Path, different: dict[str, set[str]]) -> None:
        self._name = file.name
        self._different = different
        self._tensors = _places(file)
        try:
            self._fd = os.open(folder / file.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            self._fd = -1  # missing, which is reported already

    def write(self, offset: int, data: memoryview) -> bool:
        if self._fd >= 0:
            there = memoryview(read_up_to(self._fd, len(data), offset))
            if there != data:
                end = offset + len(data)
                found = {
                    name
                    for name, start, stop in self._tensors
                    if start < end and offset < stop and _part(there, offset, start, stop) != _part(data, offset, start, stop)
                }
                self._different.setdefault(self._name, set()).update(found)
        return False

    def finish(self) -> str:
        return ""

    def abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _places(file: OutputFile) -> list[tuple[str, int, int]]:
    """The tensors of an output file and where their bytes begin and end in it."""
    if not file.name.endswith(".safetensors"):
        return [place for extent in file.extents if isinstance(extent, Extent) for place in extent.places()]
    header = parse_header(file.header[8:], file.file_bytes, file.name)
    return [(name, header.data_start + info.start, header.data_start + info.end) for name, info in header.tensors.items()]


def _part(data: memoryview, offset: int, start: int, stop: int) -> memoryview:
    """Of `data`, which begins at byte `offset` of a file, what lies in bytes `start` to `stop`."""
    return data[max(start - offset, 0) : max(stop - offset, 0)]
