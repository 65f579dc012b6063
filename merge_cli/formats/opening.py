"""Open a checkpoint of whatever container: safetensors, or a torch distributed checkpoint."""

from __future__ import annotations

from merge_cli.formats.checkpoint import Checkpoint, Opened, open_safetensors
from merge_cli.formats.dcp.checkpoint import open_dcp
from merge_cli.formats.dcp.entries import DROP
from merge_cli.formats.dcp.item import Envelopes
from merge_cli.formats.dcp.trainers import find_dcp, is_unfinished
from merge_cli.stores.store import StrPath


class Seen:
    """Parsed parts that the checkpoints of one run share: those of safetensors, and envelopes of
    items.
    """

    def __init__(self) -> None:
        self.safetensors = Opened()
        self.envelopes = Envelopes()


def open_checkpoint(path: StrPath, *, seen: Seen | None = None, training_state: str = DROP) -> Checkpoint:
    """Open the checkpoint at `path`: a folder, or one `.safetensors` file; and check that it is
    complete.

    `seen` shares parsed parts between checkpoints. `training_state` decides which entries of a
    distributed checkpoint are kept (see `dcp/entries.py`). Raises InputError where a file is
    missing, broken or reaches outside the checkpoint.
    """
    seen = seen or Seen()
    place = find_dcp(path)
    if place is not None or is_unfinished(path):
        return open_dcp(path, place, training_state, seen.envelopes)
    return open_safetensors(path, seen=seen.safetensors)
