"""The native kernels against the reference in torch (`engine/arithmetic.py`): the same bits,
always.

Every check forces each kernel that this processor can run in turn.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from builders import random_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import TESTS
from reference import round_fraction
from torch import Tensor

from merge_cli.engine.arithmetic import add_term, divide, store, torch_dtype
from merge_cli.engine.kernels import build, native
from merge_cli.engine.kernels.native import Job, Kernel
from merge_cli.errors import UsageError
from merge_cli.planning.sums import WeightedSum, weighted_sum
from merge_cli.request.coefficients import Coefficients
from merge_cli.request.methods import coefficients

NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8000000000000}
DTYPES = tuple(NAN)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
KERNELS = native.kernels()

if not KERNELS and shutil.which("cc") is None:
    pytest.skip("no C compiler here", allow_module_level=True)


def test_the_library_is_built_from_these_sources() -> None:
    assert build.is_current(), f"{native.why_none() or 'the library is old'}: run scripts/setup"
    assert "base" in KERNELS
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        assert ("v3" in KERNELS) == ("avx2" in flags)
        assert ("v4" in KERNELS) == {"avx512f", "avx512bw", "avx512dq", "avx512vl"}.issubset(flags)


def dtype_of(tensor: Tensor) -> str:
    return next(name for name in DTYPES if torch_dtype(name) == tensor.dtype)


class Sum(NamedTuple):
    """A sum and the dtype that it is rounded to."""

    dtype: str
    operation: WeightedSum


def sum_of(
    dtype: str,
    accumulator: str,
    inputs: tuple[int, ...],
    factors: tuple[float, ...],
    divisor: float | None = None,
    retry: bool = False,
) -> Sum:
    return Sum(dtype, WeightedSum(inputs, factors, divisor, accumulator, retry))


def planned(inputs: tuple[int, ...], chosen: Coefficients, sources: Sequence[Tensor], dtype: str, setting: str) -> Sum:
    """The sum that a plan has."""
    return Sum(dtype, weighted_sum(inputs, chosen, setting, [dtype_of(sources[i]) for i in inputs], dtype))


def by_torch(each: Sum, sources: Sequence[Tensor]) -> Tensor:
    """The sum by the reference: bits as integers, NaN as the one pattern."""

    def reduced(operation: WeightedSum) -> Tensor:
        total = torch.empty(len(sources[0]), dtype=torch_dtype(operation.dtype))
        for position, i in enumerate(operation.inputs):
            add_term(operation, position, sources[i].to(total.dtype), total)
        divide(operation, total)
        output = torch.empty(len(total), dtype=torch_dtype(each.dtype))
        store(total, output)
        return output

    output = reduced(each.operation)
    if each.operation.retry and not output.isfinite().all():
        output = torch.where(output.isfinite(), output, reduced(each.operation.again_in_float64()))
    bits = output.view(INTEGERS[output.itemsize])
    return torch.where(output.isnan(), torch.tensor(NAN[each.dtype], dtype=bits.dtype), bits)


def prepare(kernel: Kernel, dtypes: Sequence[str], sums: Sequence[Sum]) -> Job:
    return kernel.prepare(dtypes, [each.operation for each in sums], [each.dtype for each in sums])


def by_kernel(kernel: Kernel, sums: Sequence[Sum], sources: Sequence[Tensor]) -> list[Tensor]:
    """The sums by the kernel, as bits. Checks which outputs it reports as not finite."""
    outputs = [torch.full((len(sources[0]),), 7, dtype=torch_dtype(each.dtype)) for each in sums]
    job = prepare(kernel, [dtype_of(source) for source in sources], sums)
    bad = job.run([source.data_ptr() for source in sources], [output.data_ptr() for output in outputs], len(sources[0]))
    assert bad == [k for k, output in enumerate(outputs) if not output.isfinite().all()]
    return [output.view(INTEGERS[output.itemsize]) for output in outputs]


def check(sums: Sequence[Sum], sources: Sequence[Tensor]) -> None:
    """All kernels give the reference's bits, for all sums at once and for each alone."""
    expected = [by_torch(each, sources) for each in sums]
    groups = [list(range(len(sums)))] + ([[k] for k in range(len(sums))] if len(sums) > 1 else [])
    for kernel, group in itertools.product(KERNELS.values(), groups):
        for k, found in zip(group, by_kernel(kernel, [sums[k] for k in group], sources), strict=True):
            wrong = (found != expected[k]).nonzero().flatten()[:5]
            inputs = [source[wrong] for source in sources]
            assert not len(wrong), (kernel.name, sums[k], inputs, found[wrong], expected[k][wrong])


