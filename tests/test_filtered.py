"""The filter: sums by a matrix product have the reference's bits, whatever the product's rounding is within its bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from builders import random_bits
from checks import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_cli.engine.buffers import elements
from merge_cli.engine.matmul_sums import FILTER_ELEMENTS, FilteredSums, Product
from merge_cli.engine.reducers.cpu import Lane
from merge_cli.planning.plan import Extent, Location
from merge_cli.planning.sums import WeightedSum

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
EMA = (0.512, 0.128, 0.16, 0.2)
OPERATIONS = {
    0: WeightedSum((0, 1, 2, 3), (1.0, 1.0, 1.0, 1.0), 4.0),
    1: WeightedSum((0, 1, 2, 3), EMA, None),
    2: WeightedSum((0, 1, 2, 3), (0.11, 0.23, 0.29, 0.37), None),
    3: WeightedSum((2, 3), (-0.31, 1.31), None),
    5: WeightedSum((0, 1, 2, 3), (3.0, 5.0, 7.0, 11.0), 26.0),
    6: WeightedSum((1, 3), (0.93, 0.07), None),
}
RATIONAL = (0, 5)  # summed in float32 where all inputs have 16 bits
OUTPUTS = 7
PRODUCT = torch.mm


class Sums:
    """A lane with its inputs filled; how often the filter was asked, and which outputs it made."""

    def __init__(self, sources: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch, capacity: int = 4096) -> None:
        self.count = sources[0].numel()
        width = max(source.element_size() for source in sources)
        self.lane = Lane(len(sources), OUTPUTS, max(self.count, capacity), max(self.count, capacity) * width)
        for buffer, source in zip(self.lane.inputs, sources, strict=True):
            elements(buffer, source.dtype, 0, self.count).copy_(source)
        self.run = Extent("average", "BF16", 0, self.count, tuple(Location(None, 0, NAMES[s.dtype]) for s in sources), ("a",), (0,))  # type: ignore[arg-type]
        self.loaded: list[int] = []
        self.done: list[set[int]] = []
        self._monkeypatch = monkeypatch

    def reduce(self, operations: dict[int, WeightedSum] = OPERATIONS, *, by_reference: bool = False) -> dict[int, Tensor]:
        """The outputs, whether or not they are finite."""
        reduce = FilteredSums.reduce

        def watched(*arguments: object) -> set[int]:
            done = reduce(*arguments)  # type: ignore[arg-type]
            self.done.append(done)
            return done

        if all(source.dtype != "F32" for source in self.run.sources):
            operations = {
                k: each._replace(dtype="F32", retry=True) if k in RATIONAL and operations is OPERATIONS else each
                for k, each in operations.items()
            }
        with self._monkeypatch.context() as patch:
            patch.setattr(FilteredSums, "reduce", watched)
            if by_reference:
                patch.setattr(FilteredSums, "choose", lambda *arguments: None)
            for buffer in self.lane.outputs:
                buffer.tensor.fill_(0xFF)  # what is not written is NaN
            self.lane.reduce(self.run, self.count, operations, self.loaded.append)
        return {k: elements(self.lane.outputs[k], torch.bfloat16, 0, self.count).clone() for k in operations}


def of_a_run(count: int, dtype: torch.dtype = torch.bfloat16, noise: float = 0.05) -> list[Tensor]:
    """Four tensors as a run has them."""
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(count, generator=generator)
    return [(0.02 * (base + noise * torch.randn(count, generator=generator))).to(dtype) for _ in range(4)]


def assert_same(found: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    for k in expected:
        assert same_bits(found[k], expected[k]), k


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 31, 4097, FILTER_ELEMENTS, 2 * FILTER_ELEMENTS + 5])
def test_same_bits_as_the_reference(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = Sums(of_a_run(count, dtype), monkeypatch)
    found = sums.reduce()
    if count > 4096:
        assert sums.done == [{1, 2, 3, 6} if dtype != torch.float32 else set(OPERATIONS)]
    assert_same(found, sums.reduce(by_reference=True))


def test_all_that_any_output_uses_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = Sums(of_a_run(5000), monkeypatch)
    late = WeightedSum((2, 3), (0.71, 0.29), None)
    sums.reduce({0: OPERATIONS[0], 1: late, 2: late, 3: late})
    assert sorted(sums.loaded) == [0, 1, 2, 3] and sums.done == [{1, 2, 3}]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_inputs_of_several_dtypes(dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [source.to(dtypes[i % 2]) for i, source in enumerate(of_a_run(9001))]
    sums = Sums(sources, monkeypatch)
    assert_same(sums.reduce(), sums.reduce(by_reference=True))
    assert len(sums.done[0]) >= 4


@pytest.mark.parametrize("seed", range(4))
def test_any_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every magnitude from subnormal to the largest, at random; NaN and Inf too in the last."""
    sources = [random_bits(torch.bfloat16, 30_000, 10 * seed + i) for i in range(4)]
    if seed < 3:
        sources = [torch.where(source.isfinite(), source, 1.0) for source in sources]
    if seed < 2:
        sources = [torch.where(source.abs() < 1e30, source, 1.0) for source in sources]
    sums = Sums(sources, monkeypatch)
    found, expected = sums.reduce(), sums.reduce(by_reference=True)
    assert (sums.done[0] == set()) == (seed > 1)
    for k in OPERATIONS:
        finite = expected[k].isfinite()
        assert same_bits(found[k][finite], expected[k][finite])
        assert torch.equal(found[k].isfinite(), finite)


