"""Which of several processes this one is, as its launcher says: torchrun, srun, Slurm arrays, Open
MPI, PMI, --workers.

No process talks to another. Each learns its rank and the number of ranks (the world size) from its
environment, and makes the same plan (see `shares.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from merge_cli.errors import UsageError


@dataclass(frozen=True)
class Rank:
    """This process: number `rank` of `world_size`, number `local_rank` of `local_size` (0: not
    known) on its machine.

    `source` says where that was learned; "" for a process on its own.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 0
    source: str = ""

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    def cores(self, of_machine: int) -> int | None:
        """Its share of the cores where its launcher leaves it all those of the machine; None where
        that is not known.
        """
        return max(1, of_machine // self.local_size) if self.local_size and self.source in (WORKER, "torchrun") else None

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


class _Launcher(NamedTuple):
    """The variables in which a launcher gives rank and world size to its processes."""

    name: str
    rank: str
    world_size: str
    local_rank: str = ""
    local_size: str = ""


WORKER, ARRAY = "--workers", "Slurm array"
_LAUNCHERS = (
    _Launcher(WORKER, "PMERGE_WORKER", "PMERGE_WORKERS", "PMERGE_WORKER", "PMERGE_WORKERS"),
    _Launcher("PMERGE_RANK", "PMERGE_RANK", "PMERGE_WORLD_SIZE"),
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Launcher("PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # the size of the step that srun started: a batch script and the shell of salloc also have
    # SLURM_PROCID and SLURM_NTASKS
    _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def find_rank(environment: Mapping[str, str], rank: int | None = None, world_size: int | None = None) -> Rank:
    """This process's rank: as given, else from the first launcher whose variables are set, else
    alone.

    The variables may be there for another reason: a shell in a training job, an array whose tasks
    make different merges. That does no harm, because a rank whose fellows never come goes on with
    their shares. Raises UsageError where only one of a pair is given or they make no sense.
    """
    worker = _LAUNCHERS[0]
    if environment.get(worker.rank):  # it has the options of the one that started it, and is none of what they say
        number, count = _number(environment, worker.rank), _number(environment, worker.world_size)
        return _checked(Rank(number, count, number, count, WORKER))
    if rank is None and world_size == 1:
        return Rank()
    if bool(environment.get("PMERGE_RANK")) != bool(environment.get("PMERGE_WORLD_SIZE")) and rank is None:
        raise UsageError("PMERGE_RANK and PMERGE_WORLD_SIZE belong together", hint="set both, or unset both")
    if (rank is None) != (world_size is None):
        raise UsageError("--rank and --world-size belong together", hint="--rank 0 --world-size 8")
    if rank is not None and world_size is not None:
        return _checked(Rank(rank, world_size, source="--rank"))
    for launcher in _LAUNCHERS:
        if environment.get(launcher.rank) and environment.get(launcher.world_size) and not _is_stale(launcher, environment):
            rank, world_size, local_rank, local_size = (_number(environment, name) for name in launcher[1:])
            found = _checked(Rank(rank, world_size, local_rank, local_size, launcher.name))
            if launcher.name != "srun" or not found.is_alone:
                return found  # a step of one may be in an array, or left over from the shell in which that was submitted
    return _array_task(environment)


def _is_stale(launcher: _Launcher, environment: Mapping[str, str]) -> bool:
    """Whether the variables came into a Slurm job from the step of another job in which it was
    submitted.
    """
    job, _, step = environment.get("PMI_JOBID", "").partition(".")
    return launcher.name == "PMI" and step.isdecimal() and job != environment.get("SLURM_JOB_ID", job)


def _array_task(environment: Mapping[str, str]) -> Rank:
    """The rank of a task of a Slurm array. Of an array with gaps (1,3,7) two tasks may get one
    rank: claims keep them apart.
    """
    if not environment.get("SLURM_ARRAY_TASK_ID"):
        return Rank()
    task, count, first, step = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT", "MIN", "STEP"))
    return _checked(Rank((task - first) // max(step, 1) % max(count, 1), max(count, 1), source=ARRAY))


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "0"
    if not text.isdecimal():
        raise UsageError(f"{name} in the environment is {text!r}", details=["expected  a number"], hint=f"unset {name}")
    return int(text)


def _checked(rank: Rank) -> Rank:
    if not 0 <= rank.rank < rank.world_size:
        raise UsageError(
            f"there is no rank {rank.rank} of {rank.world_size} (from {rank.source})",
            details=["expected  0 <= rank < world size"],
            hint=f"ranks count from 0:  --rank {max(rank.world_size, 1) - 1}"
            if rank.source == "--rank"
            else "to be alone, whatever the environment says:  --world-size 1",
        )
    return Rank() if rank.is_alone else rank
