"""A sweep by several ranks: every output has the bytes of a sweep by one, whatever their number,
order and fate.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import nasty_run, training_run, write_run

from faults.runs import FaultRuns
from merge_cli import Rank, plan_sweep, run_sweep, sweep
from merge_cli.errors import OutputError, UsageError
from merge_cli.features.sweep import SweepResult
from merge_cli.output.joint import JointDestination
from merge_cli.planning.plan import WorkItem

GRID: dict[str, Any] = {"methods": ["sma", "wma", "ema:0.7"], "last": [2, 3]}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few kilobytes, so that small files are cut too."""
    monkeypatch.setattr("merge_cli.ranks.shares.MIN_PIECE_BYTES", 512)
    monkeypatch.setattr("merge_cli.output.joint._CONTROL_WAIT_S", 20.0)


def share(run: Path, out: Path, rank: int, world_size: int, grid: Mapping[str, Any] = GRID, **options: Any) -> SweepResult:
    return run_sweep(plan_sweep([run], out, rank=Rank(rank, world_size, source="--rank"), **grid, **options))


def content(out: Path) -> dict[str, Any]:
    """Every file of a sweep, records without how and where it was made."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        found[name] = path.read_bytes()
        if path.suffix == ".json" and path.name in ("pmerge.json", "sweep.json"):
            record = json.loads(found[name])
            for each in record.get("outputs", []):
                each["path"] = Path(each["path"]).name
            found[name] = {key: value for key, value in record.items() if key not in ("command", "sha256")}
    return found


@pytest.mark.parametrize("layout", ["single", "sharded", "mixed"])
@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_one_after_the_other_give_the_bytes_of_one_sweep(layout: str, world_size: int, tmp_path: Path) -> None:
    nasty_run(tmp_path / "run", 4, layout=layout)
    grid = {**GRID, "at": [300, 400]}
    sweep([tmp_path / "run"], tmp_path / "one", **grid)
    results = [share(tmp_path / "run", tmp_path / "out", rank, world_size, grid) for rank in reversed(range(world_size))]
    assert results[0].published == results[0].outputs
    assert all(not result.published and not result.missing for result in results[1:])
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_without_flock_each_rank_does_its_share_and_the_last_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nasty_run(tmp_path / "run", 4, layout="mixed")
    grid = {**GRID, "at": [300, 400]}
    sweep([tmp_path / "run"], tmp_path / "one", **grid)
    monkeypatch.setattr("merge_cli.output.claims.flock", lambda fd: False)
    results = [share(tmp_path / "run", tmp_path / "out", rank, 3, grid) for rank in range(3)]
    assert all(result.missing for result in results[:-1]) and not results[-1].missing
    assert not any((tmp_path / "out" / "sweep.json").exists() for result in results[:-1] if result.published)
    published = [path for result in results for path in result.published]
    assert sorted(published) == sorted(results[0].outputs)
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_ranks_at_the_same_time(tmp_path: Path) -> None:
    tensors = {f"layers.{i}": torch.randn(61, 997).bfloat16() for i in range(30)}
    write_run(tmp_path / "run", training_run(tensors, 4), shards=3)
    sweep([tmp_path / "run"], tmp_path / "one", **GRID)
    results: list[SweepResult] = []
    threads = [
        threading.Thread(target=lambda rank=rank: results.append(share(tmp_path / "run", tmp_path / "out", rank, 3, threads=1)))
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path for result in results for path in result.published) == sorted(results[0].outputs)
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_a_rank_that_died_between_the_records_of_two_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is then finished in one output and not in another, and its inputs are read again."""

    class Died(BaseException):
        pass

    nasty_run(tmp_path / "run", 4, layout="sharded")
    sweep([tmp_path / "run"], tmp_path / "one", **GRID)
    done, count = JointDestination.done, 0

    def die(self: JointDestination, item: WorkItem, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count % 5 == 4:
            raise Died
        done(self, item, *arguments)

    for rank in range(3):
        with monkeypatch.context() as patch, pytest.raises(Died):
            patch.setattr(JointDestination, "done", die)
            share(tmp_path / "run", tmp_path / "out", rank, 3, threads=1)
    assert share(tmp_path / "run", tmp_path / "out", 1, 3).published
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_a_piece_that_is_recorded_in_the_moment_before_its_claim_is_not_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nasty_run(tmp_path / "run", 3, layout="single")
    sweep([tmp_path / "run"], tmp_path / "one", **GRID)
    claim, done = JointDestination.claim, JointDestination.done
    seen: list[Any] = []

    def claim_after_another(self: JointDestination, item: WorkItem) -> Any:
        if not seen and self.folder.destination.name == "wma-last2":  # another rank was quicker, for this output alone
            seen.append(item)
            destination = JointDestination(self.folder.destination, self.merge, self._run, self._rank)
            with destination as other:
                assert claim(other, item).name == "TAKEN"
                writer = other.open(item)
                reference = tmp_path / "one" / "wma-last2" / item.file.name
                begin = max(item.begin, len(item.file.header))
                assert writer.write(begin, memoryview(reference.read_bytes()[begin : item.end])) or not item.bytes_to_write
                done(other, item, writer.finish(), {})
        return claim(self, item)

    monkeypatch.setattr(JointDestination, "claim", claim_after_another)
    assert len(share(tmp_path / "run", tmp_path / "out", 0, 3).published) == 6
    assert seen and content(tmp_path / "out") == content(tmp_path / "one")


def test_a_sweep_by_one_process_and_an_average_by_ranks_go_on_with_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_cli import finalize, plan_average, run_average

    nasty_run(tmp_path / "run", 4, layout="sharded")
    sweep([tmp_path / "run"], tmp_path / "one", **GRID)

    def stop(*_: object) -> None:
        raise OutputError("stopped")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="stopped"):
        patch.setattr("merge_cli.job._publish", stop)
        share(tmp_path / "run", tmp_path / "out", 0, 2)
    assert finalize(tmp_path / "out" / "wma-last3") == tmp_path / "out" / "wma-last3"
    by_ranks = plan_average([tmp_path / "run"], tmp_path / "out" / "sma-last2", last=2, rank=Rank(1, 2, source="--rank"))
    assert run_average(by_ranks).has_published
    assert sweep([tmp_path / "run"], tmp_path / "out", **GRID).reused == 6 * 3
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_finished_files_are_read_again_by_one_process_only(tmp_path: Path) -> None:
    nasty_run(tmp_path / "run", 3, layout="single")
    with pytest.raises(UsageError, match="--verify-resume is for one process"):
        share(tmp_path / "run", tmp_path / "out", 0, 2, verify_resume=True)


