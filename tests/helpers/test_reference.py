"""The oracle against something simpler still: `fractions`, torch's own casts, and the writer
against safetensors.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    nasty_run,
    nasty_tensors,
    random_bits,
    read_layout,
    tensor_bytes,
    training_run,
    write_safetensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exact_mean, exact_sum, load, round_fraction, round_quotient, weighted_sum
from safetensors.torch import load_file

NARROW = [torch.bfloat16, torch.float16, torch.float32]


def by_fractions(tensors: list[torch.Tensor], numerators: list[int], dtype: torch.dtype) -> list[float]:
    rows = zip(*(tensor.tolist() for tensor in tensors), strict=True)
    sums = [sum(n * Fraction(x) for n, x in zip(numerators, row, strict=True)) for row in rows]
    return [round_fraction(s / sum(numerators), dtype) if s else 0.0 for s in sums]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), divisor=st.sampled_from([1, 2, 3, 6, 7, 10, 55, 120]))
def test_quotients_are_rounded_once(dtype: torch.dtype, seed: int, divisor: int) -> None:
    values = random_bits(dtype, 40, seed)
    expected = [round_fraction(Fraction(x) / divisor, dtype) if x else 0.0 for x in values.tolist()]
    assert round_quotient(values.double(), divisor, dtype).tolist() == expected


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), numerators=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_exact_mean_is_the_rational_mean(dtype: torch.dtype, seed: int, numerators: list[int]) -> None:
    tensors = [random_bits(torch.bfloat16, 40, seed + i) for i in range(len(numerators))]
    mean = exact_mean(tensors, numerators, dtype)
    if mean.isfinite().all():
        assert mean.tolist() == by_fractions(tensors, numerators, dtype)
    noise = torch.randn(len(numerators), 40, generator=torch.Generator().manual_seed(seed))
    near = [tensor.to(dtype) for tensor in 1 + noise * 0.01]
    assert exact_mean(near, numerators, dtype).tolist() == by_fractions(near, numerators, dtype)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), numerators=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_exact_mean_of_fp64(seed: int, numerators: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = list(torch.randn(len(numerators), 20, generator=generator, dtype=torch.float64))
    expected = [
        float(sum(n * Fraction(x) for n, x in zip(numerators, row, strict=True)) / sum(numerators))
        for row in zip(*(tensor.tolist() for tensor in tensors), strict=True)
    ]  # Python divides two integers with one rounding
    assert exact_mean(tensors, numerators, torch.float64).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_agrees_with_torch(dtype: torch.dtype) -> None:
    values = random_bits(torch.float32, 100_000, 0)
    rounded = round_quotient(values.double(), 1, dtype)
    assert tensor_bytes(rounded) == tensor_bytes(values.to(dtype))


def test_rounding_does_not_pass_through_float32() -> None:
    just_above_a_tie = torch.tensor([1 + 2**-8 + 2**-40, -1 - 2**-8 - 2**-40], dtype=torch.float64)
    assert just_above_a_tie.to(torch.float32).to(torch.bfloat16).tolist() == [1.0, -1.0]
    assert round_quotient(just_above_a_tie, 1, torch.bfloat16).tolist() == [1.0078125, -1.0078125]


def test_a_rounded_third_breaks_ties() -> None:
    tensors = [torch.randn(10_000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(6)]
    _, exact = exact_sum(tensors, [1] * 6)
    wrong = exact_mean(tensors, [1] * 6, torch.bfloat16) != weighted_sum(tensors, [1 / 6] * 6, torch.bfloat16)
    assert exact.float().mean() > 0.99
    assert 0.001 < wrong.float().mean() < 0.1


@pytest.mark.parametrize("layout", ["single", "sharded", "mixed"])
def test_written_checkpoints_are_read_by_safetensors(tmp_path: Path, layout: str) -> None:
    paths = nasty_run(tmp_path, 3, layout=layout)
    for path, expected in zip(paths, training_run(nasty_tensors(0), 3, 1), strict=True):
        found = load(path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert tensor_bytes(found[name]) == tensor_bytes(tensor)
        assert sum(len(tensors) for tensors in read_layout(path).values()) == len(expected)


def test_headers_may_be_odd(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int64), "c": torch.tensor(1.5).bfloat16()}
    options: dict[str, Any] = {"before": " \n", "multiple": 1, "metadata": None, "header_order": ["c", "a", "b"]}
    write_safetensors(tmp_path / "odd.safetensors", tensors, **options)
    found = load_file(tmp_path / "odd.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