def values(dtype: str, count: int, seed: int, special: bool = True) -> Tensor:
    """All exponents, and values near 1 so that sums are not only of one term; some zeros,
    infinities and NaN.
    """
    drawn = random_bits(torch_dtype(dtype), count, seed)
    near = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(drawn.dtype)
    mixed = torch.where(torch.arange(count) % 2 == 0, drawn, near)
    for place, value in enumerate([0.0, -0.0, torch.inf, -torch.inf, torch.nan] if special else []):
        mixed[3 + place * (seed + 1) :: 97] = value
    return mixed


METHODS = {
    "sma": coefficients("sma", [1, 2, 3]),
    "sma-4": coefficients("sma", [1, 2, 3, 4]),
    "wma": coefficients("wma", [1, 2, 3, 4, 5]),
    "ema": coefficients("ema", [1, 2, 3, 4], alpha=0.2),
    "decay": coefficients("decay", range(7)),
    "power": coefficients("power", [100, 200, 300], sigma_rel=0.2),
    "weights": coefficients("weights", range(6), weights=[0.7, 0.5, -0.3, 0.1, 0.0, 1.0], normalize=True),
    "many digits": Coefficients((0.7, 0.5, -0.3, 0.1, 0.0, 1.0)),
    "one": Coefficients((1.0,), (1,), 1),
}