def test_zeros_of_both_signs_and_opposite_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums vanish, or nearly so, and where they are subnormal: a few such elements among ordinary ones."""
    sources = of_a_run(20_000)
    tiny, zero = 2.0**-133, 0.0
    special = [
        (zero, zero, zero, zero),
        (-zero, -zero, -zero, -zero),
        (zero, -zero, zero, -zero),
        (1.0, -4.0, 1.0, -1.6),
        (tiny, tiny, -tiny, 3 * tiny),
        (-tiny, zero, -zero, tiny),
        (1.0, 2.0**-9, -1.0, 2.0**-130),
        (2.0**90, -(2.0**90), 2.0**-100, 1.0),
    ]
    for place, values in enumerate(special):
        for source, value in zip(sources, values, strict=True):
            source[place * 97 : place * 97 + 3] = value
    sums = Sums(sources, monkeypatch)
    assert_same(sums.reduce(), sums.reduce(by_reference=True))
    assert sums.done[0] == {1, 2, 3, 6}


def near_the_bound(sign: Callable[[Tensor], Tensor], share: float) -> Callable[..., Tensor]:
    """A product that is wrong by `share` of what its rounding may be."""

    def mm(coefficients: Tensor, terms: Tensor, out: Tensor) -> Tensor:
        n = coefficients.shape[1] - 1
        size = coefficients[:, :n].abs() @ terms[:n].abs()
        roundings = (coefficients != 0).sum(1, keepdim=True)  # a product with 0 is exact, and so is adding it
        exact = coefficients.double() @ terms.double()
        return out.copy_(exact + sign(PRODUCT(coefficients, terms)) * share * roundings * 2.0**-24 * size)

    return mm


@pytest.mark.parametrize("direction", ["up", "down", "out", "random"])
def test_a_product_that_rounds_as_badly_as_it_may(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    sign = {
        "up": lambda values: torch.ones_like(values),
        "down": lambda values: -torch.ones_like(values),
        "out": torch.sign,
        "random": lambda values: torch.rand(values.shape, generator=generator) * 2 - 1,
    }[direction]
    sums = Sums(of_a_run(400_000, noise=0.5), monkeypatch)
    monkeypatch.setattr(FilteredSums, "is_precise", lambda *arguments: True)  # which would notice
    monkeypatch.setattr(torch, "mm", near_the_bound(sign, 1.0))
    found = sums.reduce()
    assert sums.done == [{1, 2, 3, 6}]
    expected = sums.reduce(by_reference=True)
    assert_same(found, expected)
    monkeypatch.setattr(torch, "mm", near_the_bound(sign, 20.0))  # so that this test can fail
    assert not all(same_bits(each, expected[k]) for k, each in sums.reduce().items())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_coefficients_and_windows(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    weight = st.one_of(st.floats(-2, 2, width=32), st.sampled_from([0.0, 0.5, 0.25, 1.0, 1e-30, 1e-300, 1 / 3]))
    operations = {}
    for k in range(data.draw(st.integers(3, OUTPUTS))):
        inputs = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
        factors = tuple(data.draw(st.lists(weight, min_size=len(inputs), max_size=len(inputs))))
        operations[k] = WeightedSum(tuple(inputs), factors, data.draw(st.sampled_from([None, 3.0])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    base = torch.randn(3000, generator=generator)
    noise = data.draw(st.sampled_from([0.0, 0.01, 1.0]))
    sources = [(base + noise * torch.randn(3000, generator=generator)).bfloat16() for _ in range(n)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        sums = Sums(sources, monkeypatch)
        assert_same(sums.reduce(operations), sums.reduce(operations, by_reference=True))


def test_sums_that_are_often_on_a_tie_are_left_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    quarters = WeightedSum((0, 1, 2), (0.25, 0.25, 0.5), None)
    operations = {**OPERATIONS, 4: quarters}
    for capacity in (4096, FILTER_ELEMENTS):
        sums = Sums(of_a_run(20_000), monkeypatch, capacity)
        expected = sums.reduce(operations, by_reference=True)
        for _ in range(20):
            assert_same(sums.reduce(operations), expected)
        assert all(done == {1, 2, 3, 6} for done in sums.done)
        tried = [4 in product.keys for product in sums.lane._filtered._products.values() if product]
        assert sorted(tried) == ([False, True] if capacity == 4096 else [True])  # a small tensor says little about others


def test_a_block_of_zeros_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = of_a_run(2 * FILTER_ELEMENTS)
    for source in sources:
        source[:FILTER_ELEMENTS] = -0.0
    sums = Sums(sources, monkeypatch)
    assert_same(sums.reduce(), sums.reduce(by_reference=True))
    assert sums.done == [set()]


@pytest.mark.parametrize("rounded", ["operands", "operands to 10 bits", "sums"])
@pytest.mark.parametrize("num_inputs", [4, 300])
def test_a_product_that_is_less_than_float32_is_noticed(num_inputs: int, rounded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where somebody asks for `torch.set_float32_matmul_precision("medium")`, on a CPU that heeds it."""
    low = {"operands": torch.bfloat16, "operands to 10 bits": torch.float16, "sums": torch.bfloat16}[rounded]

    def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        if rounded == "sums":
            return out.copy_(PRODUCT(a, b).to(low))
        return PRODUCT(a.to(low).float(), b.to(low).float(), out=out)

    operations = {k: WeightedSum((0, num_inputs - 1), (0.1 + k, 0.3), None) for k in range(3)}
    product = Product({**operations, 3: WeightedSum(tuple(range(num_inputs)), (1 / num_inputs,) * num_inputs, None)})
    sums = FilteredSums(8192, num_inputs, 4)
    assert product.is_usable and sums.is_precise(product)
    monkeypatch.setattr(torch, "mm", mm)
    assert not sums.is_precise(product)


