"""The promises of `Queues`, which an accelerator's reducers rest on: one set of tests, run on a
fake device that reorders all that it may, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from fake_device import FakeDevice, World
from torch import Tensor

from merge_cli.engine.device import Device
from merge_cli.engine.queues import COMPUTE, DOWNLOAD, QUEUES, UPLOAD, Queues

COUNT = 1 << 16
DEVICES: dict[str, Callable[[], Device]] = {
    **{f"fake-{seed}": partial(FakeDevice, "fake", World(seed=seed, capacity=1 << 30)) for seed in range(5)},
    "cuda": partial(Device, "cuda:0"),
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu if name == "cuda" else ()) for name in DEVICES])
def queues(request: pytest.FixtureRequest) -> Queues:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return DEVICES[request.param]().queues()


def numbers(queues: Queues) -> Tensor:
    return queues.memory(COUNT * 4).view(torch.int32)


def test_memory_has_the_size_asked_for(queues: Queues) -> None:
    memory, buffer = queues.memory(1000), queues.host_buffer(5000)
    assert (memory.dtype, memory.shape) == (torch.uint8, (1000,))
    assert len(buffer.memory) >= 5000 and buffer.begin == 0


@pytest.mark.parametrize("queue", QUEUES)
def test_operations_of_a_queue_run_in_their_order(queues: Queues, queue: str) -> None:
    values = numbers(queues)
    queues.submit(queue, lambda: values.zero_())
    for factor in range(2, 7):  # multiplying and adding do not commute
        queues.submit(queue, lambda: values.add_(1))
        last = queues.submit(queue, partial(values.mul_, factor))
    queues.wait(last)
    expected = 0
    for factor in range(2, 7):
        expected = (expected + 1) * factor
    assert values.eq(expected).all()


def test_an_operation_runs_after_those_of_other_queues_that_it_names(queues: Queues) -> None:
    source = torch.arange(COUNT, dtype=torch.int32)
    given, result = numbers(queues), numbers(queues)
    back = queues.host_buffer(COUNT * 4)
    uploaded = queues.submit(UPLOAD, lambda: given.copy_(source))
    added = queues.submit(COMPUTE, lambda: torch.add(given, 1, out=result), [uploaded])
    downloaded = queues.submit(DOWNLOAD, lambda: back.tensor[: COUNT * 4].view(torch.int32).copy_(result), [added])
    again = queues.submit(UPLOAD, lambda: given.zero_(), [added])  # a stage is overwritten only after it was added
    queues.wait(downloaded)
    assert torch.equal(back.tensor[: COUNT * 4].view(torch.int32), source + 1)
    queues.wait(again)
    assert given.eq(0).all()


def test_waiting_twice_and_for_what_is_long_done_returns(queues: Queues) -> None:
    values = numbers(queues)
    first = queues.submit(COMPUTE, lambda: values.zero_())
    second = queues.submit(COMPUTE, lambda: values.add_(1), [first, first])
    queues.wait(second)
    queues.wait(first)
    queues.wait(second)
    assert values.eq(1).all()


def test_waiting_for_all_leaves_nothing_in_any_queue(queues: Queues) -> None:
    values = {queue: numbers(queues) for queue in QUEUES}
    for queue, each in values.items():
        for value in range(8):
            queues.submit(queue, partial(each.fill_, value))
    queues.wait_for_all()
    assert all(each.eq(7).all() for each in values.values())
    queues.wait_for_all()


def test_too_much_memory_is_an_out_of_memory_error(queues: Queues) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        queues.memory(1 << 40)
    assert queues.memory(16).numel() == 16