@pytest.mark.parametrize("setting", ["auto", "fp32", "fp64"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_dtype_and_setting(method: str, setting: str) -> None:
    inputs = tuple(range(len(METHODS[method].values)))
    for dtype, special in itertools.product(DTYPES, (False, True)):
        sources = [values(dtype, 1100, seed, special) for seed in inputs]
        check([planned(inputs, METHODS[method], sources, output, setting) for output in DTYPES], sources)


def all_patterns(dtype: str) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch_dtype(dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern_of_16_bits(dtype: str) -> None:
    operations = [(1.0, None), (1.0, 3.0), (0.3, None), (3.0, 4.0)]
    for output, accumulator, (factor, divisor) in itertools.product(DTYPES, ("F32", "F64"), operations):
        check([sum_of(output, accumulator, (0,), (factor,), divisor)], [all_patterns(dtype)])


@pytest.mark.parametrize(("accumulator", "factors", "divisor"), [("F32", (1.0, 1.0), 2.0), ("F64", (0.7, 0.3), None)])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern_of_16_bits_with_64_partners(
    dtype: str, accumulator: str, factors: tuple[float, float], divisor: float | None
) -> None:
    every = all_patterns(dtype)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e-8, 65504.0, torch.inf, torch.nan]).to(every.dtype)
    for few in torch.cat([every[77 :: 1 << 10][:56], special]).split(16):
        sources = [every.repeat(len(few)), few.repeat_interleave(len(every))]
        check([sum_of(dtype, accumulator, (0, 1), factors, divisor, retry=True)], sources)


@pytest.mark.parametrize(("dtype", "output"), [("BF16", "BF16"), ("F16", "F32"), ("F32", "F16"), ("F64", "F64")])
def test_every_tail_at_every_alignment(dtype: str, output: str) -> None:
    """The bits of an element depend on nothing around it, and nothing around the output is touched."""
    each = sum_of(output, "F64", (0, 1, 2), (1.0, 2.0, 3.0), 6.0)
    sources = [values(dtype, 576, seed) for seed in range(3)]
    width, width_out = sources[0].itemsize, torch_dtype(output).itemsize
    stored, expected = [bytes_of(source) for source in sources], bytes_of(by_torch(each, sources))
    for kernel in KERNELS.values():
        job = prepare(kernel, [dtype] * 3, [each])
        for tail, alignment in itertools.product(range(64), range(64)):
            count = tail + 512 * (alignment % 2)
            inputs = [bytearray(alignment) + data[: count * width] for data in stored]
            out = bytearray(b"\xa5" * (alignment + count * width_out + 64))
            job.run([address_of(data) + alignment for data in inputs], [address_of(out) + alignment], count)
            end = alignment + count * width_out
            assert out[alignment:end] == expected[: count * width_out], (kernel.name, tail, alignment)
            assert not out[:alignment].strip(b"\xa5") and not out[end:].strip(b"\xa5")


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_byte_outside_is_touched(dtype: str) -> None:
    """Memory ends at a page that may not be touched, or begins after one: a vector that reaches
    over kills the process.
    """
    width, page = torch_dtype(dtype).itemsize, mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    maps = [mmap.mmap(-1, 4 * page) for _ in range(6)]
    for memory in maps:
        for guard in (0, 3 * page):
            assert libc.mprotect(ctypes.c_void_p(address_of(memory) + guard), page, 0) == 0
    sums = [sum_of(dtype, "F32", (0, 1, 2, 3), (1.0, 1.0, 1.0, 1.0), 3.0), sum_of(dtype, "F64", (0, 1, 3), (0.1, 0.2, 0.7))]
    for kernel, some in itertools.product(KERNELS.values(), (sums, sums[:1], sums[1:])):
        job = prepare(kernel, [dtype] * 4, some)
        for count in [*range(1, 65), 512, 513, 2 * page // width]:
            for offset in (page, 3 * page - count * width):
                addresses = [address_of(memory) + offset for memory in maps]
                assert job.run(addresses[:4], addresses[4 : 4 + len(some)], count) == []


def address_of(buffer: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0


def bytes_of(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


doubles = st.floats(-1e300, 1e300)


@st.composite
def near_ties(draw: st.DrawFn) -> float:
    """A float64 at, or a few of its last bits beside, the middle of two values of a 16-bit format
    or of float32.
    """
    bits = draw(st.sampled_from([8, 11, 24]))
    exponent = draw(st.integers(-160, 130) | st.integers(-30, 17))
    middle = (2 * draw(st.integers(0, 1 << bits)) + 1) * 2.0**-bits * 2.0**exponent
    pattern = ctypes.c_int64.from_buffer(ctypes.c_double(middle)).value + draw(st.integers(-2, 2))
    return draw(st.sampled_from([1.0, -1.0])) * ctypes.c_double.from_buffer(ctypes.c_int64(pattern)).value


@settings(max_examples=200, deadline=None)
@given(st.lists(near_ties() | doubles, min_size=1, max_size=80), st.sampled_from(["BF16", "F16", "F32"]))
def test_float64_is_rounded_once(numbers: list[float], output: str) -> None:
    """Against exact arithmetic, which knows nothing of how either rounds."""
    source, dtype = torch.tensor(numbers, dtype=torch.float64), torch_dtype(output)
    exact = torch.tensor([round_fraction(Fraction(x), dtype) for x in numbers], dtype=torch.float64).copysign(source).to(dtype)
    for kernel in KERNELS.values():
        (found,) = by_kernel(kernel, [sum_of(output, "F64", (0,), (1.0,))], [source])
        assert torch.equal(found, exact.view(found.dtype)), kernel.name


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Sum], list[Tensor]]:
    """Outputs and inputs of any dtypes, each output with inputs of its own choice."""
    count = draw(st.integers(1, 600))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=9))
    sources = [values(dtype, count, seed + draw(st.integers(0, 9)), draw(st.booleans())) for seed, dtype in enumerate(dtypes)]
    sums = []
    for _ in range(draw(st.integers(1, 11))):
        inputs = tuple(sorted(draw(st.sets(st.integers(0, len(dtypes) - 1), min_size=1))))
        whole = st.integers(1, 9).map(float)
        factors = tuple(draw(st.sampled_from([whole, st.floats(-2, 2)]).flatmap(lambda kind: kind)) for _ in inputs)
        divisor = draw(st.none() | st.integers(2, 50).map(float))
        sums.append(
            sum_of(
                draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["F32", "F64"])), inputs, factors, divisor, draw(st.booleans())
            )
        )
    return sums, sources


