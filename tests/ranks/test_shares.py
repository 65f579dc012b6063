"""Who is which rank, and what each of them writes: pure functions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from builders import nasty_run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schemes import READ, quantized_run

from merge_cli import plan_average
from merge_cli.engine.reducers.quantized import rows_of
from merge_cli.errors import UsageError
from merge_cli.planning.extent import QuantizedExtent
from merge_cli.planning.plan import OutputFile, WorkItem
from merge_cli.ranks.launcher import ARRAY, Rank, find_rank
from merge_cli.ranks.shares import MIN_PIECE_BYTES, PIECE_ALIGNMENT, cut, order_of_work, shares

SLURM_STEP = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
ENVIRONMENTS = {  # the variables of each launcher as measured, docs/clusters.md
    "a shell": ({}, Rank()),
    "torchrun": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"},
        Rank(5, 8, 1, 4, "torchrun"),
    ),
    "torchrun in srun -n 1": (
        {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        Rank(1, 2, 0, 0, "torchrun"),
    ),
    "srun -n 2": ({**SLURM_STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, Rank(1, 2, 1, 0, "srun")),
    "srun -n 1": ({**SLURM_STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Rank()),
    "srun --mpi=pmi2": (
        {**SLURM_STEP, "SLURM_PROCID": "1", "PMI_RANK": "1", "PMI_SIZE": "2", "PMI_JOBID": "17.0"},
        Rank(1, 2, 0, 0, "PMI"),
    ),
    "sbatch -n 2, the script itself": ({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, Rank()),
    "sbatch from a step of another job, variables left over": (
        {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "PMI_RANK": "1", "PMI_SIZE": "2", "PMI_JOBID": "16.0"},
        Rank(),
    ),
    "the shell of salloc -n 2": ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "2"}, Rank()),
    "the shell of salloc -n 2, as an interactive step": (
        {
            "SLURM_JOB_ID": "17",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_ID": "4294967290",
            "SLURM_STEP_NUM_TASKS": "1",
        },
        Rank(),
    ),
    "an array of four": (
        {
            "SLURM_PROCID": "0",
            **{f"SLURM_ARRAY_TASK_{k}": v for k, v in {"ID": "2", "COUNT": "4", "MIN": "0", "STEP": "1"}.items()},
        },
        Rank(2, 4, 0, 0, ARRAY),
    ),
    "an array 3-9:3": (
        {f"SLURM_ARRAY_TASK_{k}": v for k, v in {"ID": "9", "COUNT": "3", "MIN": "3", "STEP": "3"}.items()},
        Rank(2, 3, 0, 0, ARRAY),
    ),
    "srun -n 2 in an array task": (
        {**SLURM_STEP, "SLURM_PROCID": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"},
        Rank(1, 2, 0, 0, "srun"),
    ),
    "an array submitted in srun --pty bash": (
        {
            **{"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
            **{f"SLURM_ARRAY_TASK_{k}": v for k, v in {"ID": "1", "COUNT": "4", "MIN": "0", "STEP": "1"}.items()},
        },
        Rank(1, 4, 0, 0, ARRAY),
    ),
    "Open MPI in an allocation": (
        {
            "SLURM_JOB_ID": "17",
            "SLURM_PROCID": "0",
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        Rank(3, 4, 1, 2, "Open MPI"),
    ),
    "MPICH": ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, Rank(0, 2, 0, 0, "PMI")),
    "set by hand": (
        {"PMERGE_RANK": "1", "PMERGE_WORLD_SIZE": "2", "RANK": "0", "WORLD_SIZE": "8"},
        Rank(1, 2, 0, 0, "PMERGE_RANK"),
    ),
}


@pytest.mark.parametrize("where", ENVIRONMENTS)
def test_the_rank_is_that_of_the_launcher(where: str) -> None:
    environment, expected = ENVIRONMENTS[where]
    assert find_rank(environment) == expected


def test_flags_outrank_the_environment() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "4"}
    assert find_rank(environment, 0, 2) == Rank(0, 2, source="--rank")
    assert find_rank(environment, world_size=1) == Rank() == find_rank(environment, 0, 1)


@pytest.mark.parametrize("pair", [(2, 2), (-1, 2), (0, 0), (0, None), (None, 2)])
def test_ranks_that_make_no_sense_are_refused(pair: tuple[int | None, int | None]) -> None:
    with pytest.raises(UsageError, match=r"rank"):
        find_rank({}, *pair)


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(UsageError, match="WORLD_SIZE in the environment is 'many'"):
        find_rank({"RANK": "0", "WORLD_SIZE": "many"})


def test_several_ranks_on_a_machine_share_its_cores_where_their_launcher_does_not_divide_them() -> None:
    assert Rank(0, 8, 0, 8, "torchrun").cores(16) == 2
    assert Rank(0, 8, 0, 8, "torchrun").cores(4) == 1
    assert Rank(0, 2, 0, 2, "--workers").cores(64) == 32
    assert Rank(0, 8, 0, 8, "Open MPI").cores(16) is None  # mpirun binds its ranks to cores


def file_of(name: str, size: int) -> OutputFile:
    return OutputFile(name, b"", size, (), ())


sizes = st.lists(st.integers(1, 10_000_000_000), min_size=1, max_size=200)


@given(sizes, st.integers(1, 512))
@example([113_246_209, 138_412_033], 2)  # whole files are balanced enough
@settings(deadline=None)
def test_pieces_cover_every_file_once_and_shares_are_balanced(file_sizes: list[int], world_size: int) -> None:
    files = [file_of(f"{i:05d}", size) for i, size in enumerate(file_sizes)]
    pieces = cut(files, world_size)
    for file in files:
        here = [piece for piece in pieces if piece.file is file]
        assert [here[0].begin, *(p.end for p in here)] == [*(p.begin for p in here), file.file_bytes]
        assert all(piece.begin % PIECE_ALIGNMENT == 0 and piece.end > piece.begin for piece in here)
    assert len({piece.name for piece in pieces}) == len(pieces)
    found = shares(pieces, world_size)
    assert sorted(p.name for share in found for p in share) == sorted(p.name for p in pieces)
    loads = [sum(p.end - p.begin for p in share) for share in found]
    mean, largest = sum(file_sizes) / world_size, max(p.end - p.begin for p in pieces)
    assert max(loads) <= mean + largest
    is_balanced = all(piece.is_whole for piece in pieces) and max(loads) <= 1.1 * mean
    assert is_balanced or largest <= max(mean / 4, 2 * MIN_PIECE_BYTES) + PIECE_ALIGNMENT
    for rank in (0, world_size - 1):
        work = order_of_work(pieces, rank, world_size)
        assert sorted(p.name for p in work) == sorted(p.name for p in pieces)
        assert work[: len(found[rank])] == found[rank]


@given(st.integers(1, 100_000_000_000), st.integers(2, 64))
def test_pieces_of_more_ranks_lie_within_those_of_fewer(size: int, world_size: int) -> None:
    file = file_of("model.safetensors", size)
    ends = [{piece.end for piece in cut([file], world)} for world in (world_size, 2 * world_size)]
    assert ends[0] <= ends[1]


def test_a_terabyte_on_hundreds_of_ranks_is_planned_in_a_moment() -> None:
    files = [file_of(f"{i:05d}", 1_333_000_000) for i in range(1500)]
    found = shares(cut(files, 512), 512)
    loads = [sum(p.end - p.begin for p in share) for share in found]
    assert max(loads) / (sum(loads) / 512) < 1.25


def chunks(todo: WorkItem, values: int) -> list[tuple[int, int, int]]:
    """(run, first, end) of every chunk of quantized rows, or of elements."""
    found = []
    for run, first, end in todo.parts():
        number = todo.file.extents.index(run)
        if isinstance(run, QuantizedExtent) and not (run.codec and run.codec.needs_stats):
            found += [(number, r0, r1) for r0, r1 in rows_of(run, values, first, end)]
        else:
            found.append((number, first, end))
    return found


@pytest.mark.parametrize("case", ["nasty", *READ])
def test_what_begins_in_the_pieces_is_the_whole_file(case: str, tmp_path: Path) -> None:
    """For any cut, whatever the memory of each rank: every element and row once, every byte of the
    data once.
    """
    for requantize in (False, True) if case != "nasty" else (False,):
        paths = nasty_run(tmp_path / "run") if case == "nasty" else quantized_run(tmp_path / f"run{requantize}", case)[0]
        for file in plan_average(paths, tmp_path / "out", requantize=requantize).merge.files:
            size = file.file_bytes
            for places in ([], [size // 2], [1, 100, size - 1], list(range(0, size, 61))[1:]):
                ends = [0, *places, size]
                parts = [WorkItem(file, (0,), begin, end) for begin, end in pairwise(ends)]
                assert sum(part.bytes_to_write for part in parts) == size - len(file.header)
                found = sorted(chunk for i, part in enumerate(parts) for chunk in chunks(part, 64 * (1 + i % 3)))
                for number, run in enumerate(file.extents):
                    here = [(a, b) for n, a, b in found if n == number and b > a]
                    total = run.num_rows if isinstance(run, QuantizedExtent) else run.num_elements
                    assert [0, *(b for _, b in here)] == [*(a for a, _ in here), total]
                    if isinstance(run, QuantizedExtent):
                        assert all(a % run.row_step == 0 for a, _ in here)


def test_a_piece_has_a_name_of_its_own() -> None:
    file = file_of("rank0/model.safetensors", 100)
    assert WorkItem.whole(file).name == file.name
    assert WorkItem(file, (0,), 0, 50).name == "rank0/model.safetensors@0-50"
