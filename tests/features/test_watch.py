"""A run is merged while it trains: complete checkpoints only, each merge once, whatever kills the
process in between.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import pmerge, start
from safetensors.numpy import load_file, save_file

from merge_cli.errors import InputError, OutputError, UsageError
from merge_cli.features.average import average
from merge_cli.features.watch import Event, watch
from merge_cli.features.watch_plan import plan_watch
from merge_cli.output.lock import Lock
from merge_cli.request.grid import grid
from merge_cli.trajectory.evaluators import CommandEvaluator
from merge_cli.trajectory.ledger import Ledger
from merge_cli.trajectory.watched import read_record

LOSS = """python3 -S -E -c '
import json, os, struct, array
raw = open(os.environ["PMERGE_PATH"] + "/model.safetensors", "rb").read()
(n,) = struct.unpack("<Q", raw[:8])
print(json.dumps({"loss": sum(x * x for x in array.array("f", raw[8 + n:]))}))'"""


def save(run: Path, step: int) -> Path:
    """A checkpoint of one small file, beside its config."""
    folder = run / f"ckpt_{step}"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(step).normal(size=64)
    save_file({"w": (noise + 3 - step / 1000).astype(np.float32)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def look(run: Path, *, last: int = 2, method: str = "sma", settle_s: float = 0.0, **options: Any) -> list[Event]:
    """One look, as `--once` takes it."""
    events: list[Event] = []
    plan = plan_watch(run, grid([method], [last]), output=run.parent / "out", settle_s=settle_s, **options)
    code = watch(plan, events.append, once=True)
    assert code == sum(event.kind == "failed" for event in events)
    return events


def kinds(events: list[Event]) -> list[str]:
    """What happened, apart from warnings about the plan of a merge."""
    return [event.kind for event in events if event.kind != "warning"]


def merges(run: Path) -> list[str]:
    folder = run.parent / "out" / "merges"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (100, 200, 300):
        save(tmp_path / "my run", step)
    return tmp_path / "my run"


def test_the_first_look_merges_at_the_newest_and_the_second_finds_nothing_to_do(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert kinds(look(run)) == ["complete", "merged", "done"]
    assert merges(run) == ["sma-last2-at300"]
    average([run / "ckpt_200", run / "ckpt_300"], tmp_path / "by hand")
    made = load_file(run.parent / "out" / "merges" / "sma-last2-at300" / "model.safetensors")
    assert np.array_equal(made["w"], load_file(tmp_path / "by hand" / "model.safetensors")["w"])
    assert kinds(look(run)) == ["idle"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_every_checkpoint_that_came_while_nobody_looked_is_merged(run: Path) -> None:
    look(run)
    for step in (400, 500, 600):
        save(run, step)
    assert [event.name for event in look(run) if event.kind == "merged"] == [f"sma-last2-at{step}" for step in (400, 500, 600)]
    assert kinds(look(run)) == ["idle"]


def test_since_reaches_back_and_too_few_checkpoints_are_passed_over_once(run: Path) -> None:
    events = look(run, since=0)
    assert merges(run) == ["sma-last2-at200", "sma-last2-at300"]
    assert [event.name for event in events if event.kind == "skipped"] == ["sma-last2-at100"]
    assert kinds(look(run, since=0)) == ["idle"]


def test_a_kind_of_merge_that_is_new_begins_at_the_newest(run: Path) -> None:
    look(run, since=0)
    assert [event.name for event in look(run, method="wma") if event.kind == "merged"] == ["wma-last2-at300"]


def torn_data(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def lost_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def numbered_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def half_a_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:11])


@pytest.mark.parametrize("damage", [torn_data, lost_shard, numbered_shard, half_a_header])
def test_a_checkpoint_that_is_being_written_is_never_touched(run: Path, damage: Any) -> None:
    look(run)
    damage(save(run, 400))
    (event,) = look(run)
    assert event.kind == "waiting" and event.step == 400 and merges(run) == ["sma-last2-at300"]
    shutil.rmtree(run / "ckpt_400")
    save(run, 400)
    assert "sma-last2-at400" in [event.name for event in look(run)]


@pytest.mark.parametrize("settle_s", [float("nan"), float("inf"), -1.0])
def test_the_seconds_to_settle_are_a_length_of_time(settle_s: float, run: Path) -> None:
    with pytest.raises(UsageError, match="--settle cannot be"):
        look(run, settle_s=settle_s)


def test_a_checkpoint_settles_first(run: Path) -> None:
    look(run)
    folder = save(run, 400)
    os.utime(folder / "model.safetensors", (0, 0))  # as rsync -t leaves it: the time of the inode still is that of now
    (event,) = look(run, settle_s=30)
    assert event.kind == "waiting" and "30 seconds" in event.text
    assert "merged" in kinds(look(run))


def test_the_trainers_marker_is_waited_for_where_the_checkpoint_before_has_one(run: Path) -> None:
    look(run)
    (save(run, 400) / "trainer_state.json").write_text('{"global_step": 400}')
    assert "merged" in kinds(look(run))
    folder = save(run, 500)
    (event,) = look(run)
    assert event.kind == "waiting" and "trainer_state.json" in event.text
    (folder / "trainer_state.json").write_text('{"global_step": 500}')
    assert "merged" in kinds(look(run))


def test_an_earlier_checkpoint_that_is_being_written_holds_back_the_later_one(run: Path) -> None:
    look(run)
    torn_data(save(run, 400))
    save(run, 500)
    time.sleep(0.05)
    held = look(run, settle_s=0.02)
    assert kinds(held) == ["waiting", "waiting"] and "ckpt_400" in held[1].text
    time.sleep(0.2)  # ten times the settling time without a change: given up
    events = look(run, settle_s=0.02)
    assert [event.name for event in events if event.kind == "merged"] == ["sma-last2-at500"]
    assert "left out" in kinds(events)
    inputs = json.loads((run.parent / "out" / "merges" / "sma-last2-at500" / "pmerge.json").read_text())["inputs"]
    assert [each["step"] for each in inputs] == [300, 500]


def test_an_earlier_folder_without_weights_yet_holds_back_the_later_one(run: Path) -> None:
    look(run)
    (run / "logs_350").mkdir()  # named by a number, but not as the checkpoints are
    begun = run / "ckpt_400"
    begun.mkdir()
    (begun / "config.json").write_text("{}")
    save(run, 500)
    time.sleep(0.05)
    held = [event for event in look(run, settle_s=0.02) if event.kind == "waiting"]
    assert len(held) == 2 and all("ckpt_400" in event.text for event in held)
    shutil.rmtree(begun)
    save(run, 400)
    events = look(run)
    assert [event.name for event in events if event.kind == "merged"] == ["sma-last2-at400", "sma-last2-at500"]
    (run / "ckpt_600").mkdir()
    save(run, 700)
    time.sleep(0.3)  # ten times the settling time without a change: given up
    events = look(run, settle_s=0.02)
    assert [event.name for event in events if event.kind == "merged"] == ["sma-last2-at700"]
    assert "left out" in kinds(events)


def test_only_merges_that_were_made_here_are_removed(run: Path) -> None:
    folder = run.parent / "out" / "merges"
    average([run / "ckpt_100", run / "ckpt_200"], folder / "sma-last2-at200")  # by hand, the very same result
    (folder / "mine").mkdir()
    look(run, since=0, keep=1)
    save(run, 400)
    save(run, 500)
    look(run, keep=1)
    assert merges(run) == ["mine", "sma-last2-at200", "sma-last2-at500"]
    (folder / "sma-last2-at500" / "notes.txt").write_text("good one")
    save(run, 600)
    assert "kept" in kinds(look(run, keep=1))
    assert merges(run) == ["mine", "sma-last2-at200", "sma-last2-at500", "sma-last2-at600"]
    assert kinds(look(run, keep=1)) == ["idle"]  # what was removed is not made again


def test_merges_and_checkpoints_are_measured_and_reported(run: Path) -> None:
    for step in range(400, 1100, 100):
        save(run, step)
    report = run.parent / "re port.html"
    evaluator = CommandEvaluator(LOSS)
    options: dict[str, Any] = {"evaluator": lambda path: evaluator, "report": report, "last": 3, "keep": 2}
    events = look(run, since=500, **options)
    rows = {row.name: row for row in Ledger(run.parent / "out").rows()}
    steps = range(500, 1100, 100)
    assert set(rows) == {*(f"step-{step}" for step in steps), *(f"sma-last3-at{step}" for step in steps)}
    path = run.parent / "out" / "merges" / "sma-last3-at1000" / "model.safetensors"
    assert rows["sma-last3-at1000"].metrics["loss"] == sum(float(x) ** 2 for x in load_file(path)["w"])
    assert report.is_file() and "forecast" in kinds(events)
    assert merges(run) == ["sma-last3-at1000", "sma-last3-at900"]
    count = len(rows)
    assert kinds(look(run, **options)) == ["idle"] and len(Ledger(run.parent / "out").rows()) == count


def test_a_failed_evaluation_is_tried_again_and_the_merge_is_not(run: Path) -> None:
    failing = CommandEvaluator(f"test -e '{run.parent}/ready' && {LOSS}")
    options: dict[str, Any] = {"evaluator": lambda path: failing}
    assert kinds(look(run, **options)) == ["complete", "merged", "failed"]
    (run.parent / "ready").touch()
    assert kinds(look(run, **options)) == ["complete", "measured", "measured", "done"]


def test_then_gets_the_path_quoted_and_runs_until_it_succeeds(run: Path) -> None:
    then = f"printf '%s|%s|%s\\n' {{path}} {{name}} \"$PMERGE_STEP\" >> '{run.parent}/then'; test -e '{run.parent}/ready'"
    assert kinds(look(run, then=then)) == ["complete", "merged", "failed"]
    (run.parent / "ready").touch()
    assert kinds(look(run, then=then)) == ["complete", "then", "done"]
    line = f"{run.parent}/out/merges/sma-last2-at300|sma-last2-at300|300"
    assert (run.parent / "then").read_text().splitlines() == [line, line]
    with pytest.raises(UsageError, match=r"--then has \{path\} inside double quotes"):
        plan_watch(run, grid(["sma"], [2]), then='echo "{path}"')


def test_what_began_at_a_checkpoint_that_is_gone_is_closed(run: Path) -> None:
    failing = CommandEvaluator("exit 1")
    look(run, evaluator=lambda path: failing)
    shutil.rmtree(run / "ckpt_300")
    events = look(run, evaluator=lambda path: failing)
    assert kinds(events) == ["done", "idle"]


def test_two_watchers_and_wrong_requests_are_refused(run: Path, tmp_path: Path) -> None:
    with Lock(tmp_path / "out" / "watch.lock", tmp_path / "out"), pytest.raises(OutputError):
        look(run)
    with pytest.raises(InputError, match="no such checkpoint"):
        plan_watch(tmp_path / "missing", grid(["sma"], [2]))
    with pytest.raises(UsageError, match="--keep"):
        plan_watch(run, grid(["sma"], [2]), keep=0)
    with pytest.raises(UsageError, match="--report needs"):
        plan_watch(run, grid(["sma"], [2]), report=Path("x"))
    with pytest.raises(UsageError, match="ends at one step"):
        plan_watch(run, grid(["sma"], [2], at=[300]))


def test_a_run_without_checkpoints_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert kinds(look(tmp_path / "run")) == ["note", "idle"]
    save(tmp_path / "run", 100)
    save(tmp_path / "run", 200)
    assert merges(tmp_path / "run") == []
    assert [event.name for event in look(tmp_path / "run") if event.name] == ["sma-last2-at100"] + ["sma-last2-at200"] * 2


def test_the_command_prints_events_as_json_lines(run: Path, tmp_path: Path) -> None:
    """Processes, forked: stdout and stderr are the subject."""
    done = pmerge("watch", "my run", "--last", "2", "--settle", "0", "--once", "--json", cwd=tmp_path)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events if event["event"] != "warning"] == ["complete", "merged", "done"]
    assert len(done.stderr.splitlines()) == len(events) and (tmp_path / events[-1]["path"] / "pmerge.json").is_file()
    again = pmerge("watch", "my run", "--last", "2", "--settle", "0", "--once", cwd=tmp_path)
    assert again.stdout == "" and "nothing to do" in again.stderr


def test_a_checkpoint_that_grows_while_watch_looks_on_is_merged_when_it_is_whole(run: Path, tmp_path: Path) -> None:
    """A process, forked, beside this one, which writes as a trainer does that reserves its files
    first: they have their names and sizes long before their content.
    """
    look(run)
    whole = (save(tmp_path / "aside", 400) / "model.safetensors").read_bytes()
    process = start("watch", "my run", "--last", "2", "--settle", "0.6", "-o", "out", cwd=tmp_path)
    folder = run / "ckpt_400"
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        start_of_data = len(whole) - 256
        file.write(whole[:start_of_data])
        file.truncate(len(whole))
        for begin in range(start_of_data, len(whole), 32):
            file.flush()
            time.sleep(0.2)
            assert merges(run) == ["sma-last2-at300"]
            file.write(whole[begin : begin + 32])
    deadline = time.monotonic() + 30
    path = tmp_path / "out" / "merges" / "sma-last2-at400"
    while not path.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send(signal.SIGTERM)
    done = process.end()
    assert done.code == 143 and "Traceback" not in done.stderr
    inputs = [load_file(run / name / "model.safetensors")["w"].astype(np.float64) for name in ("ckpt_300", "ckpt_400")]
    made = load_file(path / "model.safetensors")["w"]
    assert np.array_equal(made, ((inputs[0] + inputs[1]) / 2).astype(np.float32))


MORE = pytest.mark.slow(reason="a minute of kills each; the first seed of the same test")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=MORE), pytest.param(2, marks=MORE)])
def test_kills_at_any_moment_lose_nothing_and_double_nothing(run: Path, tmp_path: Path, seed: int) -> None:
    """Killed processes, forked: SIGKILL after random times while checkpoints appear, until all is
    done.
    """
    generator = random.Random(seed)
    then = f"echo {{name}} >> '{tmp_path}/then'"
    arguments = [
        "watch",
        "my run",
        "--last",
        "2",
        "--settle",
        "0.05",
        "--keep",
        "2",
        "--command",
        LOSS,
        "--then",
        then,
        "-o",
        "out",
    ]
    steps = list(range(400, 1001, 100))
    look(run, settle_s=0)
    kills = 0
    while steps or read_record(tmp_path / "out").merges.get("sma-last2-at1000", None) is None:
        process = start(*arguments, cwd=tmp_path)
        if steps:
            save(run, steps.pop(0))
        time.sleep(generator.uniform(0.05, 0.6))
        process.send(signal.SIGKILL)
        kills += process.end().code != 0
    for _ in range(2):
        pmerge(*arguments, "--once", cwd=tmp_path)
    assert kills > 3
    names = [f"sma-last2-at{step}" for step in range(400, 1001, 100)]
    record = read_record(tmp_path / "out").merges
    assert {name: record[name].state for name in names} == dict.fromkeys(names[:-2], "removed") | dict.fromkeys(names[-2:], "done")
    assert sorted(merges(run)) == sorted(names[-2:])
    assert not [path for path in (tmp_path / "out" / "merges").iterdir() if path.name.startswith(".")]
    rows = Ledger(tmp_path / "out").rows()
    assert {row.name for row in rows} == {*names, *(f"step-{step}" for step in range(400, 1001, 100))}
    ran = (tmp_path / "then").read_text().split()
    assert sorted(set(ran)) == sorted(names)


def test_amounts_in_tokens(run: Path) -> None:
    plan = plan_watch(
        run,
        grid(["sma"], [2], ["8M"]),
        output=run.parent / "out",
        settle_s=0,
        tokens_per_step=40_000,
        evaluator=lambda checkpoint: CommandEvaluator(LOSS, []),
    )
    events: list[Event] = []
    assert watch(plan, events.append, once=True) == 0
    (made,) = [Path(event.path) for event in events if event.kind == "done"]
    inputs = json.loads((made / "pmerge.json").read_text())["inputs"]
    assert made.name == "sma-last2-every8M-at300" and [each["step"] for each in inputs] == [100, 300]
    assert {row.name for row in Ledger(run.parent / "out").rows()} >= {made.name}
    with pytest.raises(UsageError, match="no amount is in tokens"):
        plan_watch(run, grid(["sma"], [2]), output=run.parent / "out", tokens_per_step=40_000)
    assert "--tokens-per-step" in pmerge("watch", "--help", cwd=run).stdout