@settings(max_examples=100, deadline=None)
@given(jobs())
def test_any_job(job: tuple[list[Sum], list[Tensor]]) -> None:
    check(*job)


def test_more_outputs_than_are_summed_at_once() -> None:
    sources = [values("BF16", 1500, seed) for seed in range(11)]
    chosen = [coefficients(method, range(n)) for method in ("ema", "sma") for n in range(2, 11)]
    check([planned(tuple(range(len(each.values))), each, sources, "BF16", "auto") for each in chosen], sources)


def test_sums_too_large_for_float32_are_made_again() -> None:
    most = torch.tensor([torch.finfo(torch.bfloat16).max] * 700).bfloat16()
    again, once = (sum_of("BF16", "F32", (0, 1), (1.0, 1.0), 2.0, retry) for retry in (True, False))
    for kernel in KERNELS.values():
        found, infinite = by_kernel(kernel, [again, once], [most, most])
        assert torch.equal(found, most.view(torch.int16))
        assert torch.equal(infinite, torch.full_like(infinite, 0x7F80))


@pytest.fixture
def flushing() -> Iterator[None]:
    """Subnormals are flushed to zero, as some libraries set it for a whole thread."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


def test_subnormals_are_kept_where_they_are_flushed(request: pytest.FixtureRequest) -> None:
    sums = [sum_of(output, accumulator, (0, 1), (1.0, 3.0), 4.0) for output in DTYPES for accumulator in ("F32", "F64")]
    cases = []
    for dtype in DTYPES:
        sources = [values(dtype, 900, seed) / 2.0 ** (torch.finfo(torch_dtype(dtype)).bits * 2) for seed in (0, 1)]
        cases.append((sources, [by_torch(each, sources) for each in sums]))
    tiny = torch.tensor([1e-40])
    request.getfixturevalue("flushing")
    for kernel, (sources, expected) in itertools.product(KERNELS.values(), cases):
        for each, found, bits in zip(sums, by_kernel(kernel, sums, sources), expected, strict=True):
            assert torch.equal(found, bits), (kernel.name, each)
        assert float(tiny * 1.0) == 0.0  # as it was set before the call


def test_rounding_is_to_nearest_whatever_is_set() -> None:
    libm = ctypes.CDLL("libm.so.6")
    before = libm.fegetround()
    sources = [values("F32", 900, seed) for seed in (0, 1)]
    each = sum_of("BF16", "F64", (0, 1), (0.1, 0.9))
    expected = by_torch(each, sources)
    for kernel in KERNELS.values():
        output = torch.empty(900, dtype=torch.bfloat16)
        job = prepare(kernel, ["F32", "F32"], [each])
        for mode in (0x400, 0x800, 0xC00) if os.uname().machine == "x86_64" else (0x400000, 0x800000, 0xC00000):
            assert libm.fesetround(mode) == 0
            job.run([source.data_ptr() for source in sources], [output.data_ptr()], 900)
            kept = libm.fegetround()
            libm.fesetround(before)
            assert kept == mode
            assert torch.equal(output.view(torch.int16), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found(dtype: str) -> None:
    kernel = KERNELS["base"]
    source = values(dtype, 1500, 0)
    expected = (~source.isfinite()).nonzero().flatten().tolist()
    assert kernel.find_nonfinite(dtype, source.data_ptr(), 1500, 1500) == (len(expected), expected)
    assert kernel.find_nonfinite(dtype, source.data_ptr(), 1500, 3) == (len(expected), expected[:3])
    assert kernel.find_nonfinite(dtype, values(dtype, 1500, 0, special=False).data_ptr(), 1500) == (0, [])


def test_inputs_that_no_sum_uses_are_not_read() -> None:
    sources = [values("F32", 100, seed) for seed in range(3)]
    each = sum_of("F32", "F64", (0, 2), (0.5, 0.5))
    for kernel in KERNELS.values():
        outputs = torch.empty(2, 100)
        job = prepare(kernel, ["F32", "F32", "F32"], [each, each])
        assert job.inputs == (0, 2)
        job.run([sources[0].data_ptr(), 0, sources[2].data_ptr()], [output.data_ptr() for output in outputs], 100)
        assert torch.equal(outputs.view(torch.int32), by_torch(each, sources).repeat(2, 1))


def test_the_variable_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNELS:
        monkeypatch.setenv("PMERGE_KERNEL", name)
        assert getattr(native.load(), "name", None) == name
    monkeypatch.setenv("PMERGE_KERNEL", "torch")
    assert native.load() is None
    monkeypatch.setenv("PMERGE_KERNEL", "v9")
    with pytest.raises(UsageError, match="v9"):
        native.load()
    monkeypatch.delenv("PMERGE_KERNEL")
    assert getattr(native.load(), "name", None) == list(KERNELS)[-1]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Another place for the library, where none is yet."""
    library = tmp_path / "average.so"
    monkeypatch.setattr(build, "LIBRARY", library)
    monkeypatch.delenv("PMERGE_KERNEL", raising=False)
    native._library.cache_clear()
    yield library
    native._library.cache_clear()


