"""A rank that waits for a lock says so, once, and waits for as long as the holder is alive."""

import errno
import logging
import os
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


def test_a_folder_that_another_host_removes_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client then has a stale handle of it."""
    stale = [OSError(errno.ESTALE, os.strerror(errno.ESTALE))] * 3

    def check(*arguments: object, **options: object) -> None:
        if stale:
            raise stale.pop()

    monkeypatch.setattr(locks, "check_made_by_us", check)
    with Lock(tmp_path / "out.pmerge-partial" / "lock", tmp_path / "out") as lock:
        assert lock.is_current and not stale
    stale.extend([OSError(errno.ESTALE, os.strerror(errno.ESTALE))] * 1000)
    with pytest.raises(OutputError, match=os.strerror(errno.ESTALE)):
        Lock(tmp_path / "out.pmerge-partial" / "lock", tmp_path / "out").acquire()


@pytest.mark.parametrize("can_rename", [True, False])
def test_a_run_killed_as_it_makes_its_owner_file_leaves_none_that_is_empty(
    can_rename: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without flock."""

    class Killed(BaseException):
        pass

    def no_flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def no_rename(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    def killed(*_: object) -> int:
        raise Killed

    staging = tmp_path / "out.pmerge-partial"
    monkeypatch.setattr("fcntl.flock", no_flock)
    if not can_rename:
        monkeypatch.setattr(locks, "rename_in_one_step", no_rename)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "write", killed)
        Lock(staging / "lock", tmp_path / "out").acquire()
    assert not (staging / "lock.owner").exists()
    with Lock(staging / "lock", tmp_path / "out"), pytest.raises(OutputError, match="another run"):
        Lock(staging / "lock", tmp_path / "out").acquire()
    assert [path.name[:7] for path in staging.iterdir()].count(".probe-") == 1, "that of the killed one"
