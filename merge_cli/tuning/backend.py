"""Which device a job runs on. "auto" takes an accelerator only where it is measured to be faster
for this very job.

Storage, cores and bus decide which is faster, not the device: plain sums are cheap anywhere. So
both paths work on the first bytes of the job, as they would in the extent, hashing included, only
that nothing is written. The first pass of each is not counted: it starts CUDA, pins memory, and
reads what then lies in the page cache for both. Where the storage is the limit both are equally
fast, and the CPU is taken. Small jobs are over before a device has been started, and are not
measured.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from merge_cli.engine.budget import Budget
from merge_cli.engine.chunk import Statistics
from merge_cli.engine.device import CPU, Device, choose_device
from merge_cli.engine.sink import NoSink
from merge_cli.engine.stream import stream
from merge_cli.errors import PmergeError
from merge_cli.planning.plan import MergePlan, WorkItem

SMALL_JOB_BYTES = 2_000_000_000
SAMPLE_BYTES = 128_000_000
SAMPLE_S = 0.5
_MARGIN = 1.1  # by which an accelerator must be faster: less is noise


class DeviceChoice(NamedTuple):
    """The device, the memory as it is used there, and what to say about it."""

    device: Device
    budget: Budget
    notes: tuple[str, ...]


class Rate(NamedTuple):
    """Bytes read in some seconds of work."""

    num_bytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """A second."""
        return self.num_bytes / max(self.seconds, 1e-9) / 1e9


def settle(name: str, plan: MergePlan, fit: Callable[[Device], Budget], local_rank: int = 0) -> DeviceChoice:
    """The device for `plan` under the name "auto", "cpu", "cuda" or "cuda:K"; only "auto" is
    decided here.

    `fit` gives the budget on a device. Raises what it raises, and UsageError for a device that is
    not there.
    """
    device = choose_device(name, local_rank)
    if name != "auto" or not device.is_accelerator:
        return DeviceChoice(device, fit(device), ())
    if plan.bytes_to_read < SMALL_JOB_BYTES:
        note = f"device cpu: reads less than {SMALL_JOB_BYTES / 1e9:.0f} GB, for which starting {device.name} takes too long"
        return DeviceChoice(CPU, fit(CPU), (note,))
    on_cpu = fit(CPU)
    try:
        there = fit(device)
        is_faster, note = compare(lambda: sample(plan, on_cpu), lambda: sample(plan, there), device.name)
    except PmergeError as error:  # no room on the device, or it failed, or the data did: the run itself reports that
        return DeviceChoice(CPU, on_cpu, (f"device cpu: {device.name} could not be measured ({error.message})",))
    return DeviceChoice(device, there, (note,)) if is_faster else DeviceChoice(CPU, on_cpu, (note,))


def compare(cpu: Callable[[], Rate], accelerator: Callable[[], Rate], name: str) -> tuple[bool, str]:
    """Whether the accelerator called `name` is clearly faster, and a line that says so. Both paths
    are run twice, in turn.
    """
    for path in (cpu, accelerator):
        path()
    first, second = cpu(), accelerator()
    is_faster = second.gb_per_s > _MARGIN * first.gb_per_s
    taken, rate, other, against = (name, second, "the CPU", first) if is_faster else ("cpu", first, name, second)
    measured = f"measured on the first {min(first.num_bytes, second.num_bytes) / 1e6:.0f} MB"
    return is_faster, f"device {taken}: {rate.gb_per_s:.1f} GB/s against {against.gb_per_s:.1f} GB/s on {other}, {measured}"


def sample(plan: MergePlan, budget: Budget, num_bytes: int = SAMPLE_BYTES, seconds: float = SAMPLE_S) -> Rate:
    """Work on the first bytes of `plan`, until that many bytes were counted or that much time has
    passed. Writes nothing.

    The first round, in which every worker finishes a chunk, is not counted: until then bytes are
    read that nobody has finished. After that they flow, in rounds of one chunk a worker.
    """
    outputs = tuple(range(len(plan.outputs)))
    kinds = ("average", "coded")
    files = [replace(file, extents=tuple(extent for extent in file.extents if extent.kind in kinds)) for file in plan.files]
    allowing = replace(plan, spec=replace(plan.spec, allow_nonfinite=True))
    sink = _Sampling(budget.workers, num_bytes, seconds)
    stream(allowing, [WorkItem.whole(file, outputs) for file in files if file.extents], sink, budget)
    return sink.rate


class _Sampling(NoSink):
    """Hashes the results, as a writer would, and ends the run when enough is measured."""

    def __init__(self, workers: int, num_bytes: int, seconds: float) -> None:
        self.rate = Rate(0, 0.0)
        self._workers = workers
        self._num_bytes = num_bytes
        self._seconds = seconds
        self._first_round: Rate | None = None
        self._is_enough = False
        self._began = time.perf_counter()

    def open(self, item: WorkItem, k: int) -> _Hasher:
        return _Hasher()

    def progress(self, statistics: Statistics) -> bool:
        if not self._is_enough:  # the chunks that other threads finish while they stop do not count
            now = Rate(statistics.bytes_read, time.perf_counter() - self._began)
            if self._first_round is None and statistics.chunks >= self._workers:
                self._first_round = now
            before = self._first_round if self._first_round and statistics.chunks >= 2 * self._workers else Rate(0, 0.0)
            self.rate = Rate(now.num_bytes - before.num_bytes, now.seconds - before.seconds)
            flows = statistics.chunks >= 3 * self._workers and self.rate.num_bytes >= self._num_bytes
            self._is_enough = flows or now.seconds >= self._seconds
        return not self._is_enough


class _Hasher:
    """In place of a file's writer: does the work that costs time there, and leaves nothing behind."""

    is_finished = False

    def write(self, offset: int, data: memoryview) -> bool:
        hashlib.sha256(data)
        return False

    def finish(self) -> str:
        return ""

    def abandon(self) -> None:
        pass