def test_a_missing_library_means_torch(elsewhere: Path) -> None:
    assert native.load() is None
    assert "not built" in native.why_none()


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_broken_library_means_torch(elsewhere: Path, content: bytes) -> None:
    elsewhere.write_bytes(content)
    assert native.load() is None
    assert "cannot be loaded" in native.why_none()


def test_a_library_of_other_sources_is_not_used(elsewhere: Path) -> None:
    built = Path(native.__file__).with_name("average.so").read_bytes()
    elsewhere.write_bytes(built.replace(build.digest().encode(), b"0" * 64))
    assert not build.is_current(elsewhere)
    assert native.load() is None
    assert "other sources" in native.why_none()


def test_nothing_is_built_with_fast_math(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ("-ffast-math", "-ffinite-math-only"):
        monkeypatch.setenv("CFLAGS", flags)
        with pytest.raises(build.BuildError, match="IEEE 754"):
            build.build(elsewhere)
    assert not elsewhere.exists()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_no_compiler_is_no_library(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(build.BuildError):
        build.build(elsewhere)


@pytest.mark.slow(reason="builds with sanitizers; the tests above compare the same kernels with torch")
def test_sanitizers_find_nothing(elsewhere: Path) -> None:
    """Random jobs in a C program with AddressSanitizer and UBSan, which also compares the kernels
    with each other.
    """
    flags = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    build.build(elsewhere, flags)
    driver, include = TESTS / "data" / "kernel_driver.c", Path(native.__file__).parent
    program = elsewhere.with_name("driver")
    command = [*build.compiler(), *flags, f"-I{include}", str(driver), str(elsewhere), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[:-1]) == (0, list(KERNELS)), done.stderr


def test_the_kernel_needs_neither_torch_nor_numpy() -> None:
    """In a process of its own, since this one has both."""
    code = "import sys, merge_cli.engine.kernels.native as n; n.load(); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
