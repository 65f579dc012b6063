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
from merge_cli.formats.alike import original_of
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
    places: dict[int, tuple[str, int]] = {}  # of checkpoints with equal headers, which share their tensors
    for each in group:
        if number >= 0 and id(original_of(each.tensors)) not in places:
            places[id(original_of(each.tensors))] = _place(each, number)
        fact = _headers(each) if number < 0 else _block(each, *places[id(original_of(each.tensors))])
        parts.setdefault(fact, []).append(each)
    return [part for part in parts.values() if len(part) > 1]


def _headers(checkpoint: Checkpoint) -> Hashable:
    return tuple((file.name, file.header.sha256, file.file_bytes) for file in checkpoint.files)


def _place(checkpoint: Checkpoint, number: int) -> tuple[str, int]:
    """The key of one of the tensors, which are taken evenly by bytes, and the byte of it where
    block `number` begins; "" where there is none.
    """
    at = checkpoint.tensor_bytes * (2 * number + 1) // (2 * SAMPLES)
    for key, stored in original_of(checkpoint.tensors).items():
        size = stored.info.end - stored.info.start
        if at < size:
            return key, max(0, min(at, size - SAMPLE_BYTES))
        at -= size
    return "", 0


def _block(checkpoint: Checkpoint, key: str, begin: int) -> Hashable:
    """The values there; elsewhere than on this machine the versions of all files."""
    if not is_local(checkpoint.path):
        return tuple(file.source.version for file in checkpoint.files)
    if not key:
        return b""
    stored = checkpoint.tensors[key]
    size = stored.info.end - stored.info.start
    with closing(stored.file.source) as source:
        return bytes(read_bytes(source, stored.offset + begin, min(SAMPLE_BYTES, size)))
