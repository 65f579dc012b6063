"""A destination is either absent or complete.

Everything is first written to `OUT.pmerge-partial/` beside the destination, on the same filesystem:

    state.json      what is being made: the request, the inputs' fingerprints, the plan's hash; and by which command
    lock            held (flock) by the run that works on it
    done/           one record per finished file: its size, modification time and sha256
    checkpoint/     the result as it grows: shards, then side files and pmerge.json, the index last
    claims/, ranks/ with several ranks: who is at work on what, and how far (see `joint.py`)
    publish.json    what is about to get the final name; written when all of checkpoint/ is durable
    replaced/       with --overwrite, the old result in the moment between two renames

`publish` makes `checkpoint/` durable and renames it to the destination in one step. A run that dies leaves the staging folder, and
the same command continues with the files that are not done. A staging folder of another request, or of inputs that have changed
since, is an error that names the differences: nothing is ever mixed. Wherever a run dies while it publishes, `_recover` of the next
one finds out from `publish.json` which side of the rename it died on.

Not guaranteed: that a finished file still holds its bytes when a run continues (its size and modification time are looked at; with
`verify` it is read and hashed again).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.errors import OutputError, first_ten
from merge_cli.formats.checkpoint import recorded_fingerprint
from merge_cli.names import MANIFEST, STAGING_SUFFIX
from merge_cli.output.lock import Lock
from merge_cli.output.schema import SCHEMA, check_schema, is_newer
from merge_cli.planning.plan import OutputFile
from merge_cli.system.durable import NOT_SUPPORTED, exchange, fsync_folder, fsync_tree, output_error, rename_to_new, write_file
from merge_cli.system.files import files_in, read_json, sha256_of

_NO_FOLDER_RENAME = (*NOT_SUPPORTED, errno.EXDEV, errno.EPERM, errno.EISDIR, errno.EMLINK)
_WITHOUT_STATE = {"lock", "lock.owner", "control", "control.owner", "state.json.partial"}


@dataclass(frozen=True)
class Done:
    """A finished file: its size in bytes, its sha256, and how many elements were NaN or Inf, by tensor."""

    file_bytes: int
    sha256: str
    nonfinite: Mapping[str, int] = field(default_factory=dict)


class Staging:
    """The staging folder of one destination, locked while the context is open.

    `is_published` is true after `prepare` when an earlier run of the same request died after its rename: the result stands.
    """

    def __init__(self, destination: Path, overwrite: bool = False) -> None:
        self.destination = destination
        self.overwrite = overwrite
        self.folder = destination.with_name(destination.name + STAGING_SUFFIX)
        self.checkpoint = self.folder / "checkpoint"
        self.is_published = False
        self._done = self.folder / "done"
        self._state_file = self.folder / "state.json"
        self._publish_file = self.folder / "publish.json"
        self._replaced = self.folder / "replaced"
        self._more_folders = (self.folder / "claims", self.folder / "ranks")  # see `joint.py`
        self._is_cleaned = False
        self._state: Mapping[str, Any] = {}
        self._request = ""  # what records are made for: one of another request vouches for nothing
        self._lock = Lock(self.folder / "lock", destination)

    def __enter__(self) -> Staging:
        self._lock.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
        self._remove_empty_folder()

    def prepare(self, state: Mapping[str, Any], *, restart: bool = False, verify: bool = False) -> dict[str, Done]:
        """Get ready to write what `state` describes; the files that an earlier run of the same finished, by name.

        `restart` throws away what an earlier run left, `verify` reads finished files again and drops those whose sha256 is
        another. Raises OutputError where the destination exists, or what is there belongs to another request.
        """
        self._set_state(state)
        try:
            if self._recover() and not restart:
                self.is_published = True
                return {}
            if os.path.lexists(self.destination) and not self.overwrite:
                raise already_there(self.destination)
            if restart:
                self._discard()
            else:
                self._check_schema()
                self._check_same_request()
            done = self._finished_files(verify)
            self._remove_all_but(done)
            self._done.mkdir(exist_ok=True)
            self.checkpoint.mkdir(exist_ok=True)
            self._write_state()
        except OSError as error:
            raise output_error(error, f"cannot work in {self.folder}", self._state_file) from error
        return done

    def _set_state(self, state: Mapping[str, Any]) -> None:
        self._state = json.loads(json.dumps(state))
        self._request = _hash_of(self._state)

    def _recorded_state(self) -> dict[str, Any]:
        """The state that the staging folder was made for, {} where it has none."""
        recorded = read_json(self._state_file).get("state")
        state = with_fingerprints(recorded)
        if state == self._state:
            self._request = _hash_of(recorded)  # what the records of this request were made for, in the form of that time
        return state

    def _write_state(self) -> None:
        if not self._state_file.exists():
            about = "an unfinished pmerge run: run the same command again to continue it, with --restart to begin afresh"
            made_by = {
                "schema": SCHEMA,
                "about": about,
                "command": shlex.join(["pmerge", *sys.argv[1:]]),
                "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            }
            write_file(self._state_file, json.dumps({**made_by, "state": self._state}, indent=2).encode())

    def record(self, file: OutputFile, sha256: str, nonfinite: Mapping[str, int]) -> None:
        """Note that `file` stands complete and durable in the staging folder."""
        mtime_ns = (self.checkpoint / file.name).stat().st_mtime_ns
        entry = {
            "schema": SCHEMA,
            "name": file.name,
            "file_bytes": file.file_bytes,
            "mtime_ns": mtime_ns,
            "sha256": sha256,
            "request": self._request,
            "nonfinite": dict(nonfinite),
        }
        write_file(self._record_file(file.name), json.dumps(entry).encode())

    def publish(self) -> None:
        """Make the checkpoint durable and give it its final name; with `overwrite` an older one is replaced only now."""
        try:
            fsync_tree(self.checkpoint)
        except OSError as error:
            with suppress(OSError):  # who knows which names were lost: nothing here is finished any more
                _remove(self._done)
            raise output_error(error, f"cannot make {self.checkpoint} durable", self.checkpoint) from error
        marker = {
            "schema": SCHEMA,
            "inode": self.checkpoint.stat().st_ino,
            "manifest": sha256_of(self.checkpoint / MANIFEST),
            "state": self._state,
        }
        write_file(self._publish_file, json.dumps(marker).encode())
        try:
            if self.overwrite and is_merged(self.destination):
                self._replace()
            else:
                self._appear()
        except FileExistsError as error:
            raise already_there(self.destination) from error
        except OSError as error:
            raise output_error(error, f"cannot publish {self.destination}", self.destination) from error
        try:
            fsync_folder(self.destination.parent)
        except OSError as error:
            with suppress(OSError):
                self._take_back()
            raise output_error(error, f"cannot make the name {self.destination} durable", self.destination) from error
        self.clean()

    def clean(self) -> None:
        """Remove the staging folder after the result was published; what another put into it stays."""
        self._is_cleaned = True
        with suppress(OSError):  # the result stands: what cannot be removed is only litter
            self._remove_content()
            self._lock.remove_files()
            self.folder.rmdir()

    def _remove_empty_folder(self) -> None:
        """After the locks are released: NFS keeps an open file that is removed, under another name, until it is closed."""
        if self._is_cleaned:
            with suppress(OSError):  # gone already, or somebody else's
                self.folder.rmdir()

    def _remove_content(self) -> None:
        for part in (self.checkpoint, self._replaced, self._done, *self._more_folders):
            _remove(part)
        for file in (self._state_file, self._publish_file, self.folder / "control"):
            file.unlink(missing_ok=True)

    def _appear(self) -> None:
        try:
            rename_to_new(self.checkpoint, self.destination)
        except OSError as error:
            if error.errno not in _NO_FOLDER_RENAME:
                raise
            self._move_files()

    def _move_files(self) -> None:
        """Where folders cannot be renamed: file by file, what makes it a checkpoint (pmerge.json, the index) last."""
        self.destination.mkdir()
        marker = {**read_json(self._publish_file), "inode": self.destination.stat().st_ino, "by_file": True}
        write_file(self._publish_file, json.dumps(marker).encode())
        try:
            for path in sorted(files_in(self.checkpoint), key=_publishing_order):
                target = self.destination / path.relative_to(self.checkpoint)
                target.parent.mkdir(parents=True, exist_ok=True)
                if _publishing_order(path)[0]:
                    fsync_tree(self.destination)  # the weights' names are durable before the index can be
                path.rename(target)
            fsync_tree(self.destination)
        except OSError:
            with suppress(OSError):
                self._move_files_back()
            raise
        shutil.rmtree(self.checkpoint)

    def _replace(self) -> None:
        if exchange(self.checkpoint, self.destination):
            return
        try:
            self.destination.rename(self._replaced)
        except OSError as error:
            if error.errno not in _NO_FOLDER_RENAME:
                raise
            raise OutputError(
                f"{self.destination} cannot be replaced: its filesystem cannot rename folders",
                hint="remove it, then run the same command again: what is finished is kept",
            ) from error
        try:
            fsync_folder(self.folder)
            rename_to_new(self.checkpoint, self.destination)
        except BaseException:
            self._replaced.rename(self.destination)
            raise

    def _take_back(self) -> None:
        """Undo the rename whose durability failed, so that the next run does it anew instead of believing a second fsync."""
        if self._replaced.exists():
            self.destination.rename(self.checkpoint)
            self._replaced.rename(self.destination)
        elif self.checkpoint.exists():
            exchange(self.checkpoint, self.destination)
        else:
            self.destination.rename(self.checkpoint)

    def _recover(self) -> bool:
        """Finish or undo what a run that died while publishing began; True when it was this request and is complete."""
        marker = read_json(self._publish_file)
        check_schema(
            marker, self._publish_file, "let that version finish what it was publishing: run its command again", OutputError
        )
        half_moved = bool(marker.get("by_file")) and self.checkpoint.exists()
        ours = self.destination.is_dir() and self.destination.stat().st_ino == marker.get("inode")
        if ours and not half_moved:
            ours = sha256_of(self.destination / MANIFEST) == marker.get("manifest")
        if self._replaced.exists() and not ours:
            self._put_back_replaced()
        if ours and half_moved:
            self._move_files_back()
        elif ours:
            fsync_folder(self.destination.parent)
            if marker.get("state") == self._state:
                return True
            _remove(self._replaced)
            self._discard()
        elif marker and self.destination.is_dir() and not any(self.destination.iterdir()):
            self.destination.rmdir()  # made to be filled file by file
        self._publish_file.unlink(missing_ok=True)
        return False

    def _put_back_replaced(self) -> None:
        if os.path.lexists(self.destination):
            raise OutputError(
                f"{self._replaced} was moved aside to be replaced, but {self.destination} is not what should replace it",
                hint=f"keep one of the two; to keep what was moved aside:  mv {self._replaced} SOMEWHERE",
            )
        self._replaced.rename(self.destination)
        fsync_folder(self.destination.parent)

    def _move_files_back(self) -> None:
        for path in sorted(files_in(self.destination), key=_publishing_order, reverse=True):
            target = self.checkpoint / path.relative_to(self.destination)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        shutil.rmtree(self.destination)

    def _discard(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for part in (self._done, self.checkpoint, *self._more_folders):
            _remove(part)
        self._state_file.unlink(missing_ok=True)

    def _check_schema(self) -> None:
        """Raise OutputError where a newer version of pmerge began the staging folder."""
        hint = "continue with that version, or throw its work away:  --restart"
        check_schema(read_json(self._state_file), self._state_file, hint, OutputError)

    def _check_same_request(self) -> None:
        """Raise OutputError unless the staging folder belongs to this very request, or nothing in it is finished."""
        if not self._state_file.exists():
            strange = sorted({path.name for path in self.folder.iterdir()} - _WITHOUT_STATE)
            if not any((self.folder / name).is_file() or any((self.folder / name).iterdir()) for name in strange):
                return
            raise OutputError(
                f"{self.folder} holds files, and no state.json that says what they are",
                details=first_ten(strange),
                hint="look at it; to throw away what an earlier run left there, add --restart",
            )
        was, schema = self._recorded_state(), read_json(self._state_file).get("schema", 0)
        if was == self._state:
            return
        if not any(self._done.glob("*.json")):  # nothing is finished: nothing is lost by beginning afresh
            self._state_file.unlink()
            return
        older = ", or of an older version of pmerge" if schema < SCHEMA else ""
        raise OutputError(
            f"{self.folder} is the unfinished run of another request or of inputs that have changed since{older}",
            details=first_ten(differences(was, self._state), "more differences"),
            hint="repeat the command that began it, or throw its work away:  --restart",
        )

    def _finished_files(self, verify: bool, only: str | None = None) -> dict[str, Done]:
        found = {}
        for record in sorted(self._done.glob("*.json")) if only is None else [self._record_file(only)]:
            entry = read_json(record)
            try:
                path, done = self.checkpoint / entry["name"], Done(entry["file_bytes"], entry["sha256"], dict(entry["nonfinite"]))
                status = path.stat()
                found_now = (status.st_size, status.st_mtime_ns, self._request)
                if is_newer(entry) or found_now != (done.file_bytes, entry["mtime_ns"], entry["request"]):
                    continue
            except (OSError, KeyError, TypeError, ValueError):
                continue  # a torn record, or its file is gone: that file is written again
            if not verify or sha256_of(path) == done.sha256:
                found[str(entry["name"])] = done
        return found

    def _remove_all_but(self, done: Mapping[str, Done]) -> None:
        """Remove every file that no record vouches for: parts of shards, side files of the last attempt, an old result."""
        kept = {self.checkpoint / name for name in done} | {self._record_file(name) for name in done}
        for path in (*files_in(self.checkpoint), *files_in(self._done)):
            if path not in kept:
                path.unlink()
        for folder, _, _ in os.walk(self.checkpoint, topdown=False):
            with suppress(OSError):  # not empty
                Path(folder).rmdir()
        if self._done.exists():
            fsync_folder(self._done)  # no record may come back after a power cut and vouch for what is written from here on

    def _record_file(self, name: str) -> Path:
        return self._done / f"{name.replace('/', '%2F')}.json"


def remove_litter(destination: Path) -> None:
    """Remove what is left of the staging folder of a result that stands: its run was killed while it cleaned up."""
    staging = Staging(destination)
    if staging.folder.is_dir() and not any((staging.folder / name).exists() for name in ("state.json", "publish.json")):
        with suppress(OutputError), staging:
            staging.clean()


def with_fingerprints(state: Any) -> dict[str, Any]:
    """A recorded state with the inputs' fingerprints in the form of today, {} where there is none."""
    if not isinstance(state, dict) or not isinstance(state.get("inputs"), dict):
        return {}
    inputs = {path: {name: recorded_fingerprint(file) for name, file in files.items()} for path, files in state["inputs"].items()}
    return {**state, "inputs": inputs}


def _hash_of(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def differences(was: Any, now: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, one line each: what, was, is."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [*was, *(key for key in now if key not in was)]
        return [
            line
            for key in keys
            for line in differences(was.get(key, "absent"), now.get(key, "absent"), f"{where}, {key}" if where else key)
        ]
    return [] if was == now else [f"{where}  was {_short(was)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value) if not isinstance(value, dict) else "present"
    return text if len(text) <= 60 else text[:57] + "..."


def _publishing_order(path: Path) -> tuple[int, str]:
    is_index = path.name.endswith(".index.json") or path.name == ".metadata"
    return (2 if is_index else path.name == MANIFEST, str(path))


def _remove(folder: Path) -> None:
    """Remove a folder if it is there. Raises OSError; its `ignore_errors` would make `rmtree` swallow an interruption."""
    if folder.exists():
        shutil.rmtree(folder)


def already_there(destination: Path) -> OutputError:
    return OutputError(
        f"{destination} exists already",
        hint="choose another place with -o PATH, or replace it with --overwrite",
    )


def is_merged(folder: Path) -> bool:
    return not folder.is_symlink() and (folder / MANIFEST).is_file()
