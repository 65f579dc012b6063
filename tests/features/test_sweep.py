"""A sweep: every output is what `average` makes, inputs are read once, and each output is absent or
complete.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import nasty_run, random_bits, training_run, write_checkpoint, write_run
from builders import write_trained as write
from command import pmerge, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemes import PLAIN, quantized_run

from faults.runs import Ended, Run
from merge_cli import AveragePlan, Rank, SweepPlan, average, plan_average, plan_sweep, sweep
from merge_cli.engine import arithmetic as engine_reduce
from merge_cli.engine.reader import InputFiles
from merge_cli.errors import MismatchError, NonFiniteError, OutputError, UsageError
from merge_cli.features import preparation
from merge_cli.output.lock import Lock
from merge_cli.planning.plan import MergePlan
from merge_cli.request.grid import Combination, entry, grid, parse_method
from merge_cli.request.spec import RunConfig
from merge_cli.tuning import tune as tuning

METHODS = [
    "sma",
    "wma",
    "ema",
    "ema:0.7",
    "ema:half-life=150",
    "decay:1-sqrt",
    "decay:linear",
    "decay:cosine:floor=0.1",
    "power:0.2",
]


def content(folder: Path) -> dict[str, Any]:
    """Every file of a result by name, pmerge.json without what tells one run from another."""
    files: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(files["pmerge.json"])
    return {**files, "pmerge.json": {key: value for key, value in manifest.items() if key not in ("command", "sha256")}}


def alone(run: Any, out: Path, combination: Combination, **options: Any) -> dict[str, Any]:
    """What `average` makes of a combination."""
    selection = {{"at": "to_step"}.get(key, key): value for key, value in combination.selection.items()}
    return content(average(run, out, method=combination.method, **combination.parameters, **selection, **options).output)


def assert_each_is_that_of_average(run: Any, folder: Path, out: Path, asked: Mapping[str, Any], **options: Any) -> int:
    """Make a sweep, and each of its outputs alone; how many outputs there were."""
    plan = plan_sweep(run, out, **asked, **options)
    sweep(run, out, **asked, **options)
    assert {path.name for path in out.iterdir()} == {each.combination.name for each in plan.outputs} | {"sweep.json"}
    for number, each in enumerate(plan.outputs):
        assert content(each.path) == alone(run, folder / f"alone-{number}", each.combination, **options), each.combination.name
    return len(plan.outputs)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("single", {}),
        ("sharded", {}),
        ("mixed", {}),
        ("single", {"dtype": "fp32"}),
        ("mixed", {"dtype": "bf16", "accumulate": "fp64"}),
        ("sharded", {"accumulate": "fp32"}),
    ],
    ids=str,
)
def test_each_output_is_that_of_average(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    nasty_run(tmp_path / "run", 5, layout=layout)
    asked = {"methods": METHODS, "last": [1, 2, 4], "at": [300, 500]}
    count = assert_each_is_that_of_average([tmp_path / "run"], tmp_path, tmp_path / "out", asked, **options)
    assert count == (1 + 8) + (1 + 8 + 8)  # nine methods of which two are the same, all of them for N = 1; no four at 300
    plan = plan_sweep([tmp_path / "run"], tmp_path / "new", methods=["sma"], at=[300, 500])
    assert len(plan.groups) == (2 if layout == "mixed" else 1)


@given(data=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_each_output_of_any_grid_is_that_of_average(data: st.DataObject) -> None:
    axis = st.lists(st.sampled_from([1, 2, 3, 4]), max_size=2, unique=True)
    asked: dict[str, Any] = {
        "methods": data.draw(st.lists(st.sampled_from(METHODS), min_size=1, max_size=3, unique=True)),
        "last": data.draw(axis),
        "every": data.draw(st.sampled_from([[], [100], [100, 200]])),
        "at": data.draw(st.sampled_from([[], [400], [200, 300, 500]])),
    }
    threads = data.draw(st.sampled_from([1, 3]))
    memory = data.draw(st.sampled_from([None, 16 << 20]))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        nasty_run(folder / "run", 5, layout=data.draw(st.sampled_from(["single", "mixed"])))
        try:
            plan_sweep([folder / "run"], folder / "out", **asked)
        except UsageError as error:
            assert "no combination" in error.message
            return
        assert_each_is_that_of_average([folder / "run"], folder, folder / "out", asked, threads=threads, memory=memory)


@pytest.mark.parametrize("case", ["DeepSeek-V3", "scales in BF16"])
def test_quantized_runs_are_dequantized_as_by_average(case: str, tmp_path: Path) -> None:
    paths, *_ = quantized_run(tmp_path / "run", case, 4)
    asked = {"methods": ["sma", "ema:0.3"], "last": [2, 3], "at": [3, 4]}
    assert assert_each_is_that_of_average(paths, tmp_path, tmp_path / "out", asked) == 8


def test_sums_too_large_for_float32_are_redone_beside_a_quantized_checkpoint(tmp_path: Path) -> None:
    """The tensor is quantized in one checkpoint, which not every output uses; masks hold numbers
    near the smallest bfloat16.
    """
    paths, (first,), name, _ = quantized_run(tmp_path / "run", "DeepSeek-V3", 1)
    for step in (2, 3, 4):
        values = random_bits(torch.bfloat16, first.numel(), step).view(first.shape)
        values[:2] = -3e38
        tensors = {name: values, **PLAIN}
        paths.append(write_checkpoint(tmp_path / "run" / f"step_{step}", tensors))
    asked = {"methods": ["sma", "wma", "ema"], "last": [2, 3, 4]}
    assert assert_each_is_that_of_average(paths, tmp_path, tmp_path / "out", asked) == 9


def test_integers_and_config_come_from_the_base_of_each_output(tmp_path: Path) -> None:
    run = training_run({"w": torch.randn(64).bfloat16(), "n": torch.tensor([0])}, 4)
    for number, tensors in enumerate(run):
        tensors["n"] = torch.tensor([number // 2])
    for path, text in zip(write_run(tmp_path / "run", run), "abcd", strict=True):
        (path / "config.json").write_text(json.dumps({"model_type": text}))
    asked = {"methods": ["sma"], "last": [2], "at": [200, 400]}
    assert assert_each_is_that_of_average([tmp_path / "run"], tmp_path, tmp_path / "out", asked) == 2
    assert json.loads((tmp_path / "out" / "sma-last2-at200" / "config.json").read_text()) == {"model_type": "b"}
    with pytest.raises(MismatchError, match="1 tensor that is not averaged"):
        sweep([tmp_path / "run"], tmp_path / "other", methods=["sma"], last=[2, 3])
    assert not [path for path in (tmp_path / "other").iterdir() if not path.name.endswith(".pmerge-partial")]


@pytest.mark.parametrize("options", [{"exclude": ["v"]}, {"include": ["w"]}, {"int_policy": "newest"}], ids=str)
def test_each_output_copies_from_its_own_base(options: dict[str, Any], tmp_path: Path) -> None:
    for step in (1, 2, 3):
        tensors = {"w": torch.full((8,), float(step)), "v": torch.full((8,), float(step)), "n": torch.full((4,), step)}
        if "int_policy" not in options:
            del tensors["n"]
        write_checkpoint(tmp_path / "run" / f"step_{step}", tensors)
    wanted = [{"last": 2, "at": 2}, {"last": 2, "at": 3}]
    made = sweep([tmp_path / "run"], tmp_path / "sweep", combinations=wanted, **options)
    for output, asked in zip(made.outputs, wanted, strict=True):
        single = average([tmp_path / "run"], tmp_path / "one" / output.name, last=2, to_step=asked["at"], **options).output
        assert content(output) == content(single)


def test_each_output_of_pickles_has_the_dtype_of_its_own_base(tmp_path: Path) -> None:
    for step, dtype in ((1, torch.bfloat16), (2, torch.bfloat16), (3, torch.float32)):
        (tmp_path / "run" / f"step_{step}").mkdir(parents=True)
        torch.save({"w": torch.full((8,), float(step), dtype=dtype)}, tmp_path / "run" / f"step_{step}" / "pytorch_model.bin")
    made = sweep([tmp_path / "run"], tmp_path / "sweep", methods=["sma"], last=[2], at=[2, 3])
    for output, step in zip(made.outputs, (2, 3), strict=True):
        assert content(output) == content(average([tmp_path / "run"], tmp_path / f"one-{step}", last=2, to_step=step).output)


def test_inputs_are_read_once_and_only_where_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"layers.{i}": torch.randn(300, 101).bfloat16() for i in range(4)}
    paths = write_run(tmp_path / "run", training_run(tensors, 5), shards=2)
    read: Counter[tuple[str, int, int]] = Counter()
    read_into = InputFiles.read_into

    def counted(self: InputFiles, file: Any, offset: int, buffer: memoryview) -> None:
        read[(str(file.path), offset, len(buffer))] += 1
        read_into(self, file, offset, buffer)

    monkeypatch.setattr(InputFiles, "read_into", counted)
    plan = plan_sweep(paths, tmp_path / "out", methods=["sma", "wma", "ema:0.1"], last=[2, 3])
    (group,) = plan.groups
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert (plan.bytes_to_read, group.bytes_read_separately) == (3 * size, 3 * (2 + 3) * size)
    assert plan.bytes_to_write > 6 * size
    result = sweep(paths, tmp_path / "out", methods=["sma", "wma", "ema:0.1"], last=[2, 3])
    assert result.statistics.bytes_read == plan.bytes_to_read == sum(n * times for (_, _, n), times in read.items())
    assert set(read.values()) == {1}
    assert not [path for path, _, _ in read if "checkpoint-100/" in path or "checkpoint-200/" in path]
    read.clear()
    shutil.rmtree(tmp_path / "out" / "ema-0.1-last2")
    assert sweep(paths, tmp_path / "out", methods=["sma", "wma", "ema:0.1"], last=[2, 3]).reused == 5 * 2
    assert {Path(path).parent.name for path, _, _ in read} == {"checkpoint-400", "checkpoint-500"}


def test_weights_belong_to_the_checkpoints_as_they_were_typed(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", 3, layout="single")
    typed = [paths[2], paths[0], paths[1]]
    lists: list[dict[str, Any]] = [{"weights": [0.7, 0.1, 0.2], "name": "typed"}, {"method": "wma", "name": "by-step"}]
    assert assert_each_is_that_of_average(typed, tmp_path, tmp_path / "out", {"combinations": lists}) == 2
    assert len(plan_sweep(typed, tmp_path / "new", combinations=lists).groups) == 2


@pytest.mark.parametrize("accumulate", ["auto", "fp32"])
def test_terms_added_in_one_pass_or_in_two_are_the_same(accumulate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training_run({"w": torch.randn(501, 1009).bfloat16(), "v": torch.randn(70_001)}, 4)
    write_run(tmp_path / "run", run)
    assert engine_reduce.multiplies_then_adds()
    one = sweep([tmp_path / "run"], tmp_path / "one", methods=METHODS, accumulate=accumulate)
    monkeypatch.setattr(engine_reduce, "multiplies_then_adds", lambda: False)
    two = sweep([tmp_path / "run"], tmp_path / "two", methods=METHODS, accumulate=accumulate)
    assert [content(path) for path in one.outputs] == [content(path) for path in two.outputs]


def test_what_is_the_same_is_written_once_and_what_cannot_be_is_skipped(tmp_path: Path) -> None:
    nasty_run(tmp_path / "run", 4, layout="single")
    sweep([tmp_path / "run"], tmp_path / "out", methods=["sma", "decay:linear", "ema:0.5"], last=[2, 9], every=[100], at=[300, 350])
    report = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [each["name"] for each in report["outputs"]] == ["sma-last2-every100-at300", "ema-0.5-last2-every100-at300"]
    first = report["outputs"][0]
    assert [(each["step"], each["coefficient"]) for each in first["inputs"]] == [(200, 0.5), (300, 0.5)]
    assert (first["effective_sample_size"], first["mean_age"]) == (2.0, 0.5)
    assert first["plan"] == json.loads((Path(first["path"]) / "pmerge.json").read_text())["plan"]
    (same,) = report["duplicates"]
    assert (same["name"], same["same_as"]) == ("decay-linear-last2-every100-at300", "sma-last2-every100-at300")
    reasons = {each["name"]: each["reason"] for each in report["skipped"]}
    assert len(reasons) == 9
    assert "no checkpoint at step 350" in reasons["sma-last2-every100-at350"]
    assert "missing for --every 100" in reasons["sma-last9-every100-at300"] or "--last 9" in reasons["sma-last9-every100-at300"]
    with pytest.raises(UsageError, match="no combination"):
        plan_sweep([tmp_path / "run"], tmp_path / "other", methods=["sma"], last=[9])


def test_another_result_is_refused_and_replaced_only_on_request(tmp_path: Path) -> None:
    nasty_run(tmp_path / "run", 3, layout="single")
    run, out = [tmp_path / "run"], tmp_path / "out"
    sweep(run, out, methods=["sma"], last=[2, 3])
    old = content(out / "sma-last2")
    assert not plan_sweep(run, out, methods=["sma", "wma"], last=[2, 3]).findings
    with pytest.raises(OutputError, match="exists already"):
        sweep(run, out, methods=["sma", "wma"], last=[2, 3], dtype="fp32")
    assert content(out / "sma-last2") == old and not (out / "wma-last2").exists()
    sweep(run, out, methods=["sma", "wma"], last=[2, 3], dtype="fp32", overwrite=True)
    assert content(out / "sma-last2") == alone(run, tmp_path / "alone", grid(["sma"], [2])[0], dtype="fp32")
    shard = out / "sma-last2" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(OutputError, match="exists already"):
        sweep(run, out, methods=["sma"], last=[2], dtype="fp32")
    (out / "sweep.json").write_text("[]")
    with pytest.raises(OutputError, match="no sweep wrote it"):
        sweep(run, out, methods=["power"], last=[2])


@pytest.mark.parametrize("plan", [plan_average, partial(plan_sweep, methods=["sma", "wma"])])
def test_a_wrong_destination_is_found_before_anything_is_timed(
    plan: Callable[..., AveragePlan | SweepPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", [{"w": torch.full((3,), float(step))} for step in range(3)])
    (tmp_path / "file").touch()
    timed: list[tuple[str, str]] = []
    tuned = tuning.tune

    def watched(merge: MergePlan, run: RunConfig, rank: Rank | None) -> tuning.Tuning:
        timed.append((run.device, run.direct))
        return tuned(merge, run, rank)

    monkeypatch.setattr(preparation, "tune", watched)
    for place in (tmp_path / "file" / "out", run[1] / "out"):
        assert plan(run, place).findings
    assert timed == [("cpu", "off")] * 2  # nothing is left to choose, so nothing is measured
    assert not plan(run, tmp_path / "out").findings
    assert timed[2:] == [("auto", "auto")]


def test_nothing_is_made_of_nan(tmp_path: Path) -> None:
    run = training_run({"w": torch.randn(64).bfloat16()}, 3)
    run[0]["w"][5] = torch.nan
    write_run(tmp_path / "run", run)
    with pytest.raises(NonFiniteError, match="NaN or Inf in an input"):
        sweep([tmp_path / "run"], tmp_path / "out", methods=["sma"], last=[2, 3])
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.endswith(".pmerge-partial")]
    sweep([tmp_path / "run"], tmp_path / "out", methods=["sma", "wma"], last=[2])


def test_a_staging_folder_that_another_run_holds_stops_the_sweep(tmp_path: Path) -> None:
    nasty_run(tmp_path / "run", 3, layout="single")
    other = tmp_path / "out" / "wma-last2"
    with Lock(other.with_name("wma-last2.pmerge-partial") / "lock", other), pytest.raises(OutputError, match="another run"):
        sweep([tmp_path / "run"], tmp_path / "out", methods=["sma", "wma"], last=[2])
    sweep([tmp_path / "run"], tmp_path / "out", methods=["sma", "wma"], last=[2])


# -- the memory, the disk
# ---------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_disk_is_looked_at_for_all_outputs_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", training_run({"w": torch.randn(1 << 20).bfloat16()}, 4))
    methods = [f"ema:0.{i}" for i in range(1, 10)]
    plan = plan_sweep([tmp_path / "run"], tmp_path / "out", methods=methods, memory=16 << 20)
    one = plan_average([tmp_path / "run"], tmp_path / "one", method="ema")
    assert plan.groups[0].budget.bytes <= 16 << 20
    assert plan_sweep([tmp_path / "run"], tmp_path / "out", methods=methods).groups[0].budget.bytes > one.budget.bytes
    with pytest.raises(UsageError, match="too small"):
        plan_sweep([tmp_path / "run"], tmp_path / "out", methods=methods, memory=100_000)
    free = os.statvfs(tmp_path)
    fields = list(free)
    fields[4] = 3 * plan.bytes_to_write // len(methods) // free.f_frsize  # room for three outputs
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    (finding,) = plan_sweep([tmp_path / "run"], tmp_path / "out", methods=methods).findings
    assert "not enough space" in finding.message and str(plan.bytes_to_write) in finding.details[0]
    assert not plan_sweep([tmp_path / "run"], tmp_path / "out", methods=methods[:2]).findings


# -- killed, full, interrupted: processes
# ------------------------------------------------------------------------------------

GRID = ["--method", "sma,wma,ema:0.1", "--last", "2,3", "--threads", "1", "--memory", "16MiB"]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three checkpoints with six shards, and the results that averages of it must be."""
    folder = tmp_path_factory.mktemp("big")
    tensors = {f"layers.{i:02}": torch.randn(1 << 19).bfloat16() for i in range(12)}
    write_run(folder / "run", training_run(tensors, 3), shards=6)
    for combination in grid(["sma", "wma", "ema:0.1"], [2, 3]):
        alone([folder / "run"], folder / "alone" / combination.name, combination)
    return folder


