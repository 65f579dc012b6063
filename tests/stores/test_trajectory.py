"""`analyze` and `evaluate` over runs that are not folders of safetensors on this machine: revisions
of the Hub, and distributed checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import write_checkpoint
from dcp_checkpoints import save_dcp
from hub_server import HubServer

from merge_cli import analyze, evaluate, plan_evaluation
from merge_cli.errors import UsageError
from merge_cli.features.evaluate import EvaluationPlan
from merge_cli.trajectory.evaluators import CommandEvaluator
from merge_cli.trajectory.folder import folder_of, read_run, run_of

REPO = "allenai/OLMo-2-1124-7B"
STEPS = range(1000, 7000, 1000)
# No loss, but another number for other weights.
COUNT = """import glob, json, os, zlib
data = open(glob.glob(os.environ["PMERGE_PATH"] + "/*.safetensors")[0], "rb").read()
values = data[8 + int.from_bytes(data[:8], "little") :]
json.dump({"loss": 1 + zlib.crc32(values) / 1e10}, open(os.environ["PMERGE_RESULT"], "w"))"""


def weights(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"layers.{i}.w": torch.randn(16, 8, generator=generator) * 0.01 - step / 10_000 for i in range(3)}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for step in STEPS:
        write_checkpoint(tmp_path / "run" / f"step{step}", weights(step), side_files=False)
    return tmp_path / "run"


@pytest.fixture
def revisions(local: Path, hub_server: HubServer) -> str:
    for step in STEPS:
        files = {path.name: path.read_bytes() for path in (local / f"step{step}").iterdir()}
        hub_server.commit(REPO, f"step{step}-tokens{4 * step // 1000}B", files)
    return f"hf://{REPO}@step*"


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    for step in STEPS:
        save_dcp(tmp_path / "dcp" / f"step-{step}", {**weights(step), "optimizer": {"state": {"m": torch.ones(3)}}}, files=2)
    return tmp_path / "dcp"


@pytest.fixture
def evaluator(tmp_path: Path) -> CommandEvaluator:
    (tmp_path / "count.py").write_text(COUNT)
    return CommandEvaluator(f"python3 {tmp_path / 'count.py'} {{path}}")


def names(plan: EvaluationPlan) -> list[str]:
    return [each.claim.name for each in plan.targets]


def test_analyze_finds_the_same_everywhere(local: Path, revisions: str, distributed: Path, tmp_path: Path) -> None:
    near = analyze(local, output=tmp_path / "near")
    far = analyze(revisions, output=tmp_path / "far")
    chunks = analyze(distributed, output=tmp_path / "chunks")
    assert near.groups == far.groups == chunks.groups
    assert [each.step for each in far.members] == list(STEPS)


def test_evaluate_plans_the_same_everywhere(
    local: Path, revisions: str, distributed: Path, evaluator: CommandEvaluator, tmp_path: Path
) -> None:
    near = plan_evaluation(local, evaluator, output=tmp_path / "near")
    far = plan_evaluation(revisions, evaluator, output=tmp_path / "far")
    assert (
        sorted(names(far)) == sorted(names(near)) == sorted(names(plan_evaluation(distributed, evaluator, output=tmp_path / "d")))
    )
    assert all(each.path is None for each in far.targets) and far.merge_bytes == near.merge_bytes


def test_what_is_kept_about_a_run_is_kept_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for paths, run, folder in (
        ([f"hf://{REPO}@step*"], f"hf://{REPO}", "OLMo-2-1124-7B.pmerge"),
        ([f"hf://{REPO}@step1000", f"hf://{REPO}@step2000"], f"hf://{REPO}", "OLMo-2-1124-7B.pmerge"),
        ([f"hf://{REPO}@main/runs/a"], f"hf://{REPO}@main/runs/a", "a.pmerge"),
        (["s3://bucket/run/step-*"], "s3://bucket/run", "run.pmerge"),
        (["s3://bucket/run"], "s3://bucket/run", "run.pmerge"),
    ):
        assert (run_of(paths), folder_of(paths)) == (run, tmp_path / folder)
    with pytest.raises(UsageError, match="s3://bucket/evals is no folder of this machine"):
        folder_of([str(tmp_path)], "s3://bucket/evals")


def test_evaluate_copies_far_checkpoints_for_a_while(
    local: Path, revisions: str, evaluator: CommandEvaluator, tmp_path: Path
) -> None:
    near = evaluate(local, evaluator, output=tmp_path / "near")
    far = evaluate(revisions, evaluator, output=tmp_path / "far")
    assert not far.failures
    assert {row.name: row.metrics for row in far.rows} == {row.name: row.metrics for row in near.rows}
    run = read_run(tmp_path / "far")
    assert run is not None and run.path == f"hf://{REPO}" and [each.step for each in run.checkpoints] == list(STEPS)
    assert not list((tmp_path / "far").glob("merges*"))
    assert json.loads((tmp_path / "far" / "run.json").read_text())
