"""The analysis of real checkpoints, from their files to analysis.json, against numpy on the same
weights.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_cli.errors import NonFiniteError, UsageError
from merge_cli.features.analyze import analyze, plan_analysis
from merge_cli.trajectory.analysis import Analysis
from merge_cli.trajectory.folder import read_analysis

STEPS = list(range(9300, 10_001, 100))
SHAPES = {
    "model.embed_tokens.weight": (40, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (30, 8),
    "model.layers.1.mlp.up_proj.weight": (30, 8),
    "model.norm.weight": (8,),
}


def tensors_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: (5 + rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in STEPS:
        folder = tmp_path / "run" / f"ckpt_{step}"
        folder.mkdir(parents=True)
        save_file({**tensors_at(step), "model.count": np.array([3])}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text("{}")
    return tmp_path / "run"


def found(run: Path, **options: object) -> Analysis:
    return analyze(run, output=run.parent / "a", **options)  # type: ignore[arg-type]


def test_numbers_are_those_of_the_weights(run: Path) -> None:
    analysis = found(run, method="wma")
    flat = np.array([np.concatenate([each.ravel() for each in tensors_at(step).values()]) for step in STEPS], np.float64)
    values = np.arange(1, 9) / 36
    merge = values @ flat
    norm = np.linalg.norm(flat[-1])
    assert np.allclose(analysis.geometry.distances, np.linalg.norm(flat[:, None] - flat[None], axis=2))
    assert analysis.whole.merge_to_newest == pytest.approx(np.linalg.norm(merge - flat[-1]) / norm)
    assert analysis.whole.spread == pytest.approx(np.sqrt(values @ np.sum((flat - merge) ** 2, axis=1)) / norm)
    assert analysis.whole.num_elements == flat.shape[1]
    assert {(each.layer, each.kind) for each in analysis.groups} == {
        (None, "embedding"),
        (0, "attention"),
        (0, "MLP"),
        (1, "MLP"),
        (None, "norm"),
    }
    (mlp,) = (each for each in analysis.kinds if each.kind == "MLP")
    own = np.array(
        [np.concatenate([tensors_at(step)[f"model.layers.{i}.mlp.up_proj.weight"].ravel() for i in (0, 1)]) for step in STEPS]
    )
    assert mlp.merge_to_newest == pytest.approx(np.linalg.norm(values @ own - own[-1]) / np.linalg.norm(own[-1]), rel=1e-5)
    assert analysis.mean_age == pytest.approx(values @ (10_000 - np.array(STEPS)))
    assert analysis.verdict.value == "likely to help"
    assert read_analysis(run.parent / "a") == analysis


def test_every_bit_is_the_same_however_the_work_is_divided(run: Path) -> None:
    one = found(run, threads=1)
    assert found(run, threads=4, chunk_size="16KiB") == one == found(run, memory="64MiB", direct="on")


def test_the_log_of_the_newest_checkpoint_is_read(run: Path, tmp_path: Path) -> None:
    assert "no training log" in plan_analysis(run, output=tmp_path / "a").notes[-1]
    history = [{"step": step, "learning_rate": 1e-3 if step < 9500 else 1e-4} for step in range(0, 10_001, 100)]
    (run / "ckpt_10000" / "trainer_state.json").write_text(json.dumps({"global_step": 10_000, "log_history": history}))
    analysis = found(run)
    assert [each.name for each in analysis.findings] == ["stages"] and analysis.constant_since == 9500
    assert analysis.verdict.value == "may hurt"  # the phase is 500 steps old, the merge lags 350
    (tmp_path / "log.csv").write_text("step,lr\n" + "".join(f"{step},0.001\n" for step in range(0, 10_001, 100)))
    assert found(run, log=tmp_path / "log.csv").findings == ()


def test_selections_and_wrong_inputs(run: Path, tmp_path: Path) -> None:
    assert [member.step for member in found(run, last=3).members] == STEPS[-3:]
    assert [each.kind for each in found(run, include=["*norm*"]).kinds] == ["norm"]
    with pytest.raises(UsageError, match="at least two"):
        found(run, last=1)
    broken = tensors_at(9900)
    broken["model.norm.weight"][3] = np.nan
    save_file(broken | {"model.count": np.array([3])}, run / "ckpt_9900" / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"`model.norm.weight` has NaN"):
        found(run)


def test_the_command_prints_the_formula_and_no_gain(run: Path) -> None:
    """Processes, as a user starts them."""

    def pmerge(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "merge_cli", "analyze", "run", *arguments]
        return subprocess.run(command, cwd=run.parent, check=True, capture_output=True, text=True, timeout=120)

    done = pmerge()
    assert "likely to help" in done.stdout and "sum c_i (T_last - T_i) / T_last = 350 / 10000 = 0.035" in done.stdout
    assert "none of this is a gain" in done.stdout and "buffers" in done.stderr
    assert (run.parent / "run.pmerge" / "analysis.json").exists()
    assert json.loads(pmerge("--json", "-q").stdout)["verdict"]["value"] == "likely to help"
