"""CPU time of the weighted sums alone, by each native kernel and by torch, in one thread.

    PYTHONPATH=scripts/lib .venv/bin/python -m bench.kernels [--elements 262144] [--rounds 15] [case
    ...]

One chunk lies in memory and is summed again and again; kernels and torch take turns within a round,
so that a machine that is busy slows both. Printed are the least nanoseconds of CPU time for an
element of output, and how many times as long torch takes (the median over the rounds). torch sums
term by term; for many outputs pmerge's torch path may take a matrix product instead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_cli.engine.arithmetic import add_term, divide, is_finite, store, torch_dtype
from merge_cli.engine.kernels import native
from merge_cli.engine.kernels.layouts import layout_of
from merge_cli.engine.kernels.native import Kernel, Parts
from merge_cli.formats.quantization.codec import Codec
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.quantization.layout import Grid
from merge_cli.formats.quantization.mxfp4 import MxFp4
from merge_cli.formats.quantization.nvfp4 import NvFp4
from merge_cli.planning.sums import WeightedSum

COLUMNS = 4096


@dataclass(frozen=True)
class Case:
    """`inputs` inputs of a dtype or quantized by a codec, `outputs` sums of them all."""

    name: str
    source: str | Codec
    output: str
    accumulator: str
    inputs: int = 4
    outputs: int = 1
    is_mean: bool = False

    def sums(self) -> list[WeightedSum]:
        every = tuple(range(self.inputs))
        if self.is_mean:
            return [WeightedSum(every, (1.0,) * self.inputs, float(self.inputs), self.accumulator, True)]
        return [WeightedSum(every, tuple(0.9 / (1 + i + k) for i in every), None, self.accumulator) for k in range(self.outputs)]


CASES = [
    Case("bf16 mean of 4", "BF16", "BF16", "F32", is_mean=True),
    Case("bf16 mean of 10", "BF16", "BF16", "F32", 10, is_mean=True),
    Case("bf16 ema of 4", "BF16", "BF16", "F64"),
    Case("bf16 ema of 10", "BF16", "BF16", "F64", 10),
    Case("bf16, 8 outputs of 10", "BF16", "BF16", "F64", 10, 8),
    Case("fp16 ema of 4", "F16", "F16", "F64"),
    Case("fp32 ema of 4", "F32", "F32", "F64"),
    Case("fp8 128x128, of 4", Fp8(Grid(128, 128)), "BF16", "F64"),
    Case("fp8 channel, of 4", Fp8(Grid(1)), "BF16", "F64"),
    Case("mxfp8 32, of 4", Fp8(Grid(1, 32), "U8", "mx"), "BF16", "F64"),
    Case("int4 32 packed, of 4", Integer(Grid(1, 32), "BF16", 4, True, -8), "BF16", "F64"),
    Case("int8 channel, of 4", Integer(Grid(1), "F32"), "BF16", "F64"),
    Case("mxfp4, of 4", MxFp4(), "BF16", "F64"),
    Case("nvfp4, of 4", NvFp4(), "BF16", "F64"),
]


class Work:
    """A case with its data in memory."""

    def __init__(self, case: Case, elements: int) -> None:
        self.case = case
        self.shape = (elements // COLUMNS, COLUMNS)
        self.count = self.shape[0] * COLUMNS
        self.sums = case.sums()
        self.sources = [self._source(seed) for seed in range(case.inputs)]
        self.outputs = [torch.empty(self.count, dtype=torch_dtype(case.output)) for _ in self.sums]
        accumulator = torch_dtype(case.accumulator)
        self._totals = [torch.empty(self.count, dtype=accumulator) for _ in self.sums]
        self._wide = torch.empty(self.count, dtype=accumulator)

    def _source(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.case.source, str):
            return {"codes": (torch.randn(self.count, generator=generator) * 0.02).to(torch_dtype(self.case.source))}
        codec = self.case.source
        sizes = {role: codec.part_range(role, self.shape, 0, self.shape[0])[1] for role in ("codes", "scale")}
        parts = {role: torch.randint(0, 127, (size,), generator=generator).to(torch.uint8) for role, size in sizes.items()}
        kind = {"F32": torch.float32, "BF16": torch.bfloat16}.get(getattr(codec, "scale_dtype", ""))
        if kind is not None:
            parts["scale"] = (
                (torch.rand(sizes["scale"] // kind.itemsize, generator=generator) * 1e-3 + 1e-4).to(kind).view(torch.uint8)
            )
        if isinstance(codec, NvFp4):
            parts["global_scale"] = torch.tensor([321.5]).view(torch.uint8)
        return parts

    def by_kernel(self, kernel: Kernel) -> Callable[[], object]:
        codec = self.case.source
        layout = codec if isinstance(codec, str) else layout_of(codec, self.shape)
        assert layout is not None
        job = kernel.prepare([layout] * self.case.inputs, self.sums, [self.case.output] * len(self.sums))
        inputs = [self._addresses(source) for source in self.sources]
        outputs = [output.data_ptr() for output in self.outputs]
        return lambda: job.run(inputs, outputs, self.count)

    def _addresses(self, source: dict[str, Tensor]) -> int | Parts:
        at = {role: part.data_ptr() for role, part in source.items()}
        return at["codes"] if len(at) == 1 else Parts(at["codes"], at["scale"], global_scale=at.get("global_scale", 0))

    def by_torch(self) -> None:
        for i, source in enumerate(self.sources):
            codec = self.case.source
            values = source["codes"] if isinstance(codec, str) else codec.decode(source, self.shape, 0, self.shape[0]).view(-1)
            wide = values if values.dtype == self._wide.dtype else self._wide.copy_(values)
            for operation, total in zip(self.sums, self._totals, strict=True):
                add_term(operation, i, wide, total)
        for operation, total, output in zip(self.sums, self._totals, self.outputs, strict=True):
            divide(operation, total)
            store(total, output)
            is_finite(output)


def seconds(work: Callable[[], object]) -> float:
    """CPU time of this thread."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def measure(work: Work, kernels: Sequence[Kernel], rounds: int) -> dict[str, tuple[float, float]]:
    """For torch and each kernel: least nanoseconds an element, and the median of torch's time over
    its own.
    """
    ways = {"torch": work.by_torch, **{kernel.name: work.by_kernel(kernel) for kernel in kernels}}
    for way in ways.values():
        way()
    found = [{name: seconds(way) for name, way in ways.items()} for _ in range(rounds)]
    return {
        name: (
            min(each[name] for each in found) / work.count * 1e9,
            statistics.median(each["torch"] / each[name] for each in found),
        )
        for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser("bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 18)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("cases", nargs="*", help="parts of the names of the cases to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kernels = list(native.kernels().values())
    print(f"{'ns an element of output (torch takes times as long)':<52}{'torch':>8}" + "".join(f"{k.name:>16}" for k in kernels))
    for case in CASES:
        if options.cases and not any(part in case.name for part in options.cases):
            continue
        found = measure(Work(case, options.elements), kernels, options.rounds)
        columns = [f"{found[kernel.name][0]:>8.2f} ({found[kernel.name][1]:>4.1f}x)" for kernel in kernels]
        print(f"{case.name:<52}{found['torch'][0]:>8.2f}" + "".join(columns))


if __name__ == "__main__":
    main()
