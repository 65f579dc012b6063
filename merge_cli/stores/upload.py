"""Sending files to another place: the contract of `hub_upload` and `object_upload`.

Nothing that is there is replaced. A target is looked at first; whatever it holds of the same
content is kept, so a push that broke off continues; anything else that is in the way is an error.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

from merge_cli.errors import UsageError

TARGETS = {"hf": "hub_upload", **dict.fromkeys(("s3", "gs", "az"), "object_upload")}
"""Scheme -> the module of `merge_cli.stores` whose `open_target` sends to such places."""


class Outgoing(NamedTuple):
    """A file to be sent: a path of this machine, or its bytes."""

    name: str
    num_bytes: int
    sha256: str
    content: Path | bytes

    def read(self) -> bytes:
        """All of a small file."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


class There(NamedTuple):
    """A file that a place holds, by its size and hash: `sha256 ...`, `git ...`, "" if unknown."""

    num_bytes: int
    digest: str

    def equals(self, file: Outgoing) -> bool:
        """Whether this is the content of `file`."""
        if self.num_bytes != file.num_bytes or not self.digest:
            return False
        kind, _, digest = self.digest.partition(" ")
        return digest == (file.sha256 if kind == "sha256" else git_sha1(file.read()))


class Target(Protocol):
    """A place that a result is sent to. Raises InputError where it cannot be used, OutputError
    where sending fails.
    """

    def look(self, ours: Collection[str]) -> Mapping[str, There]:
        """All files of the place by name; the digest may be missing for those that are not `ours`."""

    def send(self, files: Sequence[Outgoing], title: str, on_sent: Callable[[int], None]) -> str:
        """Send `files` in this order, and return the address that names exactly this state.

        Whatever breaks off leaves the last file out. `on_sent` counts bytes.
        """


def open_target(address: str) -> Target:
    """The target of an address. Raises UsageError for other schemes, InputError for a bad name."""
    scheme = match[1] if (match := re.match(r"([a-z][a-z0-9]*)://", address)) else ""
    if scheme not in TARGETS:
        raise UsageError(
            f"{address} is no place to push to",
            details=["expected  hf://org/name@branch, s3://bucket/folder, gs://..., az://..."],
        )
    target: Target = import_module(f"merge_cli.stores.{TARGETS[scheme]}").open_target(address)
    return target


def git_sha1(data: bytes) -> str:
    """The hash by which git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
