"""Inner products of checkpoints: a reducer of the one loop that writes nothing and gives values to
the sink.
"""

from pathlib import Path

import pytest
import torch
from builders import write_run
from schemes import quantized_run
from torch import Tensor

from merge_cli import plan_average
from merge_cli.engine.budget import fit_memory
from merge_cli.engine.chunk import GRAM_BLOCK_ELEMENTS
from merge_cli.engine.device import CPU
from merge_cli.engine.reducers.gram import GramTotals
from merge_cli.engine.stream import stream
from merge_cli.errors import NonFiniteError
from merge_cli.planning.plan import GRAM, MergePlan, WorkItem

SHAPES = {"a": (3 * GRAM_BLOCK_ELEMENTS + 5,), "b": (7, 11), "c": (GRAM_BLOCK_ELEMENTS,), "empty": (0, 4)}
COUNT = 4


def run_of(folder: Path, dtype: torch.dtype, integers: bool = False) -> tuple[MergePlan, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(7)
    tensors = []
    for _ in range(COUNT):
        values = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        tensors.append({key: (10 * value).round().to(dtype) if integers else value.to(dtype) for key, value in values.items()})
    return plan_average(write_run(folder, tensors), device="cpu").merge, tensors


def totals_of(plan: MergePlan, threads: int = 1, chunk_bytes: int | None = None) -> dict[str, list[list[float]]]:
    sink = GramTotals()
    budget = fit_memory(plan, 1 << 28, CPU, threads, chunk_bytes=chunk_bytes, reducer=GRAM)
    stream(plan, [WorkItem.whole(file, (), GRAM) for file in plan.files], sink, budget)
    return {key: total.products for key, total in sink.totals().items()}


def products(tensors: list[dict[str, Tensor]], key: str) -> Tensor:
    rows = torch.stack([each[key].double().flatten() for each in tensors])
    rows = rows - rows[-1]
    return rows @ rows.T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_products_are_those_of_float64(dtype: torch.dtype, tmp_path: Path) -> None:
    plan, tensors = run_of(tmp_path / "run", dtype)
    found = totals_of(plan)
    assert found.keys() == SHAPES.keys() - {"empty"}
    for key, matrix in found.items():
        torch.testing.assert_close(torch.tensor(matrix, dtype=torch.float64), products(tensors, key), rtol=1e-12, atol=1e-9)


def test_integers_are_exact(tmp_path: Path) -> None:
    plan, tensors = run_of(tmp_path / "run", torch.bfloat16, integers=True)
    for key, matrix in totals_of(plan).items():
        assert torch.equal(torch.tensor(matrix, dtype=torch.float64), products(tensors, key))


def test_bits_do_not_depend_on_chunks_or_threads(tmp_path: Path) -> None:
    plan, _ = run_of(tmp_path / "run", torch.float32)
    first = totals_of(plan)
    for threads, chunk_bytes in ((1, 1 << 16), (3, 1 << 16), (2, 1 << 20), (4, None)):
        assert totals_of(plan, threads, chunk_bytes) == first


def test_quantized_inputs_count_as_they_are_decoded(tmp_path: Path) -> None:
    paths, *_ = quantized_run(tmp_path / "run", "DeepSeek-V3")
    plan = plan_average(paths, device="cpu").merge
    found = totals_of(plan)
    assert found == totals_of(plan, 3, 1 << 14) and found
    assert all(matrix[-1] == [0.0] * len(paths) for matrix in found.values())
    assert any(matrix[0][0] > 0 for matrix in found.values())


def test_groups_are_sums_of_tensors(tmp_path: Path) -> None:
    plan, tensors = run_of(tmp_path / "run", torch.bfloat16, integers=True)
    sink = GramTotals(group=lambda key: "all")
    stream(plan, [WorkItem.whole(file, (), GRAM) for file in plan.files], sink, fit_memory(plan, 1 << 28, CPU, reducer=GRAM))
    expected = torch.stack([products(tensors, key) for key in ("a", "b", "c")]).sum(0)
    total = sink.totals()["all"]
    assert torch.equal(torch.tensor(total.products, dtype=torch.float64), expected)
    newest = torch.cat([tensors[-1][key].double().flatten() for key in ("a", "b", "c")])
    assert total.norm2 == float(newest @ newest) and total.num_elements == len(newest)


def test_nan_is_named(tmp_path: Path) -> None:
    _, tensors = run_of(tmp_path / "run", torch.float32)
    tensors[1]["b"][3, 4] = torch.nan
    broken = plan_average(write_run(tmp_path / "broken", tensors), device="cpu").merge
    with pytest.raises(NonFiniteError, match="`b` has NaN"):
        totals_of(broken)
