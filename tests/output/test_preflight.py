"""What would stop a run at its destination is found before any weight is read."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import training_run, write_run

from merge_cli import plan_average
from merge_cli.errors import UsageError
from merge_cli.output.preflight import check_destinations
from merge_cli.request.spec import RunConfig


def test_space_is_counted_for_one_more_file_of_each_further_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a lock fails, a rank may write a file that another one writes too."""
    plan = plan_average(
        write_run(tmp_path / "run", training_run({name: torch.ones(4000) for name in "abc"}, 2), shards=3), tmp_path / "out"
    )
    sizes = [file.file_bytes for file in plan.merge.files]
    assert len(sizes) == 3
    for ranks, need in ((1, sum(sizes)), (2, sum(sizes) + max(sizes)), (9, 2 * sum(sizes))):
        for free, enough in ((need, True), (need - 1, False)):
            status = SimpleNamespace(f_bavail=free, f_frsize=1, f_favail=0, f_files=0, f_flag=0)
            monkeypatch.setattr(os, "statvfs", lambda path, status=status: status)
            assert (check_destinations({plan.output: plan.merge}, RunConfig(), ranks) == []) is enough, (ranks, free)


def test_an_owner_to_trust_that_nobody_knows_is_an_error_of_usage(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", training_run({"w": torch.ones(4)}, 2))
    plan = plan_average(paths, tmp_path / "out", trust_owner="nobody-of-this-name")
    assert isinstance(plan.findings[0], UsageError) and "nobody-of-this-name" in plan.findings[0].message
    assert not plan_average(paths, tmp_path / "out", trust_owner="root").findings
    assert not plan_average(paths, tmp_path / "out", trust_owner="12345").findings
