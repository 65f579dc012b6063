"""Boxes out of any chunks: the bytes that slicing the tensor gives, whatever part of them is read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from builders import tensor_bytes
from dcp_checkpoints import grid
from hypothesis import given
from hypothesis import strategies as st

from merge_cli.formats import gathered
from merge_cli.formats.gathered import Box, Gathered, Piece, piece_of
from merge_cli.formats.safetensors import Header
from merge_cli.formats.weight_file import WeightFile


def box_of(
    shape: Sequence[int], cuts: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], dtype: torch.dtype, permuted: bool
) -> tuple[Gathered, dict[str, bytes], bytes]:
    """A box of a tensor that is cut into a grid, the files of the chunks, and the bytes to expect."""
    tensor = torch.arange(1, math.prod(shape) + 1).to(dtype).reshape(tuple(shape))
    files: dict[str, bytes] = {}
    pieces: list[Piece] = []
    for number, (at, n) in enumerate(grid(shape, cuts)):
        part = tensor[tuple(slice(a, a + k) for a, k in zip(at, n, strict=True))].clone(memory_format=torch.contiguous_format)
        stored = part.t().clone(memory_format=torch.contiguous_format) if permuted and part.ndim == 2 else part
        strides = stored.t().stride() if permuted and part.ndim == 2 else part.stride()
        files[f"f{number}"] = b"12345" + tensor_bytes(stored)
        file = cast(WeightFile, f"f{number}")
        piece = piece_of(file, 5, strides, Box(at, n), Box(offsets, sizes), tensor.element_size())
        pieces += [] if piece is None else [piece]
    box = tensor[tuple(slice(a, a + k) for a, k in zip(offsets, sizes, strict=True))]
    expected = tensor_bytes(box.clone(memory_format=torch.contiguous_format))
    made = Gathered(cast(Any, None), "w", Header({}, {}, 0, len(expected), ""), tuple(pieces), tensor.element_size(), "run")
    return made, files, expected


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    dims = draw(st.integers(0, 4))
    shape = [draw(st.integers(1, 7)) for _ in range(dims)]
    cuts = [draw(st.integers(1, n)) for n in shape]
    offsets = [draw(st.integers(0, n - 1)) for n in shape]
    sizes = [draw(st.integers(1, n - at)) for n, at in zip(shape, offsets, strict=True)]
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]))
    return shape, cuts, offsets, sizes, dtype, draw(st.booleans())


@given(cases(), st.data(), st.sampled_from([1, 40, 1 << 20]))
def test_any_bytes_of_any_box(case: tuple[Any, ...], data: st.DataObject, read_bytes: int) -> None:
    made, files, expected = box_of(*case)
    begin = data.draw(st.integers(0, len(expected) - 1))
    end = data.draw(st.integers(begin + 1, len(expected)))
    largest = 0

    def read_into(file: object, offset: int, buffer: memoryview) -> None:
        nonlocal largest
        assert offset >= 5 and offset + len(buffer) <= len(files[str(file)])
        largest = max(largest, len(buffer))
        buffer[:] = files[str(file)][offset : offset + len(buffer)]

    buffer = bytearray(end - begin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "READ_BYTES", read_bytes)
        made.gather(read_into, begin, memoryview(buffer))
    assert buffer == expected[begin:end]
    if not case[-1]:  # rows, or as many of them as fit
        assert largest <= max(read_bytes, max(len(each) - 5 for each in files.values()) if read_bytes > 1 else len(expected) + 8)


def test_rows_that_are_close_are_read_together_and_others_one_by_one() -> None:
    calls: list[tuple[int, int]] = []

    def count(file: object, offset: int, buffer: memoryview) -> None:
        calls.append((offset, len(buffer)))

    made, _, expected = box_of((64, 8), (1, 1), (0, 2), (64, 4), torch.float32, False)
    made.gather(count, 0, memoryview(bytearray(len(expected))))
    assert calls == [(5 + 8, 63 * 32 + 16)]
    calls.clear()
    made, _, expected = box_of((8, 8192), (1, 1), (0, 2), (8, 4), torch.float32, False)
    made.gather(count, 0, memoryview(bytearray(len(expected))))
    assert calls == [(5 + 8 + row * 8192 * 4, 16) for row in range(8)]
    calls.clear()
    made, _, expected = box_of((8, 512), (4, 1), (0, 0), (8, 512), torch.float32, False)  # rows of whole chunks: one read each
    made.gather(count, 0, memoryview(bytearray(len(expected))))
    assert calls == list(itertools.repeat((5, 2 * 512 * 4), 4))
