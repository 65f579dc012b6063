"""One merge by many processes: which of them this one is, and what each of them writes.

No process talks to another. Each learns its rank and the number of ranks (the world size) from its launcher, makes the same plan,
and computes the same shares from it: the output files, largest first, each to the rank with the least so far. A file that is large
against a share is cut into pieces by byte ranges, at multiples of 4 MiB, so that two hosts never write into one page or stripe.
The number of pieces is a power of two, so the pieces of another world size are unions or halves of these, and a run that is
continued with more or fewer ranks keeps what is done.

A rank that has finished its share goes on with what no other has begun (see `output/joint.py`); shares decide who starts where.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from merge_cli.errors import UsageError
from merge_cli.plan import OutputFile

PIECE_ALIGNMENT = 4 << 20
MIN_PIECE_BYTES = 64 << 20
_BALANCED = 1.1  # the largest share over the mean with which files stay whole
_CUT_ABOVE = 0.25  # of a mean share: then no rank has more than 1.25 times the mean


@dataclass(frozen=True)
class Rank:
    """This process: number `rank` of `world_size`, number `local_rank` of `local_size` (0: not known) on its machine.

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

    def threads(self, cores: int) -> int | None:
        """How many threads it should use where its launcher leaves it all `cores` of the machine; None where that is not known."""
        return max(1, min(8, cores // self.local_size)) if self.local_size and self.source in (WORKER, "torchrun") else None

    def variables(self) -> tuple[str, ...]:
        """The environment variables that say so."""
        return next((launcher[1:3] for launcher in _LAUNCHERS if launcher.name == self.source), ())

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


class _Launcher(NamedTuple):
    """The variables in which a launcher tells its processes who they are."""

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
    # the size of the step that srun started: a batch script and the shell of salloc also have SLURM_PROCID and SLURM_NTASKS
    _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def find_rank(environment: Mapping[str, str], rank: int | None = None, world_size: int | None = None) -> Rank:
    """This process's rank: as given, else from the first launcher whose variables are set, else alone.

    The variables may be there for another reason: a shell in a training job, an array whose tasks make different merges. That does
    no harm, because a rank whose fellows never come goes on with their shares. Raises UsageError where only one of a pair is given
    or they make no sense.
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
    """Whether the variables came into a Slurm job from the step of another job in which it was submitted."""
    job, _, step = environment.get("PMI_JOBID", "").partition(".")
    return launcher.name == "PMI" and step.isdecimal() and job != environment.get("SLURM_JOB_ID", job)


def _array_task(environment: Mapping[str, str]) -> Rank:
    """The rank of a task of a Slurm array. Of an array with gaps (1,3,7) two tasks may get one rank: claims keep them apart."""
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
            hint="count ranks from 0" if rank.source == "--rank" else "to be alone, whatever the environment says:  --world-size 1",
        )
    return Rank() if rank.is_alone else rank


class Piece(NamedTuple):
    """The part of an output file whose bytes lie from `begin` to `end`; the whole file where it is not cut."""

    file: OutputFile
    begin: int
    end: int

    @property
    def is_whole(self) -> bool:
        return (self.begin, self.end) == (0, self.file.file_bytes)

    @property
    def name(self) -> str:
        """A name that no other piece has."""
        return self.file.name if self.is_whole else f"{self.file.name}@{self.begin}-{self.end}"


def cut(files: Sequence[OutputFile], world_size: int, min_bytes: int | None = None) -> list[Piece]:
    """The pieces of `files` for `world_size` ranks, in the order of the plan.

    Files stay whole where that is balanced, since a file that is cut is read once more for its sha256; else those are cut that are
    large against a share. No piece is smaller than `min_bytes` (64 MiB), which is what taking turns is worth.
    """
    min_bytes = min_bytes or MIN_PIECE_BYTES
    mean = sum(file.file_bytes for file in files) / world_size
    whole = [Piece(file, 0, file.file_bytes) for file in files]
    if max((sum(piece.end for piece in share) for share in shares(whole, world_size)), default=0) <= _BALANCED * mean:
        return whole
    most = _CUT_ABOVE * mean
    pieces = []
    for file in files:
        count = 1
        while world_size > 1 and file.file_bytes / count > most and file.file_bytes / (2 * count) >= min_bytes:
            count *= 2
        alignment = min(PIECE_ALIGNMENT, min_bytes)
        ends = [file.file_bytes * i // count // alignment * alignment for i in range(1, count)] + [file.file_bytes]
        pieces += [Piece(file, begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    return pieces


def shares(pieces: Sequence[Piece], world_size: int) -> list[list[Piece]]:
    """What each rank writes: largest first, each piece to the rank with the least so far. Shares keep the order of `pieces`."""
    loads = [(0, rank) for rank in range(world_size)]
    owner = {}
    for position in sorted(range(len(pieces)), key=lambda i: (pieces[i].begin - pieces[i].end, i)):
        load, rank = heapq.heappop(loads)
        owner[position] = rank
        heapq.heappush(loads, (load + pieces[position].end - pieces[position].begin, rank))
    found: list[list[Piece]] = [[] for _ in range(world_size)]
    for position, piece in enumerate(pieces):
        found[owner[position]].append(piece)
    return found


def order_of_work(pieces: Sequence[Piece], rank: int, world_size: int) -> list[Piece]:
    """All pieces in the order in which `rank` tries them: its share, then those that the next ranks would come to last."""
    found = shares(pieces, world_size)
    others = [piece for step in range(1, world_size) for piece in reversed(found[(rank + step) % world_size])]
    return [*found[rank], *others]
