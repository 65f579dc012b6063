"""The device, memory and kind of reads for a planned merge, from what RunConfig leaves open. May
time some reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from merge_cli.engine.budget import Budget, fit_memory
from merge_cli.engine.device import Device
from merge_cli.engine.kernels.native import VARIABLE, why_none
from merge_cli.engine.reducers.kinds import kernel_of
from merge_cli.engine.storage import requests_at_once, requests_for
from merge_cli.planning.plan import MergePlan
from merge_cli.ranks.launcher import WORKER, Rank
from merge_cli.request.spec import RunConfig
from merge_cli.tuning.backend import settle
from merge_cli.tuning.direct import choose_direct


class Tuning(NamedTuple):
    """The device and the kernel on it, the reasons for them, and the use of memory there for this
    merge or others of its inputs.
    """

    device: Device
    kernel: str
    notes: tuple[str, ...]
    fit: Callable[[MergePlan], Budget]


def tune(merge: MergePlan, run: RunConfig, rank: Rank | None = None) -> Tuning:
    """Settle how `rank` carries out `merge`. Raises UsageError for a missing device or too little
    memory.
    """
    rank = rank or Rank()
    direct = choose_direct(merge, run.direct)
    at_once = requests_at_once(merge)

    def fit(where: Device, plan: MergePlan) -> Budget:
        return fit_memory(
            plan,
            run.memory,
            where,
            threads=run.threads or (at_once if at_once > 1 else None),
            cores=rank.cores(len(os.sched_getaffinity(0))),
            device_memory=run.device_memory,
            chunk_bytes=run.chunk_size,
            direct=direct.use,
            processes=rank.world_size if rank.source == WORKER else 1,
        )

    device, budget, reasons = settle(run.device, merge, partial(fit, plan=merge), rank.local_rank)
    requests = requests_for(merge, budget.size.num_bytes)
    far = f"reading takes about {requests:,} requests, {budget.workers} at once" if requests else ""
    kernel = kernel_of(device)
    return Tuning(device, kernel, (*filter(None, [direct.note, far, _slower(device, kernel)]), *reasons), partial(fit, device))


def _slower(device: Device, kernel: str) -> str:
    """A note where torch does the sums on the CPU though nobody chose it."""
    is_chosen = device.is_accelerator or kernel != "torch" or os.environ.get(VARIABLE)
    return "" if is_chosen else f"{why_none()}: torch does the sums, with the same bytes, some times slower"
