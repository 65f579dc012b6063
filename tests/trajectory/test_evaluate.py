"""Evaluations with real commands over real checkpoints: exact numbers, resumed after a kill, never
believed when constant.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_cli.errors import ChangedError, UsageError
from merge_cli.features.evaluate import EvaluationResult, evaluate, plan_evaluation
from merge_cli.features.forecast import forecast
from merge_cli.ranks.launcher import Rank
from merge_cli.trajectory.evaluators import CommandEvaluator, EvaluationError, Subject
from merge_cli.trajectory.folder import folder_of, read_run
from merge_cli.trajectory.ledger import Ledger

STEPS = range(100, 2001, 100)
# The loss is quadratic in the weights: sum of squares. Reads the file by hand: a process that
# imports numpy takes .1 s.
QUADRATIC = """
import json, os, struct, array
path = os.environ["PMERGE_PATH"] + "/model.safetensors"
raw = open(path, "rb").read()
(n,) = struct.unpack("<Q", raw[:8])
values = array.array("f", raw[8 + n :])
loss = 0.0
for x in values:
    loss += x * x
with open(os.environ["PMERGE_RESULT"], "w") as out:
    json.dump({"loss": loss}, out)
"""


def weights_at(step: int) -> np.ndarray:
    """A path that falls towards 0 with noise around it; small integers over 64, so that sums are
    exact.
    """
    noise = np.random.default_rng(step).integers(-8, 9, size=32)
    return ((noise + 64 - step // 40) / 64).astype(np.float32)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in STEPS:
        folder = tmp_path / "my run" / f"ckpt_{step}"
        folder.mkdir(parents=True)
        save_file({"w": weights_at(step)}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text("{}")
    return tmp_path / "my run"


def command(tmp_path: Path, text: str = QUADRATIC) -> str:
    script = tmp_path / "eval uate.py"
    script.write_text(text)
    return f"echo {{name}} >> '{tmp_path}/calls'; {sys.executable} -S -E '{script}' {{path}}"


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().split() if (tmp_path / "calls").exists() else []


def do(run: Path, evaluator: object, **options: object) -> EvaluationResult:
    return evaluate(run, evaluator, output=run.parent / "evals", **options)  # type: ignore[arg-type]


def test_rows_hold_exactly_what_the_command_measured(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = do(run, CommandEvaluator(command(tmp_path)))
    singles = [f"step-{step}" for step in (1700, 1800, 1900, 2000)]
    assert [row.name for row in result.rows] == [*singles, "sma-last8-every100-at2000", "sma-last6-every200-at2000"]
    for row in result.rows:
        merged = sum(np.float64(part.coefficient) * weights_at(part.step or 0).astype(np.float64) for part in row.parts).astype(
            np.float32
        )
        expected = 0.0
        for x in merged.tolist():
            expected += x * x
        assert row.metrics == {"loss": expected}
        assert bool(row.weights) == (len(row.parts) > 1)
    assert not list((tmp_path / "evals").glob("merges*")) and not list((tmp_path / "evals").glob("*.lock"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    noted = read_run(tmp_path / "evals")
    assert noted is not None and noted.steps == list(STEPS) and noted.path == str(run)
    outputs = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "evals" / "outputs").iterdir()}
    assert outputs == {row.name for row in result.rows}


def test_what_is_known_is_not_measured_again_and_changed_weights_are(run: Path, tmp_path: Path) -> None:
    evaluator = CommandEvaluator(command(tmp_path))
    first = do(run, evaluator)
    count = len(calls(tmp_path))
    assert do(run, evaluator).measured == () and len(calls(tmp_path)) == count
    assert do(run, evaluator).rows == first.rows
    assert len(do(run, evaluator, redo=True).measured) == count
    newest = run / "ckpt_2000"
    save_file({"w": weights_at(7)}, newest / "model.safetensors", {"format": "pt"})
    again = do(run, evaluator)
    assert {row.name for row in again.measured} == {row.name for row in first.rows if row.parts[-1].step == 2000}
    assert do(run, CommandEvaluator(command(tmp_path) + " ")).measured  # another command is another evaluator


@pytest.mark.slow(
    reason="kills processes again and again; test_what_is_known_is_not_measured_again, and the torn lines of test_ledger"
)
def test_a_killed_evaluation_goes_on_where_it_was(run: Path, tmp_path: Path) -> None:
    """Killed processes, which is the point: SIGKILL in the middle of an evaluation, again and again
    until all is done.
    """
    slow = QUADRATIC + "\nimport time; time.sleep(0.25)\n"
    arguments = [sys.executable, "-m", "merge_cli", "evaluate", "my run", "--command", command(tmp_path, slow), "-o", "evals", "-q"]
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = len(calls(tmp_path))
        while process.poll() is None and len(calls(tmp_path)) < before + 3:
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert process.returncode == 0 and kills >= 1
    rows = Ledger(tmp_path / "evals").rows()
    clean = do(run, CommandEvaluator(command(tmp_path, slow)), redo=True)
    assert [(row.key, row.metrics) for row in rows] == [(row.key, row.metrics) for row in clean.rows]
    made = calls(tmp_path)[: -len(clean.rows)]
    assert len(made) <= len(rows) + kills  # each kill cost one evaluation, the one in progress
    assert not list((tmp_path / "evals").glob("merges*"))


def test_nothing_outlives_a_killed_evaluation(run: Path, tmp_path: Path) -> None:
    """A process is killed, and what its command had started is looked for."""
    text = f"sh -c 'echo $$ > {tmp_path}/pid; sleep 100; true' & wait; echo {{path}}"
    process = subprocess.Popen(
        [sys.executable, "-m", "merge_cli", "evaluate", "my run", "--command", text, "-o", "evals"], cwd=tmp_path, stderr=-1
    )
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    process.kill()
    process.communicate()
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] if Path(f"/proc/{child}").exists() else "Z"
        if state == "Z":
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_copy_of_the_run_is_measured_again_and_replaces_the_rows(run: Path, tmp_path: Path) -> None:
    evaluator = CommandEvaluator(command(tmp_path))
    first = do(run, evaluator)
    for path in run.rglob("model.safetensors"):
        os.utime(path, (1, 1))
    again = do(run, evaluator)
    assert len(again.measured) == len(first.rows) and [r.metrics for r in again.rows] == [r.metrics for r in first.rows]
    found = forecast(run, output=tmp_path / "evals", metric="loss")
    assert sorted(each.key for each in found.results) == sorted(row.key for row in again.rows)


@pytest.mark.parametrize(
    ("printed", "rows"),
    [("1.23456789", 1), ("0.25", 2), ('{"a": 0.123, "b": 0.456, "c": 0.789}', 1), ("7", 2)],
)
def test_a_constant_evaluator_stops(printed: str, rows: int, run: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="different weights give exactly the same result") as error:
        do(run, CommandEvaluator(f"echo '{printed}' {{path}} > /dev/null; echo '{printed}'"))
    assert "--allow-equal" in error.value.hint
    assert len(Ledger(tmp_path / "evals").rows()) == rows
    assert do(run, CommandEvaluator(f"echo '{printed}'"), allow_equal=True).rows


def test_the_first_failure_stops_and_a_later_one_does_not(run: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="exit code 3") as error:
        do(run, CommandEvaluator("echo oh no >&2; exit 3; {path}"))
    assert error.value.details == ("oh no",)
    failing = command(tmp_path) + "; test {step} != 1900"
    result = do(run, CommandEvaluator(failing))
    assert list(result.failures) == ["step-1900"] and len(result.rows) >= 4
    assert result.error is not None and "1 evaluations failed" in result.error.message
    mended = do(run, CommandEvaluator(failing))
    assert list(mended.failures) == ["step-1900"] and mended.measured == ()


def test_weights_that_change_while_they_are_measured_give_no_row(run: Path, tmp_path: Path) -> None:
    touch = "touch {path}/model.safetensors; echo 1.$(date +%N)"
    with pytest.raises(ChangedError, match="has changed while it was evaluated"):
        do(run, CommandEvaluator(touch))
    assert Ledger(tmp_path / "evals").rows() == []


def test_ranks_share_a_plan(run: Path, tmp_path: Path) -> None:
    evaluator = CommandEvaluator(command(tmp_path))
    shares = [do(run, evaluator, rank=Rank(number, 3, source="--rank")) for number in range(3)]
    names = [row.name for share in shares for row in share.rows]
    alone = plan_evaluation(run, evaluator, output=tmp_path / "evals")
    assert sorted(names) == sorted(each.claim.name for each in alone.targets) and alone.missing == []
    assert len(calls(tmp_path)) == len(names)


def test_jobs_and_gpus(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "gpus"
    text = f"echo $CUDA_VISIBLE_DEVICES >> {log}; {command(tmp_path)}; sleep 0.2"
    result = do(run, CommandEvaluator(text, gpus=["3", "5"]))
    assert set(log.read_text().split()) == {"3", "5"} and len(result.rows) == len(calls(tmp_path))
    assert [row.name for row in result.rows] == [row.name for row in do(run, CommandEvaluator(text, gpus=["3", "5"])).rows]


def test_kept_merges_and_the_bound_on_the_disk(run: Path, tmp_path: Path) -> None:
    evaluator = CommandEvaluator(command(tmp_path))
    plan = plan_evaluation(run, evaluator, plan="grid", output=tmp_path / "evals", batch=2)
    assert plan.disk_bytes == 2 * plan.merge_bytes > 0
    result = do(run, evaluator, keep=True)
    kept = {path.name for path in (tmp_path / "evals" / "merges").iterdir() if path.is_dir()}
    assert kept == {row.name for row in result.rows if len(row.parts) > 1}


def test_a_list_and_an_annealed_checkpoint(run: Path, tmp_path: Path) -> None:
    end = tmp_path / "decayed" / "ckpt_2000"
    end.mkdir(parents=True)
    save_file({"w": weights_at(2) / 4}, end / "model.safetensors")
    entries = [{"last": 1}, {"last": 1, "at": 500, "name": "early"}, {"method": "ema", "alpha": 0.5, "last": 3}]
    result = do(run, CommandEvaluator(command(tmp_path)), plan=entries, annealed={str(end): 1500})
    assert [row.name for row in result.rows] == ["step-2000", "early", "ema-0.5-last3", "annealed-1500-2000"]
    assert [row.annealed_from for row in result.rows] == [None, None, None, 1500]
    assert result.rows[2].coefficients == [0.25, 0.25, 0.5]
    with pytest.raises(UsageError, match="no checkpoint of an annealing"):
        do(run, CommandEvaluator(command(tmp_path)), annealed={str(end): 2000})
    with pytest.raises(UsageError, match="no checkpoint at step 7"):
        do(run, CommandEvaluator(command(tmp_path)), plan=[{"last": 1, "at": 7}])


def test_the_folder_is_never_in_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    assert folder_of(["my run"]) == run.parent / "my run.pmerge"
    monkeypatch.chdir("/")
    assert folder_of([run]) == Path("/my run.pmerge")
    monkeypatch.chdir(run)
    assert folder_of(["."]) == run.parent / "my run.pmerge"
    monkeypatch.chdir(run / "ckpt_100")
    assert folder_of([".."]) == run.parent / "my run.pmerge"
    assert folder_of(["../ckpt_100", "../ckpt_200"]) == run.parent / "my run.pmerge"


def test_the_result_of_a_command_is_kept_and_found(tmp_path: Path) -> None:
    evaluator = CommandEvaluator("cd {out}; echo noise; echo '{\"acc\": 0.5}'", ["acc"])
    (tmp_path / "f").mkdir()
    assert evaluator.measure(Subject("n", tmp_path, "7"), tmp_path / "f", 0).metrics == {"acc": 0.5}
    assert (tmp_path / "f" / "stdout").read_text() == 'noise\n{"acc": 0.5}\n'
    (tmp_path / "g").mkdir()
    with pytest.raises(EvaluationError, match="no metric loss"):
        CommandEvaluator("echo '{\"acc\": 0.5}'", ["loss"]).measure(Subject("n", tmp_path, ""), tmp_path / "g", 0)


def test_a_forecast_from_start_to_end_is_that_of_the_quadratic(run: Path, tmp_path: Path) -> None:
    do(run, CommandEvaluator(command(tmp_path)), plan="rolling")
    found = forecast(run, output=tmp_path / "evals")
    assert found.refusals == ()
    point = found.noises[0].a
    losses = {row.key: row.metrics["loss"] for row in Ledger(tmp_path / "evals").rows()}
    assert point.value == pytest.approx(sum(weight * losses[key] for key, weight in point.rows.items()))
    assert json.loads(json.dumps({"a": point.value}))["a"] > 0
    with pytest.raises(UsageError, match="there is no ledger"):
        forecast(tmp_path / "other", output=tmp_path / "none")
