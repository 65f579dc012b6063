"""A run works in the staging folder that it has locked, and in no other; only recorded files are
published.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import training_run, write_run

from merge_cli import Rank, average, plan_average, run_average
from merge_cli.engine.writer import ShardWriter
from merge_cli.errors import OutputError
from merge_cli.output import publish as publishing
from merge_cli.output.destination import Claim
from merge_cli.output.folder import StagingFolder, with_fingerprints
from merge_cli.output.joint import JointDestination
from merge_cli.output.manifest import seal
from merge_cli.output.solo import SoloDestination
from merge_cli.planning.plan import WorkItem
from merge_cli.system.durable import exchange
from merge_cli.system.held import HeldFolder

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


def old_result(paths: list[Path], out: Path) -> dict[str, bytes]:
    average(paths, out, method="wma")
    return files_of(out)


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["eval_results.json", "evals/deep/results.json", "model-00003.safetensors"])
def test_files_that_others_put_into_the_old_result_during_the_run_stop_it(
    name: str, kind: str, can_exchange: bool, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come before the last look, or between that and the exchange."""
    out = tmp_path / "out"
    before = old_result(paths, out)
    path = out / name

    def put() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("hours of work")

    def put_and_exchange(one: tuple[int, str], other: tuple[int, str]) -> bool:
        put()
        return exchange(one, other) if can_exchange else False

    with monkeypatch.context() as patch:
        at_the_last_look(patch, put)
        with pytest.raises(OutputError, match="--overwrite would remove them") as refused:
            run(paths, out, kind, overwrite=True)
    assert [*refused.value.details] == [name] and files_of(out) == {**before, name: b"hours of work"}
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("merge_cli.output.publish.exchange", put_and_exchange)
        with pytest.raises(OutputError, match="--overwrite would remove them"):
            run(paths, out, kind, overwrite=True)
    path.unlink()
    assert {each: data for each, data in files_of(out).items() if data} == before
    run(paths, out, kind, overwrite=True)
    assert '"method": "sma"' in (out / "pmerge.json").read_text() and [*tmp_path.glob("out?*")] == []


