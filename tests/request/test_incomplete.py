"""Checkpoints that are still being written: by which signs they are known, and what becomes of them
in a run folder.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import INDEX, shard_name, write_checkpoint
from command import pmerge
from dcp_checkpoints import save_dcp

from merge_cli.errors import InputError
from merge_cli.features.analyze import plan_analysis
from merge_cli.features.average import plan_average
from merge_cli.features.sweep_plan import plan_sweep
from merge_cli.formats.completeness import incomplete_reason
from merge_cli.request.discovery import find_candidates
from merge_cli.request.spec import Selection
from merge_cli.stores.store import name_of

TENSORS = {name: torch.full((4, 4), 1.0) for name in "abcd"}


def truncate(path: Path, num_bytes: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def half_of(name: str) -> Callable[[Path], None]:
    return lambda folder: truncate(folder / name, (folder / name).stat().st_size // 2)


def without_index_and_last(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / shard_name(3, 3)).unlink()


def zeros(folder: Path) -> None:
    (folder / shard_name(3, 3)).write_bytes(bytes(4096))


BREAK = {
    "a shard of the index is missing": without(shard_name(2, 3)),
    "the index and the last shard are missing": without_index_and_last,
    "a shard ends within its header": lambda folder: truncate(folder / shard_name(3, 3)),
    "a shard ends within its data": half_of(shard_name(3, 3)),
    "a shard is empty": lambda folder: truncate(folder / shard_name(3, 3), 0),
    "a shard is all zeros": zeros,
    "the index ends early": half_of(INDEX),
    "the trainer says so": lambda folder: Path(f"{folder}-unfinished").touch(),
}


def a_run(folder: Path) -> Path:
    for step in (1000, 2000, 3000, 4000):
        write_checkpoint(folder / f"ckpt_{step}", TENSORS, shards=3)
    return folder


def names(paths: Path, incomplete: str = "newest") -> list[str]:
    return [name_of(each.path) for each in find_candidates(paths, Selection(incomplete=incomplete)).candidates]


@pytest.mark.parametrize("sign", BREAK)
def test_the_newest_is_left_out_with_a_warning(sign: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    newest = run / "ckpt_4000"
    assert incomplete_reason(newest) is None
    BREAK[sign](newest)
    assert str(newest) in (incomplete_reason(newest) or "")
    plan = plan_average(run, tmp_path / "out", last=3)
    assert [each.step for each in plan.candidates] == [1000, 2000, 3000]
    (warning,) = [line for line in plan.warnings if "incomplete" in line]
    assert warning.startswith(f"{newest} is left out as incomplete: {incomplete_reason(newest)}")


@pytest.mark.parametrize("sign", [sign for sign in BREAK if sign != "the trainer says so"])
def test_error_and_a_folder_that_is_named_stop_the_run(sign: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    BREAK[sign](run / "ckpt_4000")
    with pytest.raises(InputError, match="ckpt_4000"):
        plan_average(run, tmp_path / "out", incomplete="error")
    for incomplete in ("newest", "skip"):
        with pytest.raises(InputError, match="ckpt_4000"):
            plan_average([run / "ckpt_3000", run / "ckpt_4000"], tmp_path / "out", incomplete=incomplete)


def test_an_older_one_is_an_error_unless_all_are_skipped(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "ckpt_2000" / shard_name(1, 3)).unlink()
    with pytest.raises(InputError, match="ckpt_2000"):
        plan_average(run, tmp_path / "out")
    assert names(run, incomplete="skip") == ["ckpt_1000", "ckpt_3000", "ckpt_4000"]
    (run / "ckpt_4000" / shard_name(1, 3)).unlink()
    assert names(run, incomplete="skip") == ["ckpt_1000", "ckpt_3000"]


def test_another_fault_is_not_taken_for_a_save_under_way(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "ckpt_4000" / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must be a JSON object"):
        plan_average(run, tmp_path / "out")


def test_a_broken_newest_stops_only_runs_that_select_it(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "ckpt_4000" / shard_name(2, 3)).write_bytes(b"\xff" * 4096)
    for incomplete in ("newest", "skip"):
        plan = plan_average(run, tmp_path / "out", to_step=3000, incomplete=incomplete)
        assert [each.step for each in plan.candidates] == [1000, 2000, 3000]
        with pytest.raises(InputError, match="ckpt_4000"):
            plan_average(run, tmp_path / "out", incomplete=incomplete)


def test_sweeps_analyses_and_the_command_leave_it_out_too(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "ckpt_4000" / shard_name(3, 3)).unlink()
    assert plan_sweep([run], tmp_path / "sweep", methods=["sma"]).warnings[0].startswith(f"{run}/ckpt_4000 is left out")
    assert plan_analysis(run).warnings[0].startswith(f"{run}/ckpt_4000 is left out")
    done = pmerge("average", "run", "-o", "out", cwd=tmp_path)
    assert "warning: run/ckpt_4000 is left out as incomplete: 1 of 3 weight files are missing" in done.stderr
    refused = pmerge("average", "run", "-o", "other", "--incomplete", "error", cwd=tmp_path, expect=2)
    assert "--incomplete skip" in refused.stderr


def test_a_run_of_which_one_would_be_left_keeps_its_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "ckpt_1000", TENSORS, shards=3)
    (tmp_path / "run" / "ckpt_1000" / shard_name(3, 3)).unlink()
    with pytest.raises(InputError, match="1 of 3 weight files are missing"):
        plan_average(tmp_path / "run", tmp_path / "out")
    write_checkpoint(tmp_path / "run" / "ckpt_500", TENSORS, shards=3)
    with pytest.raises(InputError, match="1 of 3 weight files are missing"):  # what is left would be a copy
        plan_average(tmp_path / "run", tmp_path / "out")


def test_distributed_checkpoints_have_the_marker_of_their_trainer(tmp_path: Path) -> None:
    for trainer in ("torch", "olmo", "megatron"):
        for step in (0, 1, 2):
            folder = tmp_path / trainer / f"iter_{step:07d}"
            save_dcp(folder / ("model_and_optim" if trainer == "olmo" else ""), {"w": torch.ones(3)})
            assert incomplete_reason(folder) is None
    olmo, megatron = tmp_path / "olmo" / "iter_0000002", tmp_path / "megatron" / "iter_0000002"
    (olmo / "train").mkdir()
    assert "OLMo-core writes last" in (incomplete_reason(olmo) or "")
    (olmo / ".metadata.json").write_text("{}")
    assert incomplete_reason(olmo) is None
    (megatron / "common.pt").touch()
    assert "Megatron writes last" in (incomplete_reason(megatron) or "")
    (megatron / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert incomplete_reason(megatron) is None
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("1")
    assert "newer than iteration 1" in (incomplete_reason(megatron) or "")
    assert names(tmp_path / "megatron") == ["iter_0000000", "iter_0000001"]
    data = next((tmp_path / "torch" / "iter_0000002").glob("*.distcp"))
    truncate(data, 10)
    assert "ends before" in (incomplete_reason(data.parent) or "")
    data.unlink()
    assert "missing" in (incomplete_reason(data.parent) or "")


def without_weights(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "optimizer.pt").touch()


def dcp_without_metadata(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    save_dcp(folder, TENSORS)
    (folder / ".metadata").unlink()


NO_CHECKPOINT_YET = {
    "holds no weights that pmerge reads": without_weights,
    "has no .metadata": dcp_without_metadata,
}


@pytest.mark.parametrize("reason", NO_CHECKPOINT_YET)
def test_a_save_without_weights_or_metadata_is_as_incomplete_as_others(reason: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    newest = run / "ckpt_4000"
    NO_CHECKPOINT_YET[reason](newest)
    for incomplete in ("newest", "skip"):
        for plan in (
            plan_average(run, tmp_path / "out", incomplete=incomplete),
            plan_sweep(run, tmp_path / "sweep", methods=["sma"], incomplete=incomplete),
            plan_analysis(run, incomplete=incomplete),
        ):
            (warning,) = [line for line in plan.warnings if "incomplete" in line]
            assert warning.startswith(f"{newest} is left out as incomplete: ") and reason in warning
            assert not any(str(newest) in note for note in plan.notes)
    with pytest.raises(InputError, match=re.escape(reason)) as refused:
        plan_average(run, tmp_path / "out", incomplete="error")
    assert str(newest) in refused.value.message


def test_of_folders_without_weights_only_error_is_strict(tmp_path: Path) -> None:
    """They may be anything that is named by step (`eval_step_500`), so an older one stops nothing."""
    run = a_run(tmp_path / "run")
    (run / "eval_step_500").mkdir()
    (run / "eval_step_500" / "results.json").touch()
    plan = plan_average(run, tmp_path / "out")
    assert [each.step for each in plan.candidates] == [1000, 2000, 3000, 4000]
    assert any("eval_step_500 is left out as incomplete" in line for line in plan.warnings)
    with pytest.raises(InputError, match="eval_step_500"):
        plan_average(run, tmp_path / "out", incomplete="error")


def test_many_folders_without_weights_are_one_warning(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    for step in range(100, 900, 100):
        (run / f"ckpt_{step}").mkdir()
    (warning,) = [line for line in plan_average(run, tmp_path / "out").warnings if "incomplete" in line]
    assert warning.startswith(f"{run}/ckpt_100, {run}/ckpt_200, {run}/ckpt_300 and 5 more are left out as incomplete")
