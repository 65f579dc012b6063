"""The demo's parts, with a few steps of training: what `scripts/demo` shows in full takes minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import LIB
from reference import load

DEMO = LIB / "demo"


@pytest.mark.slow(reason="trains two models; scripts/demo checks the same, and nothing of pmerge depends on it")
@pytest.mark.parametrize("flags", [[], ["--moe"]])
def test_demo_trains_merges_and_evaluates(flags: list[str], tmp_path: Path) -> None:
    def run(*command: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == expect, done.stderr
        return done

    train = (sys.executable, DEMO / "train.py", ".", "--steps", 24, "--save-every", 2, "--checkpoints", 4)
    run(*train, *flags)
    folders = sorted(path.name for path in tmp_path.glob("ckpt_*"))
    assert folders == ["ckpt_18", "ckpt_20", "ckpt_22", "ckpt_24"]
    assert (tmp_path / "ckpt_24" / "optimizer.pt").exists()
    assert len(json.loads((tmp_path / "ckpt_24" / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    out = run(sys.executable, "-m", "merge_cli", "average", *folders, "--method", "ema", "--quiet").stdout.strip()
    assert load(tmp_path / out).keys() == load(tmp_path / "ckpt_24").keys()
    if not flags:  # later training is better training
        shown = run(sys.executable, DEMO / "evaluate.py", "ckpt_18", "ckpt_24").stdout
        assert "ckpt_24" in shown and "The merges are better" in shown
