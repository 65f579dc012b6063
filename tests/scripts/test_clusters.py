"""The recipes for clusters say what pmerge understands, and torchrun makes the same bytes. The rest
by `scripts/clusters`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import digests, training_run, write_run
from paths import REPOSITORY, TESTS
from torch import randn

RECIPES = sorted((REPOSITORY / "scripts" / "slurm").glob("*.sbatch"))
SCRIPTS = [REPOSITORY / "scripts" / name for name in ("clusters", "lib/clusters/nfs", "lib/clusters/slurm-here")]


def test_there_are_recipes() -> None:
    assert [path.stem for path in RECIPES] == ["array", "cpu", "gpu", "nightly", "watch"]


@pytest.mark.parametrize("path", RECIPES + SCRIPTS, ids=lambda path: path.name)
def test_bash_understands(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True, timeout=60)


def test_recipes_use_only_options_that_exist() -> None:
    known = json.loads((TESTS / "flags.json").read_text())
    for path in RECIPES:
        command = "watch" if path.stem == "watch" else "average"
        lines = path.read_text().replace("\\\n", " ").splitlines()
        used = {flag for line in lines for flag in re.findall(r" (--?[a-z][a-z-]*)", line.partition(f"pmerge {command}")[2])}
        assert used and used <= set(known[command]), path.name


def test_recipes_have_a_page() -> None:
    page = (REPOSITORY / "docs" / "clusters.md").read_text()
    assert [path.name for path in RECIPES if f"scripts/slurm/{path.name}" not in page] == []


@pytest.mark.slow(reason="five imports of torch; tests/ranks/test_ranks.py has the bytes of ranks and the variables of torchrun")
def test_torchrun_makes_the_same_bytes(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.weight": randn(64, 32).bfloat16() for i in range(8)}
    run = write_run(tmp_path / "run", training_run(tensors, 3), shards=4)
    average = ["-m", "merge_cli", "average", *map(str, run), "--quiet", "-o"]
    subprocess.run([sys.executable, *average, tmp_path / "one"], check=True, timeout=120)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, *average, tmp_path / "two"], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout == f"{tmp_path / 'two'}\n"
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
