"""`--memory` bounds what a run allocates beyond torch and Python, whatever the number and the size
of checkpoints and tensors.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import LIB

PMERGE = str(Path(sys.executable).with_name("pmerge"))
MEMORY = 32 << 20
OTHER = 24 << 20  # interpreter and allocator: plans, thread stacks, arenas

# From a small process: the peak of the parent, which has loaded torch, would count as the child's.
CODE = """
import sys
from bench.measure import measure
print(measure(sys.argv[1:]).largest_process_bytes)
"""


def peak(folder: Path, *shape: str) -> int:
    """The peak resident bytes of an average of checkpoints of zeros (holes take no room)."""
    make = [sys.executable, "-m", "checkpoints", *shape, "--sparse", "--out", str(folder / "run")]
    subprocess.run(make, cwd=LIB, check=True, capture_output=True)
    average = [PMERGE, "average", str(folder / "run"), "-o", str(folder / "out"), "--memory", str(MEMORY), "--quiet", "--json"]
    command = [sys.executable, "-c", CODE, *average]
    done = subprocess.run(command, cwd=LIB, capture_output=True, text=True, check=True)
    assert json.loads((folder / "out" / "pmerge.json").read_bytes())["files"]
    return int(done.stdout)


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What a merge of next to nothing takes."""
    return peak(tmp_path_factory.mktemp("tiny"), "--size=1MB", "--count=2")


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(("--size=60MB", "--count=2"), id="two"),
        pytest.param(("--size=60MB", "--count=16"), id="sixteen"),
        pytest.param(("--size=300MB", "--largest-tensor=250MB", "--count=2", "--shards=1"), id="a tensor of 250 MB"),
    ],
)
def test_peak_memory_is_bounded(shape: tuple[str, ...], least: int, tmp_path: Path) -> None:
    assert peak(tmp_path, *shape) - least < MEMORY + OTHER


def test_peak_memory_of_many_sums_is_bounded(tmp_path: Path) -> None:
    """Six outputs, each with a buffer of its own."""
    peaks = []
    for size in ("1MB", "60MB"):
        run, out = tmp_path / f"run-{size}", tmp_path / f"out-{size}"
        make = [sys.executable, "-m", "checkpoints", f"--size={size}", "--count=8", "--out", str(run)]
        subprocess.run(make, cwd=LIB, check=True, capture_output=True)
        methods = "ema:0.1,ema:0.15,ema:0.2,decay:1-sqrt,decay:cosine,power:0.2"
        sweep = [PMERGE, "sweep", str(run), "-o", str(out), "--method", methods, "--memory", str(2 * MEMORY), "--quiet"]
        done = subprocess.run([sys.executable, "-c", CODE, *sweep], cwd=LIB, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 2 * MEMORY + OTHER
