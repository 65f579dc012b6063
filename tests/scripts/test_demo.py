"""The demo's parts, with a few steps of training: what `scripts/demo` shows in full takes minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import LIB

from merge_cli import open_checkpoint


@pytest.mark.slow(reason="trains two models; scripts/demo checks the same, and nothing of pmerge depends on it")
@pytest.mark.parametrize("flags", [[], ["--moe"], ["--dcp"]])
def test_demo_trains_merges_and_evaluates(flags: list[str], tmp_path: Path) -> None:
    def run(*command: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(LIB)}
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expect, done.stderr
        return done

    train = (sys.executable, "-m", "demo.train", ".", "--steps", 24, "--save-every", 2, "--checkpoints", 4)
    run(*train, *flags)
    saved = "step-" if "--dcp" in flags else "ckpt_"
    folders = sorted(path.name for path in tmp_path.glob(f"{saved}*"))
    newest = folders[-1]
    assert folders == [f"{saved}{step}" for step in (18, 20, 22, 24)]
    if "--dcp" not in flags:
        assert (tmp_path / newest / "optimizer.pt").exists()
        assert len(json.loads((tmp_path / newest / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    out = run(sys.executable, "-m", "merge_cli", "average", *folders, "--method", "ema", "--quiet").stdout.strip()
    names = set(open_checkpoint(tmp_path / newest).tensors)
    assert set(open_checkpoint(tmp_path / out).tensors) == names and len(names) > 10
    if "--moe" not in flags:  # later training is better training
        shown = run(sys.executable, "-m", "demo.evaluate", folders[0], newest).stdout
        assert newest in shown and "The merges are better" in shown
