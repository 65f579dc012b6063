"""Which reducers a plan needs, and which of them a chunk is given to.

Modules are imported when their kind of work occurs: some need torch, and importing that takes
seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merge_cli.engine.chunk import Reducer
from merge_cli.engine.kernels.native import load
from merge_cli.engine.reducers.native_quantized import NativeQuantizedReducer, can_decode
from merge_cli.planning.extent import Extent, QuantizedExtent
from merge_cli.planning.plan import GRAM, MergePlan, WorkItem

if TYPE_CHECKING:
    from merge_cli.engine.device import Device

SUMS, COPIES, QUANTIZED, DECODED = "sums", "copies", "quantized", "decoded"


def kind_of(extent: Extent | QuantizedExtent, reducer: str) -> str:
    """The kind of work that an extent is for a work item that names `reducer`."""
    if reducer == GRAM:
        return GRAM
    if isinstance(extent, QuantizedExtent):
        return DECODED if can_decode(extent) else QUANTIZED
    return SUMS if extent.kind == "average" else COPIES


def kinds_in(plan: MergePlan, work: Sequence[WorkItem] | None = None) -> list[str]:
    """The kinds of work in a plan, or in these items of it."""
    items = [WorkItem.whole(file) for file in plan.files] if work is None else work
    return list({kind_of(extent, item.reducer): None for item in items for extent in item.file.extents})


def is_native(kind: str, device: Device) -> bool:
    """Whether a chunk of `kind` is one call into the native kernel, or none."""
    return kind == COPIES or (kind in (SUMS, DECODED) and kernel_of(device) != "torch")


def kernel_of(device: Device) -> str:
    """The name of what does the sums on `device`: one of the native kernels, or "torch"."""
    kernel = None if device.is_accelerator else load()
    return "torch" if kernel is None else kernel.name


def class_of(kind: str, device: Device) -> type[Reducer]:
    """The class of the reducer of `kind` on `device`. All are made by `(plan, size, device,
    reads)`.
    """
    if kind == GRAM:
        from merge_cli.engine.reducers.gram import GramReducer

        return GramReducer
    if kind == COPIES:
        from merge_cli.engine.reducers.copying import CopyingReducer

        return CopyingReducer
    native = load() is not None and not device.is_accelerator
    if kind == DECODED and native:
        return NativeQuantizedReducer
    if kind in (QUANTIZED, DECODED):
        from merge_cli.engine.reducers.quantized import QuantizedReducer

        return QuantizedReducer
    if device.is_accelerator:
        from merge_cli.engine.reducers.fallback import WithCpu

        return WithCpu
    if native:
        from merge_cli.engine.reducers.native import NativeReducer

        return NativeReducer
    from merge_cli.engine.reducers.cpu import CpuReducer

    return CpuReducer
