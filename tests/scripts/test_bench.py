"""scripts/make_checkpoints and scripts/bench: real checkpoints, and measurements that mean what
they say.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from bench import contestants, measure, peers, plot, report, rounds
from bench.__main__ import threads_of
from bench.contestants import LIB, Contestant
from checkpoints import __main__ as make_checkpoints
from checkpoints.shapes import SHAPES, split_into_shards
from units import format_size, parse_size

Make = Callable[..., list[Path]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make small checkpoints with scripts/make_checkpoints, from a small random block; returns
    their folders.
    """
    monkeypatch.setattr(make_checkpoints, "BLOCK_ELEMENTS", 10_007)

    def run(*options: str, count: int = 2) -> list[Path]:
        make_checkpoints.main([*options, f"--count={count}", f"--out={tmp_path}"])
        return [tmp_path / f"ckpt_{1000 * (i + 1)}" for i in range(count)]

    return run


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    """A process: the benchmark measures the largest of its children, which begin as large as their
    parent.
    """
    return subprocess.run([sys.executable, "-m", "bench", *options], cwd=LIB, capture_output=True, text=True, check=True)


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for shard in checkpoint.glob("*.safetensors"):
        weights |= load_file(shard)
    return weights


@pytest.mark.parametrize("text, size", [("1.7GB", 1_700_000_000), ("256MiB", 2**28), ("12", 12), ("3 kB", 3000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_size_that_is_none() -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size("much")


def test_format_size() -> None:
    assert [format_size(n) for n in (0, 999, 1_700_000_000, 688_574_839_360)] == [
        "0 B",
        "999 B",
        "1.7 GB",
        "689 GB",
    ]


@pytest.mark.parametrize("shape", ["dense", "moe", "fp8"])
def test_checkpoints_are_what_the_index_and_the_config_say(make: Make, shape: str) -> None:
    first, second = make("--shape", shape, "--size=2MB", "--tensors=100", "--shards=3")
    index = json.loads((first / "model.safetensors.index.json").read_text())
    config = json.loads((first / "config.json").read_text())
    a, b = load(first), load(second)
    assert a.keys() == index["weight_map"].keys() == b.keys()
    assert len(set(index["weight_map"].values())) == 3
    assert sum(t.nbytes for t in a.values()) == index["metadata"]["total_size"]
    assert ("quantization_config" in config) == (shape == "fp8")
    assert a["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    for name, weight in a.items():
        values, other = weight.float(), b[name].float()
        assert values.isfinite().all()
        if values.numel() > 1000:
            assert not values.equal(other)
            assert (values - other).norm() < 0.2 * values.norm()
        if weight.dtype == torch.float8_e4m3fn:
            blocks = [math.ceil(n / 128) for n in weight.shape]
            assert list(a[f"{name}_scale_inv"].shape) == blocks


@pytest.mark.parametrize("shape, size", [("dense", 1.7e9), ("moe", 1.7e9), ("fp8", 1.7e9), ("dense", 2e7)])
def test_sizes_are_close_to_those_asked_for(shape: str, size: int) -> None:
    made = sum(tensor.nbytes for tensor in SHAPES[shape](int(size), 0, 0).tensors)
    assert made == pytest.approx(size, rel=0.03)


def test_largest_tensor() -> None:
    sizes = [tensor.nbytes for tensor in SHAPES["dense"](1_300_000_000, 0, 1_000_000_000).tensors]
    assert max(sizes) == pytest.approx(1e9, rel=1e-3)
    assert sum(sizes) == pytest.approx(1.3e9, rel=1e-2)


def test_deepseek_v3_has_the_published_size() -> None:
    tensors = SHAPES["deepseek-v3"](0, 0, 0).tensors
    assert len(tensors) == len({tensor.name for tensor in tensors}) == 91_991
    assert sum(math.prod(tensor.shape) for tensor in tensors) == 684_531_386_000  # as the Hub counts it
    assert len(split_into_shards(tensors, 163)) == 163


def test_sparse_takes_no_room(make: Make) -> None:
    [checkpoint] = make("--shape=1t", "--sparse", count=1)
    shards = list(checkpoint.glob("*.safetensors"))
    assert len(shards) == 61
    assert sum(shard.stat().st_size for shard in shards) > 1e12
    assert sum(shard.stat().st_blocks * 512 for shard in shards) < 1e8


def test_existing_checkpoints_stay(make: Make, tmp_path: Path) -> None:
    make("--size=1MB")
    with pytest.raises(SystemExit, match="exists already"):
        make("--size=1MB")


@pytest.mark.parametrize("average", [peers.naive, peers.shard_by_shard])
def test_loops_average(make: Make, tmp_path: Path, average: Callable[[Path, list[Path]], object]) -> None:
    checkpoints = make("--size=1MB", count=3)
    average(tmp_path / "out", checkpoints)
    found = peers.check(tmp_path / "out", checkpoints)
    assert found["num_missing"] == found["num_added"] == 0
    assert found["correctly_rounded"] > 0.999
    one = load(tmp_path / "out")["model.norm.weight"]
    mean = sum(load(c)["model.norm.weight"].double() for c in checkpoints) / 3
    assert one.equal(mean.to(one.dtype))


def test_check_sees_what_is_wrong(make: Make, tmp_path: Path) -> None:
    checkpoints = make("--size=1MB")
    shutil.copytree(checkpoints[0], tmp_path / "out")
    assert peers.check(tmp_path / "out", checkpoints)["correctly_rounded"] < 0.9
    next((tmp_path / "out").glob("model-00002*")).unlink()
    assert peers.check(tmp_path / "out", checkpoints)["num_missing"] > 10


def test_measure() -> None:
    code = "import time; x = bytearray(200_000_000); time.sleep(0.4); print('done')"
    measured = measure.measure([sys.executable, "-c", code], watch=True)
    assert measured.stdout == "done\n"
    assert 0.4 <= measured.wall_s < 60
    for size in (measured.largest_process_bytes, measured.together_bytes, measured.private_bytes):
        assert size > 200_000_000


def test_measure_adds_up_processes() -> None:
    # From a small process: the peak of the parent, which has loaded torch, would count as the
    # child's.
    code = """
import sys
from bench.measure import measure
child = "import time; x = bytearray(100_000_000); time.sleep(1)"
start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
parent = f"import subprocess, sys; [p.wait() for p in [{start}, {start}]]"
measured = measure([sys.executable, "-c", parent], watch=True)
print(measured.largest_process_bytes, measured.together_bytes, measured.private_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=LIB, capture_output=True, text=True, check=True)
    largest, together, private = map(int, done.stdout.split())
    assert 100_000_000 < largest < 150_000_000
    assert 200_000_000 < private < together < 300_000_000


def test_measure_reports_failure() -> None:
    with pytest.raises(measure.CommandFailed, match=r"(?s)exit status 3.*no room"):
        measure.measure(["sh", "-c", "echo no room >&2; exit 3"])


def test_interrupted_measure_ends_the_command_and_its_children(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            measure.measure(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"])
    finally:
        signal.signal(signal.SIGALRM, before)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while measure.memory(child) != (0, 0):  # a zombie has no memory
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_terminated_bench_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--size=1MB", "--peers=none", f"--folder={tmp_path}"]
    with subprocess.Popen(command, cwd=LIB, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        while bench.poll() is None and not list(tmp_path.iterdir()):
            time.sleep(0.02)
        bench.terminate()
        _, stderr = bench.communicate(timeout=60)
    assert bench.returncode == 1
    assert stderr.endswith("terminated\n")
    assert list(tmp_path.iterdir()) == []


def test_contest_runs_in_turn_and_drops_who_fails(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "check", lambda *_: {"num_missing": 0, "correctly_rounded": 1.0})
    log = tmp_path / "log"
    other = Contestant("other", "", lambda _, out: ["sh", "-c", f"mkdir {out}; echo other >> {log}"])
    broken = Contestant("broken", "", lambda *_: ["sh", "-c", f"echo broken >> {log}; exit 1"])
    inputs = rounds.describe(make("--size=1MB", "--tensors=30"))
    assert (inputs.num_tensors, inputs.num_shards) == (30, 3)
    results = rounds.contest([contestants.floor(), broken, other], inputs, tmp_path, rounds=2)
    assert log.read_text().split() == ["other" if i != 0 else "broken" for i in range(4)]
    assert [len(result.runs) for result in results] == [2, 0, 2]
    assert not (tmp_path / "out").exists()

    facts = [report.as_json(result) for result in results]
    capsys.readouterr()
    report.table("", [(f["name"], report.figures(f, report.floor_seconds(facts))) for f in facts])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert "| 1.00 " in lines[2]
    assert "failed" in lines[3]


@pytest.mark.parametrize("copies", [1, 3])
def test_the_parallel_floor_reads_all_and_writes_the_first(make: Make, tmp_path: Path, copies: int) -> None:
    checkpoints = make("--size=4MB")
    floor = contestants.parallel_floor(2, copies)
    out = tmp_path / "out"
    done = subprocess.run(floor.command(checkpoints, out), capture_output=True, text=True, check=True)
    assert 0 < json.loads(done.stdout)["seconds"] < 60
    for folder in [out] if copies == 1 else [out / str(k) for k in range(copies)]:
        for shard in checkpoints[0].glob("*.safetensors"):
            assert (folder / shard.name).read_bytes() == shard.read_bytes()


def test_a_loop_is_compared_with_the_parallel_floor_of_its_threads(tmp_path: Path) -> None:
    inputs = rounds.Inputs([tmp_path], 10, 1, 1, False)

    def facts(name: str, threads: int, loop_s: float) -> report.Facts:
        run = measure.Measured(1.0, 1.0, 1, stdout=json.dumps({"seconds": loop_s}))
        contestant = Contestant(name, "", lambda *_: [], threads=threads)
        return report.as_json(rounds.Result(contestant, inputs, run, [run], {"correctly_rounded": 1.0, "num_missing": 0}))

    found = [facts(name, n, s) for name, n, s in [("floor", 0, 9), ("parallel floor, 2", 2, 4), ("a", 2, 6), ("b", 4, 6)]]
    parallel_s = report.parallel_seconds(found)
    assert parallel_s == {2: 4}
    assert [report.figures(each, 1.0, parallel_s)["x parallel"] for each in found] == ["", "1.00", "1.50", ""]


def test_threads_that_pmerge_is_given() -> None:
    assert threads_of(["--workers", "2", "--threads", "3"]) == 3
    assert threads_of(["--threads=5"]) == 5
    assert threads_of([]) == len(os.sched_getaffinity(0))


def test_fit_line() -> None:
    fixed, slope, rest = plot.fit_line([(1, 3.0), (10, 21.0), (100, 201.0)])
    assert [fixed, slope] == pytest.approx([1, 2])
    assert rest == pytest.approx([0, 0, 0], abs=1e-9)


@pytest.mark.parametrize("least, step", [(0.3, 0.5), (1, 1), (3, 5), (112.64, 200), (60, 100)])
def test_nice_step(least: float, step: float) -> None:
    assert plot.nice_step(least) == pytest.approx(step)


def test_plot_is_well_formed() -> None:
    drawing = ElementTree.fromstring(plot.bars("a < b", "MB", "n", [("2", 250.0), ("32", 260.0)], limit=512))
    heights = [float(bar.attrib["height"]) for bar in drawing.iter("{http://www.w3.org/2000/svg}rect") if bar.get("x")]
    assert heights[1] / heights[0] == pytest.approx(260 / 250, rel=1e-2)


@pytest.mark.slow(reason="ten merges in processes; test_fit_line and test_plot_is_well_formed")
def test_bench_of_a_series(tmp_path: Path) -> None:
    options = ["--grow=size", "--values=1MB,2MB,3MB", "--rounds=1", f"--folder={tmp_path}", f"--plot={tmp_path}/m.svg"]
    done = bench(*options)
    assert "loop: " in done.stdout and "3MB " in done.stdout.split("off that line:")[1]
    ElementTree.parse(tmp_path / "m.svg")


@pytest.mark.slow(reason="ten merges in processes; test_contest_runs_in_turn_and_drops_who_fails")
def test_bench_from_the_command_line(tmp_path: Path) -> None:
    options = ["--size=1MB", "--rounds=1", "--peers=safe_open", f"--folder={tmp_path}", "--json"]
    done = bench(*options)
    results = {result["name"]: result for result in json.loads(done.stdout)["results"]}
    assert results.keys() >= {"floor", "safe_open"}
    assert results["safe_open"]["check"]["correctly_rounded"] > 0.999
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(reason="ten merges in processes; test_contest_runs_in_turn_and_drops_who_fails")
def test_bench_of_a_sweep(tmp_path: Path) -> None:
    options = ["--sweep", "--size=1MB", "--count=3", "--rounds=1", f"--folder={tmp_path}", "--json"]
    done = bench(*options)
    floor, parallel, pmerge = json.loads(done.stdout)["results"]
    assert (floor["name"], floor["failure"], pmerge["failure"]) == ("floor", "", "")
    assert (parallel["name"], parallel["failure"]) == ("parallel floor", "")
    assert pmerge["check"]["correctly_rounded"] > 0.999


@pytest.mark.slow(reason="twenty merges in processes; test_contest_runs_in_turn_and_drops_who_fails")
def test_bench_of_other_places(tmp_path: Path) -> None:
    options = ["--dcp", "--far=1ms,50MB", "--peers=none", "--size=1MB", "--count=2", "--rounds=1", f"--folder={tmp_path}", "--json"]
    results = {result["name"]: result for result in json.loads(bench(*options).stdout)["results"]}
    assert {name: result["failure"] for name, result in results.items()} == dict.fromkeys(
        ("floor", "parallel floor", "pmerge", "pmerge, DCP", "bare client", "pmerge, s3://"), ""
    )
    assert results["pmerge, DCP"]["check"]["correctly_rounded"] == results["pmerge, s3://"]["check"]["correctly_rounded"] == 1
    assert list(tmp_path.iterdir()) == []