@pytest.mark.parametrize("before", ["nothing", "old result", "old result, no exchange"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_result_whose_name_cannot_be_made_durable_is_taken_back(
    kind: str, before: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second fsync that succeeds would mean nothing: the next run has to rename anew."""
    out, sync, failed = tmp_path / "out", HeldFolder.sync, list[dict[str, bytes]]()
    old = {} if before == "nothing" else old_result(paths, out)

    def failing(self: HeldFolder, name: str = ".") -> None:
        if self.path == tmp_path:
            failed.append(files_of(out))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(self, name)

    if before.endswith("no exchange"):
        monkeypatch.setattr("merge_cli.output.publish.exchange", lambda one, other: False)
    with monkeypatch.context() as patch:
        patch.setattr(HeldFolder, "sync", failing)
        with pytest.raises(OutputError, match=r"cannot make the name .* durable"):
            run(paths, out, kind, overwrite=bool(old))
    assert b'"method": "sma"' in failed[0]["pmerge.json"], "it had its final name"
    assert files_of(out) == old and out.exists() == bool(old)
    run(paths, out, kind, overwrite=bool(old))
    assert '"method": "sma"' in (out / "pmerge.json").read_text() and [*tmp_path.glob("out?*")] == []


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_old_result_that_was_moved_aside_is_put_back(
    kind: str, killed: bool, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or where the run was killed between the two renames by the next one, which then
    fails too.
    """

    class Died(BaseException):
        pass

    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def die(*arguments: Any) -> None:
        raise Died

    out, rename = tmp_path / "out", publishing._rename
    old = old_result(paths, out)
    monkeypatch.setattr("merge_cli.output.publish.exchange", lambda one, other: False)
    with monkeypatch.context() as patch, pytest.raises(Died if killed else OutputError):
        patch.setattr(HeldFolder, "rename_to_new", die if killed else fail)
        if killed:  # it can do no more
            patch.setattr(publishing, "_rename", lambda *names: rename(*names) if names[2] else die())
        run(paths, out, kind, overwrite=True)
    assert out.exists() is not killed and files_of(tmp_path / "out.pmerge-partial" / "replaced" if killed else out) == old
    with monkeypatch.context() as patch, pytest.raises(Died):
        at_the_last_look(patch, die)
        run(paths, out, kind, overwrite=True)
    assert files_of(out) == old
    run(paths, out, kind, overwrite=True)
    assert '"method": "sma"' in (out / "pmerge.json").read_text() and [*tmp_path.glob("out?*")] == []


@pytest.mark.parametrize("killed", [False, True])
def test_files_that_come_after_the_exchange_are_kept_and_named(
    killed: bool, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who works in the old folder; also where the run is killed before the old result
    is removed.
    """
    out = tmp_path / "out"
    old_result(paths, out)
    remove_old = publishing._remove_old

    def put(folder: StagingFolder) -> list[Path]:
        (folder.checkpoint / "eval_results.json").write_text("hours of work")
        if killed:
            raise KeyboardInterrupt
        return remove_old(folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt if killed else OutputError) as ended:
        patch.setattr(publishing, "_remove_old", put)
        run(paths, out, "lone", overwrite=True)
    if killed:
        with pytest.raises(OutputError, match="published") as ended:
            run(paths, out, "lone", overwrite=True)
    assert isinstance(ended.value, OutputError) and str(tmp_path / "out.kept-1") in ended.value.details[0]
    assert files_of(tmp_path / "out.kept-1") == {"eval_results.json": b"hours of work"}
    run(paths, out, "lone", overwrite=True)
    assert '"method": "sma"' in (out / "pmerge.json").read_text() and not (tmp_path / "out.pmerge-partial").exists()


@pytest.mark.parametrize(
    "state", [None, 1.5, "x", [], {}, {"inputs": 5}, {"inputs": {"p": 1.5}}, {"inputs": {"p": {"f": 2}}}], ids=str
)
def test_a_state_of_another_shape_counts_as_none(state: object) -> None:
    assert with_fingerprints(state) == {}


@pytest.mark.parametrize("name", ["../victim", "deep/../../victim", "/victim", ".", ""])
@pytest.mark.parametrize("key", ["files", "side_files"])
def test_overwrite_removes_nothing_outside_whatever_the_old_record_lists(
    key: str, name: str, paths: list[Path], tmp_path: Path
) -> None:
    """The seal is a checksum, which anybody can renew."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("mine")
    out = average(paths, tmp_path / "out").output
    record = json.loads((out / "pmerge.json").read_bytes())
    del record["sha256"]
    record[key][name] = {"bytes": 1, "sha256": "0" * 64}
    (out / "pmerge.json").write_bytes(seal(record))
    before = files_of(tmp_path)
    with pytest.raises(OutputError, match="did not write"):
        average(paths, out, method="wma", overwrite=True)
    assert {name: data for name, data in files_of(tmp_path).items() if ".pmerge-partial" not in name} == before


def test_a_folder_that_cannot_be_listed_stops_the_publishing(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (paths[-1] / "chat_templates").mkdir()
    (paths[-1] / "chat_templates" / "tool.jinja").write_text("{{ tool }}")
    opening = os.open

    def failing(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if path == "chat_templates" and not flags & os.O_DIRECTORY:  # as os.fwalk opens it
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opening(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        at_the_last_look(patch, lambda: patch.setattr(os, "open", failing))
        with pytest.raises(OutputError, match="Input/output error"):
            average(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (average(paths, tmp_path / "out").output / "chat_templates" / "tool.jinja").exists()


def test_a_run_that_died_while_it_moved_files_keeps_those_that_others_put_beside_them(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def no_folder_rename(*arguments: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    rename, moved = HeldFolder.rename, list[str]()

    def dying(self: HeldFolder, name: str, new: str, **options: Any) -> None:
        if options.get("make_after") == 0:
            moved.append(new)
            if len(moved) == 3:
                raise Died
        rename(self, name, new, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(HeldFolder, "rename_to_new", no_folder_rename)
        patch.setattr(HeldFolder, "rename", dying)
        with pytest.raises(Died):
            average(paths, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="did not write") as refused:
        average(paths, out)
    assert [*refused.value.details] == ["notes.txt"] and (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    assert average(paths, out).has_published


def test_a_rank_that_looks_while_another_cleans_up_finds_the_result(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = [Rank(number, 2, source="--rank") for number in range(2)]
    plans = [plan_average(paths, tmp_path / "out", rank=rank, threads=1) for rank in ranks]
    remove, missing = StagingFolder.remove_content, list[list[str]]()
    with JointDestination(tmp_path / "out", plans[1].merge, plans[1].run, ranks[1]) as other:

        def looking(folder: StagingFolder) -> None:
            for part in ("done", "claims"):
                folder.held.remove(part)
            missing.append(other.missing())
            remove(folder)

        monkeypatch.setattr(StagingFolder, "remove_content", looking)
        assert run_average(plans[0]).has_published
        assert missing == [[]] and other.is_published


@pytest.mark.parametrize("part", ["claims", "partial", "ranks", "done"])
def test_a_rank_that_works_in_a_folder_while_another_removes_it_leaves_nothing(
    part: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes a file in each part of the folder between its listing and its removal."""
    ranks = [Rank(number, 2, source="--rank") for number in range(2)]
    plans = [plan_average(paths, tmp_path / "out", rank=rank, threads=1) for rank in ranks]
    rmdir, late = os.rmdir, list[Claim]()
    items = [WorkItem.whole(file) for file in plans[1].merge.files]
    with JointDestination(tmp_path / "out", plans[1].merge, plans[1].run, ranks[1]) as other:

        def overtaken(name: Any, **options: Any) -> None:
            if name == part and not late:
                late.extend(other.claim(item) for item in items)
                (other.folder.path / part / "late").write_text("")
            rmdir(name, **options)

        monkeypatch.setattr(os, "rmdir", overtaken)
        assert run_average(plans[0]).has_published
        assert late == [Claim.RECORDED, Claim.RECORDED]
        assert other.missing() == [] and other.is_published and not other.begin_to_publish()
    assert [*tmp_path.glob("out?*")] == []


@pytest.mark.parametrize("step", ["state.json", "done", "claims", "publish.json"])
def test_no_other_run_begins_in_a_folder_that_a_rank_cleans_away(
    step: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = plan_average(paths, tmp_path / "out", method="wma", overwrite=True)
    remove, refused = HeldFolder.remove, list[str]()

    def overtaken(self: HeldFolder, name: str) -> None:
        remove(self, name)
        if name == step and not refused and (tmp_path / "out").exists():
            with pytest.raises(OutputError, match="another run is writing") as error:
                run_average(other)
            refused.append(error.value.message)

    with monkeypatch.context() as patch:
        patch.setattr(HeldFolder, "remove", overtaken)
        run(paths, tmp_path / "out", "rank")
    assert refused and '"method": "sma"' in (tmp_path / "out" / "pmerge.json").read_text()
    assert run_average(other).has_published and [*tmp_path.glob("out?*")] == []


def test_a_rank_that_starts_in_the_last_moment_of_a_folder_leaves_nothing(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmdir, late = Path.rmdir, list[bool]()

    def overtaken(path: Path) -> None:
        if path.name == "out.pmerge-partial" and not late:
            late.append(False)
            plan = plan_average(paths, tmp_path / "out", rank=Rank(1, 2, source="--rank"), threads=1)
            late[0] = run_average(plan).already_published
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", overtaken)
    run(paths, tmp_path / "out", "rank")
    assert late == [True] and [*tmp_path.glob("out?*")] == []


def test_a_rank_that_cannot_write_any_more_finds_that_another_has_published(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that was cut off until its lease had expired: its open files are gone on the server."""
    plans = [plan_average(paths, tmp_path / "out", rank=Rank(number, 2, source="--rank"), threads=1) for number in range(2)]
    write, published = ShardWriter.write, list[bool]()

    def failing(self: ShardWriter, offset: int, data: memoryview) -> bool:
        if published:
            return write(self, offset, data)
        published.append(False)
        published[0] = run_average(plans[0]).has_published
        raise OutputError(f"cannot write {self.path}: Input/output error")

    monkeypatch.setattr("merge_cli.output.claims.flock", lambda fd: True)
    monkeypatch.setattr(ShardWriter, "write", failing)
    result = run_average(plans[1])
    assert published == [True] and result.already_published and not result.missing
    assert [*tmp_path.glob("out?*")] == []


@pytest.mark.parametrize(
    "wrong",
    [{"sha256": 1}, {"sha256": None}, {"mtime_ns": "x"}, {"file_bytes": []}, {"nonfinite": {"a": "x"}}, {"nonfinite": [1]}],
    ids=str,
)
def test_a_record_of_another_shape_counts_for_nothing(wrong: dict[str, Any], paths: list[Path], tmp_path: Path) -> None:
    plan = plan_average(paths, tmp_path / "out", threads=1)
    with SoloDestination(plan.output, plan.merge, plan.run) as destination:
        item = WorkItem.whole(plan.merge.files[0])
        writer = destination.open(item)
        destination.done(item, writer.finish(), {})  # without its values: to be written again
        (record,) = destination.folder.records.folder.iterdir()
        record.write_text(json.dumps(json.loads(record.read_text()) | wrong))
    run(paths, tmp_path / "out", "lone")
    average(paths, tmp_path / "one")
    for name in (file.name for file in plan.merge.files):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
