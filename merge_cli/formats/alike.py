"""Tensors of checkpoints whose headers are equal: one record a tensor, however many checkpoints
there are.

The checkpoints of one run differ in their values and seldom in their headers. The first one opened
has records of its tensors; of each other one with the same headers only the files are its own, and
a record of its tensor is made of the first one's when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping
from typing import Protocol, Self, TypeVar

from merge_cli.formats.weight_file import Files


class Movable(Protocol):
    """A record that names files."""

    def moved(self, files: Files) -> Self:
        """The same record of other files."""
        ...


T = TypeVar("T", bound=Movable)


class Moved(Mapping[str, T]):
    """The tensors of `original`, a dict of another checkpoint, in other files."""

    def __init__(self, original: Mapping[str, T], files: Files) -> None:
        self.original = original
        self._files = files

    def like(self, original: Mapping[str, T]) -> Moved[T]:
        """Those of `original`, other tensors of the same checkpoint as `self.original`."""
        return Moved(original, self._files)

    def __getitem__(self, key: str) -> T:
        return self.original[key].moved(self._files)

    def __contains__(self, key: object) -> bool:
        return key in self.original

    def __iter__(self) -> Iterator[str]:
        return iter(self.original)

    def __len__(self) -> int:
        return len(self.original)

    def keys(self) -> KeysView[str]:
        return self.original.keys()


def original_of(tensors: Mapping[str, T]) -> Mapping[str, T]:
    """The tensors that `tensors` are made of: equal ones, but for their files, have the same."""
    return tensors.original if isinstance(tensors, Moved) else tensors
