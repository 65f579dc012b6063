"""A destination that exists: the result of the same request is taken as it is, an empty folder is
filled, the rest is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import digests, nasty_run
from safetensors.torch import load_file, save_file

from faults.ground import COMMAND, FILESYSTEMS, Ground
from faults.runs import FaultRuns
from merge_cli import Rank, average, plan_average, run_average, sweep
from merge_cli.errors import OutputError
from merge_cli.features.average import AverageResult
from merge_cli.output.existing import already_there
from merge_cli.output.lock import Lock

SHARD = "model-00002-of-00003.safetensors"


def by_one(paths: list[Path], out: Path, **options: Any) -> AverageResult:
    return average(paths, out, **options)


def by_a_rank(paths: list[Path], out: Path, **options: Any) -> AverageResult:
    return run_average(plan_average(paths, out, rank=Rank(1, 2, source="--rank"), **options))


@pytest.fixture(params=[by_one, by_a_rank], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[..., AverageResult]:
    return request.param  # type: ignore[no-any-return]


def damage(path: Path) -> None:
    """Flip the last byte, and leave size and modification time as they were."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_same_request_has_nothing_to_do(make: Callable[..., AverageResult], tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="sharded")
    assert make(paths, tmp_path / "out", method="ema").has_published
    before = (tmp_path / "out" / "pmerge.json").stat()
    for options in ({}, {"overwrite": True}, {"restart": True}, {"verify_existing": True}):
        again = make(paths, tmp_path / "out", method="ema", **options)
        assert again.already_published and not again.has_published and not again.statistics.bytes_read
        assert again.reused == 3
    assert (tmp_path / "out" / "pmerge.json").stat() == before
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_corrupt_result_is_noticed_where_that_is_asked_for_and_made_again_by_overwrite(
    make: Callable[..., AverageResult], tmp_path: Path
) -> None:
    paths = nasty_run(tmp_path / "run", layout="sharded")
    make(paths, tmp_path / "out")
    good = digests(tmp_path / "out")
    damage(tmp_path / "out" / SHARD)
    assert make(paths, tmp_path / "out").already_published
    with pytest.raises(OutputError, match=f"{SHARD} is not as it was written") as refused:
        make(paths, tmp_path / "out", verify_existing=True)
    assert "--overwrite" in refused.value.hint
    assert make(paths, tmp_path / "out", overwrite=True).has_published
    assert digests(tmp_path / "out") == good


def twins(folder: Path) -> list[Path]:
    """Two runs whose files differ in their weights alone, as out of a reproducible archive."""
    for name, value in (("A", 0.0), ("B", 1000.0)):
        for step in (1, 2):
            file = folder / name / f"ckpt_{step}" / "model.safetensors"
            file.parent.mkdir(parents=True)
            save_file({"w": torch.full((4,), value + step)}, str(file))
            os.utime(file, ns=(0, 0))
    return [folder / "A", folder / "B"]


def test_the_result_of_another_run_is_another_one(make: Callable[..., AverageResult], tmp_path: Path) -> None:
    first, second = twins(tmp_path)
    make([first], tmp_path / "out")
    with pytest.raises(OutputError, match="is not what is asked for") as refused:
        make([second], tmp_path / "out")
    assert str(second / "ckpt_1") in "".join(refused.value.details)
    assert make([second], tmp_path / "out", overwrite=True).has_published
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [1001.5] * 4


def test_a_run_that_moved_is_the_same(make: Callable[..., AverageResult], tmp_path: Path) -> None:
    first, _ = twins(tmp_path)
    make([first], tmp_path / "out")
    first.rename(tmp_path / "moved")
    assert make([tmp_path / "moved"], tmp_path / "out").already_published
    first.symlink_to(tmp_path / "moved")
    assert make([first], tmp_path / "out").already_published


def test_a_link_that_leads_to_another_file_is_another_input(make: Callable[..., AverageResult], tmp_path: Path) -> None:
    blobs = [run / f"ckpt_{step}" / "model.safetensors" for run in twins(tmp_path) for step in (1, 2)]
    links = [tmp_path / f"model_step_{step}.safetensors" for step in (1, 2)]
    for link, blob in zip(links, blobs, strict=False):
        link.symlink_to(blob)
    make(links, tmp_path / "out")
    assert make(links, tmp_path / "out").already_published
    links[1].unlink()
    links[1].symlink_to(blobs[3])
    with pytest.raises(OutputError, match="is not what is asked for"):
        make(links, tmp_path / "out")


