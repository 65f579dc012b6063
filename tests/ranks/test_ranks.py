"""One average by several ranks: the bytes of a single run, whatever their number, order, launcher
and fate.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import digests, nasty_run, nasty_tensors, training_run, write_checkpoint, write_run
from command import start
from safetensors.torch import load_file, save_file
from schemes import quantized_run

from faults import ranks
from faults.attacks import shared
from faults.attacks.world import World
from faults.ground import Ground
from faults.runs import Ended, FaultRuns
from merge_cli import Rank, average, finalize, plan_average, run_average
from merge_cli.engine import writer
from merge_cli.errors import InputError, NonFiniteError, OutputError, UsageError
from merge_cli.features.average import AverageResult
from merge_cli.output import joint
from merge_cli.output.destination import Claim
from merge_cli.output.joint import JointDestination
from merge_cli.output.lock import Lock
from merge_cli.planning.plan import OutputFile, WorkItem
from merge_cli.request.spec import RunConfig
from merge_cli.system.files import read_json
from merge_cli.system.held import HeldFolder

LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_ARRAY_TASK_ID", "PMERGE_RANK")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few kilobytes, so that small files are cut too."""
    monkeypatch.setattr("merge_cli.ranks.shares.MIN_PIECE_BYTES", 512)
    monkeypatch.setattr("merge_cli.output.joint._CONTROL_WAIT_S", 20.0)


def share(paths: list[Path], out: Path, rank: int, world_size: int, **options: Any) -> AverageResult:
    return run_average(plan_average(paths, out, rank=Rank(rank, world_size, source="--rank"), **options))


def as_single(single: Path, joint: Path) -> None:
    """Assert that two results are equal but for the commands in pmerge.json."""
    assert not joint.with_name(joint.name + ".pmerge-partial").exists()
    names = sorted(path.relative_to(single) for path in single.rglob("*"))
    assert names == sorted(path.relative_to(joint) for path in joint.rglob("*"))
    for name in names:
        if str(name) == "pmerge.json":
            one, other = (json.loads((folder / name).read_text()) | {"command": "", "sha256": ""} for folder in (single, joint))
            assert one == other
        elif (single / name).is_file():
            assert (single / name).read_bytes() == (joint / name).read_bytes(), name


