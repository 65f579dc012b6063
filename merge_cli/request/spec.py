"""The request: everything that decides the bytes of the output, apart from the inputs themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class MergeSpec:
    """What is asked for: everything that decides the output's bytes, apart from the inputs themselves."""

    method: str
    parameters: Mapping[str, Any]
    dtype: str = "keep"
    accumulate: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    int_policy: str = "error"
    allow_nonfinite: bool = False
    shard_bytes: int | None = None
    requantize: bool = False
