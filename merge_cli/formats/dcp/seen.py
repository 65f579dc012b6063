"""What the distributed checkpoints of one run share: most `.metadata` files of a run differ in the
path and the identifier of the save alone, which are not read.

Those two lie behind all that is read, so two files are the same where the bytes before are, and the
opcodes behind are the same but for the text of strings that are neither names of fields nor of
classes. The interpreter then need not run again: it takes 0.1 ms a chunk.
"""

from __future__ import annotations

import hashlib
import pickletools

from merge_cli.formats.dcp.item import Envelopes
from merge_cli.formats.dcp.metadata import Metadata, parse_metadata

_LAST = b"\x8c\x0cstorage_meta"  # SHORT_BINUNICODE: the key of the path and the identifier
_LONGEST_TAIL = 1 << 14
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE"}
_FIELDS = {"storage_meta", "checkpoint_id", "save_id", "load_id", "modules", "version"}

Likeness = tuple[bytes, tuple[tuple[str, object], ...]]


class SeenDcp:
    """Metadata and envelopes of the checkpoints seen so far."""

    def __init__(self) -> None:
        self.envelopes = Envelopes()
        self._metadata: dict[Likeness, Metadata] = {}

    def parse(self, raw: bytes, what: str) -> Metadata:
        """The metadata in `raw`, parsed unless one like it was seen. Raises what `parse_metadata`
        raises.
        """
        like = _likeness(raw)
        if like not in self._metadata:
            self._metadata[like] = parse_metadata(raw, what)
        return self._metadata[like]


def _likeness(raw: bytes) -> Likeness:
    """What two files have in common that mean the same."""
    at = raw.rfind(_LAST)
    if at >= 0 and len(raw) - at <= _LONGEST_TAIL:
        try:
            opcodes = list(pickletools.genops(raw[at:]))
        except ValueError:
            opcodes = []
        if opcodes and opcodes[-1][2] == len(raw) - at - 1:
            steps = [(code.name, value) for code, value, _ in opcodes if code.name != "MEMOIZE"]
            tail = tuple(step if _counts(steps[i : i + 3]) else (step[0], None) for i, step in enumerate(steps))
            return hashlib.sha256(raw[:at]).digest(), (*tail, ("opcodes", tuple(code.name for code, _, _ in opcodes)))
    return hashlib.sha256(raw).digest(), ()


def _counts(steps: list[tuple[str, object]]) -> bool:
    """Whether the argument of the first opcode counts: it is no string, or the name of a field or
    class.
    """
    (name, value), *following = steps
    return name not in _STRINGS or value in _FIELDS or any(step[0] == "STACK_GLOBAL" for step in following)
