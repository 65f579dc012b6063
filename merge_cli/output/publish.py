"""The publish sequence: a destination is either absent or complete. Written once, for one output
and many, one process and ranks.

    1. side files, pmerge.json, and the index are written beside the weights; every header is read
       back
    2. the inputs are compared once more with the plan
    3. every folder of the checkpoint is made durable, publish.json notes what is about to be
       published, and the checkpoint must have the files that were recorded, and no other
    4. one rename gives the checkpoint its final name, which is made durable
    5. with --overwrite, the old result is removed by its own list of files
    6. the staging folder is removed

Wherever a run dies in between, `recover` of the next one finds out from publish.json which side of
the rename it died on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Protocol

from merge_cli.engine.writer import CHECKPOINT
from merge_cli.errors import OutputError, first_ten
from merge_cli.names import MANIFEST
from merge_cli.output.existing import already_there, is_empty_folder, is_merged, own_files, strangers, would_remove
from merge_cli.output.folder import StagingFolder, with_fingerprints
from merge_cli.output.manifest import write_metadata_files
from merge_cli.output.records import DONE, FileRecord, files_have_changed
from merge_cli.output.schema import SCHEMA, check_schema
from merge_cli.planning.plan import MergePlan
from merge_cli.system.durable import NOT_SUPPORTED, exchange, output_error
from merge_cli.system.files import read_json, sha256_of
from merge_cli.system.held import HeldFolder, is_held_by_nfs

_NO_FOLDER_RENAME = (*NOT_SUPPORTED, errno.EXDEV, errno.EPERM, errno.EISDIR, errno.EMLINK)
_REPLACED = "replaced"


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

    for each, _ in ready:
        each.folder.records.remove_side_files(each.merge.files)
    complete = [
        (each, {**records, **write_metadata_files(each.merge, each.folder.held, records, command)}) for each, records in ready
    ]
    check_inputs_unchanged(merge)
    kept = []
    for each, files in complete:
        _give_final_name(each.folder, files, each.overwrite)
        try:
            kept += _remove_old(each.folder)
        except OSError:
            continue  # the result is published: the next run removes the rest
        each.clean()
    if kept:
        raise _are_kept(kept)


def _give_final_name(folder: StagingFolder, files: Mapping[str, FileRecord], overwrite: bool) -> None:
    """Make the checkpoint, which consists of `files`, durable and rename it; with `overwrite` an
    older one is replaced only now.
    """
    destination = folder.destination
    try:
        folder.held.sync_tree(CHECKPOINT)
    except OSError as error:
        with suppress(OSError):  # nobody knows which names were lost: nothing here is finished any more
            folder.held.remove(DONE)
        raise output_error(error, f"cannot make {folder.checkpoint} durable", folder.checkpoint) from error
    folder.note_publishing(
        {
            "schema": SCHEMA,
            "inode": folder.held.stat(CHECKPOINT).st_ino,
            "manifest": files[MANIFEST].sha256,
            "state": folder.state,
        }
    )
    _check_files(folder, files)
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
        folder.above.sync()
    except OSError as error:
        with suppress(OSError):
            _take_back(folder)
        raise output_error(error, f"cannot make the name {destination} durable", destination) from error


def _check_files(folder: StagingFolder, files: Mapping[str, FileRecord]) -> None:
    """Raise OutputError unless the checkpoint has these files, as they were recorded, and no other."""
    found = {name: status for name, status in folder.held.files(CHECKPOINT).items() if not is_held_by_nfs(name)}
    if strangers := sorted(found.keys() - files.keys()):
        raise OutputError(
            f"{folder.checkpoint} holds files that this run has not made: they would be published with the result",
            details=first_ten(strangers),
            hint="find out who put them there and remove them, then run the same command again",
        )
    same = {name for name, status in found.items() if status.st_uid in folder.owners and status.st_nlink <= 1}
    if changed := [name for name, record in files.items() if name not in same or not folder.records.matches(name, record)]:
        raise files_have_changed(folder.checkpoint, changed)


def _appear(folder: StagingFolder) -> None:
    try:
        if is_empty_folder(folder.destination):
            _rename(folder, CHECKPOINT, "")  # which replaces an empty folder, and nothing else
        else:
            folder.held.rename_to_new(CHECKPOINT, folder.above, folder.destination.name)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder.destination)) from error
        if error.errno not in _NO_FOLDER_RENAME:
            raise
        _move_files(folder)


def _rename(folder: StagingFolder, source: str, target: str) -> None:
    """Rename within the staging folder, "" being the destination."""
    name = folder.destination.name
    (folder.held if source else folder.above).rename(source or name, target or name, to=folder.held if target else folder.above)


def _move_files(folder: StagingFolder) -> None:
    """Where folders cannot be renamed: file by file, the marks of a checkpoint (pmerge.json, the
    index) last.
    """
    folder.above.make_folder(folder.destination.name)
    with _held_destination(folder) as destination:
        names = sorted(folder.held.files(CHECKPOINT), key=_publishing_order)
        marker = {"inode": os.fstat(destination.fd).st_ino, "by_file": True, "files": names}
        folder.note_publishing({**read_json(folder.publish_file), **marker})
        try:
            for name in names:
                if _publishing_order(name)[0]:
                    destination.sync_tree(".")  # the weights' names are durable before the index can be
                folder.held.rename(f"{CHECKPOINT}/{name}", name, to=destination, make_after=0)
            destination.sync_tree(".")
        except OSError:
            with suppress(OSError):
                _move_files_back(folder)
            raise
    folder.held.remove(CHECKPOINT)


def _move_files_back(folder: StagingFolder) -> None:
    """Undo `_move_files`. Raises OutputError where others have put files beside those moved."""
    moved = read_json(folder.publish_file).get("files")
    with _held_destination(folder) as destination:
        for name in sorted(destination.files("."), key=_publishing_order, reverse=True):
            if not isinstance(moved, list) or name in moved:
                destination.rename(name, f"{CHECKPOINT}/{name}", to=folder.held)
        destination.remove_empty_folders(".")
        others = sorted(destination.files("."))
    if not folder.above.remove_if_empty(folder.destination.name):
        raise OutputError(
            f"{folder.destination} was being filled by a run that died, and holds files that pmerge did not write",
            details=first_ten(others),
            hint="move them away, then run the same command again: what is finished is kept",
        )


@contextmanager
def _held_destination(folder: StagingFolder) -> Iterator[HeldFolder]:
    destination = HeldFolder(folder.destination)
    destination.hold(within=folder.above)
    try:
        yield destination
    finally:
        destination.release()


def _publishing_order(name: str) -> tuple[int, str]:
    is_index = name.endswith(".index.json") or name.rpartition("/")[2] == ".metadata"
    return (2 if is_index else name == MANIFEST, name)


def _replace(folder: StagingFolder) -> None:
    """Put the checkpoint in the place of the old result, which is looked at before and after:
    others may have put files into it since the run began.
    """
    with _held_destination(folder) as destination:
        _check_old(folder, destination)
        if _exchange(folder):
            try:
                _check_old(folder, destination, CHECKPOINT)
            except BaseException:
                _exchange(folder)
                raise
            return
        _move_aside(folder, destination)


def _move_aside(folder: StagingFolder, old: HeldFolder) -> None:
    try:
        _rename(folder, "", _REPLACED)
    except OSError as error:
        if error.errno not in _NO_FOLDER_RENAME:
            raise
        raise OutputError(
            f"{folder.destination} cannot be replaced: its filesystem cannot rename folders",
            hint="remove it, then run the same command again: what is finished is kept",
        ) from error
    try:
        _check_old(folder, old, _REPLACED)
        folder.held.sync()
        folder.held.rename_to_new(CHECKPOINT, folder.above, folder.destination.name)
    except BaseException:
        _rename(folder, _REPLACED, "")
        raise


def _check_old(folder: StagingFolder, old: HeldFolder, moved_to: str = "") -> None:
    """Raise OutputError if the old result has files that pmerge did not write, or is another folder
    by now.
    """
    path = folder.path / moved_to if moved_to else folder.destination
    if names := strangers(path, sorted(old.files("."))):
        raise would_remove(folder.destination, names)
    if not os.path.samestat(os.fstat(old.fd), os.lstat(path)):
        raise OutputError(
            f"{folder.destination} was exchanged while this run was about to replace it",
            hint="find out who did that, then run the same command again",
        )


def _remove_old(folder: StagingFolder) -> list[Path]:
    """Remove the result that was replaced: the files that its own pmerge.json lists, that one last.
    If others put files into it in the last moment, they are kept in a folder beside the
    destination, which is returned. Raises OSError.
    """
    kept = []
    for part in (CHECKPOINT, _REPLACED):
        if not folder.held.exists(part):
            continue
        if own := own_files(folder.path / part):
            for name in own - {MANIFEST}:
                folder.held.remove(f"{part}/{name}")
            folder.held.remove_empty_folders(part)
            folder.held.sync_tree(part)  # while the list is there, a run that is killed here can go on
            folder.held.remove(f"{part}/{MANIFEST}")
        if not folder.held.remove_if_empty(part) and not all(map(is_held_by_nfs, folder.held.files(part))):
            kept.append(_keep(folder, part))
    return kept


def _keep(folder: StagingFolder, part: str) -> Path:
    for number in count(1):
        path = folder.destination.with_name(f"{folder.destination.name}.kept-{number}")
        with suppress(FileExistsError):
            folder.held.rename_to_new(part, folder.above, path.name)
            return path
    raise AssertionError


def _are_kept(kept: Sequence[Path]) -> OutputError:
    return OutputError(
        "published; but others put files into the old result at the last moment, and they are kept",
        details=[f"in  {path}" for path in kept],
        hint="move them to where they belong; the result is complete",
    )


def _exchange(folder: StagingFolder) -> bool:
    """Let the checkpoint and the destination change places; False where the filesystem cannot."""
    return exchange((folder.held.fd, CHECKPOINT), (folder.above.fd, folder.destination.name))


def _take_back(folder: StagingFolder) -> None:
    """Undo the rename whose durability failed, so that the next run does it anew instead of
    believing a second fsync.
    """
    if folder.held.exists(_REPLACED):
        _rename(folder, "", CHECKPOINT)
        _rename(folder, _REPLACED, "")
    elif folder.held.exists(CHECKPOINT):
        _exchange(folder)
    else:
        _rename(folder, "", CHECKPOINT)


def recover(folder: StagingFolder) -> bool:
    """Finish or undo the publishing of a run that died in it; True if that was this request and is
    complete. Raises OSError.
    """
    destination = folder.destination
    marker = read_json(folder.publish_file)
    hint = "let that version finish what it was publishing: run its command again"
    check_schema(marker, folder.publish_file, hint, OutputError)
    half_moved = bool(marker.get("by_file")) and folder.held.exists(CHECKPOINT)
    ours = destination.is_dir() and not destination.is_symlink() and destination.stat().st_ino == marker.get("inode")
    if ours and not half_moved:
        ours = sha256_of(destination / MANIFEST) == marker.get("manifest")
    if folder.held.exists(_REPLACED) and not ours:
        _put_back_replaced(folder)
    if ours and half_moved:
        _move_files_back(folder)
    elif ours:
        folder.above.sync()
        kept = _remove_old(folder)
        if kept:
            raise _are_kept(kept)
        if with_fingerprints(marker.get("state")) == folder.state:
            return True
        folder.remove_content()
    elif marker and is_empty_folder(destination):
        destination.rmdir()  # made to be filled file by file
    folder.forget_publishing()
    return False


def _put_back_replaced(folder: StagingFolder) -> None:
    if os.path.lexists(folder.destination):
        raise OutputError(
            f"{folder.replaced} was moved aside to be replaced, but {folder.destination} is not what should replace it",
            hint=f"keep one of the two; to keep what was moved aside:  mv {folder.replaced} SOMEWHERE",
        )
    _rename(folder, _REPLACED, "")
    folder.above.sync()
