"""A run works in the staging folder that it has locked, and in no other; only recorded files are
published.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import training_run, write_run

from merge_cli import Rank, average, plan_average, run_average
from merge_cli.errors import OutputError
from merge_cli.output.joint import JointDestination
from merge_cli.output.solo import SoloDestination

KINDS: dict[str, type[SoloDestination] | type[JointDestination]] = {"lone": SoloDestination, "rank": JointDestination}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = write_run(tmp_path / "run", training_run({"w": torch.ones(8), "b": torch.zeros(8)}, 2), shards=2)
    (found[-1] / "old_code.py").write_text("pass")
    return found


def run(paths: list[Path], out: Path, kind: str, **options: Any) -> None:
    rank = Rank(0, 2, source="--rank") if kind == "rank" else None
    run_average(plan_average(paths, out, rank=rank, threads=1, **options))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("moment", ["open", "done", "begin_to_publish"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_folder_was_removed_fails_and_leaves_that_of_another_alone(
    kind: str, moment: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the first run its folder is removed, and a run of another method begins."""
    out, others, before = tmp_path / "out", list[SoloDestination](), dict[str, bytes]()
    method = getattr(KINDS[kind], moment)

    def overtaken(self: Any, *arguments: Any) -> Any:
        if not others:
            plan = plan_average(paths, out, method="wma")
            others.append(SoloDestination(out, plan.merge, plan.run))
            shutil.rmtree(self.folder.path)
            others[0].__enter__()
            before.update(files_of(self.folder.path))
        return method(self, *arguments)

    monkeypatch.setattr(KINDS[kind], moment, overtaken)
    with pytest.raises(OutputError, match="removed or exchanged"):
        run(paths, out, kind)
    assert not out.exists() and files_of(tmp_path / "out.pmerge-partial") == before
    others[0].__exit__()
    assert average(paths, out, method="wma").has_published


def at_the_last_look(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Something happens when all files are there, just before they are published."""
    monkeypatch.setattr("merge_cli.engine.input_checks.check_inputs_unchanged", lambda merge: change())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["evil.py", "deep/er/evil.bin", "model-00001-of-00002.safetensors.partial"])
def test_files_that_are_not_recorded_are_refused_by_name(
    name: str, kind: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant() -> None:
        path = tmp_path / "out.pmerge-partial" / "checkpoint" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import os")

    with monkeypatch.context() as patch:
        at_the_last_look(patch, plant)
        with pytest.raises(OutputError, match="has not made") as refused:
            run(paths, tmp_path / "out", kind)
    assert [*refused.value.details] == [name] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_files_that_have_changed_since_they_were_recorded_are_not_published(
    name: str, kind: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.pmerge-partial" / "checkpoint" / name
    with monkeypatch.context() as patch:
        at_the_last_look(patch, lambda: path.write_bytes(bytes(len(path.read_bytes()))))
        with pytest.raises(OutputError, match="gone or have changed") as refused:
            run(paths, tmp_path / "out", kind)
    assert [*refused.value.details] == [name] and not (tmp_path / "out").exists()
    run(paths, tmp_path / "out", kind)
    assert (tmp_path / "out" / name).read_bytes() == (average(paths, tmp_path / "one").output / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_file_that_is_gone_from_the_base_is_not_published(
    kind: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die() -> None:
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        at_the_last_look(patch, die)
        run(paths, tmp_path / "out", kind)
    assert (tmp_path / "out.pmerge-partial" / "checkpoint" / "old_code.py").exists()
    (paths[-1] / "old_code.py").unlink()
    run(paths, tmp_path / "out", kind)
    assert not (tmp_path / "out" / "old_code.py").exists() and (tmp_path / "out" / "pmerge.json").exists()
