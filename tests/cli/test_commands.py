"""The command as a user types it: processes (forked, see command.py), real folders."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from builders import write_trained as write
from command import pmerge, start
from safetensors.torch import load_file, save_file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in range(1000, 11000, 1000):
        write(tmp_path / "run" / f"ckpt_{step}", step)
    return tmp_path / "run"


def test_average_as_typed_orders_by_step_and_prints_the_path(run: Path) -> None:
    folders = sorted(path.name + "/" for path in run.iterdir())  # as the shell gives them: ckpt_10000 second
    done = pmerge("average", *folders, "--method", "ema", cwd=run)
    assert done.stdout == "merged-ema-1000-10000\n"
    assert "effective sample size 7.87" in done.stderr
    out = run / "merged-ema-1000-10000"
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "pmerge.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    manifest = json.loads((out / "pmerge.json").read_text())
    assert [entry["step"] for entry in manifest["inputs"]] == list(range(1000, 11000, 1000))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 40 * 7 * 2 + 13 * 4 + 8
    umask = os.umask(0)
    os.umask(umask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in out.iterdir())
    assert not (run / "merged-ema-1000-10000.pmerge-partial").exists()


def test_weights_by_path(run: Path) -> None:
    pmerge("average", "ckpt_1000:0.25", "ckpt_2000/:0.75", "-o", "out", cwd=run)
    one, two = (load_file(run / name / "model-00002-of-00002.safetensors") for name in ("ckpt_1000", "ckpt_2000"))
    expected = (one["model.norm.weight"].double() * 0.25 + two["model.norm.weight"].double() * 0.75).float()
    assert torch.equal(load_file(run / "out" / "model-00002-of-00002.safetensors")["model.norm.weight"], expected)


def test_a_dry_run_ends_as_the_run_would_and_lists_the_findings(run: Path) -> None:
    (run.parent / "taken" / "data").mkdir(parents=True)
    done = pmerge("average", run, "-o", run.parent / "taken", "--dry-run", cwd=run.parent, expect=1)
    assert "would fail:" in done.stderr and "exists already" in done.stderr and "hint: choose another place" in done.stderr
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "taken"]
    plan = json.loads(pmerge("average", run, "--dry-run", "--json", "--quiet", cwd=run.parent).stdout)
    assert plan["bytes_to_read"] == 10 * (40 * 7 * 2 + 13 * 4 + 8) and plan["findings"] == []


@pytest.mark.parametrize("command", [("average",), ("sweep", "--method", "sma")], ids=["average", "sweep"])
@pytest.mark.parametrize(("output", "code"), [("taken", 1), ("run/ckpt_1000/inside", 2), ("fine", 0)])
def test_a_dry_run_gates_a_job(command: Sequence[str], output: str, code: int, run: Path) -> None:
    """`pmerge average --dry-run && sbatch job`: the same code; the run names the error, and no
    plan before it.
    """
    (run.parent / "taken" / "sma").mkdir(parents=True)
    (run.parent / "taken" / "sma" / "data").write_text("dear")
    dry = pmerge(*command, "run", "-o", output, "--dry-run", cwd=run.parent, expect=code)
    wet = pmerge(*command, "run", "-o", output, cwd=run.parent, expect=code)
    assert ("would fail:" in dry.stderr) == (code > 0) == wet.stderr.startswith("error:")
    assert not code or wet.stderr.splitlines()[0].removeprefix("error: ") in dry.stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("--method", "EMA"), "--method ema"),
        (("--method", "mean"), "--method sma"),
        (("--dtype", "bfloat16"), "--dtype bf16"),
        (("--methd", "ema"), "--method"),
        (("--dryrun",), "--dry-run"),
        (("--alhpa", "0.2"), "--alpha"),
    ],
)
def test_options_that_are_nearly_right_get_what_was_meant(typed: Sequence[str], meant: str, run: Path) -> None:
    refused = pmerge("average", run, *typed, "--json", cwd=run, expect=2)
    assert refused.stderr.endswith(f"hint: did you mean  {meant}\n")
    assert json.loads(refused.stdout)["hint"] == f"did you mean  {meant}"


def test_quiet_leaves_stderr_empty_and_json_goes_to_stdout(run: Path) -> None:
    done = pmerge("average", run, "--last", 3, "-o", "out", "--quiet", "--json", cwd=run)
    assert done.stderr == ""
    assert json.loads(done.stdout)["output"] == "out"


def test_an_existing_output_is_refused_and_replaced_only_when_asked(run: Path) -> None:
    pmerge("average", run, "--last", 2, "-o", "out", cwd=run.parent)
    before = (run.parent / "out" / "pmerge.json").read_bytes()
    refused = pmerge("average", run, "--last", 3, "-o", "out", cwd=run.parent, expect=1)
    assert "--overwrite" in refused.stderr
    assert (run.parent / "out" / "pmerge.json").read_bytes() == before
    pmerge("average", run, "--last", 3, "-o", "out", "--overwrite", cwd=run.parent)
    assert len(json.loads((run.parent / "out" / "pmerge.json").read_text())["inputs"]) == 3
    (run.parent / "home").mkdir()
    (run.parent / "home" / "thesis.txt").write_text("dear")
    pmerge("average", run, "-o", "home", "--overwrite", cwd=run.parent, expect=1)
    assert (run.parent / "home" / "thesis.txt").exists()


@pytest.mark.parametrize("output", ["run", "run/ckpt_1000", "run/ckpt_1000/out", "."])
def test_an_output_that_touches_an_input_is_refused(run: Path, output: str) -> None:
    done = pmerge("average", "run", "-o", output, "--overwrite", cwd=run.parent, expect=2)
    assert "input" in done.stderr


def test_wrong_shape_is_named_with_steps(run: Path) -> None:
    write(run / "ckpt_11000", 11000, rows=41)
    done = pmerge("average", run, "--last", 3, "-o", "out", cwd=run.parent, expect=2)
    assert "disagree on the shape of `model.embed.weight`" in done.stderr
    assert "step 9000  [40, 7]" in done.stderr and "step 11000  [41, 7]" in done.stderr
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["average", "nowhere"], "no such checkpoint"),
        (["average", "run/step_*/"], "nothing matches run/step_*"),
        (["average", "run/*"], "leave out the quotes:  run/*"),
        (["average", ""], "path is empty"),
        (["inspect", ""], "path is empty"),
        (["average", "run", "-o", ""], "-o is empty"),
        (["average", "run", "-o", "/"], "the result cannot be /"),
        (["average", "run/ckpt_1000:0.5", "run/ckpt_2000:half"], "'half' is not a weight"),
        (["average", "run", "--every", "500", "--tokens-per-step", "4M"], "no amount is in tokens"),
        (["average", "run", "--tokens-per-step", "4M"], "no amount is in tokens"),
        (["average", "run", "--every", "8B", "--tokens-per-step", "0"], "--tokens-per-step must be at least 1"),
        (["average", "run", "--tokens-per-step", "many"], "--tokens-per-step cannot be 'many'"),
        (["average", "run", "--from", "soon"], "--from cannot be 'soon'"),
        (["average", "run", "--from", "9k", "--to", "1_000"], "from step 9000, up to step 1000"),
        (["average", "run", "--exclude", "*"], "nothing would be averaged"),
        (["average", "run", "--include", "model.count"], "nothing would be averaged"),
        (["average", "run", "--method", "median"], "--method cannot be 'median'"),
        (["average", "run", "--method", "sma", "--half-life", "10"], "method sma does not take --half-life"),
        (["average", "run", "--memory", "much"], "--memory cannot be 'much'"),
        (["average", "run", "--memory", "10kB"], "--memory is too small"),
        (["average", "run", "--exclude", "nothing*"], "no tensor matches"),
        (["average", "run", "--every", "8B"], "--tokens-per-step"),
        (["average", "run", "--every", "700"], "missing for --every 700"),
        (["average", "run", "--last", "99"], "--last 99"),
        (["average", "run", "--before", "1000"], "leaves no checkpoint"),
        (["average", "run/ckpt_1000", "run/ckpt_1000/"], "named twice"),
        (["average", "run", "--weights", "0.5,0.6", "--last", "2"], "sum to 1"),
        (["average", "run", "--base", "run/elsewhere"], "--base"),
        (["average", "run", "--device", "cuda:99"], "no device"),
        (["methods", "median"], "unknown method"),
        (["inspect", "nowhere"], "no such checkpoint"),
    ],
)
def test_wrong_input_is_one_clear_error_and_exit_2(run: Path, arguments: list[str], text: str) -> None:
    done = pmerge(*arguments, cwd=run.parent, expect=2)
    assert text in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


def test_help_is_fast_has_examples_and_needs_no_torch(run: Path) -> None:
    for command in (["--help"], ["average", "--help"], ["inspect", "--help"], ["methods", "--help"], ["sweep", "--help"]):
        assert "Example:" in pmerge(*command, cwd=run).stdout
    code = "import sys; sys.argv = ['pmerge', 'methods']; import merge_cli.cli.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert pmerge("--version", cwd=run).stdout.startswith("pmerge ")


def test_the_list_of_commands_is_whole_at_80_columns(run: Path) -> None:
    lines = pmerge("--help", cwd=run).stdout.partition("Commands:")[2].splitlines()
    assert len([line for line in lines if line.startswith("  ")]) >= 12
    assert all(line.endswith(".") and "..." not in line and len(line) <= 80 for line in lines if line.strip())


def test_methods_prints_the_coefficients(tmp_path: Path) -> None:
    assert "0.3874" in pmerge("methods", "ema", "--n", 10, "--alpha", 0.1, cwd=tmp_path).stdout
    listed = json.loads(pmerge("methods", "--json", cwd=tmp_path).stdout)
    assert [entry["method"] for entry in listed] == ["sma", "wma", "ema", "decay", "power", "weights"]


def test_inspect_shows_what_differs(run: Path) -> None:
    write(run / "ckpt_11000", 11000, rows=41)
    found = json.loads(pmerge("inspect", run, "--json", cwd=run).stdout)
    assert [each["step"] for each in found["checkpoints"]] == list(range(1000, 12000, 1000))
    assert found["checkpoints"][0]["num_tensors"] == 3
    assert any("model.embed.weight" in line for line in found["differences"])
    assert "optimizer.pt" in pmerge("inspect", run, cwd=run).stdout


def test_inspect_shows_the_others_when_one_is_broken(run: Path) -> None:
    (run / "ckpt_3000" / "model-00002-of-00002.safetensors").unlink()
    (run / "ckpt_500").mkdir()
    done = pmerge("inspect", "run", cwd=run.parent, expect=2)
    assert "ckpt_2000" in done.stdout and "ckpt_10000" in done.stdout and "ckpt_500 is left out" in done.stdout
    assert "broken: run/ckpt_3000: 1 of 2 weight files are missing" in done.stderr
    found = json.loads(pmerge("inspect", "run", "--json", cwd=run.parent, expect=2).stdout)
    assert len(found["checkpoints"]) == 9 and found["broken"][0]["path"] == "run/ckpt_3000"
    assert found["notes"] == ["run/ckpt_500 is left out: it holds no weights that pmerge reads"]
    assert pmerge("inspect", run / "ckpt_3000", cwd=run, expect=2).stdout == ""


def test_an_interrupted_run_leaves_nothing_and_continues(run: Path) -> None:
    big = run.parent / "big"
    for step in (1, 2):
        (big / f"step_{step}").mkdir(parents=True)
        for shard in range(3):
            tensors = {f"w{shard}.{i}": torch.full((4 << 20,), float(step)) for i in range(4)}
            save_file(tensors, big / f"step_{step}" / f"part{shard}.safetensors")
    command = ("average", "big", "-o", "out", "--threads", 1, "--memory", "8MiB")
    process = start(*command, cwd=run.parent)
    done = run.parent / "out.pmerge-partial" / "done"
    deadline = time.monotonic() + 60
    while not (done.is_dir() and any(done.glob("*.json"))) and process.is_running and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send(signal.SIGTERM)
    ended = process.end()
    if ended.code == 0:
        pytest.skip("the run finished before the signal arrived")
    assert ended.code == 143
    assert "run the same command again" in ended.stderr
    assert not (run.parent / "out").exists()
    again = json.loads(pmerge(*command, "--json", cwd=run.parent).stdout)
    assert again["files_reused"] >= 1
    assert torch.equal(load_file(run.parent / "out" / "part2.safetensors")["w2.3"], torch.full((4 << 20,), 1.5))


def test_a_reader_that_went_away_is_no_failure(run: Path) -> None:
    for command in ("average run --last 3 -o out", "inspect run", "methods"):
        done = pmerge(*command.split(), cwd=run.parent, streams={"stdout": "broken"})
        assert "roken" not in done.stderr and "rror" not in done.stderr
    assert (run.parent / "out" / "pmerge.json").exists()


def test_notes_inform_and_warnings_warn(run: Path) -> None:
    (run / "ckpt_500").mkdir()
    (run / "ckpt_2000" / "trainer_state.json").write_text("{")
    (run / "ckpt_10000" / "trainer_state.json").write_text('{"global_step": 10001}')
    plan = json.loads(pmerge("average", run, "--last", 3, "--dry-run", "--json", "--quiet", cwd=run.parent).stdout)
    notes, warnings = "\n".join(plan["notes"]), "\n".join(plan["warnings"])
    assert "ckpt_500 is left out as incomplete" in warnings and "7 of 10 checkpoints are left out" in notes
    assert "ckpt_2000/trainer_state.json is not a valid trainer state" in notes
    assert "ckpt_10000 is step 10001 by its trainer_state.json, not 10000" in warnings
    shown = pmerge("average", run, "--last", 3, "--dry-run", cwd=run.parent).stderr
    assert f"note: {plan['notes'][0]}" in shown and f"warning: {plan['warnings'][0]}" in shown
    (run / "ckpt_2000").rename(run / "best")
    assert "trainer_state" in pmerge("average", run, "--last", 3, "--dry-run", cwd=run.parent, expect=2).stderr


def test_one_checkpoint_is_a_copy_and_says_so(run: Path) -> None:
    shown = pmerge("average", run, "--last", 1, "--dry-run", cwd=run.parent).stderr
    assert "average of 1 checkpoint by" in shown and "only one checkpoint is selected" in shown


def test_tokens_select_like_steps(run: Path) -> None:
    def steps(*options: str) -> list[int]:
        plan = json.loads(pmerge("average", run, "--dry-run", "--json", *options, cwd=run.parent).stdout)
        return [entry["step"] for entry in plan["inputs"]]

    tokens = ("--tokens-per-step", "4M")
    assert steps("--every", "8B", *tokens) == steps("--every", "2k") == [2000, 4000, 6000, 8000, 10000]
    assert steps("--from", "15.9B", "--before", "20B", *tokens) == steps("--from", "3_975", "--before", "5k") == [4000]
    assert steps("--to", "2000", "--from", "1B", *tokens) == [1000, 2000]


def test_the_last_in_the_order_is_the_base(run: Path) -> None:
    folders = ("run/ckpt_1000", "run/ckpt_10000", "run/ckpt_2000", "--dry-run")  # as the shell sorts
    assert "ckpt_10000  10000       0.3333  ████████████████████  base" in pmerge("average", *folders, cwd=run.parent).stderr
    for options in (("--order", "given"), ("--weights", "0.2,0.5,0.3")):
        shown = pmerge("average", *folders, *options, cwd=run.parent).stderr
        assert "note: the order given is not that of the steps; the last one, run/ckpt_2000, counts as the newest" in shown


def test_without_steps_what_needs_an_order_is_refused(run: Path) -> None:
    for old, new in (("ckpt_1000", "b"), ("ckpt_2000", "a")):
        (run / old).rename(run / new)
        (run / new / "trainer_state.json").unlink()
    refused = pmerge("average", run / "a", run / "b", "--last", 1, "-o", "out", cwd=run.parent, expect=2)
    assert "no step is known" in refused.stderr and "--order given" in refused.stderr
    shown = pmerge("average", run / "b", run / "a", "-o", "out", "--dry-run", cwd=run.parent).stderr
    assert "note: no step is known for 2 of 2 checkpoints: their order is the one given, " in shown
    pmerge("average", run, "--last", 2, "-o", run / "merged", cwd=run.parent)
    shown = pmerge("average", *sorted(run.iterdir()), "--allow-merged", "--dry-run", cwd=run.parent).stderr
    assert "warning: no step is known for 3 of 11 checkpoints" in shown and f"averaged again: {run / 'merged'}" in shown
    given = ("--order", "given", "--last", 1, "--dry-run", "--json")
    assert json.loads(pmerge("average", run / "b", run / "a", *given, cwd=run.parent).stdout)["base"] == str(run / "a")


def test_folders_of_ranks_are_not_left_out(run: Path) -> None:
    for step in (1, 2):
        for rank in ("mp_rank_00", "mp_rank_01"):
            (run.parent / "ranks" / f"step_{step}" / rank).mkdir(parents=True)
            save_file({"w": torch.full((3,), float(step))}, run.parent / "ranks" / f"step_{step}" / rank / "model.safetensors")
            (run.parent / "ranks" / f"step_{step}" / rank / "optim.pt").write_bytes(b"")
    shown = pmerge("average", "ranks", "--dry-run", cwd=run.parent).stderr
    assert "left out: mp_rank_00/optim.pt, mp_rank_01/optim.pt\n" in shown


def test_raw_checkpoints_are_never_overwritten(run: Path) -> None:
    pmerge("average", run, "--last", 2, "-o", run / "ckpt_1000", "--overwrite", cwd=run.parent, expect=1)
    assert (run / "ckpt_1000" / "optimizer.pt").exists()


def test_a_closed_or_full_stream_is_no_traceback(run: Path) -> None:
    for number, (streams, code) in enumerate([({"stderr": "closed"}, 0), ({"stdout": "full"}, 1)]):
        done = pmerge("average", "run", "--last", 2, "-o", f"out{number}", cwd=run.parent, expect=code, streams=streams)
        assert (run.parent / f"out{number}" / "pmerge.json").exists()
        assert done.stdout in ("", f"out{number}\n")


def test_dry_run_estimates_the_time(run: Path) -> None:
    plan = json.loads(pmerge("average", run, "--dry-run", "--json", "--storage-bandwidth", "1kB", cwd=run).stdout)
    moved = plan["bytes_to_read"] + plan["bytes_to_write"]
    assert plan["estimate"].pop("parts").keys() == {"storage", "computing"}
    assert plan["estimate"] == {"seconds": moved / 1000, "bottleneck": "storage", "storage_bandwidth": 1000}
    plan = json.loads(pmerge("average", run, "--dry-run", "--json", "--storage-bandwidth", "1000TB", cwd=run).stdout)
    assert plan["estimate"]["bottleneck"] == "computing" and 0 < plan["estimate"]["seconds"] < 1
    done = pmerge("average", run, "--dry-run", cwd=run)
    assert "measured on the first bytes" in done.stderr
    assert "--dry-run" in pmerge("average", run, "--storage-bandwidth", "5GB", cwd=run, expect=2).stderr


def test_overwrite_keeps_what_pmerge_did_not_write(run: Path) -> None:
    out = run.parent / "out"
    pmerge("average", run, "--last", 2, "-o", out, cwd=run)
    (out / "eval").mkdir()
    (out / "eval" / "r.json").write_text("1")
    refused = pmerge("average", run, "--last", 3, "-o", out, "--overwrite", cwd=run, expect=1)
    assert "eval/r.json" in refused.stderr and (out / "eval" / "r.json").exists()
    link = run.parent / "link"
    link.symlink_to(out)
    assert "does not follow links" in pmerge("average", run, "-o", link, "--overwrite", cwd=run, expect=1).stderr


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (("average", "run", "-o", "loop/out"), 1, "loop is not a folder"),
        (("average", "run", "-o", "loop"), 1, "loop exists already"),
        (("average", "run", "-o", "loop/.."), 2, "is or contains the input"),
        (("average", "run", "-o", "loop", "--overwrite"), 1, "does not follow links"),
        (("average", "run", "-o", "out", "--base", "loop"), 2, "--base loop is not one of"),
        (("sweep", "run", "-o", "loop/x"), 1, "loop is not a folder"),
        (("watch", "loop"), 2, "loop"),
    ],
)
def test_links_in_a_circle_are_one_clear_error(run: Path, arguments: Sequence[str], code: int, says: str) -> None:
    (run.parent / "loop").symlink_to("loop")
    failed = pmerge(*arguments, cwd=run.parent, expect=code)
    assert says in failed.stderr and "Traceback" not in failed.stderr


def test_unfinished_folders_of_a_run_are_left_out(run: Path) -> None:
    write(run / "ckpt_99000-tmp", 99000)
    plan = json.loads(pmerge("average", run, "--dry-run", "--json", cwd=run).stdout)
    assert not any(each["path"].endswith("-tmp") for each in plan["inputs"])
    assert any("unfinished" in note for note in plan["notes"])


def test_a_line_break_in_the_output_is_refused(run: Path) -> None:
    assert "control character" in pmerge("average", run, "-o", "a\nb", cwd=run, expect=2).stderr


def test_a_base_without_config_and_adapters_that_differ_are_told(run: Path) -> None:
    for step, alpha in ((9000, 8), (10000, 16)):
        folder = run / f"ckpt_{step}"
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha, "r": 4}))
    (run / "ckpt_9000" / "config.json").write_text("{}")
    (run / "ckpt_10000" / "config.json").unlink(missing_ok=True)
    plan = json.loads(pmerge("average", run, "--last", 2, "--dry-run", "--json", cwd=run).stdout)
    assert any("lora_alpha: 8 against 16" in warning for warning in plan["warnings"])
    assert any("has no config.json" in warning for warning in plan["warnings"])


@pytest.mark.parametrize("config, says_so", [({"torch_dtype": "bfloat16"}, True), ({"model_type": "tiny"}, False)])
def test_the_plan_says_what_config_json_will_say(config: dict[str, str], says_so: bool, tmp_path: Path) -> None:
    for step in (1000, 2000):
        write(tmp_path / "run" / f"ckpt_{step}", step)
        (tmp_path / "run" / f"ckpt_{step}" / "config.json").write_text(json.dumps(config))
    done = pmerge("average", "run", "--dtype", "fp32", "-o", "out", cwd=tmp_path)
    assert ("floats are written as fp32; config.json says so" in done.stderr) == says_so
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("float32" in written.values()) == says_so
