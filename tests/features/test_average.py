"""The engine against the oracle, and the properties that must hold whatever the way it ran."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    INDEX,
    digests,
    nasty_run,
    nasty_tensors,
    perturbed,
    random_bits,
    read_layout,
    split,
    training_run,
    write_checkpoint,
    write_run,
)
from checks import Interval, assert_within, expect, outside, same_bits, sum_is_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import exact_mean, exact_sum, load, round_quotient
from torch import Tensor

from merge_cli import average
from merge_cli.engine.nonfinite import describe_nonfinite
from merge_cli.engine.reducers import cpu, native
from merge_cli.errors import MismatchError, NonFiniteError

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sma": ("sma", {}),
    "wma": ("wma", {}),
    "ema": ("ema", {"alpha": 0.1}),
    "ema-half-life": ("ema", {"half_life": 150.0}),
    "decay-linear": ("decay", {"shape": "linear"}),
    "decay-1-sqrt": ("decay", {"shape": "1-sqrt", "floor": 0.1}),
    "decay-cosine": ("decay", {"shape": "cosine"}),
    "power": ("power", {"sigma_rel": 0.2}),
    "weights": ("weights", {"weights": [0.7, 0.5, -0.3, 0.1]}),
}
DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STEPS = [100, 200, 300, 400]
LAYOUTS = ("single", "sharded", "mixed")

a_few_examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The same four checkpoints in three layouts; tests only read them."""
    return {layout: nasty_run(tmp_path_factory.mktemp(layout), layout=layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def nasty_inputs() -> list[dict[str, Tensor]]:
    return training_run(nasty_tensors(0), 4, 1)


@pytest.fixture(scope="module", params=itertools.product(METHODS, DTYPES), ids="-".join)
def case(request: pytest.FixtureRequest, nasty_inputs: list[dict[str, Tensor]]) -> tuple[str, str, dict[str, Any]]:
    """A method, an output dtype, and what the average of the nasty checkpoints must be."""
    label, dtype = request.param
    method, options = METHODS[label]
    return label, dtype, expect(nasty_inputs, method, options, STEPS, DTYPES[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_method_dtype_and_layout_equals_the_oracle(
    case: tuple[str, str, dict[str, Any]], layout: str, nasty: dict[str, list[Path]], tmp_path: Path
) -> None:
    label, dtype, expected = case
    method, options = METHODS[label]
    out = average(nasty[layout], tmp_path / "out", method=method, dtype=dtype, **options).output
    merged = load(out)
    assert_within(merged, expected)
    base_layout = read_layout(nasty[layout][-1])
    if dtype == "keep":
        assert read_layout(out) == base_layout
    else:
        names = {file: [name for name, _, _ in entries] for file, entries in read_layout(out).items()}
        assert names == {file: [name for name, _, _ in entries] for file, entries in base_layout.items()}
    if (out / INDEX).exists():
        index, base_index = (json.loads((path / INDEX).read_text()) for path in (out, nasty[layout][-1]))
        assert index["weight_map"] == base_index["weight_map"]
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())


def test_the_intervals_of_the_oracle_are_single_values(nasty_inputs: list[dict[str, Tensor]]) -> None:
    """The tests above are only as sharp as this: most elements have one correct answer."""
    for method, options in METHODS.values():
        expected = expect(nasty_inputs, method, options, STEPS)
        ranges = [allowed for allowed in expected.values() if not isinstance(allowed, Tensor)]
        narrow = [allowed for allowed in ranges if allowed[0].dtype != torch.float64]
        open_ = sum(int((low != high).sum()) for low, high in narrow)
        # ties: .1 and .3 in ema and weights; cosine's weights are symmetrical, with pairs that sum
        # to 1/2
        assert open_ <= 0.15 * sum(low.numel() for low, _ in narrow), method
    tensors = [checkpoint["model.embed_tokens.weight"] for checkpoint in nasty_inputs]
    assert sum_is_exact(tensors, [1, 2, 3, 4], torch.float32).double().mean() > 0.9999


@pytest.mark.parametrize("accumulate", ["fp32", "fp64"])
@pytest.mark.parametrize("label", ["sma", "ema", "power"])
def test_accumulators(
    label: str, accumulate: str, nasty: dict[str, list[Path]], nasty_inputs: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    method, options = METHODS[label]
    out = average(nasty["mixed"], tmp_path / "out", method=method, accumulate=accumulate, **options).output
    assert_within(load(out), expect(nasty_inputs, method, options, STEPS, None, accumulate))


def wide_run(count: int = 5) -> list[dict[str, Tensor]]:
    """Values of all exponents, far apart between the checkpoints, so that sums are not exact in
    float32.
    """
    small = {torch.bfloat16: 2.0**120, torch.float32: 2.0**120, torch.float16: torch.inf}
    run = []
    for seed in range(count):
        drawn = {str(dtype): random_bits(dtype, 4001, seed) for dtype in small}
        run.append({k: torch.where(v.abs() < small[v.dtype], v, torch.ones((), dtype=v.dtype)) for k, v in drawn.items()})
    return run


@pytest.mark.parametrize("accumulate", ["auto", "fp64"])
@pytest.mark.parametrize("label", ["sma", "wma", "ema", "decay-1-sqrt", "power"])
def test_values_of_all_exponents(label: str, accumulate: str, tmp_path: Path) -> None:
    run = wide_run()
    method, options = METHODS[label]
    out = average(write_run(tmp_path / "run", run), tmp_path / "out", method=method, accumulate=accumulate, **options).output
    assert_within(load(out), expect(run, method, options, [*STEPS, 500], None, accumulate))


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 10, 12, 30])
def test_means_of_any_number_are_exact(count: int, tmp_path: Path) -> None:
    """Ties are frequent for some numbers and impossible for others."""
    start = {"b": torch.randn(3, 1001).bfloat16(), "h": torch.randn(3, 1001).half(), "f": torch.randn(3, 1001)}
    run = training_run(start, count, seed=count)
    paths = write_run(tmp_path / "run", run)
    for method, integers in (("sma", [1] * count), ("wma", list(range(1, count + 1)))):
        merged = load(average(paths, tmp_path / method, method=method).output)
        for name, found in merged.items():
            expected = exact_mean([tensors[name] for tensors in run], integers, found.dtype)
            certain = sum_is_exact([t[name] for t in run], integers, torch.float64 if name == "f" else torch.float32)
            assert certain.double().mean() > 0.98, name  # fp16: 11 bits, and up to 9 more for the sum of 30
            assert torch.equal(found[certain], expected[certain]), name


def test_float64_is_rounded_once_to_sixteen_bits(tmp_path: Path) -> None:
    """torch rounds float64 to float32 on the way, which turns what is almost a tie into one."""
    almost = [1 + 2**-8 + 2**-40, -1 - 2**-8 - 2**-40, 1 + 3 * 2**-8 - 2**-40, 2**-133 * (0.5 + 2**-40), 2**-134]
    paths = write_run(tmp_path / "run", [{"w": torch.tensor(almost, dtype=torch.float64)}] * 2)
    out = average(paths, tmp_path / "bf16", method="weights", weights=[0.5, 0.5], dtype="bf16").output
    assert load(out)["w"].tolist() == [1.0078125, -1.0078125, 1.0078125, 2**-133, 0.0]
    almost = [1 + 2**-11 + 2**-40, -1 - 2**-11 - 2**-40, 2**-24 * (0.5 + 2**-40), 2**-25, 2**-24 * (1.5 - 2**-40)]
    paths = write_run(tmp_path / "run16", [{"w": torch.tensor(almost, dtype=torch.float64)}] * 2)
    out = average(paths, tmp_path / "fp16", dtype="fp16").output
    assert load(out)["w"].tolist() == [1 + 2**-10, -1 - 2**-10, 2**-24, 0.0, 2**-24]


@pytest.mark.parametrize("label", [label for label in METHODS if label != "weights"])
def test_one_checkpoint_is_its_own_average_and_so_are_copies(label: str, tmp_path: Path) -> None:
    """Bit for bit, whatever the bits are. Sums of three float64 have no wider type to be rounded
    from: last bits may differ.
    """
    tensors = nasty_tensors() | {str(dtype): random_bits(dtype, 3001, 5) for dtype in (torch.float16, torch.float64)}
    for dtype in (torch.bfloat16, torch.float32):
        values = random_bits(dtype, 3001, 6)
        tensors[str(dtype)] = torch.where(values.abs() < 1e37, values, torch.ones((), dtype=dtype))
    tensors["torch.float64"] = torch.where(tensors["torch.float64"].abs() < 1e300, tensors["torch.float64"], 1.0)
    method, options = METHODS[label]
    for count in (1, 3):
        paths = write_run(tmp_path / f"run{count}", [tensors] * count, shards=count)
        merged = load(average(paths, tmp_path / f"out{count}", method=method, **options).output)
        assert merged.keys() == tensors.keys()
        for name, found in merged.items():
            if found.dtype == torch.float64 and count > 1:
                torch.testing.assert_close(found, tensors[name], rtol=1e-15, atol=1e-320)
            else:
                assert same_bits(found, tensors[name]), name


def test_negative_zero_is_kept(tmp_path: Path) -> None:
    minus = {str(dtype): -torch.zeros(5, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
    paths = write_run(tmp_path / "run", [minus] * 3)
    for label in ("sma", "wma", "ema", "decay-1-sqrt", "power"):
        method, options = METHODS[label]
        merged = load(average(paths, tmp_path / label, method=method, **options).output)
        assert all(bool(tensor.signbit().all()) for tensor in merged.values()), label


def test_the_order_of_arguments_changes_nothing(nasty: dict[str, list[Path]], tmp_path: Path) -> None:
    paths = nasty["mixed"]
    first = None
    for number, shuffled in enumerate([paths, paths[::-1], [paths[2], paths[0], paths[3], paths[1]]]):
        found = digests(average(shuffled, tmp_path / str(number), method="ema", alpha=0.3).output)
        first = first or found
        assert found == first


@pytest.mark.parametrize(
    ("weights", "normalize"),
    [
        ([0.7, 0.3], False),
        ([1, 1, 1], True),
        ([1.5, -0.7, 0.2], False),
        ([0.1, 0.2, 0.3], True),
        ([0.123456789, 0.876543211], False),
        ([0.333333, 0.333333, 0.333334], False),
    ],
)
def test_explicit_weights_give_the_exact_decimal_average(weights: list[float], normalize: bool, tmp_path: Path) -> None:
    """Rounded once: 0.7 and 0.3, which no float is, put sums on a tie as often as any other tenths."""
    generator = torch.Generator().manual_seed(len(weights))
    start = torch.randn(8192, generator=generator) * 0.02
    drift = [torch.randn(8192, generator=generator) * 0.002 for _ in weights]
    run = [{"b": (start + d).bfloat16(), "h": (start + d).half(), "f": start + d} for d in drift]
    out = average(write_run(tmp_path / "run", run), tmp_path / "out", method="weights", weights=weights, normalize=normalize)
    decimals = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(each.denominator for each in decimals))
    numerators = [int(each * scale) for each in decimals]
    divisor = sum(numerators) if normalize else scale
    for name, found in load(out.output).items():
        total, exact = exact_sum([tensors[name] for tensors in run], numerators)
        if name == "f" and scale == 10**9:
            continue  # 30 bits and 24 are more than float64 has
        assert exact.double().mean() > 0.99, name
        expected = round_quotient(total, divisor, found.dtype)
        assert torch.equal(found[exact], expected[exact]), name


def test_explicit_weights_stay_with_their_paths(tmp_path: Path) -> None:
    run = training_run({"w": torch.randn(99).bfloat16()}, 3)
    paths = write_run(tmp_path / "run", run)
    one = load(average(paths, tmp_path / "a", method="weights", weights=[0.5, 0.3, 0.2]).output)
    turned = load(average(paths[::-1], tmp_path / "b", method="weights", weights=[0.2, 0.3, 0.5]).output)
    assert_within(one, expect(run, "weights", {"weights": [0.5, 0.3, 0.2]}, STEPS[:3]))
    assert_within(turned, expect(run[::-1], "weights", {"weights": [0.2, 0.3, 0.5]}, STEPS[:3]))


@a_few_examples
@given(data=st.data())
def test_the_layout_of_the_inputs_changes_nothing(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    tensors = {name: tensor for name, tensor in nasty_tensors().items() if tensor.numel() < 1000}
    run = training_run(tensors, 3)
    paths = write_run(folder / "plain", run)
    others = []
    for number, checkpoint in enumerate(run[:2], 1):
        names = data.draw(st.permutations(list(checkpoint)))
        shards = split(names, data.draw(st.integers(1, 6)))
        others.append(write_checkpoint(folder / f"other/checkpoint-{100 * number}", checkpoint, shards=shards, multiple=1))
    plain = digests(average(paths, folder / "a", method="wma").output)
    assert digests(average([*others, paths[2]], folder / "b", method="wma").output) == plain
    shutil.rmtree(folder)


@a_few_examples
@given(
    memory=st.integers(700_000, 1 << 20) | st.integers(1 << 20, 256 << 20),
    threads=st.integers(1, 6),
    label=st.sampled_from(list(METHODS)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_the_way_it_runs_changes_no_byte(
    memory: int,
    threads: int,
    label: str,
    layout: str,
    dtype: str,
    nasty: dict[str, list[Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("ways")
    method, options = METHODS[label]
    plain = average(nasty[layout], folder / "plain", method=method, dtype=dtype, **options).output
    other = average(nasty[layout], folder / "o", method=method, dtype=dtype, memory=memory, threads=threads, **options).output
    assert digests(other) == digests(plain)
    shutil.rmtree(folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", METHODS)
def test_same_bytes_on_cuda(label: str, dtype: str, nasty: dict[str, list[Path]], tmp_path: Path) -> None:
    method, options = METHODS[label]
    settings: dict[str, Any] = {"method": method, "dtype": dtype, **options}
    on_cpu = digests(average(nasty["mixed"], tmp_path / "cpu", device="cpu", **settings).output)
    assert digests(average(nasty["mixed"], tmp_path / "cuda", device="cuda", **settings).output) == on_cpu
    few = {"device": "cuda", "memory": 8 << 20, "threads": 3, **settings}
    assert digests(average(nasty["mixed"], tmp_path / "few", **few).output) == on_cpu


def test_sma_of_smas_is_the_sma_of_all(tmp_path: Path) -> None:
    run = training_run({"w": torch.randn(50, 7).bfloat16(), "v": torch.randn(50, 7)}, 6)
    paths = write_run(tmp_path / "run", run)
    halves = [average(paths[i : i + 3], tmp_path / f"ckpt_{i + 1}", dtype="fp32").output for i in (0, 3)]
    both = load(average(halves, tmp_path / "both", allow_merged=True).output)
    whole = load(average(paths, tmp_path / "whole", dtype="fp32").output)
    for name in run[0]:
        torch.testing.assert_close(both[name], whole[name], rtol=0, atol=4 * 2.0**-24 * run[0][name].abs().max().item())


def test_dtypes_may_differ_between_checkpoints(tmp_path: Path) -> None:
    """All of every input counts (no rounding of fp32 to bf16 before the sum); the output has the
    base's dtype.
    """
    start = training_run({"w": torch.randn(301), "v": torch.randn(7, 5)}, 3)
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    run = [{name: t.to(kind) for name, t in tensors.items()} for tensors, kind in zip(start, kinds, strict=True)]
    paths = write_run(tmp_path / "run", run)
    for accumulate in ("auto", "fp64"):
        merged = load(average(paths, tmp_path / accumulate, accumulate=accumulate).output)
        assert_within(merged, expect(run, "sma", {}, STEPS[:3], None, accumulate))
    merged = load(average(paths, tmp_path / "first", base=paths[0]).output)
    assert_within(merged, expect(run, "sma", {}, STEPS[:3], torch.float32))


def neighbors() -> dict[str, Tensor]:
    """Tensors that lie next to each other in one file, so that the engine may treat them in one go."""
    return {f"layers.{i}.weight": torch.randn(i + 3, 41).bfloat16() for i in range(60)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "position"), [("layers.0.weight", 0), ("layers.17.weight", -1), ("layers.59.weight", -1)])
def test_nan_and_inf_are_refused_by_name(name: str, position: int, value: float, tmp_path: Path) -> None:
    run = training_run(neighbors(), 3)
    run[1][name].view(-1)[position] = value
    paths = write_run(tmp_path / "run", run, shards=2)
    with pytest.raises(NonFiniteError) as refused:
        average(paths, tmp_path / "out")
    assert f"`{name}`" in str(refused.value) and "checkpoint-200" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("threads", [1, 4])
def test_nan_and_inf_are_reported_when_allowed(threads: int, tmp_path: Path) -> None:
    run = training_run(neighbors(), 3)
    run[0]["layers.3.weight"][2, 3] = torch.nan
    run[1]["layers.3.weight"][2, 4] = torch.inf
    run[2]["layers.40.weight"][-1, -1] = -torch.inf
    paths = write_run(tmp_path / "run", run, shards=3)
    result = average(paths, tmp_path / "out", allow_nonfinite=True, threads=threads, memory=2 << 20)
    assert result.nonfinite == {"layers.3.weight": 2, "layers.40.weight": 1}
    merged = load(result.output)
    assert merged["layers.3.weight"][2, 3].isnan()
    assert merged["layers.3.weight"][2, 4] == torch.inf and merged["layers.40.weight"][-1, -1] == -torch.inf
    for name, found in merged.items():
        expected = exact_mean([tensors[name] for tensors in run], [1] * 3, torch.bfloat16)
        finite = expected.isfinite()
        assert torch.equal(found[finite], expected[finite]), name
    single = average(paths, tmp_path / "single", allow_nonfinite=True, threads=1).output
    assert digests(single) == digests(result.output)


def test_of_several_nans_the_first_in_the_plan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training_run(neighbors(), 3)
    run[0]["layers.5.weight"][0, 0] = torch.nan
    run[2]["layers.2.weight"][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.2\.weight") as refused:
        average(write_run(tmp_path / "near", run), tmp_path / "out")
    assert "--allow-nonfinite" in refused.value.hint
    run = [{name: torch.full((1 << 21,), torch.nan) for name in ("a", "b")}] * 2

    def slow_at_first(inputs: Any, outputs: Any, extent: Any, start: int, end: int, *more: Any) -> Any:
        time.sleep(1.0 if extent.key_at(start) == "a" else 0.0)
        return describe_nonfinite(inputs, outputs, extent, start, start + 1, *more)

    for reducer in (cpu, native):
        monkeypatch.setattr(reducer, "describe_nonfinite", slow_at_first)
    with pytest.raises(NonFiniteError, match="`a`"):
        average(write_run(tmp_path / "apart", run), tmp_path / "out", threads=4)


def test_nan_counts_are_in_the_manifest_and_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training_run(neighbors(), 2)
    run[0]["layers.3.weight"][2, 3] = run[1]["layers.40.weight"][0, 0] = torch.nan
    paths = write_run(tmp_path / "run", run, shards=2)
    expected = {"layers.3.weight": 1, "layers.40.weight": 1}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("merge_cli.output.manifest.write_side_files", interrupted)
        average(paths, tmp_path / "out", allow_nonfinite=True)
    result = average(paths, tmp_path / "out", allow_nonfinite=True)
    assert result.reused == 2 and result.nonfinite == expected
    assert json.loads((tmp_path / "out" / "pmerge.json").read_text())["nonfinite"] == expected


def test_nan_counts_where_its_weight_is_zero(tmp_path: Path) -> None:
    run = [{"w": torch.tensor([1.0, torch.nan])}, {"w": torch.ones(2)}]
    with pytest.raises(NonFiniteError, match="`w`"):
        average(write_run(tmp_path / "run", run), tmp_path / "out", method="weights", weights=[0.0, 1.0])


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [("fp16", 65519.0, 65520.0), ("fp16", 65504.0, 70000.0), ("bf16", 3.39e38, 3.4e38)],
)
def test_overflow_is_refused_by_name(dtype: str, largest: float, beyond: float, tmp_path: Path) -> None:
    fits = {"small": torch.ones(9), "large": torch.tensor([1.0, largest, -largest])}
    out = average(write_run(tmp_path / "fits", [fits]), tmp_path / "out", dtype=dtype).output
    kept = torch.finfo({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]).max
    assert load(out)["large"].tolist() == [1.0, kept, -kept]
    for sign in (1.0, -1.0):
        run = [fits | {"large": torch.tensor([1.0, 1.0, sign * beyond])}]
        with pytest.raises(NonFiniteError, match="`large`"):
            average(write_run(tmp_path / f"run{sign}", run), tmp_path / "refused", dtype=dtype)
        assert not (tmp_path / "refused").exists()


def test_the_largest_fp16_values_have_an_average(tmp_path: Path) -> None:
    """Sums exceed fp16 by far; only the result has to fit."""
    run = [{"w": torch.full((70,), 65504.0).half()}] * 5
    assert load(average(write_run(tmp_path / "run", run), tmp_path / "out").output)["w"].eq(65504).all()


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_are_equal_or_refused_or_the_newest(dtype: torch.dtype, tmp_path: Path) -> None:
    count = torch.arange(7) % 2 == 0
    run = [{"w": torch.ones(2), "same": count.to(dtype), "count": count.roll(i).to(dtype)} for i in (0, 0, 1)]
    paths = write_run(tmp_path / "run", run)
    same = load(average(paths[:2], tmp_path / "same").output)
    assert same_bits(same["count"], run[0]["count"])
    with pytest.raises(MismatchError, match="integer") as refused:
        average(paths, tmp_path / "out")
    message = str(refused.value)
    assert "`count`" in message and "checkpoint-300" in message and "`same`" not in message
    assert not (tmp_path / "out").exists()
    newest = load(average(paths, tmp_path / "out", int_policy="newest", base=paths[0], dtype="fp32").output)
    assert same_bits(newest["count"], run[2]["count"]) and same_bits(newest["same"], run[0]["same"])


@pytest.mark.parametrize("int_policy", ["error", "newest"])
def test_integers_of_different_dtypes_are_refused_by_name(int_policy: str, tmp_path: Path) -> None:
    run = [{"count": torch.arange(5, dtype=dtype), "w": torch.ones(9)} for dtype in (torch.int32, torch.int64)]
    paths = write_run(tmp_path / "run", run)
    for base in paths if int_policy == "error" else paths[:1]:
        with pytest.raises(MismatchError, match="`count`"):
            average(paths, tmp_path / "out", int_policy=int_policy, base=base)


def test_excluded_tensors_are_copied_from_the_base(tmp_path: Path) -> None:
    run = training_run({"a.bias": torch.randn(5), "b.weight": torch.randn(5)}, 3)
    paths = write_run(tmp_path / "run", run)
    out = load(average(paths, tmp_path / "out", exclude=["*.bias"], base=paths[0], dtype="bf16").output)
    assert same_bits(out["a.bias"], run[0]["a.bias"]) and out["b.weight"].dtype == torch.bfloat16
    out = load(average(paths, tmp_path / "only", include=["*.bias"]).output)
    assert same_bits(out["b.weight"], run[2]["b.weight"]) and not torch.equal(out["a.bias"], run[2]["a.bias"])


def test_inputs_are_left_alone(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", 3)

    def state() -> list[tuple[str, int, int]]:
        files: Sequence[Path] = sorted((tmp_path / "run").rglob("*"))
        return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]

    before = state()
    average(paths, tmp_path / "out")
    assert state() == before


def test_a_large_tensor_in_pieces(tmp_path: Path) -> None:
    """One tensor of many chunks beside tensors of one element; every element, against the oracle."""
    start = {"a": torch.randn(1), "big": torch.randn(1001, 777).bfloat16(), "b": torch.randn(()).bfloat16()}
    run = [perturbed(start, seed) for seed in range(3)]
    out = average(write_run(tmp_path / "run", run), tmp_path / "out", method="wma", memory=1 << 20, threads=3).output
    expected = expect(run, "wma", {}, STEPS[:3])
    assert_within(load(out), expected)
    allowed = expected["big"]
    assert not isinstance(allowed, Tensor)
    shifted: Interval = (allowed[0].roll(1), allowed[1].roll(1))
    assert outside(load(out)["big"], shifted).numel() > 700_000  # the check itself can fail


@pytest.mark.parametrize("method", ["sma", "wma"])
def test_a_sum_too_large_for_float32_is_no_average_too_large_for_bfloat16(method: str, tmp_path: Path) -> None:
    """Causal masks are full of the smallest bfloat16; only such elements may be summed in another
    way than the rest.
    """
    lowest = torch.finfo(torch.bfloat16).min
    run = training_run({"w": torch.randn(300_001).bfloat16()}, 3)
    for tensors in run:
        tensors["w"][7], tensors["w"][300_000] = lowest, -lowest
    paths = write_run(tmp_path / "run", run)
    merged = load(average(paths, tmp_path / "out", method=method).output)["w"]
    assert merged[7] == lowest and merged[300_000] == -lowest
    integers = [1, 1, 1] if method == "sma" else [1, 2, 3]
    assert same_bits(merged[8:300_000], exact_mean([tensors["w"][8:300_000] for tensors in run], integers, torch.bfloat16))
    other = average(paths, tmp_path / "other", method=method, memory=900_000, threads=1).output
    assert digests(other) == digests(tmp_path / "out")


def test_wide_checkpoints_are_rounded_once_to_16_bits(tmp_path: Path) -> None:
    """float32 masters written as bf16: sums in float32 would be rounded before the last rounding."""
    run = [{"w": torch.randn(200_000, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    paths = write_run(tmp_path / "run", run)
    merged = load(average(paths, tmp_path / "out", dtype="bf16").output)["w"]
    assert same_bits(merged, exact_mean([tensors["w"] for tensors in run], [1, 1, 1], torch.bfloat16))
