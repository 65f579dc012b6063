"""Carry out a plan: one runner for an average, a sweep, one of several ranks, and `pmerge
finalize`.

    enter   every destination is locked; the publishing of a dead run is finished or undone, finished files are kept
    stream  the files, or this rank's pieces of them, that no record says are finished
    publish every output all of whose files are finished, by the one sequence of `output/publish.py`

There is no rendezvous of ranks: they may start late, die, and be started again, and running the
same command again does only the missing work. `output/joint.py` keeps them out of each other's way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_cli.errors import OutputError
from merge_cli.output.destination import Destination
from merge_cli.output.existing import read_manifest
from merge_cli.output.joint import JointDestination
from merge_cli.output.manifest import count_nonfinite
from merge_cli.output.progress import Progress, RunProgress
from merge_cli.output.publish import publish
from merge_cli.output.records import FileRecord
from merge_cli.output.sink import PublishingSink
from merge_cli.output.solo import SoloDestination
from merge_cli.planning.plan import MergePlan, WorkItem
from merge_cli.ranks.launcher import Rank
from merge_cli.ranks.shares import cut, order_of_work, shares
from merge_cli.request.spec import RunConfig

if TYPE_CHECKING:
    from merge_cli.engine.budget import Budget
    from merge_cli.engine.chunk import Statistics


@dataclass(frozen=True)
class Job:
    """A plan to be carried out by this process, alone or as one of several ranks; `rank` None only
    publishes.

    `destinations` has for each output of `merge` its folder, and the plan of this output by itself.
    Without a budget nothing is computed.
    """

    merge: MergePlan
    destinations: tuple[tuple[Path, MergePlan], ...]
    run: RunConfig
    rank: Rank | None
    budget: Budget | None = None
    bytes_to_read: int = 0
    command: Sequence[str] = ()


@dataclass(frozen=True)
class OutputResult:
    """The outcome for one output. `reused` counts files that were finished before, `nonfinite`
    elements by tensor.

    `has_published`: by this process; `already_published`: before it came, or by another rank;
    `missing` are the files that other ranks still have to finish, one of which then publishes.
    """

    path: Path
    reused: int
    has_published: bool
    already_published: bool
    missing: tuple[str, ...]
    nonfinite: Mapping[str, int]


@dataclass(frozen=True)
class JobResult:
    """The outcome of a job. `claimed` counts the files and pieces that this process has made."""

    outputs: tuple[OutputResult, ...]
    statistics: Statistics
    claimed: int
    seconds: float


def carry_out(job: Job, on_progress: Callable[[Progress], None] | None = None) -> JobResult:
    """Make the outputs of a job. Raises OutputError, ChangedError, NonFiniteError or InputError;
    each destination is then absent or complete, and the same request continues. A result with
    `missing` files is no failure.
    """
    from merge_cli.engine.chunk import Statistics
    from merge_cli.engine.input_checks import check_no_writer
    from merge_cli.engine.stream import stream

    check_no_writer(job.merge)
    began = time.perf_counter()
    statistics = Statistics()
    with ExitStack() as stack:
        destinations = [stack.enter_context(_destination(job, path, merge)) for path, merge in job.destinations]
        rank = None if job.rank is None or job.rank.is_alone else job.rank
        progress = stack.enter_context(closing(RunProgress(destinations, job.bytes_to_read, rank, on_progress)))
        sink = PublishingSink(destinations, progress)
        items = _items(job, destinations)
        _assemble_files(destinations)
        while job.budget is not None and (work := _missing(items, destinations)):
            before = sink.claimed
            try:
                statistics = statistics.plus(stream(job.merge, work, sink, job.budget))
            except OutputError:
                if not _are_over(destinations):
                    raise
                break  # this host was cut off while the others published
            progress.begin_round(statistics)
            _assemble_files(destinations)
            if sink.claimed == before:
                break  # else once more: a rank that had a claim may have died
        missing = [tuple(each.missing()) for each in destinations]
        published = _publish(job, [each for each, names in zip(destinations, missing, strict=True) if not names])
        outputs = tuple(_result(each, names, published) for each, names in zip(destinations, missing, strict=True))
    return JobResult(outputs, statistics, sink.claimed, time.perf_counter() - began)


def _destination(job: Job, path: Path, merge: MergePlan) -> Destination:
    is_alone = job.rank is not None and job.rank.is_alone
    return SoloDestination(path, merge, job.run) if is_alone else JointDestination(path, merge, job.run, job.rank)


def _items(job: Job, destinations: Sequence[Destination]) -> list[WorkItem]:
    """The files, or pieces of files, in the order in which this process tries them, for all
    outputs.
    """
    files, rank = job.merge.files, job.rank
    if rank is None:
        return []
    joint = [each for each in destinations if isinstance(each, JointDestination)]
    if not joint:
        return [WorkItem.whole(file) for file in files]
    pieces = cut(files, rank.world_size if all(each.has_flock for each in joint) else 1)
    own = {piece.name for piece in shares(pieces, rank.world_size)[rank.rank]}
    for each in joint:
        each.own = own
    return order_of_work(pieces, rank.rank, rank.world_size)


def _missing(items: Sequence[WorkItem], destinations: Sequence[Destination]) -> list[WorkItem]:
    """The items of files that are not finished in every destination, each for the outputs that lack
    the file.
    """
    missing = [set(each.missing()) for each in destinations]
    found = []
    for item in items:
        outputs = tuple(k for k, names in enumerate(missing) if item.file.name in names)
        if outputs:
            found.append(item._replace(outputs=outputs))
    return found


def _assemble_files(destinations: Sequence[Destination]) -> None:
    for each in destinations:
        if isinstance(each, JointDestination):
            each.assemble_files()


def _publish(job: Job, finished: Sequence[Destination]) -> dict[Path, Mapping[str, FileRecord]]:
    """Publish the finished destinations that no other rank has published; the records of their
    files.
    """
    waiting = [each for each in finished if not each.is_published]
    waiting.sort(key=lambda each: each.folder.path)  # the same order in all ranks, which wait for each other
    ready = [(each, records) for each in waiting if (records := each.begin_to_publish())]
    try:
        if ready:
            publish(job.merge, ready, job.command)
    except OutputError:
        if not _are_over([each for each, _ in ready]):
            raise
        ready = []  # where a lock failed, another rank has published the same bytes meanwhile
    return {each.folder.destination: records for each, records in ready}


def _are_over(destinations: Sequence[Destination]) -> bool:
    """Whether other ranks have published all of these, so that an error of this one's work is none."""
    return all(isinstance(each, JointDestination) and (each.is_published or each.is_over()) for each in destinations)


def _result(each: Destination, missing: tuple[str, ...], published: Mapping[Path, Mapping[str, FileRecord]]) -> OutputResult:
    path = each.folder.destination
    nonfinite: Mapping[str, int] = {}
    if path in published:
        nonfinite = count_nonfinite(published[path])
    elif each.is_published:
        nonfinite = read_manifest(path).get("nonfinite", {})
    return OutputResult(path, each.reused, path in published, each.is_published, missing, nonfinite)
