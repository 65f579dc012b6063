"""Open a checkpoint of whatever container: safetensors, a torch distributed checkpoint, files of
`torch.save`, or a universal checkpoint of DeepSpeed.

Of several in one folder the first counts: a distributed checkpoint, safetensors, files of
`torch.save`, a universal checkpoint. The others are skipped like all files that are not copied.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from merge_cli.formats.checkpoint import Checkpoint, Opened, open_safetensors
from merge_cli.formats.dcp.checkpoint import open_dcp
from merge_cli.formats.dcp.entries import DROP
from merge_cli.formats.dcp.folder import METADATA_FILE
from merge_cli.formats.dcp.seen import SeenDcp
from merge_cli.formats.dcp.trainers import find_dcp, is_unfinished
from merge_cli.formats.pickled import ENDINGS, open_pickled, pickled_files
from merge_cli.formats.safetensors import MAX_HEADER_BYTES
from merge_cli.formats.universal import find_universal, open_universal
from merge_cli.stores.store import StrPath, as_path, join, open_store


class Seen:
    """Parsed parts that the checkpoints of one run share: those of safetensors, and metadata
    and envelopes of distributed checkpoints; of headers and metadata at most `max_bytes` together.
    """

    def __init__(self, max_bytes: int = MAX_HEADER_BYTES) -> None:
        self.safetensors = Opened(max_bytes)
        self.dcp = SeenDcp()


def is_pickled(path: StrPath) -> bool:
    """Whether `path` is a file, or a folder with files, of `torch.save`."""
    path = as_path(path)
    status = open_store(path).stat(path)
    if status is None or status.kind != "folder":
        return status is not None and path.endswith(ENDINGS)
    return bool(pickled_files([entry.name for entry in open_store(path).list(path)]))


def open_checkpoint(path: StrPath, *, seen: Seen | None = None, training_state: str = DROP) -> Checkpoint:
    """Open the checkpoint at `path`: a folder, or one file; and check that it is complete.

    `seen` shares parsed parts between checkpoints. `training_state` decides which entries of a
    distributed checkpoint are kept (see `dcp/entries.py`). Raises InputError where a file is
    missing, broken or reaches outside the checkpoint.
    """
    seen = seen or Seen()
    place = find_dcp(path)
    if place is not None or is_unfinished(path):
        if place is not None:
            metadata = join(place.folder, METADATA_FILE)
            found = open_store(metadata).stat(metadata)
            seen.safetensors.headers.spend(0 if found is None else found.num_bytes, metadata)
        return open_dcp(path, place, training_state, seen.dcp)
    if is_pickled(path):
        return open_pickled(path)
    if (inside := find_universal(path)) is not None:
        return open_universal(path, inside)
    return open_safetensors(path, seen=seen.safetensors)


def open_recorded(path: str, names: Collection[str], *, seen: Seen, training_state: str = DROP) -> Checkpoint:
    """The checkpoint at `path`, of which a record names the files. A file that was averaged through
    a link has the link's name there, and the path that it leads to. Raises InputError.
    """
    checkpoint = open_checkpoint(path, seen=seen, training_state=training_state)
    if checkpoint.root is not None or len(names) != 1:
        return checkpoint
    (file,), (name,) = checkpoint.files, names
    if file.name == name:
        return checkpoint
    linked = replace(file, name=name)
    return replace(
        checkpoint, files=(linked,), tensors={key: each.moved({file: linked}) for key, each in checkpoint.tensors.items()}
    )
