"""Work in several threads that goes on with fewer, or with none, where the system allows no more.

`threading.Thread.start` and thread pools raise RuntimeError under a limit on processes, and wait
for ever for a thread that dies of too little memory before it has begun.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(function: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """`function` of every item, in order, by this thread and up to `workers` - 1 more. Of several
    errors the first is raised, after all threads have ended what they were at.
    """
    work = _Work(function, items)
    for _ in range(min(workers, len(items)) - 1):
        with suppress(RuntimeError):
            _thread.start_new_thread(work.run, ())
    try:
        work.run()
    finally:
        work.end()
    if work.errors:
        raise work.errors[min(work.errors)]
    return [work.results[i] for i in range(len(items))]


class _Work(Generic[T, R]):
    """The items that are left, and the outcomes."""

    def __init__(self, function: Callable[[T], R], items: Sequence[T]) -> None:
        self._function = function
        self._items = items
        self._next = self._running = 0
        self._changed = threading.Condition()
        self.results: dict[int, R] = {}
        self.errors: dict[int, BaseException] = {}

    def run(self) -> None:
        """Take items until there are none, or one has failed."""
        while True:
            with self._changed:
                if self._next == len(self._items) or self.errors:
                    return
                number, self._next, self._running = self._next, self._next + 1, self._running + 1
            try:
                self.results[number] = self._function(self._items[number])
            except BaseException as error:  # raised by the thread that waits for all
                self.errors[number] = error
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

    def end(self) -> None:
        """Hand out no more items, and wait for those that are being worked on."""
        with self._changed:
            self._items = self._items[: self._next]
            while self._running:
                self._changed.wait()
