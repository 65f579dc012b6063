"""Where files lie: the stores that inputs are read from.

A place is a string: a path of this machine, or `scheme://...`, and its scheme names its store.
Whatever reads an input does so through a `Store` and the `Source`s that it opens, so formats, plan
and engine never know where bytes lie. Strings, because a `Path` turns `hf://org/name` into
`hf:/org/name`. Nothing is written through a store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from merge_cli.errors import InputError
from merge_cli.stores.addresses import meant_address

StrPath = str | os.PathLike[str]

STORES = {
    "": "merge_cli.stores.local",
    "hf": "merge_cli.stores.hub",
    **dict.fromkeys(("s3", "gs", "az"), "merge_cli.stores.object_store"),
}
"""Scheme -> the module whose `STORE` reads such paths, imported when it is needed; "" is this
machine.
"""

Kind = Literal["file", "folder", "broken link", "other"]
"""Links are followed; "other" is neither a file nor a folder: a pipe, a device."""

_SCHEME = re.compile(r"^([a-z][a-z0-9]*)://")


class Entry(NamedTuple):
    """A name in a folder."""

    name: str
    kind: Kind


class Stat(NamedTuple):
    """Facts about a path: its kind, the size of a file, and when it was modified (0 where the store
    keeps no time).
    """

    kind: Kind
    num_bytes: int
    mtime_ns: int


class Source(Protocol):
    """One file of a store, in the version that was there when it was opened. Safe to read from
    several threads.

    `version` changes whenever the file does, and is the same wherever and whenever it is opened: a
    time, a hash, an ETag.
    """

    @property
    def path(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def version(self) -> str: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset`. Raises ChangedError where the file is shorter
        or another than when it was opened, StoreError where the storage fails; both with the
        `offset` that they failed at.
        """

    def close(self) -> None:
        """Give back what reading holds (a descriptor); a later read takes it again. Not while
        another thread reads.
        """


class Store(Protocol):
    """A place that holds folders and files. Raises StoreError where it does not answer.

    `requests_at_once` is how many threads reading keeps busy: 1 where the machine's own cores are
    the limit.
    """

    @property
    def requests_at_once(self) -> int: ...

    def expand(self, path: str) -> Sequence[str]:
        """The paths that a pattern (`*`, `?`, `[...]`) means, [`path`] for others. Raises
        InputError where nothing matches.
        """

    def list(self, path: str) -> Sequence[Entry]:
        """The names in the folder `path`, sorted. Raises InputError where it cannot be listed."""

    def stat(self, path: str) -> Stat | None:
        """Facts about `path`, None where nothing is there."""

    def open(self, path: str) -> Source:
        """The regular file `path`. Raises InputError where it is missing, something else or may not
        be read.
        """

    def resolve(self, path: str) -> str:
        """The one name, to be recorded, of whatever `path` means now: absolute, links followed, a
        branch as its commit.
        """

    def check_inside(self, root: str, path: str) -> None:
        """Raise InputError where `path` is a link that is broken, or leads out of the checkpoint in
        the folder `root`.
        """


def open_store(path: str) -> Store:
    """The store that `path` belongs to. Raises InputError for an unknown scheme."""
    match = _SCHEME.match(path)
    scheme = match[1] if match else ""
    if scheme not in STORES:
        known = ", ".join(f"{each}://" for each in STORES if each) or "paths of this machine"
        meant = meant_address(path)
        raise InputError(
            f"{path}: pmerge does not read {scheme}://",
            details=[f"known  {known}"],
            hint=f"did you mean  {meant}" if meant else "copy the checkpoints to a folder, and name that",
        )
    store: Store = import_module(STORES[scheme]).STORE
    return store


def is_local(path: str) -> bool:
    """Whether `path` is one of this machine."""
    return not _SCHEME.match(path)


def as_path(given: StrPath) -> str:
    """A path as it was typed, in its shortest form: `run/./a/` is `run/a`, `hf://org/name/` is
    `hf://org/name`.

    A leading `~` is the home folder, since the shell leaves it alone in `--output=~/x` and in a
    list of paths.
    """
    text = os.fspath(given)
    return str(Path(os.path.expanduser(text))) if is_local(text) else text.rstrip("/")  # noqa: PTH111  # never raises


def join(folder: str, name: str) -> str:
    """The path of `name` in `folder`."""
    return name if folder == "." else f"{folder.removesuffix('/')}/{name}"


def name_of(path: str) -> str:
    """The last part of a path."""
    return path.rpartition("/")[2]


def folder_of(path: str) -> str:
    """The folder that a path lies in."""
    return str(Path(path).parent) if is_local(path) else path.rpartition("/")[0]


def is_glob(text: str) -> bool:
    """Whether `text` is a pattern."""
    return any(character in text for character in "*?[")


def match_names(store: Store, folder: str, pattern: str) -> list[str]:
    """The paths below `folder` that `pattern` means, sorted. Raises InputError where a folder in it
    is missing.
    """
    first, _, rest = pattern.partition("/")
    names = [entry.name for entry in store.list(folder) if fnmatchcase(entry.name, first)] if is_glob(first) else [first]
    found = [path for path in (join(folder, name) for name in names) if store.stat(path) is not None]
    return found if not rest else [each for path in found for each in match_names(store, path, rest)]


def resolve(path: str) -> str:
    """The one name of whatever `path` means now, see `Store.resolve`."""
    return open_store(path).resolve(path)


def read_bytes(source: Source, offset: int, num_bytes: int) -> bytearray:
    """`num_bytes` from `offset`. Raises what `Source.read_into` raises."""
    data = bytearray(num_bytes)
    source.read_into(offset, memoryview(data))
    return data


def read_file(path: str, max_bytes: int) -> bytes:
    """The content of a small file. Raises InputError where it is missing, no regular file or larger
    than `max_bytes`.
    """
    with closing(open_store(path).open(path)) as source:
        if source.num_bytes > max_bytes:
            raise InputError(
                f"{path} is too large to be what its name says",
                details=[f"found     {source.num_bytes} bytes", f"expected  at most {max_bytes} bytes"],
            )
        return bytes(read_bytes(source, 0, source.num_bytes))
