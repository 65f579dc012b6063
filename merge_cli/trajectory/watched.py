"""What `pmerge watch` has to remember, in one small durable file: from which step on each kind of
merge is made, and which merges it began, made, finished and removed.

Everything else is on the disk already: checkpoints, merges, ledger. The file is replaced as a
whole, so after a kill at any moment it says what was true just before or just after.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from merge_cli.errors import InputError
from merge_cli.names import MANIFEST, is_below
from merge_cli.output.existing import read_manifest
from merge_cli.stores.store import read_file
from merge_cli.system.durable import fsync_folder, output_error, write_file
from merge_cli.system.files import files_in, sha256_of
from merge_cli.system.json_text import parse_json
from merge_cli.trajectory.folder import MERGES
from merge_cli.trajectory.records import decode, encode

RECORD = "watch.json"
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Watched:
    """One merge: the `kind` without its step, the `step` that it ends at; `state` is making, made,
    done, skipped, removing or removed.

    `is_own`: no folder of this name was there before it was begun. `manifest` is the sha256 of its
    pmerge.json once it is made; `reason` is why it was skipped, and `checkpoints` how many there
    were up to its step then.
    """

    kind: str
    step: int
    state: str
    is_own: bool = False
    manifest: str = ""
    reason: str = ""
    checkpoints: int = 0


@dataclass(frozen=True)
class WatchRecord:
    """`since` has for each kind of merge the first step that counts, `merges` all merges by name."""

    since: Mapping[str, int] = field(default_factory=dict)
    merges: Mapping[str, Watched] = field(default_factory=dict)
    schema: int = 1


class WatchedMerges:
    """The merges in `folder`, and the record of them there, which every change replaces durably.

    Raises InputError for a record that cannot be read, OutputError for one that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.record = read_record(folder)

    def path(self, name: str) -> Path:
        """The folder of a merge."""
        return self._folder / MERGES / name

    def begin(self, since: Mapping[str, int]) -> None:
        """Record from which step on each kind counts."""
        self._write(replace(self.record, since=since))

    def note(self, name: str, merge: Watched) -> None:
        """Record the state of a merge."""
        if self.record.merges.get(name) != merge:
            self._write(replace(self.record, merges={**self.record.merges, name: merge}))

    def remove(self, name: str) -> str:
        """Remove a merge whose manifest is the recorded one, and that holds no file of others; why
        it is kept, "" if it is not. It loses its name first, so that half of it never looks like a
        result.
        """
        merge, path = self.record.merges[name], self.path(name)
        grave = path.with_name(f".{name}.removing")
        if path.is_dir() and (why := _not_ours(path, merge)):
            self.note(name, replace(merge, state="done", is_own=False))
            return why
        try:
            if path.is_dir():
                self.note(name, replace(merge, state="removing"))
                path.rename(grave)
                fsync_folder(path.parent)
            if grave.is_dir():
                shutil.rmtree(grave)
        except OSError as error:
            raise output_error(error, f"cannot remove {path}", path) from error
        self.note(name, replace(merge, state="removed"))
        return ""

    def _write(self, record: WatchRecord) -> None:
        write_file(self._folder / RECORD, json.dumps(encode(record), indent=1).encode() + b"\n")
        self.record = record


def _not_ours(path: Path, merge: Watched) -> str:
    """Why a folder is not exactly the merge that was made here, "" if it is."""
    if path.is_symlink() or merge.manifest != sha256_of(path / MANIFEST):
        return "it is not the merge that was made here"
    content = read_manifest(path)
    known = {MANIFEST, *content.get("files", {}), *content.get("side_files", {})}
    others = sorted({str(each.relative_to(path)) for each in files_in(path, strict=True)} - known)
    return f"it holds {others[0]}, which is not part of the merge" if others else ""


def read_record(folder: Path) -> WatchRecord:
    """The record in `folder`, an empty one if there is none. Raises InputError."""
    path = folder / RECORD
    if not path.exists():
        return WatchRecord()
    try:
        record = decode(WatchRecord, parse_json(read_file(str(path), _MAX_BYTES)), str(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}", hint=f"mv {path} {path}.old, and start again") from error
    if strange := [name for name in record.merges if "/" in name or not is_below(name)]:
        raise InputError(
            f"{path} names a merge outside its folder: {strange[0]!r:.200}", hint=f"mv {path} {path}.old, and start again"
        )
    return record
