"""A rank that waits for a lock says so, once, and waits for as long as the holder is alive."""

import logging
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from builders import training_run, write_run

from merge_cli import Rank, plan_average, run_average
from merge_cli.engine.input_checks import check_inputs_unchanged
from merge_cli.errors import OutputError
from merge_cli.output import lock as locks
from merge_cli.output.lock import Lock
from merge_cli.planning.plan import MergePlan


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
    assert line.startswith("rank 1 of 2 waits for another rank, until that is through") and "pid" in line


@pytest.mark.parametrize("beats", [True, False])
def test_a_rank_waits_for_a_slow_publisher_as_long_as_that_gives_signs_of_life(
    beats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hashes and syncs for hours beats, one that was stopped does not."""
    monkeypatch.setattr(locks, "_BEAT_EVERY_S", 0.1 if beats else 3600.0)
    monkeypatch.setattr("merge_cli.output.joint._CONTROL_WAIT_S", 1.0)
    paths = write_run(tmp_path / "run", training_run({"w": torch.ones(8)}, 2))
    plans = [plan_average(paths, tmp_path / "out", rank=Rank(number, 2, source="--rank"), threads=1) for number in range(2)]
    check, ended, waited = check_inputs_unchanged, list[bool](), list[float]()

    def wait() -> None:
        began = time.monotonic()
        with suppress(OutputError):
            waited.append(0.0)
            assert run_average(plans[1]).already_published
            waited[0] = time.monotonic() - began

    other = threading.Thread(target=wait)

    def slowly(merge: MergePlan) -> None:
        monkeypatch.setattr("merge_cli.engine.input_checks.check_inputs_unchanged", check)
        other.start()
        time.sleep(3.0)
        ended.append(not other.is_alive())
        check(merge)

    monkeypatch.setattr("merge_cli.engine.input_checks.check_inputs_unchanged", slowly)
    assert run_average(plans[0]).has_published
    other.join(20)
    assert ended == [not beats] and (waited[0] >= 3.0 if beats else waited == [0.0])
    assert not (tmp_path / "out.pmerge-partial").exists()
