"""A rank that waits for a lock says so, once."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from builders import training_run, write_run

from merge_cli import Rank, plan_average, run_average
from merge_cli.output import lock as locks
from merge_cli.output.lock import Lock


def test_a_rank_that_waits_says_so_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_SILENT_S", 0.1)
    paths = write_run(tmp_path / "run", training_run({"w": torch.ones(8)}, 2))
    plan = plan_average(paths, tmp_path / "out", rank=Rank(1, 2, source="--rank"))
    held = Lock(tmp_path / "out.pmerge-partial" / "control", tmp_path / "out")
    held.acquire()
    release = threading.Timer(1.5, held.release)
    release.start()
    with caplog.at_level(logging.WARNING):
        assert run_average(plan).has_published
    release.join()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("rank 1 of 2 waits for another rank, up to 300 s") and "pid" in line
