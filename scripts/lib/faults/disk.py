"""A strict model of a disk under power loss: after a crash only that is there which fsync has
guaranteed; the rest may be.

    changes = read_record(log)           what a run changed below a folder, call by call (see `shim.c`)
    disk = Disk(folder, before)          the folder as it was, all of it durable
    disk.apply(change) ...               up to the moment of the crash
    disk.crash(survivors).write(folder)  one of the states that may be found after it

A name survives if its folder was synced after the name was made; the bytes of a file survive if the
file was synced after they were written. Of everything else each part may survive or not
(`Survivors`): names without bytes, sizes without data, the last of several renames. What the model
takes for granted is the order within one folder: if a change of names survives, all earlier ones of
the folders that it touches do, as every journal keeps it.

Not modelled: links, modes, and filesystems that lie about a sync.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HEAD = struct.Struct("<8sqqIIII")


class Change(NamedTuple):
    """One call that succeeded. `first`: an offset, a size or the mtime in ns; `inode`: of what is
    created or synced.
    """

    kind: str
    path: Path
    other: Path
    first: int
    inode: int
    data: bytes


def read_record(log: Path) -> list[Change]:
    content, at, found = log.read_bytes(), 0, []
    while at < len(content):
        kind, first, inode, *sizes, _ = HEAD.unpack_from(content, at)
        at += HEAD.size
        parts = []
        for size in sizes:
            parts.append(content[at : at + size])
            at += size
        path, other = (Path(os.fsdecode(part)) for part in parts[:2])
        found.append(Change(kind.rstrip(b"\0").decode(), path, other, first, inode, parts[2]))
    return found


@dataclass(eq=False)
class Node:
    """A file with the writes that it has seen, or a folder with the names in it that a living
    system sees.
    """

    is_folder: bool
    inode: int = 0
    names: dict[str, Node] = field(default_factory=dict)
    content: bytes = b""  # that is durable
    pending: list[Change] = field(default_factory=list)  # since the last sync
    mtime_ns: int = 0


class Renaming(NamedTuple):
    """A change of names, as a list of (folder, name, node or None for removed); all of it survives
    or nothing.
    """

    sets: tuple[tuple[Node, str, Node | None], ...]


class Survivors(NamedTuple):
    """Of what no sync has guaranteed: which changes of names survive, and which writes. Called once
    for each, in order.
    """

    names: Callable[[int, int], bool]
    data: Callable[[Change], bool]


class Disk:
    """Applies changes one by one, and knows at each moment what is guaranteed."""

    def __init__(self, folder: Path) -> None:
        """The folder as it is now; all that is in it is durable."""
        self.top = folder
        self.root = Node(True)
        self._load(folder, self.root)
        self.durable = {self.root: dict(self.root.names)}
        self._copy_names(self.root)
        self.pending: list[Renaming] = []

    def _load(self, folder: Path, node: Node) -> None:
        for path in folder.iterdir():
            status = path.stat()
            child = Node(path.is_dir(), status.st_ino, mtime_ns=status.st_mtime_ns)
            node.names[path.name] = child
            if child.is_folder:
                self._load(path, child)
            else:
                child.content = path.read_bytes()

    def _copy_names(self, node: Node) -> None:
        self.durable[node] = dict(node.names)
        for child in node.names.values():
            if child.is_folder:
                self._copy_names(child)

    def _find(self, path: Path) -> Node:
        node = self.root
        for name in path.relative_to(self.top).parts:
            node = node.names[name]
        return node

    def apply(self, change: Change) -> None:
        """Take a change into account. Calls on files that have no name any more change nothing."""
        try:
            getattr(self, f"_{change.kind}")(change)
        except KeyError:
            if change.kind not in ("write", "size", "grow", "fsync"):
                raise

    def _rename_all(self, *sets: tuple[Node, str, Node | None]) -> None:
        for folder, name, node in sets:
            if node is None:
                del folder.names[name]
            else:
                folder.names[name] = node
        self.pending.append(Renaming(sets))

    def _create(self, change: Change, is_folder: bool = False) -> None:
        node = Node(is_folder, change.inode)
        if is_folder:
            self.durable[node] = {}
        self._rename_all((self._find(change.path.parent), change.path.name, node))

    def _mkdir(self, change: Change) -> None:
        self._create(change, is_folder=True)

    def _unlink(self, change: Change) -> None:
        self._rename_all((self._find(change.path.parent), change.path.name, None))

    def _link(self, change: Change) -> None:
        self._rename_all((self._find(change.other.parent), change.other.name, self._find(change.path)))

    def _rename(self, change: Change) -> None:
        node = self._find(change.path)
        self._rename_all(
            (self._find(change.path.parent), change.path.name, None), (self._find(change.other.parent), change.other.name, node)
        )

    def _swap(self, change: Change) -> None:
        one, other = self._find(change.path), self._find(change.other)
        self._rename_all(
            (self._find(change.path.parent), change.path.name, other), (self._find(change.other.parent), change.other.name, one)
        )

    def _write(self, change: Change) -> None:
        self._find(change.path).pending.append(change)

    _size = _grow = _write

    def _fsync(self, change: Change) -> None:
        node = self._find(change.path)
        if not node.is_folder:
            node.content, node.pending, node.mtime_ns = written(node, lambda _: True), [], change.first
            return
        last = max((k for k, each in enumerate(self.pending) if any(folder is node for folder, *_ in each.sets)), default=-1)
        chosen = closed(self.pending, {last} if last >= 0 else set())
        for k in sorted(chosen):
            self._make_durable(self.pending[k], self.durable)
        self.pending = [each for k, each in enumerate(self.pending) if k not in chosen]

    @staticmethod
    def _make_durable(renaming: Renaming, durable: dict[Node, dict[str, Node]]) -> None:
        for folder, name, node in renaming.sets:
            if node is None:
                durable[folder].pop(name, None)
            else:
                durable[folder][name] = node

    def crash(self, survivors: Survivors) -> State:
        """A state that may be found when the power is back."""
        names = {folder: dict(entries) for folder, entries in self.durable.items()}
        wanted = {k for k in range(len(self.pending)) if survivors.names(k, len(self.pending))}
        for k in sorted(closed(self.pending, wanted)):
            self._make_durable(self.pending[k], names)
        return State(self.root, names, survivors)


def closed(renamings: list[Renaming], wanted: set[int]) -> set[int]:
    """The wanted changes of names with all earlier ones of the folders that they touch."""
    found: set[int] = set()
    folders: set[Node] = set()
    for k in range(len(renamings) - 1, -1, -1):
        touched = {folder for folder, *_ in renamings[k].sets}
        if k in wanted or touched & folders:
            found.add(k)
            folders |= touched
    return found


def written(node: Node, survives: Callable[[Change], bool]) -> bytes:
    """The bytes of a file with those of its pending writes that survive."""
    content = bytearray(node.content)
    for change in node.pending:
        if not survives(change):
            continue
        end = change.first + len(change.data)
        if change.kind == "size":
            del content[change.first :]
        content.extend(bytes(max(0, end - len(content))))
        if change.kind == "write":
            content[change.first : end] = change.data
    return bytes(content)


@dataclass(frozen=True)
class State:
    """What is on the disk after a crash."""

    root: Node
    names: dict[Node, dict[str, Node]]
    survivors: Survivors

    def write(self, folder: Path) -> None:
        """Make `folder` hold this state. Inodes are new ones: JSON that names an inode in a field
        of that name is adapted.
        """
        shutil.rmtree(folder, ignore_errors=True)
        inodes: dict[int, int] = {}
        files = dict(self._write_folder(folder, self.root, inodes))
        for path, node in files.items():
            if path.suffix == ".json" and b'"inode"' in path.read_bytes():
                adapt(path, inodes)
            if node.mtime_ns:
                os.utime(path, ns=(node.mtime_ns, node.mtime_ns))

    def _write_folder(self, path: Path, node: Node, inodes: dict[int, int]) -> Iterator[tuple[Path, Node]]:
        path.mkdir()
        inodes[node.inode] = path.stat().st_ino
        for name, child in self.names[node].items():
            if child.is_folder:
                yield from self._write_folder(path / name, child, inodes)
            else:
                (path / name).write_bytes(written(child, self.survivors.data))
                inodes[child.inode] = (path / name).stat().st_ino
                yield path / name, child


def adapt(path: Path, inodes: dict[int, int]) -> None:
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        return  # torn
    if isinstance(record, dict) and "inode" in record:
        path.write_text(json.dumps({**record, "inode": inodes.get(record["inode"], record["inode"])}))


def strategies(numbers: random.Random, thorough: bool) -> Iterator[tuple[str, Survivors]]:
    """The extreme states, and with `thorough` two random ones."""

    def every(*_: object) -> bool:
        return True

    def nothing(*_: object) -> bool:
        return False

    def sizes(change: Change) -> bool:
        return change.kind != "write"

    def some(*_: object) -> bool:
        return numbers.random() < 0.5

    yield "nothing more than is guaranteed", Survivors(nothing, nothing)
    yield "all names, no bytes", Survivors(every, nothing)
    yield "all names, sizes without bytes", Survivors(every, sizes)
    yield "all bytes, no names", Survivors(nothing, every)
    if thorough:
        part = numbers.random()
        yield "the first names, some bytes", Survivors(lambda k, count: k < part * count, some)
        yield "some names, some bytes", Survivors(some, some)
