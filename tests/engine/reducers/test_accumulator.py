"""The arithmetic of an accelerator against that of the CPU, and that it neither waits for the
device nor leaves it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from builders import random_bits
from checks import same_bits
from one_device import OneDevice
from torch import Tensor

from merge_cli.engine.arithmetic import Term, add_term, divide, store, torch_dtype
from merge_cli.engine.reducers.accumulator import Accumulator, accumulator_bytes
from merge_cli.planning.sums import WeightedSum

COUNT = 30_011
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
OPERATIONS = [
    WeightedSum((0, 1, 2), (1.0, 1.0, 1.0), 3.0),
    WeightedSum((0, 1, 2), (1.0, 2.0, 3.0), 6.0),
    WeightedSum((0, 1, 2), (0.64, 0.16, 0.2), None),
    WeightedSum((0, 2), (-0.3, 1.3), None),
]


def on_host(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def reduced(sources: list[Tensor], operation: WeightedSum, out: torch.dtype) -> Tensor:
    """As `CpuWorkspace` does it."""
    dtype = torch_dtype(operation.dtype)
    total, output = torch.empty(COUNT, dtype=dtype), torch.empty(COUNT, dtype=out)
    for position, i in enumerate(operation.inputs):
        add_term(operation, position, sources[i].to(dtype), total)
    divide(operation, total)
    store(total, output)
    return output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_same_bits_as_on_the_cpu_wherever_finite(dtype: torch.dtype, out: torch.dtype) -> None:
    sources = [random_bits(dtype, COUNT, seed) for seed in range(3)]
    sums = ["F32", "F64"] if dtype != torch.float64 else ["F64"]
    for summed in sums:
        accumulator = Accumulator(on_host, COUNT + 1, len(OPERATIONS))
        operations = [operation._replace(dtype=summed) for operation in OPERATIONS]
        for i, source in enumerate(sources):
            terms = [Term(k, op, op.inputs.index(i)) for k, op in enumerate(operations) if i in op.inputs]
            accumulator.add(source, terms)
        for k, operation in enumerate(operations):
            output, clean = torch.empty(COUNT, dtype=out), torch.empty((), dtype=torch.bool)
            accumulator.finish(k, operation, output, clean)
            expected = reduced(sources, operation, out)
            finite = expected.isfinite()
            assert same_bits(output[finite], expected[finite])
            assert torch.equal(output.isfinite(), finite) and bool(clean) == bool(finite.all())


def test_float64_is_rounded_once_to_sixteen_bits() -> None:
    """Values beside ties of either type, subnormals, the ends of the range, and zeros of both
    signs.
    """
    ties = [
        1 + 2.0**-8,
        1 + 2.0**-11,
        2.0**-134,
        3 * 2.0**-134,
        2.0**-25,
        3 * 2.0**-25,
        2.0**-149,
        2.0**-150,
        65520.0,
        2.0**128,
        0.0,
    ]
    values = [sign * (tie + move) for tie in ties for move in (0, tie * 2.0**-40, -tie * 2.0**-40) for sign in (1, -1)]
    total = torch.tensor([*values, torch.inf, -torch.inf, 1e300, 5e-324], dtype=torch.float64)
    for out in (torch.bfloat16, torch.float16):
        accumulator = Accumulator(on_host, len(total), 1)
        accumulator.add(total, [Term(0, WeightedSum((0,), (1.0,), None), 0)])
        found, expected, clean = (
            torch.empty(len(total), dtype=out),
            torch.empty(len(total), dtype=out),
            torch.empty((), dtype=torch.bool),
        )
        accumulator.finish(0, WeightedSum((0,), (1.0,), None), found, clean)
        store(total, expected)
        assert same_bits(found, expected) and not clean


@dataclass
class Meter:
    """Counts the memory that is asked for."""

    num_bytes: int = 0

    def __call__(self, num_bytes: int) -> Tensor:
        self.num_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_stays_on_the_device_and_never_waits(dtype: torch.dtype) -> None:
    with OneDevice():
        meter = Meter()
        accumulator = Accumulator(meter, 4096, len(OPERATIONS))
        assert meter.num_bytes == accumulator_bytes(4096, len(OPERATIONS))
        for summed, out in itertools.product(("F32", "F64"), DTYPES):
            operations = [operation._replace(dtype=summed) for operation in OPERATIONS]
            for i in range(3):
                terms = [Term(k, op, op.inputs.index(i)) for k, op in enumerate(operations) if i in op.inputs]
                accumulator.add(torch.empty(4001, dtype=dtype, device="meta"), terms)
            for k, operation in enumerate(operations):
                output, clean = torch.empty(4001, dtype=out, device="meta"), torch.empty((), dtype=torch.bool, device="meta")
                accumulator.finish(k, operation, output, clean)
                assert output.is_meta and clean.is_meta
