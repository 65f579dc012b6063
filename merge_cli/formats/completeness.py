"""Is a folder a complete checkpoint, and if not, why? By names, sizes, headers and the trainer's
own marker; never by a weight.

Not noticed: a file that was preallocated at its full size behind a finished header. Whoever waits
for a save also waits until sizes and times no longer change.
"""

from __future__ import annotations

from merge_cli.errors import ChangedError, IncompleteError
from merge_cli.formats.dcp.trainers import missing_marker
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.formats.safetensors import BoundError
from merge_cli.stores.store import StrPath, as_path


def incomplete_reason(path: StrPath, *, seen: Seen | None = None) -> str | None:
    """Why the checkpoint at `path` is not complete, in one line that names the place; None if it
    is.

    Complete: every file of the index (or of the numbered set) is there, every size is that of its
    header, `.metadata` and all that it names are there, and the trainer's marker, where it has one.
    `seen` as in `open_checkpoint`. Raises InputError for a folder that is broken or refused for
    another reason than a save that is under way or broke off.
    """
    if (missing := missing_marker(path)) is not None:
        return missing
    try:
        open_checkpoint(as_path(path), seen=seen)
    except (IncompleteError, ChangedError) as error:
        return error.message
    except BoundError:
        pass  # complete or not, the bound of the run decides
    return None