def begin(big: Path, out: Path, **setting: Any) -> Run:
    return start("sweep", "run", "-o", out, *GRID, cwd=big, **setting)


def wait_for(process: Run, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached() and process.is_running and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.is_running, "it ended before it could be stopped"


def finished_files(out: Path) -> int:
    return len(list(out.glob("*.pmerge-partial/done/*.json")))


def assert_absent_or_complete(big: Path, out: Path) -> int:
    """How many outputs are there; each of them is whole."""
    there = [path for path in out.iterdir() if path.is_dir() and not path.name.endswith(".pmerge-partial")]
    for path in there:
        assert content(path) == content(big / "alone" / path.name)
    return len(there)


def assert_finishes(big: Path, out: Path, *arguments: object) -> Ended:
    done = pmerge("sweep", "run", "-o", out, *GRID, *arguments, cwd=big)
    assert assert_absent_or_complete(big, out) == 6
    assert {path.name for path in out.iterdir()} == {path.name for path in (big / "alone").iterdir()} | {"sweep.json"}
    return done


@pytest.mark.parametrize("files", [0, 2, 9, 20, 33])
def test_killed_anywhere_the_same_command_continues(files: int, big: Path, tmp_path: Path) -> None:
    process = begin(big, tmp_path / "out")
    wait_for(process, lambda: finished_files(tmp_path / "out") >= files and (tmp_path / "out").exists())
    process.send(signal.SIGKILL)
    process.end()
    assert_absent_or_complete(big, tmp_path / "out")
    kept = finished_files(tmp_path / "out") + 6 * len(list((tmp_path / "out").glob("*/pmerge.json")))
    done = assert_finishes(big, tmp_path / "out")
    assert f"{kept} file{'s' * (kept != 1)} of an earlier run kept" in done.stderr or kept < 1


def test_killed_while_it_publishes(big: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = begin(big, out)
    wait_for(process, lambda: len(list(out.glob("*/pmerge.json"))) >= 1)
    process.send(signal.SIGKILL)
    process.end()
    assert assert_absent_or_complete(big, out) >= 1
    assert_finishes(big, out)


@pytest.mark.parametrize("left", ["", "lock", "control", "checkpoint"])
def test_what_a_run_left_that_was_killed_while_it_cleaned_up_goes(left: str, big: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pmerge("sweep", "run", "-o", out, *GRID, cwd=big)
    folder = out / "sma-last2.pmerge-partial"
    (folder / "checkpoint" if left == "checkpoint" else folder).mkdir(parents=True)
    if left not in ("", "checkpoint"):
        (folder / left).write_text("")
    assert_finishes(big, out)


def test_what_another_grid_or_average_began_is_continued(big: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("sweep", "run", "-o", out, "--method", "wma,sma", "--last", "3", "--threads", "1", "--memory", "16MiB")
    process = start(*command, cwd=big)
    wait_for(process, lambda: finished_files(out) >= 3)
    process.send(signal.SIGKILL)
    process.end()
    pmerge("average", "run", "--last", 2, "-o", out / "sma-last2", cwd=big)
    kept = finished_files(out) + 6
    assert f"{kept} file{'s' * (kept != 1)} of an earlier run kept" in assert_finishes(big, out).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_continue(number: signal.Signals, big: Path, tmp_path: Path) -> None:
    process = begin(big, tmp_path / "out")
    wait_for(process, lambda: finished_files(tmp_path / "out") >= 3)
    process.send(number)
    ended = process.end()
    assert ended.code == 128 + number and "pmerge sweep" in ended.stderr and "Traceback" not in ended.stderr
    assert_absent_or_complete(big, tmp_path / "out")
    assert_finishes(big, tmp_path / "out")


def test_no_room_for_a_file(big: Path, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in (big / "alone").rglob("*.safetensors"))
    ended = begin(big, tmp_path / "out", limits={"RLIMIT_FSIZE": size - 1}).end()
    assert ended.code == 1 and "ulimit -f" in ended.stderr and "Traceback" not in ended.stderr
    assert assert_absent_or_complete(big, tmp_path / "out") == 0
    assert_finishes(big, tmp_path / "out")


def test_as_many_files_are_open_as_the_hard_limit_allows(big: Path, tmp_path: Path) -> None:
    """A real process, for the server of the tests sets both limits."""
    grid = shlex.join(["sweep", "run", "-o", str(tmp_path / "out"), *GRID, "--quiet"])
    for limit, code in (("-S", 0), ("", 1)):
        command = f"ulimit {limit} -n 24 && exec {shlex.quote(sys.executable)} -m merge_cli {grid}"
        ended = subprocess.run(["bash", "-c", command], cwd=big, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == code, ended.stderr
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert "open files" in ended.stderr and "ulimit -n 1024" in ended.stderr and "Traceback" not in ended.stderr


def test_64_results_fit_below_the_hard_limit_or_are_refused_before_any_work(tmp_path: Path) -> None:
    """A real process, as above: each result takes up to five open files."""
    write_run(tmp_path / "run", training_run({"w": torch.ones(8), "b": torch.zeros(8)}, 3), shards=2)
    methods = ",".join(f"ema:0.{number}" for number in range(101, 165))
    sweeping = shlex.join([sys.executable, "-m", "merge_cli", "sweep", "run", "-o", "out", "--method", methods, "--quiet"])

    def limited(limit: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", f"ulimit {limit} -n 256 && exec {sweeping}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    refused = limited("")
    assert refused.returncode == 1 and "64 results at once need more open files" in refused.stderr
    assert "ulimit -n 1024" in refused.stderr and not (tmp_path / "out").exists()
    done = limited("-S")
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "out").glob("*/pmerge.json")]) == 64


# -- what is asked for
# ------------------------------------------------------------------------------------------------------------


def test_names_speak_and_leave_out_what_was_not_given() -> None:
    names = [each.name for each in grid(["sma", "ema:0.1", "ema:half-life=2000"], [6], ["2k"], [8000])]
    ends = "last6-every2k-at8000"
    assert names == [f"sma-{ends}", f"ema-0.1-{ends}", f"ema-half-life-2000.0-{ends}"]
    assert [each.name for each in grid(["decay:1-sqrt:floor=0.1"])] == ["decay-1-sqrt-floor-0.1"]
    assert entry({"method": "ema", "alpha": 0.1, "from": 100, "to": "8B"}).name == "ema-0.1-from100-to8B"
    assert entry({"weights": [0.25, 0.75], "last": 2}).name == "weights-0.25-0.75-last2"
    assert entry({"sigma-rel": 0.2, "method": "power", "name": "mine"}).name == "mine"
    assert len(grid(["sma", "sma"], [3, 3])) == 1
    assert parse_method("decay:cosine") == ("decay", {"shape": "cosine"})


@pytest.mark.parametrize(
    "asked, text",
    [
        ({"methods": ["median"]}, "median"),
        ({"methods": ["weights"]}, "--list"),
        ({"methods": ["ema:0.1:0.2"]}, "does not take '0.2'"),
        ({"methods": ["sma:3"]}, "does not take"),
        ({"methods": ["ema:x"]}, "--alpha cannot be 'x'"),
        ({"methods": ["ema:2"]}, "--alpha is out of range"),
        ({"methods": ["sma"], "last": [0]}, "at least 1"),
        ({"methods": ["sma"], "every": ["x"]}, "--every cannot be"),
        ({"methods": ["sma"], "every": ["8B"]}, "--tokens-per-step"),
        ({"methods": ["sma"], "at": [400], "tokens_per_step": 1000}, "no amount is in tokens"),
        ({}, "nothing"),
        ({"combinations": [3]}, "expected an object"),
        ({"combinations": [{"methd": "sma"}]}, "unknown option 'methd'"),
        ({"combinations": [{"last": "three"}]}, "--last cannot be 'three'"),
        ({"combinations": [{"at": 400, "before": 300}]}, "--at"),
        ({"combinations": [{"name": "../x"}]}, "cannot be the name"),
        ({"combinations": [{"name": "x"}, {"name": "x", "last": 2}]}, "two outputs"),
        ({"methods": ["sma"], "dtype": "fp8"}, "--dtype"),
    ],
    ids=str,
)
def test_wrong_requests(asked: dict[str, Any], text: str, tmp_path: Path) -> None:
    nasty_run(tmp_path / "run", 4, layout="single")
    with pytest.raises(UsageError) as refused:
        plan_sweep([tmp_path / "run"], tmp_path / "out", **asked)
    assert text in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_tokens_end_at_the_last_checkpoint_up_to_there(tmp_path: Path) -> None:
    nasty_run(tmp_path / "run", 5, layout="single")
    plan = plan_sweep([tmp_path / "run"], tmp_path / "out", methods=["sma"], last=[2], at=["350k"], tokens_per_step=1000)
    assert [candidate.step for candidate in plan.outputs[0].candidates] == [200, 300]
    assert plan.outputs[0].combination.name == "sma-last2-at350k"


@pytest.mark.parametrize("every", [["200k", "800B"], ["800B", "200k"]], ids=str)
def test_an_amount_below_one_step_is_an_error_in_any_place(every: list[str], tmp_path: Path) -> None:
    for step in (100_000, 200_000, 300_000):
        write(tmp_path / "run" / f"step{step}-tokens{step * 4 // 1000}B", step)
    with pytest.raises(UsageError, match="--every 200k tokens are less than one step"):
        plan_sweep([tmp_path / "run"], tmp_path / "out", methods=["sma"], every=every)


def test_the_command(tmp_path: Path) -> None:
    for step in range(1000, 7000, 1000):
        write(tmp_path / "run" / f"ckpt_{step}", step)
    done = pmerge(
        "sweep", "run", "-o", "out", "--method", "sma,ema:0.1", "--last", "3,9", "--at", "5000", "--dry-run", cwd=tmp_path
    )
    assert done.stdout == "out/sma-last3-at5000\nout/ema-0.1-last3-at5000\n"
    for text in ("2 outputs from 3 checkpoints", "separate runs", "0.8100 0.0900 0.1000", "sma-last9-at5000 is skipped"):
        assert text in done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "list.json").write_text(
        '[{"method": "ema", "alpha": 0.1, "last": 3}, {"weights": [0.5, 0.5], "last": 2, "name": "w"}]'
    )
    done = pmerge("sweep", "run", "-o", "out", "--list", "list.json", "--json", "--quiet", cwd=tmp_path)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert [each["path"] for each in report["outputs"]] == ["out/ema-0.1-last3", "out/w"]
    assert report["bytes_to_read"] < report["bytes_read_separately"] and report["groups"] == [["ema-0.1-last3", "w"]]
    again = pmerge("sweep", "run", "-o", "out", "--list", "list.json", cwd=tmp_path)
    assert again.stdout == "out/ema-0.1-last3\nout/w\n" and again.stderr.count("done already") == 2


def test_without_options_a_sweep_is_an_average_in_a_folder_of_its_own(tmp_path: Path) -> None:
    for step in (1000, 2000):
        write(tmp_path / "run" / f"ckpt_{step}", step)
    assert pmerge("sweep", "run", cwd=tmp_path).stdout == "sweep-1000-2000/sma\n"
    assert pmerge("sweep", "run", "--last", "1,2", "--dry-run", cwd=tmp_path).stdout.split() == [
        "sweep-1000-2000/sma-last1",
        "sweep-1000-2000/sma-last2",
    ]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["run", "--last", "3"], "no combination"),
        (["run", "--list", "list.json", "--last", "3"], "needs --method"),
        (["run", "--list", "nowhere.json"], "cannot read nowhere.json"),
        (["run", "--list", "list.json"], "not valid JSON"),
        (["run", "--method", "sma,"], "--method cannot be"),
        (["run", "--method", "sma", "--last", "3,x"], "--last cannot be"),
        (["run", "--method", "sma", "--last", "99"], "no combination"),
        (["nowhere", "--method", "sma"], "no such checkpoint"),
    ],
)
def test_a_wrong_command_is_one_clear_error_and_exit_2(arguments: list[str], text: str, tmp_path: Path) -> None:
    write(tmp_path / "run" / "ckpt_1000", 1000)
    (tmp_path / "list.json").write_text("{")
    done = pmerge("sweep", *arguments, "-o", "out", cwd=tmp_path, expect=2)
    assert text in done.stderr and done.stdout == "" and not (tmp_path / "out").exists()


def test_an_existing_result_is_read_again_where_that_is_asked_for(tmp_path: Path) -> None:
    for step in (1000, 2000, 3000):
        write(tmp_path / "run" / f"ckpt_{step}", step)
    command = ("sweep", "run", "-o", "out", "--method", "sma,ema", "--last", "3")
    pmerge(*command, cwd=tmp_path)
    shard = next((tmp_path / "out" / "sma-last3").glob("*.safetensors"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    pmerge(*command, cwd=tmp_path)
    found = pmerge(*command, "--verify-existing", cwd=tmp_path, expect=1)
    assert f"{shard.relative_to(tmp_path)} is not as it was written" in found.stderr and "--overwrite" in found.stderr
    again = pmerge(*command, "--overwrite", cwd=tmp_path)
    assert shard.read_bytes() == good and again.stderr.count("done already") == 1
    assert pmerge(*command, "--verify-existing", cwd=tmp_path).stderr.count("done already") == 2
