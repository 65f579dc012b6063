"""A job that is requeued keeps the checkpoints that it began with, though its run has grown."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from builders import write_trained
from command import pmerge, start
from paths import REPOSITORY

from merge_cli.output.resumed import _is_same


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1000, 2000, 3000):
        write_trained(tmp_path / "run" / f"ckpt_{step}", step)
    return tmp_path


LAST_TWO = ("average", "run", "--last", 2, "--threads", 1)
REQUEUED = {**os.environ, "SLURM_RESTART_COUNT": "1"}


def kill(where: Path, *command: object) -> None:
    """Start a command that dies when one of its two shards is finished."""
    assert start(*command, cwd=where, fault="rename:2:kill:0:/done/").end().code == -9
    assert list(where.glob("**/*.pmerge-partial/done/*.json"))


def steps(result: Path) -> list[int]:
    return [each["step"] for each in json.loads((result / "pmerge.json").read_text())["inputs"]]


@pytest.mark.parametrize("output", [(), ("-o", "out")], ids=["default", "named"])
def test_an_unfinished_run_keeps_its_checkpoints(run: Path, output: Sequence[str]) -> None:
    kill(run, *LAST_TWO, *output)
    write_trained(run / "run" / "ckpt_4000", 4000)
    done = pmerge(*LAST_TWO, *output, cwd=run)
    assert "note: 1 checkpoint newer than the start of this command left out" in done.stderr
    assert "1 file of an earlier run kept" in done.stderr
    out = run / done.stdout.strip()
    assert steps(out) == [2000, 3000] and not list(run.glob("*.pmerge-partial"))
    refused = pmerge(*LAST_TWO, "-o", out, cwd=run, expect=1)  # finished, and no requeued job: the newest two are meant
    assert "is not what is asked for" in refused.stderr
    assert pmerge(*LAST_TWO, *output, cwd=run, environment=REQUEUED).stdout == done.stdout


def test_restart_selects_anew_and_another_command_is_an_error(run: Path) -> None:
    kill(run, *LAST_TWO, "-o", "out")
    write_trained(run / "run" / "ckpt_4000", 4000)
    refused = pmerge("average", "run", "--last", 2, "--dtype", "fp32", "-o", "out", cwd=run, expect=1)
    assert "another request" in refused.stderr
    pmerge(*LAST_TWO, "-o", "out", "--restart", cwd=run)
    assert steps(run / "out") == [3000, 4000]


def test_a_requeued_job_may_name_more_than_before(run: Path) -> None:
    kill(run, "average", *sorted((run / "run").iterdir()), "-o", "out")
    write_trained(run / "run" / "ckpt_4000", 4000)
    grown = sorted((run / "run").iterdir())
    assert "another request" in pmerge("average", *grown, "-o", "out", cwd=run, expect=1).stderr
    pmerge("average", *grown, "-o", "out", cwd=run, environment=REQUEUED)
    assert steps(run / "out") == [1000, 2000, 3000]


def test_ranks_and_sweeps_keep_theirs_too(run: Path) -> None:
    rank = ("--world-size", 2, "--rank")
    kill(run, *LAST_TWO, "-o", "out", *rank, 0)
    sweep = ("sweep", "run", "-o", "sweep", "--method", "sma,wma", "--last", 2, "--threads", 1)
    kill(run, *sweep)
    write_trained(run / "run" / "ckpt_4000", 4000)
    pmerge(*LAST_TWO, "-o", "out", *rank, 1, cwd=run)
    pmerge(*sweep, cwd=run)
    assert steps(run / "out") == steps(run / "sweep" / "sma-last2") == steps(run / "sweep" / "wma-last2") == [2000, 3000]


def test_the_nightly_script_fixes_its_newest_step(run: Path, tmp_path: Path) -> None:
    """A job that is killed in the middle of its merge and requeued, by a stand-in for Slurm."""
    commands = tmp_path / "bin"
    commands.mkdir()
    plan = json.dumps({"inputs": [{"step": 2000}, {"step": 3000}]})
    merge = f"case $* in *--dry-run*) echo '{plan}';; *) exit $(( RESTARTS == 0 ));; esac"
    programs = {"squeue": "echo next", "sbatch": "true", "pmerge": f'echo "$*" >>calls\n{merge}'}
    for name, text in programs.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    path = f"{commands}:{os.environ['PATH']}"
    for restarts in ("0", "1"):
        environment = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "n", "SLURM_CPUS_PER_TASK": "2", "RESTARTS": restarts}
        script = ["bash", str(REPOSITORY / "scripts/slurm/nightly.sbatch"), "run", "merges", "2"]
        assert (subprocess.run(script, cwd=run, env=environment, timeout=60).returncode == 0) == (restarts == "1")
    asked, *averages = (run / "calls").read_text().splitlines()
    assert "--dry-run" in asked
    assert averages == ["average run --to 3000 --last 2 -o merges/last-2-to-3000 --threads 2 --quiet"] * 2
    assert not list((run / "merges").iterdir())


SWEEP = ("sweep", "run", "--method", "sma", "--last", 2, "--threads", 1)


@pytest.fixture
def layouts(run: Path) -> Path:
    """A run whose newest checkpoint has another layout: its merges are a group of their own."""
    write_trained(run / "run" / "ckpt_4000", 4000, turned=True)
    return run


@pytest.mark.parametrize("output", [(), ("-o", "sweep")], ids=["default", "named"])
def test_a_sweep_killed_in_its_first_group_goes_on_with_all_its_outputs(layouts: Path, output: Sequence[str]) -> None:
    kill(layouts, *SWEEP, "--at", "3000,4000", *output)
    (begun,) = layouts.glob("sweep*")
    assert len(list(begun.glob("*/done"))) == 1
    write_trained(layouts / "run" / "ckpt_5000", 5000)
    done = pmerge(*SWEEP, "--at", "3000,4000", *output, cwd=layouts)
    assert {Path(line).name for line in done.stdout.split()} == {"sma-last2-at3000", "sma-last2-at4000"}
    assert {path.name for path in begun.iterdir()} == {"sma-last2-at3000", "sma-last2-at4000", "sweep.json"}
    assert [path.name for path in layouts.glob("sweep*")] == [begun.name]


def test_a_sweep_killed_between_its_groups_keeps_the_checkpoints_it_began_with(layouts: Path) -> None:
    (layouts / "list.json").write_text('[{"method": "sma", "last": 2, "at": 3000}, {"method": "sma", "last": 2}]')
    command = ("sweep", "run", "--list", "list.json", "-o", "out", "--threads", 1)
    assert start(*command, cwd=layouts, fault="rename:3:kill:0:/done/").end().code == -9
    assert len(list((layouts / "out").glob("*/pmerge.json"))) == 1
    write_trained(layouts / "run" / "ckpt_5000", 5000)
    done = pmerge(*command, cwd=layouts)
    assert "1 checkpoint newer than the start of this command left out" in done.stderr
    assert [steps(layouts / "out" / name) for name in ("sma-last2-at3000", "sma-last2")] == [[2000, 3000], [3000, 4000]]


def test_a_rank_of_a_sweep_that_comes_late_plans_all_outputs(layouts: Path) -> None:
    share = (*SWEEP, "--at", "2000,3000,4000", "-o", "out", "--world-size", 2)
    kill(layouts, *share, "--rank", 1)
    done = pmerge(*share, "--rank", 0, cwd=layouts)
    assert len(done.stdout.split()) == 3 and not list(layouts.glob("out/*.pmerge-partial"))


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        ("pmerge average run --last 3 -o m", "average run --last 3 -o m", True),
        (
            "pmerge average run --last 3 -o m --rank 0 --world-size 2",
            "average run --last 3 --rank=1 --world-size=2 -o m --quiet",
            True,
        ),
        ("pmerge average run --last 3 -o m --threads 2", "average run --last 3 -o m --memory 1GiB --restart", True),
        ("pmerge average run --last 3 -o m", "average run --last 4 -o m", False),
        ("pmerge average run --last 3 -o m", "average run --last 3 -o m --dtype bf16", False),
        ("pmerge average run --last 3 -o m", "average run run/ckpt_9/ --last 3 -o m", True),
        ("pmerge average run run/ckpt_9 --last 3", "average run --last 3", False),
        ("pmerge average 'broken", "average broken", False),
    ],
)
def test_commands_are_the_same_but_for_how_they_run(was: str, now: str, same: bool) -> None:
    assert _is_same(was, now.split(), ["run/ckpt_9"]) == same
