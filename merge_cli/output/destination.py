"""A destination as a transaction: claimed, written, recorded and published by one process or by
several.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Protocol, Self

from merge_cli.engine.sink import Writer
from merge_cli.output.folder import StagingFolder
from merge_cli.output.records import FileRecord
from merge_cli.planning.plan import MergePlan, WorkItem


class Claim(Enum):
    """The answer to a claim."""

    TAKEN = "this process makes it now"
    RECORDED = "it is finished"
    HELD = "another process is at it"


class Destination(Protocol):
    """A transaction on one destination, which becomes complete or stays as it is. `merge` has this
    one output.

    1. `with destination:`               lock; finish or undo the publishing of a dead run; throw away or keep its files
    2. `claim(item)`, `open(item)`       for each file or piece that is to be written, from several threads
    3. `done(item, sha256, nonfinite)`   after the writer has made it durable: it is recorded, and the claim released
    4. `begin_to_publish()`              the records of all files, if this process is the one to publish
    5. `clean()`                         by `publish`, after the rename

    Leaving the context without the last two leaves a staging folder from which the same request
    continues.
    """

    merge: MergePlan
    folder: StagingFolder
    overwrite: bool
    is_published: bool
    reused: int

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def missing(self) -> list[str]:
        """The names of the files that are not recorded; none once it is published."""

    def claim(self, item: WorkItem) -> Claim: ...

    def release(self, item: WorkItem) -> None:
        """Give a claim back without a record."""

    def open(self, item: WorkItem) -> Writer: ...

    def done(self, item: WorkItem, sha256: str, nonfinite: Mapping[str, int]) -> None: ...

    def begin_to_publish(self) -> dict[str, FileRecord]: ...

    def clean(self) -> None: ...
