"""Checkpoints with the same bytes under two names: a copy by mistake, which would count twice.

Checkpoints of one run have equal headers, so the values decide. Only a few are read: one block of
each checkpoint, and more of those that are equal so far. The versions that a store has (a hash, an
ETag) decide without a read where all are equal.

Not guaranteed: checkpoints that are equal in every block that was compared may differ elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import closing

from merge_cli.errors import first_ten
from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.stores.store import is_local, read_bytes

SAMPLES = 16
SAMPLE_BYTES = 4096


def twin_warnings(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A line for each group of checkpoints that are equal in headers, sizes and `SAMPLES` blocks.

    Reads at most `SAMPLES` blocks of `SAMPLE_BYTES` of each, and one of most. Raises ChangedError
    and StoreError.
    """
    groups = [list(checkpoints)]
    for number in range(-1, SAMPLES):
        groups = [part for group in groups for part in _split(group, number)]
    return first_ten(
        [
            f"{' and '.join(each.path for each in group)} seem to be one checkpoint: sizes, headers and {SAMPLES} blocks"
            f" of {SAMPLE_BYTES >> 10} KiB are equal, so it counts {len(group)} times"
            for group in groups
        ]
    )


def _split(group: Sequence[Checkpoint], number: int) -> list[list[Checkpoint]]:
    """The parts of `group` with more than one member that are equal in block `number`, headers
    for -1.
    """
    parts: dict[Hashable, list[Checkpoint]] = {}
    for each in group:
        fact = _headers(each) if number < 0 else _block(each, number)
        parts.setdefault(fact, []).append(each)
    return [part for part in parts.values() if len(part) > 1]


def _headers(checkpoint: Checkpoint) -> Hashable:
    return tuple((file.name, file.header.sha256, file.file_bytes) for file in checkpoint.files)


def _block(checkpoint: Checkpoint, number: int) -> Hashable:
    """The values in the middle of one of the tensors, which are taken evenly by bytes; elsewhere
    than on this machine the versions of all files.
    """
    if not is_local(checkpoint.path):
        return tuple(file.source.version for file in checkpoint.files)
    at = checkpoint.tensor_bytes * (2 * number + 1) // (2 * SAMPLES)
    for stored in checkpoint.tensors.values():
        size = stored.info.end - stored.info.start
        if at < size:
            begin = max(0, min(at, size - SAMPLE_BYTES))
            with closing(stored.file.source) as source:
                return bytes(read_bytes(source, stored.offset + begin, min(SAMPLE_BYTES, size)))
        at -= size
    return b""
