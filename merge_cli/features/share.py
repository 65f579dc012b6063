"""One average made by several processes: the feature behind torchrun, srun, --workers and `pmerge finalize`, as a library.

    run_share   what one rank does: its share, then what no other rank has begun; the one that comes last publishes
    finalize    publishes what ranks have finished, by hand

The result is, bit for bit, that of `run_average`. There is no rendezvous: ranks may start late, die, and be started again, and
running the same command again does only what is missing. How ranks keep out of each other's way is in `output/joint.py`.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_cli.errors import InputError, OutputError, UsageError, first_ten
from merge_cli.features.average import AveragePlan, AverageResult, Progress
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.names import MANIFEST, STAGING_SUFFIX
from merge_cli.output.manifest import complete
from merge_cli.planning.plan import WorkItem
from merge_cli.planning.record import describe, from_state, replan
from merge_cli.ranks.shares import cut, order_of_work, shares
from merge_cli.stores.store import StrPath, as_path

if TYPE_CHECKING:
    from merge_cli.engine.chunk import Statistics
    from merge_cli.output.joint import JointStaging


@dataclass(frozen=True)
class ShareResult(AverageResult):
    """What a rank has done. `has_published`: it was the one that published; `stood`: the result stood when it came;
    `missing`: so many files are still with other ranks (0 where it is published)."""

    has_published: bool = False
    stood: bool = False
    missing: int = 0


def run_share(
    plan: AveragePlan, *, on_progress: Callable[[Progress], None] | None = None, command: Sequence[str] = ()
) -> ShareResult:
    """Do what `plan.rank` is to do. The progress that rank 0 hears of is that of all ranks, others hear of their own.

    Raises what `run_average` raises; then this rank's work is incomplete, and the others go on. A result with `missing` files is no
    failure: the ranks that have them publish.
    """
    from merge_cli.engine.chunk import Statistics
    from merge_cli.engine.input_checks import check_inputs_unchanged
    from merge_cli.engine.sink import FolderSink
    from merge_cli.engine.stream import stream
    from merge_cli.output.joint import JointStaging
    from merge_cli.output.manifest import count_nonfinite

    if plan.findings:
        raise plan.findings[0]
    began = time.perf_counter()
    merge, rank = plan.merge, plan.rank
    with JointStaging(plan.output, merge, rank, plan.run.overwrite) as staging:
        staging.join(describe(merge), restart=plan.run.restart)
        if staging.is_published:
            return ShareResult(plan.output, time.perf_counter() - began, Statistics(), len(merge.files), stood=True)
        reused = len(merge.files) - len(staging.missing())
        pieces = cut(merge.files, rank.world_size if staging.has_flock else 1)
        own = {piece.name for piece in shares(pieces, rank.world_size)[rank.rank]}
        total, claimed = Statistics(), 0
        tell = _reporter(plan, staging, on_progress)

        def report(statistics: Statistics) -> None:
            tell(statistics.bytes_written + total.bytes_written)

        class Claiming(FolderSink):
            def claim(self, item: WorkItem) -> bool:
                nonlocal claimed
                is_ours = staging.claim(item, item.name in own)
                claimed += is_ours
                return is_ours

        def finished(_: int, item: WorkItem, sha256: str, nonfinite: Mapping[str, int]) -> None:
            staging.record_piece(item, sha256, nonfinite)
            if not item.is_whole:
                staging.assemble_file(item.file)

        work = order_of_work(pieces, rank.rank, rank.world_size)
        while missing := set(staging.missing()):  # again, as long as there is something: a rank that had a claim may have died
            before = claimed
            todo = [piece for piece in work if piece.file.name in missing]
            part = stream(merge, todo, Claiming([staging.checkpoint], report, finished), plan.budget)
            total = total.plus(part)
            staging.assemble_files()
            if claimed == before:
                break
        nonfinite: dict[str, int] = {}
        if left := len(staging.missing()):
            return ShareResult(plan.output, time.perf_counter() - began, total, reused, missing=left)
        done = staging.take_turn()
        if done:
            complete(merge, staging.checkpoint, done, command)
            check_inputs_unchanged(merge)
            staging.publish()
            nonfinite = count_nonfinite(done)
    return ShareResult(plan.output, time.perf_counter() - began, total, reused, nonfinite, has_published=bool(done))


def _reporter(plan: AveragePlan, staging: JointStaging, on_progress: Callable[[Progress], None] | None) -> Callable[[int], None]:
    """Tells the others of this rank's progress, and the caller of that of all."""
    read, write = plan.merge.bytes_to_read, plan.merge.bytes_to_write
    began = time.perf_counter()
    asked, share = -1.0, 0.0

    def report(bytes_written: int) -> None:
        nonlocal asked, share
        staging.tell(bytes_written)
        if on_progress is None:
            return
        if plan.rank.rank == 0 and time.perf_counter() - asked > 2.0:
            asked, share = time.perf_counter(), min(1.0, staging.bytes_of_all() / max(write, 1))
        done = share if plan.rank.rank == 0 else bytes_written / max(write, 1)
        on_progress(Progress(int(done * read), read, int(done * write), write, time.perf_counter() - began))

    return report


def finalize(destination: StrPath, *, overwrite: bool = False) -> Path:
    """Publish the average whose ranks have finished all files without one of them publishing it; returns its path.

    Raises OutputError, naming what is missing, where something is; InputError where inputs have changed since.
    """
    from merge_cli.engine.input_checks import check_inputs_unchanged
    from merge_cli.output.folder import differences, with_fingerprints
    from merge_cli.output.joint import JointStaging
    from merge_cli.output.schema import check_schema
    from merge_cli.system.files import read_json

    path = Path(as_path(destination))
    path = path.with_name(path.name.removesuffix(STAGING_SUFFIX)) if path.name.endswith(STAGING_SUFFIX) else path
    folder = path.with_name(path.name + STAGING_SUFFIX)
    record = read_json(folder / "state.json")
    if not record:
        if (path / MANIFEST).is_file() and not os.path.lexists(folder):
            return path
        raise UsageError(f"there is no unfinished run for {path}", details=[f"looked for  {folder / 'state.json'}"])
    check_schema(record, folder / "state.json", "finalize it with that version of pmerge, or a newer one", OutputError)
    try:
        state, command = with_fingerprints(record["state"]), record["command"]
        planned = from_state(state)
        seen = Seen()
        kept = planned.spec.training_state
        merge = replan(planned, [open_checkpoint(each, seen=seen, training_state=kept) for each in planned.paths])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise OutputError(
            f"{folder / 'state.json'} does not describe a run of this version of pmerge: {error!r:.200}",
            hint="run the command that began it again; to throw its work away, add --restart",
        ) from error
    now = describe(merge)
    if changed := differences(state, json.loads(json.dumps(now))):
        raise InputError(f"the inputs of {path} have changed since its ranks began", details=first_ten(changed, "more differences"))
    with JointStaging(path, merge, None, overwrite) as staging:
        staging.join(now)
        if staging.is_published:
            return path
        staging.assemble_files()
        if missing := staging.missing():
            raise OutputError(
                f"{len(missing)} of {len(merge.files)} files of {path} are not finished",
                details=first_ten(missing),
                hint=f"run the ranks again, they do only what is missing:  {command}",
            )
        if done := staging.take_turn():
            complete(merge, staging.checkpoint, done, shlex.split(command))
            check_inputs_unchanged(merge)
            staging.publish()
    return path
