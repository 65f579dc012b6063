"""The engine against the oracle, and the properties that must hold whatever the way it ran."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import digests, nasty_run, nasty_tensors, read_layout, training_run, write_checkpoint, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import coefficients, exact_mean, load, weighted_sum

from merge_cli import average
from merge_cli.errors import MismatchError, NonFiniteError

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("sma", {}),
    ("wma", {}),
    ("ema", {"alpha": 0.1}),
    ("ema", {"half_life": 150.0}),
    ("decay", {"shape": "1-sqrt", "floor": 0.1}),
    ("power", {"sigma_rel": 0.2}),
    ("weights", {"weights": [0.1, 0.2, 0.3, 0.4]}),
]
DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def units_apart(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many representable values lie between the elements."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.dtype.itemsize]
    low = torch.iinfo(integer).min
    a, b = (torch.where(x.view(integer) < 0, low - x.view(integer), x.view(integer)).long() for x in (found, expected))
    return (a - b).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda value: str(value)[:20])
def test_every_method_and_dtype_equals_the_oracle(tmp_path: Path, method: str, options: dict[str, Any], dtype: str) -> None:
    paths = nasty_run(tmp_path / "run")
    inputs = [load(path) for path in paths]
    out = average(reversed_unless_explicit(paths, method), tmp_path / "out", method=method, dtype=dtype, **options).output
    merged = load(out)
    assert merged.keys() == inputs[-1].keys()
    num_different = num_elements = 0
    for name, found in merged.items():
        tensors = [each[name] for each in inputs]
        if not tensors[0].is_floating_point():
            assert torch.equal(found, tensors[-1])
            continue
        wanted = DTYPES[dtype] or tensors[-1].dtype
        assert found.dtype == wanted and found.shape == tensors[-1].shape
        if method in ("sma", "wma") and found.dtype != torch.float64:
            numerators = [1] * 4 if method == "sma" else [1, 2, 3, 4]
            expected = exact_mean(tensors, numerators, wanted)
        else:
            weights = options.get("weights") or coefficients(method, [100, 200, 300, 400], **options)
            expected = weighted_sum(tensors, weights, wanted)
        apart = units_apart(found.flatten(), expected.flatten())
        if method in ("sma", "wma") and wanted in (torch.bfloat16, torch.float16) and tensors[0].dtype == wanted:
            assert not apart.any(), name
        if tensors[0].dtype != torch.float64:  # a float64 sum cannot be better than the oracle's own
            num_different += int((apart > 0).sum())
            num_elements += found.numel()
        assert not apart.numel() or apart.max() <= 1, name
    assert num_different <= max(2, 1e-5 * num_elements)


def reversed_unless_explicit(paths: list[Path], method: str) -> list[Path]:
    return paths if method == "weights" else paths[::-1]


def test_one_checkpoint_is_its_own_average_and_so_are_copies(tmp_path: Path) -> None:
    tensors = nasty_tensors()
    paths = write_run(tmp_path / "run", [tensors] * 3, shards=3)
    original = load(paths[-1])
    for k, method in enumerate(("sma", "wma", "ema", "decay")):
        for count in (1, 3):
            merged = load(average(paths[-count:], tmp_path / f"out{k}{count}", method=method).output)
            for name, found in merged.items():
                if found.dtype == torch.float64 and count > 1:  # the sum has no wider type to be rounded from
                    torch.testing.assert_close(found, original[name], rtol=1e-15, atol=0)
                    continue
                assert found.numel() == 0 or bytes(found.view(-1).view(torch.uint8)) == bytes(
                    original[name].view(-1).view(torch.uint8)
                ), name


def test_layout_names_dtypes_and_order_are_the_bases(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    assert read_layout(average(paths, tmp_path / "out").output) == read_layout(paths[-1])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(memory=st.integers(900_000, 64 << 20), threads=st.integers(1, 5), method=st.sampled_from(["wma", "ema"]))
def test_same_bytes_however_it_runs(tmp_path_factory: pytest.TempPathFactory, memory: int, threads: int, method: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    paths = nasty_run(folder / "run", 3)
    plain = digests(average(paths, folder / "plain", method=method).output)
    assert digests(average(paths, folder / "other", method=method, memory=memory, threads=threads).output) == plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda value: str(value)[:20])
def test_same_bytes_on_cuda(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    paths = nasty_run(tmp_path / "run")
    on_cpu = digests(average(paths, tmp_path / "cpu", method=method, device="cpu", **options).output)
    assert digests(average(paths, tmp_path / "cuda", method=method, device="cuda", **options).output) == on_cpu


@pytest.mark.parametrize("accumulate", ["fp32", "fp64"])
def test_input_layouts_and_accumulators_change_nothing_for_a_mean(tmp_path: Path, accumulate: str) -> None:
    run = training_run({"w": torch.randn(300, 70).bfloat16(), "v": torch.randn(33).half()}, 4)
    one, other = write_run(tmp_path / "a", run), write_run(tmp_path / "b", run, shards=2)
    mixed = [one[0], other[1], one[2], other[3]]
    first = digests(average(other, tmp_path / "x", accumulate=accumulate).output)
    assert digests(average(mixed, tmp_path / "y", order="step").output) == first


def test_sma_of_smas_is_the_sma_of_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training_run({"w": torch.randn(50, 7).bfloat16()}, 4))
    halves = [
        average(run[:2], tmp_path / "ckpt_1", dtype="fp32").output,
        average(run[2:], tmp_path / "ckpt_2", dtype="fp32").output,
    ]
    both, whole = load(average(halves, tmp_path / "both").output), load(average(run, tmp_path / "whole", dtype="fp32").output)
    torch.testing.assert_close(both["w"], whole["w"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_by_name_or_reported(tmp_path: Path, value: float) -> None:
    run = training_run({"good": torch.ones(9), "bad.weight": torch.ones(5, 7).bfloat16()}, 3)
    run[1]["bad.weight"][2, 3] = value
    paths = write_run(tmp_path / "run", run)
    with pytest.raises(NonFiniteError, match=r"bad\.weight") as refused:
        average(paths, tmp_path / "out")
    assert "checkpoint-200" in str(refused.value) and not (tmp_path / "out").exists()
    result = average(paths, tmp_path / "out", allow_nonfinite=True)
    assert result.nonfinite == {"bad.weight": 1}
    assert not load(result.output)["bad.weight"][2, 3].isfinite()


def test_fp16_overflow_is_refused_by_name(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", [{"large": torch.full((3,), 70000.0)}] * 2)
    with pytest.raises(NonFiniteError, match=r"large.*overflows F16"):
        average(paths, tmp_path / "out", dtype="fp16")


def test_integers_are_equal_or_refused_or_the_newest(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step_{step}", {"w": torch.ones(2), "count": torch.tensor([5, step])})
    paths = [tmp_path / "step_1", tmp_path / "step_2"]
    with pytest.raises(MismatchError, match="integer") as refused:
        average(paths, tmp_path / "out")
    assert "`count`" in str(refused.value) and "step_1" in str(refused.value)
    out = average(paths, tmp_path / "out", int_policy="newest", base=paths[0]).output
    assert load(out)["count"].tolist() == [5, 2]


def test_excluded_tensors_are_copied_from_the_base(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", training_run({"a.bias": torch.randn(5), "b.weight": torch.randn(5)}, 3))
    out = load(average(paths, tmp_path / "out", exclude=["*.bias"], base=paths[0], dtype="bf16").output)
    assert torch.equal(out["a.bias"], load(paths[0])["a.bias"]) and out["b.weight"].dtype == torch.bfloat16
