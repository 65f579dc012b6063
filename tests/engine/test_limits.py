"""A machine that gives less than was asked for: no new thread, no /proc, no memory."""

import threading
from pathlib import Path

import pytest
import torch
from builders import training_run, write_run

from merge_cli import average, verify
from merge_cli.__main__ import _limit_behind
from merge_cli.system.descriptors import descriptors_left

TENSORS = {f"layers.{i}.weight": torch.arange(300.0).bfloat16() for i in range(4)}


def test_without_a_new_thread_the_work_is_done_by_the_one_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", training_run(TENSORS, 3))
    expected = average(run, tmp_path / "one").output

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    found = average(run, tmp_path / "two").output
    for path in expected.glob("*.safetensors"):
        assert (found / path.name).read_bytes() == path.read_bytes()
    assert verify(found, against_inputs=True, sample=None).ok


def test_without_proc_half_of_the_descriptors_count_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> None:
        raise FileNotFoundError("/proc/self/fd")

    monkeypatch.setattr(Path, "iterdir", missing)
    assert descriptors_left() > 0


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("can't start new thread"), "no thread can be started"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "not enough memory"),
        (ImportError("libx.so: cannot open shared object file: Cannot allocate memory"), "not enough memory"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_limit_of_the_machine_is_said(error: Exception, text: str) -> None:
    found = _limit_behind(error)
    assert found is not None and found.message == text and found.hint


def test_other_errors_stay_what_they_are() -> None:
    assert _limit_behind(RuntimeError("dictionary changed size during iteration")) is None
    assert _limit_behind(ImportError("No module named 'x'")) is None