def test_another_request_says_how_it_differs(make: Callable[..., AverageResult], tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", 4)
    make(paths, tmp_path / "out", last=3)
    with pytest.raises(OutputError, match="exists already") as refused:
        make(paths, tmp_path / "out", method="ema", alpha=0.5, dtype="fp32")
    assert refused.value.details == (
        "found     sma over steps 200 to 400 (3 checkpoints)",
        "expected  ema alpha=0.5 over steps 100 to 400 (4 checkpoints), as fp32",
    )
    with pytest.raises(OutputError) as refused:
        make(paths, tmp_path / "out", last=3, exclude=["*norm*"])
    assert refused.value.details[2:] == ('exclude  was [], is ["*norm*"]',)
    os.utime(paths[3] / "model.safetensors" if (paths[3] / "model.safetensors").exists() else next(paths[3].glob("*.safetensors")))
    with pytest.raises(OutputError) as refused:
        make(paths, tmp_path / "out", last=3)
    assert "version  was " in refused.value.details[2]


def test_a_result_that_lacks_a_file_is_another_one(make: Callable[..., AverageResult], tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run", layout="sharded")
    make(paths, tmp_path / "out")
    (tmp_path / "out" / SHARD).unlink()
    with pytest.raises(OutputError, match="exists already") as refused:
        make(paths, tmp_path / "out")
    assert "pmerge verify" in refused.value.details[2]
    (tmp_path / "out" / "pmerge.json").write_text("[" * 100_000)
    assert already_there(tmp_path / "out", plan_average(paths, tmp_path / "new").merge).details == ()


def test_an_empty_folder_is_a_fine_destination(make: Callable[..., AverageResult], tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    expected = digests(by_one(paths, tmp_path / "one").output)
    (tmp_path / "out").mkdir()
    assert make(paths, tmp_path / "out").has_published
    assert digests(tmp_path / "out") == expected
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="exists already"):
        make(paths, tmp_path / "link")
    (tmp_path / "sweep" / "sma-last2").mkdir(parents=True)
    sweep(paths, tmp_path / "sweep", methods=["sma"], last=[2])


def test_a_mount_point_cannot_be_replaced(
    make: Callable[..., AverageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = nasty_run(tmp_path / "run")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="is a mount point") as refused:
        make(paths, tmp_path / "out")
    assert f"-o {tmp_path / 'out' / 'merged'}" in refused.value.hint


def test_unfinished_work_of_another_request_beside_the_result_is_kept(make: Callable[..., AverageResult], tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    make(paths, tmp_path / "out")

    def stop(*_: object) -> None:
        raise OutputError("stopped")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputError, match="stopped"):
        patch.setattr("merge_cli.output.publish._give_final_name", stop)
        make(paths, tmp_path / "out", method="wma", overwrite=True)
    staging = tmp_path / "out.pmerge-partial"
    records = {path: path.read_bytes() for path in (staging / "done").iterdir()}
    assert make(paths, tmp_path / "out").already_published
    assert records and {path: path.read_bytes() for path in (staging / "done").iterdir()} == records
    with pytest.raises(OutputError, match="another request") as refused:
        make(paths, tmp_path / "out", method="ema", overwrite=True)
    assert any(line.startswith("begun by  pmerge") for line in refused.value.details)
    assert make(paths, tmp_path / "out", method="wma", overwrite=True).has_published


def test_a_run_that_comes_while_the_result_is_published_finds_it(tmp_path: Path) -> None:
    """Two commands at once: the second one planned before the first one published."""
    paths = nasty_run(tmp_path / "run")
    second = plan_average(paths, tmp_path / "out")
    by_one(paths, tmp_path / "out")
    assert run_average(second).already_published
    other = plan_average(paths, tmp_path / "out", method="wma", overwrite=True)
    with Lock(tmp_path / "out.pmerge-partial" / "lock", tmp_path / "out"), pytest.raises(OutputError, match="another run"):
        run_average(other)


def test_a_pipe_in_the_place_of_a_record_hangs_nothing(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "pmerge.json")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            by_one(paths, tmp_path / "out", overwrite=overwrite)


# --- killed: real processes, forked from a server that has imported torch


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    if not shutil.which("gcc"):
        pytest.skip("faults are injected by a library that gcc compiles")
    with tempfile.TemporaryDirectory(prefix="pmerge-test-") as folder, FaultRuns() as runs:
        yield Ground(Path(folder) / "ground", runs)


@pytest.mark.parametrize("filesystem", ["Linux", "no renameat2 (NFS, Lustre)", "no folder rename"])
def test_killed_while_it_fills_an_empty_folder(filesystem: str, ground: Ground) -> None:
    for k in range(60, 1000, 23):
        ground.reset()
        ground.merged.mkdir()
        ended = ground.runs.run(COMMAND, ground.folder, fault=f"any:{k}:kill:0:/out", refuse=FILESYSTEMS[filesystem])
        if not ended.fired:
            assert ended.code == 0, ended.stderr
            break
        assert ground.continued(FILESYSTEMS[filesystem]) == ""


def test_a_folder_that_is_filled_during_the_run_is_not_replaced(ground: Ground) -> None:
    ground.reset()
    ground.merged.mkdir()
    fault = "pwrite:5:signal:19:/out"
    thesis = ground.merged / "thesis.txt"
    ended = ground.runs.run(COMMAND, ground.folder, fault=fault, when_stopped=lambda: thesis.write_text("dear") and None)
    assert ended.code == 1 and "exists already" in ended.stderr
    assert [path.name for path in ground.merged.iterdir()] == ["thesis.txt"]
