"""The publish sequence: a destination is either absent or complete. Written once, for one output
and many, one process and ranks.

    1. side files, pmerge.json, and the index are written beside the weights; every header is read
       back
    2. the inputs are compared once more with the plan
    3. every folder of the checkpoint is made durable, and publish.json notes what is about to be
       published
    4. one rename gives the checkpoint its final name, which is made durable
    5. the staging folder is removed

Wherever a run dies in between, `recover` of the next one finds out from publish.json which side of
the rename it died on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from merge_cli.errors import OutputError
from merge_cli.names import MANIFEST
from merge_cli.output.existing import already_there, is_empty_folder, is_merged
from merge_cli.output.folder import StagingFolder, with_fingerprints
from merge_cli.output.manifest import write_metadata_files
from merge_cli.output.records import FileRecord
from merge_cli.output.schema import SCHEMA, check_schema
from merge_cli.planning.plan import MergePlan
from merge_cli.system.durable import NOT_SUPPORTED, exchange, fsync_folder, fsync_tree, output_error, rename_to_new, write_file
from merge_cli.system.files import files_in, read_json, sha256_of

_NO_FOLDER_RENAME = (*NOT_SUPPORTED, errno.EXDEV, errno.EPERM, errno.EISDIR, errno.EMLINK)


class Ready(Protocol):
    """A destination all of whose weight files are finished, and that no other process publishes."""

    merge: MergePlan
    folder: StagingFolder
    overwrite: bool

    def clean(self) -> None:
        """Remove the staging folder after the rename; what cannot be removed is harmless."""


def publish(merge: MergePlan, ready: Sequence[tuple[Ready, Mapping[str, FileRecord]]], command: Sequence[str]) -> None:
    """Publish outputs of the plan `merge`, each with the records of its files. Raises OutputError,
    InputError or ChangedError.
    """
    from merge_cli.engine.input_checks import check_inputs_unchanged

    for each, records in ready:
        write_metadata_files(each.merge, each.folder.checkpoint, records, command)
    check_inputs_unchanged(merge)
    for each, _ in ready:
        _give_final_name(each.folder, each.overwrite)
        each.clean()


def _give_final_name(folder: StagingFolder, overwrite: bool) -> None:
    """Make the checkpoint durable and rename it; with `overwrite` an older one is replaced only
    now.
    """
    destination = folder.destination
    try:
        fsync_tree(folder.checkpoint)
    except OSError as error:
        with suppress(OSError):  # nobody knows which names were lost: nothing here is finished any more
            shutil.rmtree(folder.records.folder)
        raise output_error(error, f"cannot make {folder.checkpoint} durable", folder.checkpoint) from error
    marker = {
        "schema": SCHEMA,
        "inode": folder.checkpoint.stat().st_ino,
        "manifest": sha256_of(folder.checkpoint / MANIFEST),
        "state": folder.state,
    }
    write_file(folder.publish_file, json.dumps(marker).encode())
    try:
        if overwrite and is_merged(destination):
            _replace(folder)
        else:
            _appear(folder)
    except FileExistsError as error:
        raise already_there(destination) from error
    except OSError as error:
        raise output_error(error, f"cannot publish {destination}", destination) from error
    try:
        fsync_folder(destination.parent)
    except OSError as error:
        with suppress(OSError):
            _take_back(folder)
        raise output_error(error, f"cannot make the name {destination} durable", destination) from error


def _appear(folder: StagingFolder) -> None:
    try:
        if is_empty_folder(folder.destination):
            folder.checkpoint.rename(folder.destination)  # which replaces an empty folder, and nothing else
        else:
            rename_to_new(folder.checkpoint, folder.destination)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder.destination)) from error
        if error.errno not in _NO_FOLDER_RENAME:
            raise
        _move_files(folder)


def _move_files(folder: StagingFolder) -> None:
    """Where folders cannot be renamed: file by file, the marks of a checkpoint (pmerge.json, the
    index) last.
    """
    destination = folder.destination
    if not is_empty_folder(destination):
        destination.mkdir()
    marker = {**read_json(folder.publish_file), "inode": destination.stat().st_ino, "by_file": True}
    write_file(folder.publish_file, json.dumps(marker).encode())
    try:
        for path in sorted(files_in(folder.checkpoint), key=_publishing_order):
            target = destination / path.relative_to(folder.checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            if _publishing_order(path)[0]:
                fsync_tree(destination)  # the weights' names are durable before the index can be
            path.rename(target)
        fsync_tree(destination)
    except OSError:
        with suppress(OSError):
            _move_files_back(folder)
        raise
    shutil.rmtree(folder.checkpoint)


def _move_files_back(folder: StagingFolder) -> None:
    for path in sorted(files_in(folder.destination), key=_publishing_order, reverse=True):
        target = folder.checkpoint / path.relative_to(folder.destination)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    shutil.rmtree(folder.destination)


def _publishing_order(path: Path) -> tuple[int, str]:
    is_index = path.name.endswith(".index.json") or path.name == ".metadata"
    return (2 if is_index else path.name == MANIFEST, str(path))


def _replace(folder: StagingFolder) -> None:
    if exchange(folder.checkpoint, folder.destination):
        return
    try:
        folder.destination.rename(folder.replaced)
    except OSError as error:
        if error.errno not in _NO_FOLDER_RENAME:
            raise
        raise OutputError(
            f"{folder.destination} cannot be replaced: its filesystem cannot rename folders",
            hint="remove it, then run the same command again: what is finished is kept",
        ) from error
    try:
        fsync_folder(folder.path)
        rename_to_new(folder.checkpoint, folder.destination)
    except BaseException:
        folder.replaced.rename(folder.destination)
        raise


def _take_back(folder: StagingFolder) -> None:
    """Undo the rename whose durability failed, so that the next run does it anew instead of
    believing a second fsync.
    """
    if folder.replaced.exists():
        folder.destination.rename(folder.checkpoint)
        folder.replaced.rename(folder.destination)
    elif folder.checkpoint.exists():
        exchange(folder.checkpoint, folder.destination)
    else:
        folder.destination.rename(folder.checkpoint)


def recover(folder: StagingFolder) -> bool:
    """Finish or undo the publishing of a run that died in it; True if that was this request and is
    complete. Raises OSError.
    """
    destination = folder.destination
    marker = read_json(folder.publish_file)
    hint = "let that version finish what it was publishing: run its command again"
    check_schema(marker, folder.publish_file, hint, OutputError)
    half_moved = bool(marker.get("by_file")) and folder.checkpoint.exists()
    ours = destination.is_dir() and destination.stat().st_ino == marker.get("inode")
    if ours and not half_moved:
        ours = sha256_of(destination / MANIFEST) == marker.get("manifest")
    if folder.replaced.exists() and not ours:
        _put_back_replaced(folder)
    if ours and half_moved:
        _move_files_back(folder)
    elif ours:
        fsync_folder(destination.parent)
        if with_fingerprints(marker.get("state")) == folder.state:
            return True
        folder.remove_content()
    elif marker and is_empty_folder(destination):
        destination.rmdir()  # made to be filled file by file
    folder.publish_file.unlink(missing_ok=True)
    return False


def _put_back_replaced(folder: StagingFolder) -> None:
    if os.path.lexists(folder.destination):
        raise OutputError(
            f"{folder.replaced} was moved aside to be replaced, but {folder.destination} is not what should replace it",
            hint=f"keep one of the two; to keep what was moved aside:  mv {folder.replaced} SOMEWHERE",
        )
    folder.replaced.rename(folder.destination)
    fsync_folder(folder.destination.parent)
