"""Files in a dictionary, as a store: `memory://run/step_1/model.safetensors`.
`stores.STORES["memory"]` makes pmerge read them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from merge_cli.errors import ChangedError, InputError
from merge_cli.stores.store import Entry, Stat, join

FILES: dict[str, bytes] = {}


class MemorySource:
    def __init__(self, path: str) -> None:
        self.path, self.num_bytes = path, len(FILES[path])
        self.version = hashlib.sha256(FILES[path]).hexdigest()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        data = FILES.get(self.path, b"")
        if hashlib.sha256(data).hexdigest() != self.version or offset + len(buffer) > len(data):
            raise ChangedError(f"{self.path} is not what it was", offset=offset)
        buffer[:] = data[offset : offset + len(buffer)]

    def close(self) -> None: ...


class MemoryStore:
    requests_at_once = 4

    def expand(self, path: str) -> Sequence[str]:
        return [path]

    def list(self, path: str) -> Sequence[Entry]:
        below = [name[len(path) + 1 :] for name in FILES if name.startswith(path + "/")]
        if not below:
            raise InputError(f"cannot list {path}")
        return [Entry(name, "file" if name in below else "folder") for name in sorted({name.split("/")[0] for name in below})]

    def stat(self, path: str) -> Stat | None:
        if path in FILES:
            return Stat("file", len(FILES[path]), 0)
        return Stat("folder", 0, 0) if any(name.startswith(path + "/") for name in FILES) else None

    def open(self, path: str) -> MemorySource:
        if path not in FILES:
            raise InputError(f"cannot open {path}")
        return MemorySource(path)

    def resolve(self, path: str) -> str:
        return path

    def check_inside(self, root: str, path: str) -> None: ...


STORE = MemoryStore()


def load(folder: Path, path: str) -> None:
    """Take over all files below `folder`, as `path`."""
    FILES.update(
        {join(path, file.relative_to(folder).as_posix()): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    )
