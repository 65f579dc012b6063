"""A device that can be watched where there is no GPU: torch's "meta", on which tensors have a shape
and no values.

Looking at a value there is an error, as is mixing it with the CPU in most operations; `OneDevice`
makes it one in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OneDevice(TorchDispatchMode):
    """Fails at an operation of which a tensor is on the CPU. Single numbers, and tables while they
    are uploaded, may be.
    """

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        seen = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in seen if tensor.dim()}
        uploads = operation is torch.ops.aten._to_copy.default
        assert uploads or len(devices) < 2, f"{operation} mixes devices"
        return result