def test_no_product_where_it_is_not_precise(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = Sums(of_a_run(5000), monkeypatch)
    monkeypatch.setattr(FilteredSums, "is_precise", lambda *arguments: False)
    sums.reduce()
    assert sums.done == []


def test_the_default_dtype_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        sums = Sums(of_a_run(20_000), monkeypatch)
        assert_same(sums.reduce(), sums.reduce(by_reference=True))
        assert sums.done == [{1, 2, 3, 6}]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("place", [0, FILTER_ELEMENTS + 7])
def test_a_nan_in_any_block_leaves_all_to_the_reference(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = of_a_run(2 * FILTER_ELEMENTS)
    sources[3][place] = torch.nan
    sums = Sums(sources, monkeypatch)
    found, expected = sums.reduce(), sums.reduce(by_reference=True)
    assert sums.done == [set()]
    for k in OPERATIONS:
        finite = expected[k].isfinite()
        assert not finite[place] and same_bits(found[k][finite], expected[k][finite])


@pytest.mark.parametrize("largest, is_done", [(2.0**99, True), (2.0**101, False)])
def test_the_largest_magnitude(largest: float, is_done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = of_a_run(20_000)
    for source in sources:
        source[17] = largest
    sums = Sums(sources, monkeypatch)
    assert_same(sums.reduce(), sums.reduce(by_reference=True))
    assert bool(sums.done[0]) == is_done


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = Sums(of_a_run(5000), monkeypatch)
    choose = sums.lane._filtered.choose

    in_float32 = OPERATIONS[0]._replace(dtype="F32")

    def three(*factors: float) -> dict[int, WeightedSum]:
        return {k: WeightedSum((0, 1), factors, None) for k in range(3)}

    assert choose(sums.run, three(0.3, 0.7)) is not None
    for other in (
        three(2.0**30, -(2.0**30)),
        three(2.0**-12, 1e-300),
        {**OPERATIONS, 1: in_float32, 2: in_float32, 3: in_float32, 6: in_float32},
    ):
        assert choose(sums.run, other) is None
    for dtype, is_for_it in (("F64", True), ("F32", False)):
        operations = {k: each._replace(dtype=dtype) for k, each in OPERATIONS.items()}
        assert (choose(sums.run, operations) is not None) == is_for_it
    for dtype, sources in (("F16", "BF16"), ("F32", "BF16"), ("BF16", "F64"), ("BF16", "F8_E4M3")):
        run = replace(sums.run, dtype=dtype, sources=tuple(source._replace(dtype=sources) for source in sums.run.sources))
        assert choose(run, OPERATIONS) is None
    many = {k: WeightedSum(tuple(range(600)), (1 / 600 + k / 6000,) * 600, None) for k in range(3)}
    assert not Product(many).is_usable
