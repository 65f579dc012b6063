"""Send a published result to the Hub or to an object store: the feature behind `pmerge push`, as a
library.

    1  look     what the place holds: files of this result are kept, others in the way are an error
    2  verify   every byte of the folder against its `pmerge.json`
    3  send     weights before the file by which loaders find them (the index, `.metadata`)
    4  check    sizes, and hashes where the place keeps them, as it has them now

Nothing is replaced and nothing is deleted, here or there. Not promised: that bytes are still right
where the place keeps no hashes (object stores), unless `read_back` reads them all again.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import ChangedError, InputError, OutputError, UsageError, first_ten
from merge_cli.features.model_card import CARD, model_card
from merge_cli.features.verify import verify
from merge_cli.formats.dcp.folder import METADATA_FILE
from merge_cli.formats.index import INDEX_SUFFIX
from merge_cli.formats.safetensors import MAX_HEADER_BYTES
from merge_cli.names import MANIFEST
from merge_cli.output.check import Listed, is_for_loaders, listed_files
from merge_cli.output.manifest import MAX_MANIFEST_BYTES, is_sealed
from merge_cli.output.progress import Progress
from merge_cli.stores.store import Source, as_path, join, open_store, read_file
from merge_cli.stores.upload import Outgoing, There, open_target
from merge_cli.system.json_text import parse_json

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Pushed:
    """The place as it is now: on the Hub a commit. `sent` and `kept` are names of files."""

    address: str
    sent: tuple[str, ...]
    kept: tuple[str, ...]
    sent_bytes: int
    seconds: float


def push(
    folder: str | os.PathLike[str],
    address: str,
    *,
    read_back: bool = False,
    max_header: int = MAX_HEADER_BYTES,
    on_progress: Callable[[Progress], None] | None = None,
) -> Pushed:
    """Send the result in `folder` to `address`: `hf://org/name@branch`, `s3://bucket/folder`.

    Raises UsageError or InputError where the folder is no sound result or the place cannot be used,
    OutputError where other files are in the way or sending fails; the same call then continues.
    """
    began = time.perf_counter()
    path = Path(as_path(folder))
    target = open_target(address.rstrip("/"))
    manifest = _read_manifest(path)
    files = _in_order(path, manifest)
    there = target.look({each.name for each in files})
    kept = _kept(files, there, address)
    before = _times(files)
    found = verify(path, max_header=max_header)
    if not found.ok:
        raise InputError(
            f"{path} is not what pmerge wrote, and is not sent",
            details=first_ten(found.problems),
            hint=f"pmerge verify {shlex.quote(str(path))}",
        )
    if CARD not in there and CARD not in {each.name for each in files} and address.startswith("hf://"):
        files.insert(0, _of_bytes(CARD, model_card(manifest)))
    todo = [each for each in files if each.name not in kept]
    total, done = sum(each.num_bytes for each in todo), 0

    def on_sent(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(Progress(0, 0, done, total, time.perf_counter() - began))
        if _times(files) != before:
            raise ChangedError(f"{path} changed while it was being sent", hint="nothing complete was published; push it again")

    pinned = target.send(todo, f"Add {Path(os.path.realpath(path)).name}", on_sent)
    _check(pinned, files, read_back)
    names = tuple(each.name for each in todo)
    return Pushed(pinned, names, tuple(sorted(kept)), total, time.perf_counter() - began)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The content of `pmerge.json`. Raises UsageError where `folder` is no result."""
    if not folder.is_dir() or not os.path.lexists(folder / MANIFEST):
        raise UsageError(
            f"no result of pmerge: {folder}",
            details=["expected  a folder with a pmerge.json, as pmerge average writes it"],
            hint="hf upload and aws s3 cp send other folders",
        )
    raw = read_file(str(folder / MANIFEST), MAX_MANIFEST_BYTES)
    if not is_sealed(raw):
        raise InputError(f"{folder / MANIFEST} was changed", hint=f"pmerge verify {shlex.quote(str(folder))}")
    try:
        content = parse_json(raw, is_own=True)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{folder / MANIFEST} is damaged", hint=f"pmerge verify {shlex.quote(str(folder))}")
    return content


def _in_order(folder: Path, manifest: Mapping[str, Any]) -> list[Outgoing]:
    """All files to send. `pmerge.json` comes first, so that of two results at one place the second
    is refused; last comes the file without which loaders find nothing.
    """
    problems: list[str] = []
    weights, beside = listed_files(manifest, "files", problems), listed_files(manifest, "side_files", problems)
    if problems:
        raise InputError(f"{folder / MANIFEST} is damaged", details=first_ten(problems))
    markers = [name for name in beside if name.endswith(INDEX_SUFFIX) or name.rpartition("/")[2] == METADATA_FILE]
    small = [name for name in sorted(beside) if name not in markers]
    listed: dict[str, Listed] = {**weights, **beside}
    names = [*sorted(weights), *small, *markers] if markers else [*small, *sorted(weights)]
    files = [Outgoing(name, listed[name].file_bytes, listed[name].sha256, folder / name) for name in names]
    own = [name for name in (MANIFEST, CARD) if name not in listed and (folder / name).is_file()]
    return [*(_of_bytes(name, (folder / name).read_bytes()) for name in own), *files]


def _of_bytes(name: str, data: bytes) -> Outgoing:
    return Outgoing(name, len(data), hashlib.sha256(data).hexdigest(), data)


def _kept(files: Sequence[Outgoing], there: Mapping[str, There], address: str) -> set[str]:
    """The names of files that the place has as they are. Raises OutputError where it holds another
    model. A model card that is there stays.
    """
    ours = {each.name: each for each in files}
    kept = {name for name, found in there.items() if name == CARD or (name in ours and found.equals(ours[name]))}
    others = sorted(name for name in there if name not in kept and (name in ours or is_for_loaders(name)))
    if others:
        raise OutputError(
            f"{address} holds other files, and nothing there is replaced",
            details=first_ten([f"found  {name}, {there[name].num_bytes} bytes" for name in others]),
            hint="push to another branch, folder or repository",
        )
    return kept


def _times(files: Sequence[Outgoing]) -> list[tuple[int, int]]:
    found = [each.content.stat() for each in files if isinstance(each.content, Path)]
    return [(status.st_size, status.st_mtime_ns) for status in found]


def _check(address: str, files: Sequence[Outgoing], read_back: bool) -> None:
    """Raise OutputError unless the place has these files, asked anew."""
    store = open_store(address)
    store.expand(address)  # forget what was listed before
    problems = []
    for file in files:
        path = join(address, file.name)
        if store.stat(path) is None:
            problems.append(f"{file.name}: is missing")
        elif file.name != CARD:
            with closing(store.open(path)) as source:
                digest = f"sha256 {_read(source)}" if read_back else source.version
                if digest.startswith("etag"):  # a store that keeps no hashes
                    digest = f"sha256 {file.sha256}"
                if not There(source.num_bytes, digest).equals(file):
                    problems.append(
                        f"{file.name}: has {source.num_bytes} bytes, {digest}, not {file.num_bytes}, sha256 {file.sha256}"
                    )
    if problems:
        raise OutputError(f"{address} does not hold what was sent", details=first_ten(problems), hint="push to another place")


def _read(source: Source) -> str:
    """The sha256 of all bytes of a file."""
    hashed, buffer = hashlib.sha256(), memoryview(bytearray(min(_PIECE_BYTES, source.num_bytes)))
    for offset in range(0, source.num_bytes, _PIECE_BYTES):
        piece = buffer[: source.num_bytes - offset]
        source.read_into(offset, piece)
        hashed.update(piece)
    return hashed.hexdigest()
