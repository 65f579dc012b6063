"""Checks of the inputs that need more than headers: integers that must be equal, files that must
not have changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from merge_cli.engine.buffers import page_aligned
from merge_cli.engine.reader import InputFiles, check_unchanged
from merge_cli.errors import ChangedError, MismatchError, first_ten
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.extent import Extent
from merge_cli.planning.plan import MergePlan, WorkItem
from merge_cli.stores.local import DIRECT_BLOCK_BYTES
from merge_cli.stores.store import is_local
from merge_cli.system.writers import find_writer


def check_equal_integers(plan: MergePlan, work: Sequence[WorkItem], inputs: InputFiles, block_bytes: int = 1 << 20) -> None:
    """Raise MismatchError, naming tensors and checkpoints, unless integer tensors are equal in all
    inputs of each output.
    """
    block = page_aligned(block_bytes + 2 * DIRECT_BLOCK_BYTES)
    different: dict[str, set[str]] = {}
    equal = [
        (extent, item) for item in work for extent in item.file.extents if isinstance(extent, Extent) and extent.kind == "equal"
    ]
    for extent, item in equal:
        outputs = [plan.outputs[k] for k in item.outputs]
        used = sorted({i for output in outputs for i in output.inputs})
        dtype = DTYPES[extent.dtype]
        for key, first, end in zip(extent.keys, extent.starts, (*extent.starts[1:], extent.num_elements), strict=True):
            for start in range(dtype.num_bytes(first), dtype.num_bytes(end), block_bytes):
                size = min(block_bytes, dtype.num_bytes(end) - start)
                found = {}
                for i in used:
                    source = extent.sources[i]
                    block.begin = inputs.read_block(source.file, source.offset + start, size, 1, block.memory)
                    found[i] = hashlib.sha256(block.data(size)).digest()
                for base, i in ((output.base, i) for output in outputs for i in output.inputs):
                    if found[i] != found[base]:
                        different.setdefault(key, set()).update(str(extent.sources[j].file.path) for j in (base, i))
    if different:
        lines = [f"`{key}`  in {', '.join(sorted(paths))}" for key, paths in different.items()]
        one = len(different) == 1
        count = "1 tensor that is" if one else f"{len(different)} tensors that are"
        raise MismatchError(
            f"{count} not averaged (integers, activation scales) differ{'s' if one else ''} between the checkpoints",
            details=first_ten(lines),
            hint="take them from the newest checkpoint:  --int-policy newest ; or some of them from the base:  --exclude GLOB",
        )


def check_no_writer(plan: MergePlan) -> None:
    """Raise ChangedError where a process of this host holds an input open or mapped for writing."""
    local = [str(file.path) for checkpoint in plan.inputs for file in checkpoint.files if is_local(str(file.path))]
    writer = find_writer({os.path.realpath(path): path for path in local})
    if writer is not None:
        how = "mapped" if writer.is_mapped else "open"
        raise ChangedError(
            f"a process of this host holds {writer.path} {how} for writing",
            details=[f"found     process {writer.pid}: {writer.command}"],
            hint="nothing was published; wait until it has ended, and run the same command again",
        )


def check_inputs_unchanged(plan: MergePlan) -> None:
    """Raise ChangedError when an input file is not what it was when the plan was made, or may be
    written to.
    """
    check_no_writer(plan)
    for checkpoint in plan.inputs:
        for file in checkpoint.files:
            check_unchanged(file)
