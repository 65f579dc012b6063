"""Weighted sums by the native kernel, one call for a chunk, which gives up the interpreter's lock
(no torch, no numpy).

    kernel = load()                                     # None without a built library: the torch path gives the same bytes
    sums = [WeightedSum((0, 1, 2, 3), (1.0,) * 4, 4.0, "F32")]
    job = kernel.prepare(["BF16"] * 4, sums, ["BF16"])
    bad = job.run(inputs, outputs, count)               # addresses of memory; outputs whose results are not all finite

The bits are those of the reference in torch, on every processor and in whatever state its
floating-point unit is: products and sums in the order of the inputs, one division, one rounding.
Results that are NaN are stored as one pattern, sign 0.

The library is `average.so`, built from the C files beside it (`build.py`). It has a kernel for each
of several instruction sets, and the fastest that this processor runs is taken; PMERGE_KERNEL=base,
v3 (AVX2), v4 (AVX-512) or torch takes another. All give the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

from merge_cli.engine.kernels import build
from merge_cli.engine.kernels.layouts import Layout
from merge_cli.errors import UsageError
from merge_cli.planning.sums import WeightedSum

VARIABLE = "PMERGE_KERNEL"
_ABI = 4
_DTYPES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
_SCALES = {**_DTYPES, "F8_E4M3": 4, "F8_E8M0": 5, "U8": 5}
_CODES = {"E4M3": 0, "E2M1": 1, "I8": 2, "2": 3, "4": 4, "8": 5, "E2M1 transposed": 6}
_ZEROS = {"": 0, "I8": 1, "packed": 2}


class Parts(NamedTuple):
    """A quantized input: addresses of its parts, each of which begins with what row `first_row` of
    the tensor needs.
    """

    codes: int
    scales: int
    zeros: int = 0
    global_scale: int = 0
    first_row: int = 0


class _Coded(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("global_scale", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("matrix_rows", ctypes.c_int64),
        ("block_rows", ctypes.c_int64),
        ("block_columns", ctypes.c_int64),
        ("below", ctypes.c_int64),
        ("beside", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("zero_kind", ctypes.c_int32),
        ("divides", ctypes.c_int32),
    )


class _Input(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("coded", ctypes.POINTER(_Coded)), ("dtype", ctypes.c_int32))


class _Output(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("factors", ctypes.POINTER(ctypes.c_double)),
        ("used", ctypes.POINTER(ctypes.c_uint8)),
        ("divisor", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("sum", ctypes.c_int32),
        ("retry", ctypes.c_int32),
        ("nonfinite", ctypes.c_int32),
    )


class Job:
    """Sums of inputs of given dtypes, ready to be run on any number of chunks. For one thread at a
    time.
    """

    def __init__(
        self, kernel: Kernel, dtypes: Sequence[str | Layout], sums: Sequence[WeightedSum], output_dtypes: Sequence[str]
    ) -> None:
        self.inputs = tuple(sorted({i for each in sums for i in each.inputs}))
        """The positions of the inputs that a sum uses, ascending. No other is read."""
        self._kernel = kernel
        self._inputs = (_Input * len(self.inputs))()
        self._coded = [_describe(record, dtypes[i]) for record, i in zip(self._inputs, self.inputs, strict=True)]
        self._kept: list[object] = []  # arrays that the records below point to
        self._outputs = (_Output * len(sums))(*map(self._output, sums, output_dtypes))

    def _output(self, each: WeightedSum, dtype: str) -> _Output:
        given = dict(zip(each.inputs, each.factors, strict=True))
        assert list(given) == sorted(given) and each.dtype in ("F32", "F64")
        factors = (ctypes.c_double * len(self.inputs))(*(given.get(i, 0.0) for i in self.inputs))
        used = (ctypes.c_uint8 * len(self.inputs))(*(i in given for i in self.inputs))
        self._kept += [factors, used]
        divisor = 1.0 if each.divisor is None else each.divisor
        retry = each.retry and each.dtype == "F32"
        return _Output(None, factors, used, divisor, _DTYPES[dtype], _DTYPES[each.dtype], retry)

    def run(self, inputs: Sequence[int | Parts], outputs: Sequence[int], count: int) -> list[int]:
        """Reduce `count` elements; the outputs, by position, of which a result is NaN or infinite.

        `inputs` are addresses by position in the dtypes given, `outputs` by position in the sums;
        at any alignment. Quantized inputs are whole rows. An output may overlap nothing else.
        """
        for record, coded, i in zip(self._inputs, self._coded, self.inputs, strict=True):
            _point(record, coded, inputs[i])
        for output, address in zip(self._outputs, outputs, strict=True):
            output.data = address
        self._kernel.call(self._inputs, len(self._inputs), self._outputs, len(self._outputs), count)
        return [k for k, output in enumerate(self._outputs) if output.nonfinite]


def _describe(record: _Input, dtype: str | Layout) -> _Coded | None:
    """Fill in all of `record` but the addresses; the part of it that is for quantized inputs."""
    record.dtype = _DTYPES["F32" if isinstance(dtype, Layout) else dtype]
    if not isinstance(dtype, Layout):
        return None
    coded = _Coded(
        columns=dtype.columns,
        row_bytes=dtype.row_bytes,
        matrix_rows=dtype.matrix_rows,
        block_rows=dtype.block_rows,
        block_columns=dtype.block_columns,
        below=dtype.below,
        beside=dtype.beside,
        kind=_CODES[dtype.codes],
        scale_dtype=_SCALES[dtype.scale_dtype],
        zero_kind=_ZEROS[dtype.zeros],
        divides=dtype.global_scale == "divides",
    )
    record.coded = ctypes.pointer(coded)
    return coded


def _point(record: _Input, coded: _Coded | None, given: int | Parts) -> None:
    """Fill in the addresses of an input."""
    assert isinstance(given, Parts) == (coded is not None)
    if coded is not None and isinstance(given, Parts):
        coded.codes, coded.scales, coded.zeros, coded.global_scale, coded.first_row = given
    else:
        record.data = given


class Kernel:
    """One of the library's kernels."""

    def __init__(self, library: ctypes.CDLL, number: int, name: str) -> None:
        self.name = name
        self.call = functools.partial(library.pmerge_average, number)
        self._find_nonfinite = library.pmerge_find_nonfinite

    def prepare(self, dtypes: Sequence[str | Layout], sums: Sequence[WeightedSum], output_dtypes: Sequence[str]) -> Job:
        """The job of making `sums` of inputs of `dtypes` (of a layout where they are quantized),
        each rounded to a dtype.
        """
        return Job(self, dtypes, sums, output_dtypes)

    def find_nonfinite(self, dtype: str | Layout, data: int | Parts, count: int, most: int = 0) -> tuple[int, list[int]]:
        """How many of `count` elements are NaN or infinite, and the positions of the first `most`
        of these.
        """
        record = _Input()
        _point(record, _describe(record, dtype), data)
        positions = (ctypes.c_int64 * most)()
        found = self._find_nonfinite(ctypes.byref(record), count, positions, most)
        return found, positions[: min(found, most)]


