"""Power loss at every moment, in a strict model: only what fsync has guaranteed is there, of the
rest any part (`disk.py`).

After each crash the destination is absent or complete, or the old result where it was to be
replaced; the same commands then end with the same bytes and leave nothing behind. After exit 0 the
result is there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.attacks.world import Attack, Try, World, first_line, misbehavior, rank
from faults.disk import Change, Disk, read_record, strategies
from faults.ground import COMMAND, FILESYSTEMS, digests
from faults.runs import Setting

NFS = "no renameat2 (NFS, Lustre)"
BY_FILE = "no folder rename"
SWEEP = ("sweep", "in", "-o", "out/s", "--method", "sma,wma", "--threads", "1", "--quiet")


@dataclass(frozen=True)
class Job:
    """Commands that make one result together. `stop`: the first one stands still at this fault
    while the others run.
    """

    name: str
    commands: Sequence[Sequence[str]]
    filesystem: str = "Linux"
    overwrite: bool = False
    stop: str = ""
    result: str = "merged"


JOBS = (
    Job("lone", (COMMAND,)),
    Job("--overwrite", ((*COMMAND, "--overwrite"),), overwrite=True),
    Job("--overwrite, NFS", ((*COMMAND, "--overwrite"),), NFS, overwrite=True),
    Job("file by file", (COMMAND,), BY_FILE),
    Job("sweep", (SWEEP,), result="s"),
    Job("two ranks", (rank(1), rank(0))),
    Job("three ranks, pieces", (rank(1, size=3), rank(0, size=3))),
    Job("three ranks, pieces, one stopped meanwhile", (rank(1, size=3), rank(0, size=3)), stop="pwrite:9:signal:19:/out"),
    Job("two ranks, --overwrite, NFS", (rank(1, "--overwrite"), rank(0, "--overwrite")), NFS, overwrite=True),
)


def carry_out(world: World, job: Job, log: Path | None = None) -> str:
    """Run all commands of a job; "" if one of them published, else what went wrong."""
    others: Setting = {"refuse": FILESYSTEMS[job.filesystem]}
    if log:
        others["record"] = (str(log), str(world.out))
    stop = job.stop if log else ""
    setting: Setting = {**others, "fault": stop}
    first = world.runs.start(job.commands[0], world.folder, **setting)
    stopped = bool(stop) and first.stops()
    ended = [] if stopped else [first.end()]
    ended += [world.others.run(command, world.folder, **others) for command in job.commands[1:]]
    ended += [first.end()] if stopped else []
    for run in ended:
        if wrong := misbehavior(run):
            return wrong
        if run.code and "exists already" not in run.stderr:
            return f"exit {run.code}: {first_line(run)}"
    return ""


def crashes(world: World, job: Job, every: int, share: float = 1.0, seed: int = 0) -> Iterator[Try]:
    """Crash after each `every`-th change of the job, and after the last one; a `share` of the
    states is continued.

    Where the world is not `thorough`, only changes that give something its final name count: what
    they promise must be kept.
    """
    numbers = random.Random(f"{job.name} {seed}")
    log = world.folder / "changes"
    log.unlink(missing_ok=True)
    world.reset(job.overwrite)
    disk = Disk(world.out)
    if wrong := carry_out(world, job, log):
        yield Try(f"{job.name}, no crash", wrong)
        return
    expected, old = results(world, job), digests(world.folder / "old") if job.overwrite else {}
    changes = read_record(log)
    counted = 0
    for k, change in enumerate(changes, 1):
        disk.apply(change)
        counted += world.thorough or change.kind in ("rename", "swap")
        is_last = k == len(changes)
        if not is_last and (counted % every or not (world.thorough or change.kind in ("rename", "swap"))):
            continue
        for what, survivors in strategies(numbers, world.thorough):
            disk.crash(survivors).write(world.out)
            broken = lost(world, job, expected, old, is_last)
            if not broken and (is_last or numbers.random() < share):
                broken = continued(world, job, expected)
            yield Try(f"{job.name}, after change {k} of {len(changes)} ({shown(world, change)}), {what}", broken)


def shown(world: World, change: Change) -> str:
    return f"{change.kind} {change.path.relative_to(world.out)}"


def results(world: World, job: Job) -> dict[str, dict[str, str]]:
    """The digests of each destination of a job, by its name in `out`."""
    found = [world.out / job.result] if job.result != "s" else [path for path in (world.out / "s").iterdir() if path.is_dir()]
    return {str(path.relative_to(world.out)): digests(path) for path in found}


def lost(world: World, job: Job, expected: Mapping[str, dict[str, str]], old: dict[str, str], is_last: bool) -> str:
    for name, right in expected.items():
        found = digests(world.out / name)
        if found == right:
            continue
        if is_last:
            return f"exit 0, and after a power loss {name} is {'not complete' if found else 'gone'}"
        if old and found == old:
            continue
        if old and not found and digests(world.staging / "replaced") in (old, right):
            continue  # moved aside, to be put back; the new one if a rank that came late makes it again
        readable = any(file.endswith(".index.json") for file in found)
        if old or ((world.out / name).exists() and (readable or not world.staging.exists())):
            return f"{name} is neither absent nor complete: {sorted(file for file in right if found.get(file) != right[file])}"
    return ""


def continued(world: World, job: Job, expected: Mapping[str, dict[str, str]]) -> str:
    """The same commands, run again: the same bytes, nothing left behind."""
    if wrong := carry_out(world, job):
        return f"the next run: {wrong}"
    if results(world, job) != expected:
        return "the next run gives other bytes"
    left = [str(path.relative_to(world.out)) for path in world.out.rglob("*.pmerge-partial/*")]
    return f"left behind: {left}" if left else ""  # an empty staging folder is left by a crash in the last instant


def tries(world: World) -> Iterator[Try]:
    for job in JOBS:
        yield from crashes(world, job, 1 if world.thorough else 3, share=0.3 if world.thorough else 1.0)


ATTACK = Attack("power", "power", "Power loss loses nothing that was published, and after exit 0 the result is there.", tries)
