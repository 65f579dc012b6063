"""One file of weights of a checkpoint, and what identifies its content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.formats.safetensors import Header
from merge_cli.stores.local import version_of_time
from merge_cli.stores.store import Source

Files = Mapping["WeightFile", "WeightFile"]
"""A file of one checkpoint -> that of another with the same header."""


@dataclass(frozen=True, eq=False)
class WeightFile:
    """One safetensors file of a checkpoint; `name` is its path inside the checkpoint."""

    source: Source
    name: str
    header: Header

    @property
    def path(self) -> str:
        return self.source.path

    @property
    def file_bytes(self) -> int:
        return self.header.file_bytes

    def moved(self, files: Files) -> WeightFile:
        """The file of another checkpoint that stands for this one in `files`."""
        return files[self]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the file's content, on every host and after a remount: size, version and
        hash of the header.
        """
        return {"file_bytes": self.file_bytes, "version": self.source.version, "header_sha256": self.header.sha256}


def recorded_fingerprint(record: Mapping[str, Any]) -> dict[str, Any]:
    """A file's fingerprint out of a record; before there were stores it had a time and an inode
    instead of a version.
    """
    kept = {key: value for key, value in record.items() if key not in ("mtime_ns", "inode")}
    return {"version": version_of_time(record["mtime_ns"]), **kept} if "mtime_ns" in record else kept