def load() -> Kernel | None:
    """The kernel to use here: that of PMERGE_KERNEL, or the fastest that this processor runs. None:
    torch.

    Raises UsageError where PMERGE_KERNEL names one that is not there.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "torch":
        return None
    found = kernels()
    if not wanted:
        return list(found.values())[-1] if found else None
    if wanted not in found:
        raise UsageError(
            f"{VARIABLE} names a kernel that cannot run here: {wanted!r}",
            details=[f"expected  {', '.join([*found, 'torch'])}", *([] if found else [f"found     {why_none()}"])],
            hint=f"unset {VARIABLE}",
        )
    return found[wanted]


def kernels() -> dict[str, Kernel]:
    """The kernels that this processor runs, slowest first, by name. Empty where the library is
    missing or of other sources.
    """
    library = _library()
    if isinstance(library, str):
        return {}
    found: dict[str, Kernel] = {}
    for number in range(64):
        name = library.pmerge_name(number)
        if name is None:
            break
        if library.pmerge_is_supported(number):
            found[name.decode()] = Kernel(library, number, name.decode())
    return found


def why_none() -> str:
    """Why there are no native kernels; empty where there are."""
    library = _library()
    return library if isinstance(library, str) else ""


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why it cannot be used."""
    if not build.LIBRARY.exists():
        return "the native kernel was not built (no C compiler when pmerge was installed)"
    try:
        library = ctypes.CDLL(str(build.LIBRARY))
        abi, sources = library.pmerge_abi(), ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "pmerge_sources")))
    except (OSError, AttributeError, ValueError) as error:
        return f"the native kernel cannot be loaded ({error})"
    if abi != _ABI or sources.decode() != build.digest():
        return "the native kernel was built from other sources than these"
    library.pmerge_name.restype = ctypes.c_char_p
    library.pmerge_average.restype = None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.pmerge_average.argtypes = (ctypes.c_int32, pointer, number, pointer, number, number)
    library.pmerge_find_nonfinite.restype = number
    library.pmerge_find_nonfinite.argtypes = (pointer, number, pointer, number)
    return library