# --- the command, killed: real processes, forked from a server that has imported torch


ASKED = ("--method", "sma,ema", "--last", "2,3", "--threads", "1", "--quiet")


@pytest.fixture(scope="module")
def ground() -> Iterator[tuple[Path, FaultRuns]]:
    if not shutil.which("gcc"):
        pytest.skip("faults are injected by a library that gcc compiles")
    with tempfile.TemporaryDirectory(prefix="pmerge-test-") as folder, FaultRuns() as runs:
        tensors = {f"layers.{i}": torch.randn(3000).bfloat16() for i in range(6)}
        write_run(Path(folder) / "run", training_run(tensors, 3), shards=2)
        assert not runs.run(("sweep", "run", "-o", "one", *ASKED), Path(folder)).code
        yield Path(folder), runs


def command(rank: int, *more: str) -> tuple[str, ...]:
    return ("sweep", "run", "-o", "out", *ASKED, "--rank", str(rank), "--world-size", "3", *more)


@pytest.mark.parametrize("refuse", [{}, {"flock": 95}], ids=["Linux", "no flock"])
def test_a_rank_killed_anywhere_loses_nothing(refuse: dict[str, int], ground: tuple[Path, FaultRuns]) -> None:
    folder, runs = ground
    kills = 0
    for k in range(5, 100_000, 149 if refuse else 307):  # without flock the rank does its share alone
        shutil.rmtree(folder / "out", ignore_errors=True)
        ended = runs.run(command(1), folder, fault=f"any:{k}:kill:0:/out", refuse=refuse)
        if not ended.fired:
            break
        kills += 1
        for path in (folder / "out").glob("*/pmerge.json"):
            assert content(path.parent) == content(folder / "one" / path.parent.name)
        for rank in (0, 1, 2) if refuse else (0,):
            again = runs.run(command(rank), folder, refuse=refuse)
            assert not again.code, again.stderr
        assert content(folder / "out") == content(folder / "one"), f"killed at call {k}"
    assert kills > 2


def test_each_path_is_printed_once(ground: tuple[Path, FaultRuns]) -> None:
    folder, runs = ground
    shutil.rmtree(folder / "out", ignore_errors=True)
    paths = [f"out/{path.name}" for path in sorted((folder / "one").iterdir()) if path.is_dir()]
    first, second, third = (runs.run(command(rank), folder) for rank in (2, 1, 0))
    assert sorted(first.stdout.split()) == paths and not second.stdout
    assert sorted(third.stdout.split()) == paths  # rank 0 came when they existed
    as_json = runs.run(command(0, "--json"), folder)
    assert [each["path"] for each in json.loads(as_json.stdout)["outputs"]] == [f"out/{n}" for n in ORDER]


ORDER = ("sma-last2", "sma-last3", "ema-last2", "ema-last3")


def test_workers_and_launchers(ground: tuple[Path, FaultRuns]) -> None:
    """Whole processes, since `--workers` starts them."""
    folder, _ = ground
    shutil.rmtree(folder / "out", ignore_errors=True)
    asked = ["sweep", "run", "-o", "out", "--method", "sma,ema", "--last", "2,3", "--quiet"]
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    pmerge = [sys.executable, "-m", "merge_cli", *asked]
    launched = subprocess.run(pmerge, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert not launched.returncode and launched.stdout.split() == [f"out/{n}" for n in ORDER], launched.stderr
    assert content(folder / "out") == content(folder / "one")
    shutil.rmtree(folder / "out")
    workers = subprocess.run([*pmerge, "--workers", "2"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert not workers.returncode and sorted(workers.stdout.split()) == sorted(f"out/{n}" for n in ORDER), workers.stderr
    assert content(folder / "out") == content(folder / "one")