@pytest.mark.parametrize("layout", ["single", "sharded", "mixed"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_one_after_the_other_give_the_bytes_of_one_run(layout: str, world_size: int, tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout=layout)
    expected = average(paths, tmp_path / "one", method="ema").output
    results = [share(paths, tmp_path / "out", rank, world_size, method="ema") for rank in reversed(range(world_size))]
    assert results[0].has_published and not results[0].missing  # the first to come did what nobody else had begun
    assert all(result.already_published for result in results[1:])
    as_single(expected, tmp_path / "out")


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("case", ["fp8 block", "nvfp4"])
def test_quantized_checkpoints(case: str, requantize: bool, tmp_path: Path) -> None:
    from schemes import READ

    name = next(name for name in READ if case.split()[0] in name.lower())
    paths = quantized_run(tmp_path / "run", name)[0]
    expected = average(paths, tmp_path / "one", requantize=requantize).output
    without_taking_over(paths, tmp_path / "out", 3, requantize=requantize)
    as_single(expected, tmp_path / "out")


def without_taking_over(paths: list[Path], out: Path, world_size: int, **options: Any) -> list[AverageResult]:
    """Every rank does just its share, as where there is no flock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_cli.output.claims.flock", lambda fd: False)
        return [share(paths, out, rank, world_size, **options) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 5])
def test_without_flock_each_rank_does_its_share_and_the_last_publishes(world_size: int, tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    expected = average(paths, tmp_path / "one").output
    results = without_taking_over(paths, tmp_path / "out", world_size)
    assert [result.has_published for result in results] == [False] * (world_size - 1) + [True]
    assert [bool(result.missing) for result in results] == [True] * (world_size - 1) + [False]
    as_single(expected, tmp_path / "out")


def test_ranks_at_the_same_time(tmp_path: Path) -> None:
    run = training_run({f"layers.{i}": torch.randn(61, 997).bfloat16() for i in range(40)}, 3)
    paths = write_run(tmp_path / "run", run, shards=3)
    expected = average(paths, tmp_path / "one").output
    results: list[AverageResult] = []
    threads = [
        threading.Thread(target=lambda rank=rank: results.append(share(paths, tmp_path / "out", rank, 4, threads=1)))
        for rank in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert sum(result.has_published for result in results) == 1
    as_single(expected, tmp_path / "out")


@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_remains_where_open_files_are_renamed_instead_of_removed(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does it: the name .nfs... goes when the file is closed."""
    release = Lock.release

    def remove_files(lock: Lock) -> None:
        lock.path.rename(lock.path.with_name(".nfs1"))

    def close(lock: Lock) -> None:
        release(lock)
        if lock.path.name == "lock":
            lock.path.with_name(".nfs1").unlink(missing_ok=True)

    monkeypatch.setattr(Lock, "remove_files", remove_files)
    monkeypatch.setattr(Lock, "release", close)
    paths = write_run(tmp_path / "run", training_run({f"layers.{i}": torch.randn(61, 997) for i in range(4)}, 2), shards=2)
    for rank in range(world_size):
        run_average(plan_average(paths, tmp_path / "out")) if world_size == 1 else share(paths, tmp_path / "out", rank, world_size)
    assert (tmp_path / "out").exists()
    assert not (tmp_path / "out.pmerge-partial").exists()


def stop_at_publishing(paths: list[Path], out: Path, rank: int, world_size: int, **options: Any) -> None:
    """A rank that does all there is and dies before it publishes."""

    class Died(BaseException):
        pass

    def die(self: object) -> None:
        raise Died

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr("merge_cli.output.joint.JointDestination.begin_to_publish", die)
        share(paths, out, rank, world_size, **options)


def test_what_is_done_is_kept_by_ranks_of_another_world_size(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="single")
    expected = average(paths, tmp_path / "one").output
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_cli.output.claims.flock", lambda fd: False)
        share(paths, out, 0, 4)
    records = {path: path.read_bytes() for path in (tmp_path / "out.pmerge-partial" / "done").iterdir()}
    assert records and all("@" in path.name for path in records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_cli.output.claims.flock", lambda fd: False)
        again = share(paths, out, 0, 8)
    assert again.missing == 1
    assert {path: path.read_bytes() for path in records} == records
    result = share(paths, out, 1, 2)
    assert result.has_published
    as_single(expected, out)


def test_only_a_rank_that_is_alone_looks_into_the_records(tmp_path: Path) -> None:
    """Hundreds of ranks join one after the other: that must not take longer the more files are
    finished.
    """
    paths = nasty_run(tmp_path / "run", layout="sharded")
    out = tmp_path / "out"
    stop_at_publishing(paths, out, 0, 3)
    (tmp_path / "out.pmerge-partial" / "checkpoint" / "model-00001-of-00003.safetensors").unlink()
    plans = [plan_average(paths, out, rank=Rank(rank, 3, source="--rank")) for rank in range(2)]
    read: list[Path] = []

    def watched(path: Path) -> dict[str, Any]:
        if path.parent.name == "done":
            read.append(path)
        return read_json(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_cli.output.records.read_json", watched)
        with JointDestination(out, plans[0].merge, RunConfig(), plans[0].rank) as first:
            assert {path.name for path in read} >= {f"model-0000{number}-of-00003.safetensors.json" for number in (1, 2, 3)}
            read.clear()
            with JointDestination(out, plans[1].merge, RunConfig(), plans[1].rank) as second:
                assert not read
                assert first.missing() == second.missing() == ["model-00001-of-00003.safetensors"]


def test_two_threads_never_complete_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that finish the last two pieces of a file both see that nothing is missing."""
    paths = nasty_run(tmp_path / "run", layout="single")
    with monkeypatch.context() as patch:
        patch.setattr(JointDestination, "assemble_files", lambda self: None)
        patch.setattr(JointDestination, "_assemble", lambda self, file: None)
        assert share(paths, tmp_path / "out", 0, 4).missing == 1
    completed: list[str] = []
    assemble = writer.assemble

    def slowly(file: OutputFile, staging: HeldFolder) -> str:
        completed.append(file.name)
        time.sleep(0.3)
        return assemble(file, staging)

    monkeypatch.setattr(joint, "assemble", slowly)
    monkeypatch.setattr("merge_cli.output.claims.flock", lambda fd: False)
    plan = plan_average(paths, tmp_path / "out", rank=Rank(1, 4, source="--rank"))
    with JointDestination(plan.output, plan.merge, plan.run, plan.rank) as destination:
        threads = [threading.Thread(target=destination.assemble_files) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert completed == ["model.safetensors"] and not destination.missing()


def test_a_single_run_continues_what_ranks_have_left(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="sharded")
    expected = average(paths, tmp_path / "one").output
    stop_at_publishing(paths, tmp_path / "out", 0, 2)
    result = average(paths, tmp_path / "out")
    assert result.reused == 3
    as_single(expected, tmp_path / "out")


def test_finalize_publishes_what_is_finished(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    expected = average(paths, tmp_path / "one", method="wma", exclude=["*norm*"]).output
    stop_at_publishing(paths, tmp_path / "out", 1, 3, method="wma", exclude=["*norm*"])
    assert not (tmp_path / "out").exists()
    assert finalize(tmp_path / "out") == tmp_path / "out"
    as_single(expected, tmp_path / "out")
    assert finalize(tmp_path / "out") == tmp_path / "out"  # it stands


def test_finalize_finds_inputs_that_moved(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    expected = average(paths, tmp_path / "one").output
    stop_at_publishing(paths, tmp_path / "out", 1, 3)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="no such checkpoint"):
        finalize(tmp_path / "out")
    finalize(tmp_path / "out", inputs_root=tmp_path / "moved")
    as_single(expected, tmp_path / "out")


def test_finalize_says_what_is_missing_and_changes_nothing(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="sharded")
    with pytest.raises(UsageError, match="no unfinished run"):
        finalize(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_cli.output.claims.flock", lambda fd: False)
        share(paths, tmp_path / "out", 0, 2)
    with pytest.raises(OutputError, match=r"of 3 files of .*out are not finished") as refused:
        finalize(tmp_path / "out")
    assert "run the ranks again" in refused.value.hint
    os.utime(paths[0] / "model-00001-of-00003.safetensors")
    with pytest.raises(InputError, match="have changed since"):
        finalize(tmp_path / "out")


def test_ranks_that_were_given_different_requests_are_told(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    stop_at_publishing(paths, tmp_path / "out", 0, 2)
    with pytest.raises(OutputError, match="another request") as refused:
        share(paths, tmp_path / "out", 1, 2, method="wma")
    assert "method  was sma, is wma" in str(refused.value)
    expected = average(paths, tmp_path / "one", method="wma").output
    results = [share(paths, tmp_path / "out", rank, 2, method="wma", restart=True) for rank in (0, 1)]
    assert results[0].has_published and results[1].already_published
    as_single(expected, tmp_path / "out")


def test_a_destination_of_something_else_is_refused_and_one_of_the_same_stands(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    average(paths, tmp_path / "out", method="wma")
    with pytest.raises(OutputError, match="exists already"):
        share(paths, tmp_path / "out", 0, 2)
    assert share(paths, tmp_path / "out", 0, 2, method="wma").already_published
    expected = average(paths, tmp_path / "one").output
    assert share(paths, tmp_path / "out", 1, 2, overwrite=True).has_published
    as_single(expected, tmp_path / "out")


def test_nan_fails_the_rank_that_meets_it_and_publishes_nothing(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3000).bfloat16(), "b": torch.randn(3000).bfloat16()}
    broken = {"a": tensors["a"], "b": torch.full((3000,), torch.nan).bfloat16()}
    paths = write_run(tmp_path / "run", [tensors, broken], shards=2)
    failures = 0
    for rank in (0, 1):
        with pytest.raises(NonFiniteError, match="`b` has NaN"):
            share(paths, tmp_path / "out", rank, 2)
        failures += 1
    assert failures == 2 and not (tmp_path / "out").exists()
    share(paths, tmp_path / "out", 0, 2, allow_nonfinite=True, restart=True)
    assert json.loads((tmp_path / "out" / "pmerge.json").read_text())["nonfinite"] == {"b": 3000}
    average(paths, tmp_path / "one", allow_nonfinite=True)
    as_single(tmp_path / "one", tmp_path / "out")


def test_folders_of_ranks_that_trained(tmp_path: Path) -> None:
    """A layout with slashes in the names of its files."""
    for step in (1, 2):
        for rank in (0, 1):
            folder = tmp_path / "run" / f"step_{step}" / f"rank{rank}"
            folder.mkdir(parents=True)
            generator = torch.Generator().manual_seed(10 * step + rank)
            save_file({"w": torch.randn(5000, generator=generator).bfloat16()}, folder / "model.safetensors")
    paths = [tmp_path / "run" / "step_1", tmp_path / "run" / "step_2"]
    expected = average(paths, tmp_path / "one").output
    share(paths, tmp_path / "out", 1, 2)
    as_single(expected, tmp_path / "out")


def damage(path: Path) -> None:
    """Flip the last byte, and leave size and modification time as they were."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_restart_throws_away_what_the_same_request_left(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="sharded")
    expected = average(paths, tmp_path / "one").output
    stop_at_publishing(paths, tmp_path / "out", 0, 2)
    damage(tmp_path / "out.pmerge-partial" / "checkpoint" / "model-00002-of-00003.safetensors")
    assert share(paths, tmp_path / "out", 1, 2, restart=True).reused == 0
    as_single(expected, tmp_path / "out")


def test_overwrite_makes_a_result_again_that_stood_before(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="sharded")
    expected = average(paths, tmp_path / "one").output
    average(paths, tmp_path / "out")
    damage(tmp_path / "out" / "model-00002-of-00003.safetensors")
    os.utime(tmp_path / "out" / "pmerge.json", (1, 1))  # from before this process began
    assert share(paths, tmp_path / "out", 1, 2, overwrite=True).has_published
    as_single(expected, tmp_path / "out")
    assert share(paths, tmp_path / "out", 0, 2, overwrite=True).already_published  # made by a fellow just now


def test_records_of_another_request_vouch_for_nothing(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="sharded")
    expected = average(paths, tmp_path / "one").output
    stop_at_publishing(paths, tmp_path / "out", 0, 2)
    for record in (tmp_path / "out.pmerge-partial" / "done").iterdir():
        record.write_text(json.dumps(json.loads(record.read_text()) | {"request": "another"}))
    assert share(paths, tmp_path / "out", 0, 2).reused == 0
    as_single(expected, tmp_path / "out")


@pytest.mark.parametrize("wrong", ["inode", "request"])
def test_pieces_count_only_for_their_request_and_in_their_file(wrong: str, tmp_path: Path) -> None:
    """A file of zeros has taken the place of the one that a rank wrote a piece into."""
    paths = nasty_run(tmp_path / "run", layout="single")
    expected = average(paths, tmp_path / "one").output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_cli.output.claims.flock", lambda fd: False)
        assert share(paths, tmp_path / "out", 0, 4).missing == 1
    growing = tmp_path / "out.pmerge-partial" / "partial" / "model.safetensors.partial"
    zeros = growing.with_name("zeros")
    zeros.write_bytes(bytes(growing.stat().st_size))
    inode = zeros.stat().st_ino
    zeros.rename(growing)
    if wrong == "request":
        for record in (tmp_path / "out.pmerge-partial" / "done").iterdir():
            record.write_text(json.dumps(json.loads(record.read_text()) | {"inode": inode, "request": "another"}))
    assert share(paths, tmp_path / "out", 1, 4).has_published
    as_single(expected, tmp_path / "out")


@pytest.mark.parametrize(
    "wrong",
    [{"begin": None}, {"end": "x"}, {"begin": [1]}, {"end": 1.5}, {"nonfinite": [1]}, {"nonfinite": {"a": "x"}}, {"schema": "x"}],
    ids=str,
)
def test_a_record_of_a_piece_of_another_shape_counts_for_nothing(wrong: dict[str, Any], tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="single")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_cli.output.claims.flock", lambda fd: False)
        share(paths, tmp_path / "out", 0, 4)
    for record in (tmp_path / "out.pmerge-partial" / "done").iterdir():
        record.write_text(json.dumps(json.loads(record.read_text()) | wrong))
    assert share(paths, tmp_path / "out", 1, 4).has_published
    as_single(average(paths, tmp_path / "one").output, tmp_path / "out")


def test_without_flock_work_of_another_request_is_never_thrown_away(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_cli.output.lock.fcntl.flock", refuse_flock)
        share(paths, tmp_path / "out", 0, 2)
        for options in ({"method": "wma"}, {"method": "wma", "restart": True}, {"restart": True}):
            with pytest.raises(OutputError, match="without flock nobody knows whose") as refused:
                share(paths, tmp_path / "out", 1, 2, **options)
            assert "rm -r " in refused.value.hint
        share(paths, tmp_path / "out", 1, 2)
    as_single(average(paths, tmp_path / "one").output, tmp_path / "out")


def refuse_flock(*_: object) -> None:
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def test_a_rank_comes_back_to_what_another_had_claimed_and_left(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="sharded")
    expected = average(paths, tmp_path / "one").output
    held: list[int] = []
    claim = JointDestination.claim

    def claim_after_others(self: JointDestination, piece: WorkItem) -> Claim:
        if not held:  # another rank has the first piece that this one asks for, and dies when this one has gone on
            path = tmp_path / "out.pmerge-partial" / "claims" / piece.name
            held.append(os.open(path, os.O_RDWR | os.O_CREAT))
            fcntl.flock(held[0], fcntl.LOCK_EX)
            return claim(self, piece)
        if len(held) == 1:
            os.close(held[0])
            held.append(-1)
        return claim(self, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointDestination, "claim", claim_after_others)
        assert share(paths, tmp_path / "out", 0, 2).has_published
    as_single(expected, tmp_path / "out")


# --- the command


def pmerge(cwd: Path, *arguments: object, **environment: str) -> Ended:
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    return start(*arguments, cwd=cwd, environment=clean | environment).end()


@pytest.fixture(scope="module")
def run_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pmerge-test-") as folder:
        for number, tensors in enumerate(training_run(nasty_tensors(), 2), 1):
            write_checkpoint(Path(folder) / "run" / f"checkpoint-{number}", tensors, shards=3)
        average([Path(folder) / "run"], Path(folder) / "one")
        yield Path(folder)


def test_only_one_rank_tells_the_path_and_only_rank_0_talks(run_folder: Path, tmp_path: Path) -> None:
    runs = [pmerge(run_folder, "average", "run", "-o", tmp_path / "out", RANK=str(rank), WORLD_SIZE="3") for rank in (1, 2, 0)]
    assert [run.code for run in runs] == [0, 0, 0]
    assert [run.stdout.split() for run in runs] == [[str(tmp_path / "out")], [], [str(tmp_path / "out")]]  # rank 0: it stood
    assert (
        "rank 1 of 3: finished last and published" in runs[0].stderr and "rank 2 of 3: the result exists already" in runs[1].stderr
    )
    assert "rank 0 of 3 (from torchrun)" in runs[2].stderr and "exists already, complete" in runs[2].stderr
    assert digests(tmp_path / "out") == digests(run_folder / "one")


def test_a_batch_script_with_several_tasks_is_no_rank(run_folder: Path, tmp_path: Path) -> None:
    run = pmerge(run_folder, "average", "run", "-o", tmp_path / "out", SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_JOB_ID="1")
    assert run.code == 0 and "rank" not in run.stderr


def test_dry_run_shows_the_shares_once(run_folder: Path, tmp_path: Path) -> None:
    runs = [
        pmerge(run_folder, "average", "run", "-o", tmp_path / "out", "--dry-run", "--rank", rank, "--world-size", 2)
        for rank in (0, 1)
    ]
    assert "the largest share is" in runs[0].stderr
    assert [run.stdout.split() for run in runs] == [[str(tmp_path / "out")], []]
    assert "the plan is shown by rank 0" in runs[1].stderr


def test_workers(run_folder: Path, tmp_path: Path) -> None:
    run = pmerge(run_folder, "average", "run", "-o", tmp_path / "out", "--workers", "2")
    assert run.code == 0 and run.stdout.split() == [str(tmp_path / "out")]
    as_single(run_folder / "one", tmp_path / "out")
    for wrong in ("0", "some", "-1"):
        assert pmerge(run_folder, "average", "run", "--workers", wrong).code == 2
    refused = pmerge(run_folder, "average", "run", "--workers", "2", RANK="0", WORLD_SIZE="2")
    assert refused.code == 2 and "a run without a launcher" in refused.stderr


def test_workers_take_a_result_as_one_process_does(run_folder: Path, tmp_path: Path) -> None:
    """That of the same request is printed, by one of them; another one is not replaced."""
    shutil.copytree(run_folder / "one", tmp_path / "out")
    os.utime(tmp_path / "out" / "pmerge.json", (1, 1))  # copied before they began
    for workers in (1, 2):
        command = ("average", "run", "-o", tmp_path / "out", "--workers", workers)
        run = pmerge(run_folder, *command)
        assert run.code == 0 and run.stdout.split() == [str(tmp_path / "out")] and "exists already, complete" in run.stderr
        run = pmerge(run_folder, *command, "--method", "wma", "--quiet")
        assert run.code == 1 and not run.stdout and run.stderr.count("exists already") == 1


@pytest.mark.parametrize("alone", [("--world-size", 1), ("--rank", 0, "--world-size", 1)])
def test_workers_are_workers_whatever_else_is_said(alone: tuple[object, ...], run_folder: Path, tmp_path: Path) -> None:
    run = pmerge(run_folder, "average", "run", "-o", tmp_path / "out", "--workers", 2, *alone, RANK="3", WORLD_SIZE="8")
    assert run.code == 0 and run.stdout.split() == [str(tmp_path / "out")]
    as_single(run_folder / "one", tmp_path / "out")


def test_the_work_of_a_worker_that_was_killed_is_done_by_the_first(run_folder: Path, tmp_path: Path) -> None:
    code = """if True:
        import sys, merge_cli.cli.workers as workers
        popen = workers.subprocess.Popen
        workers.subprocess.Popen = lambda *a, **k: popen(["sh", "-c", "kill -9 $$"])
        from merge_cli.__main__ import main
        main()
    """
    arguments = ["average", "run", "-o", str(tmp_path / "out"), "--workers", "2"]
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=run_folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.split() == [str(tmp_path / "out")], run.stderr
    assert "worker 1 ended with exit code -9; this one did its work" in run.stderr
    as_single(run_folder / "one", tmp_path / "out")


def test_a_worker_that_fails_fails_the_run(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "run", tmp_path / "run")
    shard = tmp_path / "run" / "checkpoint-1" / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    save_file({name: torch.full_like(t, torch.nan) if t.is_floating_point() else t for name, t in tensors.items()}, shard)
    run = pmerge(tmp_path, "average", "run", "-o", "out", "--workers", "2", "--quiet")
    assert run.code == 1 and not run.stdout and "has NaN" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


# --- faults


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    if not shutil.which("gcc"):
        pytest.skip("faults are injected by a library that gcc compiles")
    with tempfile.TemporaryDirectory(prefix="pmerge-test-") as folder, FaultRuns() as runs:
        yield Ground(Path(folder) / "ground", runs)


@pytest.mark.parametrize("filesystem", ["Linux", "no flock", "no renameat2 (NFS, Lustre)", "no folder rename"])
def test_a_rank_killed_anywhere_loses_nothing(ground: Ground, filesystem: str) -> None:
    row = ranks.killed(ground, "any:kill:0", (-9,), filesystem, every=59)
    assert row.ok, row.wrong


@pytest.mark.parametrize("fault", ["pwrite:error:28", "fsync:error:5", "rename:error:5"])
def test_a_rank_that_cannot_write_fails_and_the_others_finish(ground: Ground, fault: str) -> None:
    row = ranks.killed(ground, fault, (1,), every=11)
    assert row.ok, row.wrong


def test_a_rank_stopped_anywhere_while_another_runs(ground: Ground) -> None:
    row = ranks.stopped(ground, every=97)
    assert row.ok, row.wrong


def test_ranks_at_once_killed_at_random(ground: Ground) -> None:
    row = ranks.together(ground, rounds=2, seed=1)
    assert row.ok, row.wrong


@pytest.mark.parametrize(
    ("match", "at", "after", "then"),
    [(shared.FIRST, 2, 1, "goes on"), (shared.FIRST, 3, 2, "is killed"), ("/out", 5, 3, "goes on")],
)
def test_two_ranks_may_write_one_file(match: str, at: int, after: int, then: str) -> None:
    """Where flock is local to each host, both write the first shard; real processes that are
    stopped in the middle.
    """
    with tempfile.TemporaryDirectory(prefix="pmerge-test-") as folder, ExitStack() as stack:
        world = World(Path(folder) / "world", stack.enter_context(FaultRuns()), stack, thorough=False)
        assert shared.interleaved(world, match, at, after, then, shared.WHOLE) == ""
