"""Records of other versions: results and unfinished work of 0.1.0 are taken over, those of a newer
version are refused by name.

tests/data/0.1.0 was written by 0.1.0 (its last commit without numbers) from the run "experts-mixed"
of golden_inputs.py, in the folder /data/average: a result, and the records of a run that was
stopped after its first file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_inputs import RUNS
from paths import TESTS

from merge_cli import Rank, average, finalize, plan_average, plan_sweep, run_average, sweep, verify
from merge_cli.errors import InputError, OutputError, PmergeError
from merge_cli.output.folder import StagingFolder
from merge_cli.output.manifest import seal
from merge_cli.output.schema import SCHEMA
from merge_cli.planning.plan import ALGORITHM

OLD = TESTS / "data" / "0.1.0"
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return RUNS["experts-mixed"](tmp_path_factory.mktemp("schema"))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def files_in(staging: Path) -> dict[Path, bytes]:
    """The content of a staging folder, its locks left out."""
    found = {path: path.read_bytes() for path in staging.rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if path.name.split(".")[0] not in ("lock", "control")}


def change(path: Path, **changes: Any) -> None:
    """Change fields of a record; pmerge.json is sealed again."""
    content = json.loads(path.read_bytes()) | changes
    if path.name == "pmerge.json":
        del content["sha256"]
        path.write_bytes(seal(content))
    else:
        path.write_text(json.dumps(content))


def as_recorded(path: Path) -> dict[str, Any]:
    """What 0.1.0 records of an input file; the inode is as on another mount."""
    status = path.stat()
    return {"file_bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino + 1}


def half_done_by_0_1_0(destination: Path, run: list[Path]) -> Path:
    """The staging folder of a run of 0.1.0 over `run` that was stopped after its first file."""
    staging = destination.with_name(destination.name + ".pmerge-partial")
    shutil.copytree(OLD / "half.pmerge-partial", staging)
    (staging / "checkpoint").mkdir()
    shutil.copy(OLD / "merged" / FIRST, staging / "checkpoint")
    record = json.loads((staging / "state.json").read_bytes())
    state = record["state"]
    state["base"] = str(run[-1])
    state["inputs"] = {
        str(path): {name: entry | as_recorded(path / name) for name, entry in files.items()}
        for path, files in zip(run, state["inputs"].values(), strict=True)
    }
    (staging / "state.json").write_text(json.dumps(record))
    request = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    mtime_ns = (staging / "checkpoint" / FIRST).stat().st_mtime_ns
    change(staging / "done" / f"{FIRST}.json", request=request, mtime_ns=mtime_ns)
    return staging


# --- 0.1.0


def test_a_result_of_0_1_0_passes(tmp_path: Path) -> None:
    assert "schema" not in json.loads((OLD / "merged" / "pmerge.json").read_bytes())
    found = verify(OLD / "merged")
    assert found.ok and found.notes == () and len(found.files) == 5


def test_tensors_of_a_result_of_0_1_0_are_computed_again(run: list[Path], tmp_path: Path) -> None:
    merged = Path(shutil.copytree(OLD / "merged", tmp_path / "merged"))
    inputs = json.loads((merged / "pmerge.json").read_bytes())["inputs"]
    for path, entry in zip(run, inputs, strict=True):
        entry["path"] = str(path)
        entry["files"] = [each | as_recorded(path / each["name"]) for each in entry["files"]]
    change(merged / "pmerge.json", inputs=inputs, base=str(run[-1]))
    found = verify(merged, against_inputs=True, sample=None)
    assert found.problems == () and found.recomputed == found.num_tensors > 0
    again = average(run, tmp_path / "again", method="ema").output
    assert weights(again) == weights(merged)


@pytest.mark.parametrize("world_size", [1, 3])
def test_unfinished_work_of_0_1_0_is_continued(world_size: int, run: list[Path], tmp_path: Path) -> None:
    half_done_by_0_1_0(tmp_path / "half", run)
    if world_size == 1:
        assert average(run, tmp_path / "half", method="ema").reused == 1
    else:
        result = run_average(plan_average(run, tmp_path / "half", method="ema", rank=Rank(0, 3, source="--rank")))
        assert result.reused == 1 and result.has_published
    assert weights(tmp_path / "half") == weights(OLD / "merged")
    assert verify(tmp_path / "half", against_inputs=True).ok


def test_unfinished_work_of_0_1_0_for_another_request_can_be_restarted(run: list[Path], tmp_path: Path) -> None:
    half_done_by_0_1_0(tmp_path / "half", run)
    with pytest.raises(OutputError, match="or of an older version of pmerge") as refused:
        average(run, tmp_path / "half", method="sma")
    assert "--restart" in refused.value.hint
    assert average(run, tmp_path / "half", method="sma", restart=True).reused == 0


# --- today


def test_every_record_has_its_number(run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def publish(folder: StagingFolder, files: object, overwrite: bool) -> None:
        found.append([folder.state_file, *sorted(folder.records.folder.iterdir())])
        raise OutputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("merge_cli.output.publish._give_final_name", publish)
        patch.setattr("merge_cli.ranks.shares.MIN_PIECE_BYTES", 512)
        with pytest.raises(OutputError, match="stopped"):
            average(run, tmp_path / "one")
        with pytest.raises(OutputError, match="stopped"):
            run_average(plan_average(run, tmp_path / "two", rank=Rank(0, 3, source="--rank")))
    one, two = found
    assert len(one) == 3 and any("@" in path.name for path in two)
    records = [*one, *two, sweep(run, tmp_path / "sweep", methods=["sma"]).report, tmp_path / "sweep" / "sma" / "pmerge.json"]
    for path in records:
        record = json.loads(path.read_bytes())
        assert record["schema"] == SCHEMA, path
        assert record.get("state", record).get("algorithm", ALGORITHM) == ALGORITHM
    assert all("algorithm" in json.loads(path.read_bytes()) for path in records[-2:])


# --- a newer version


def refused(work: Callable[[], object], path: Path) -> str:
    """The hint of the error that names the record of a newer version."""
    with pytest.raises(PmergeError) as raised:
        work()
    assert raised.value.message == f"a newer version of pmerge wrote {path}"
    assert raised.value.details[0] == f"found     schema {SCHEMA + 1}"
    return raised.value.hint


def test_a_newer_result_is_not_called_damaged(run: list[Path], tmp_path: Path) -> None:
    merged = average(run, tmp_path / "merged").output
    change(merged / "pmerge.json", schema=SCHEMA + 1, files="in another form")
    refused(lambda: verify(merged), merged / "pmerge.json")
    (finding,) = plan_average(run, merged, overwrite=True).findings
    assert "by a newer version of pmerge" in str(finding)


def test_a_result_of_another_algorithm_is_checked_but_for_its_sums(run: list[Path], tmp_path: Path) -> None:
    merged = average(run, tmp_path / "merged").output
    change(merged / "pmerge.json", algorithm=ALGORITHM + 1)
    assert verify(merged).ok
    with pytest.raises(InputError, match="cannot be computed again") as raised:
        verify(merged, against_inputs=True)
    assert raised.value.hint.startswith("pmerge verify ")


@pytest.mark.parametrize("world_size", [1, 3])
def test_unfinished_work_of_a_newer_version_is_kept_unless_restarted(world_size: int, run: list[Path], tmp_path: Path) -> None:
    staging = half_done_by_0_1_0(tmp_path / "half", run)
    change(staging / "state.json", schema=SCHEMA + 1)
    before = files_in(staging)

    def work(**options: Any) -> Any:
        rank = Rank(0, world_size, source="--rank") if world_size > 1 else None
        plan = plan_average(run, tmp_path / "half", method="ema", rank=rank, **options)
        return run_average(plan) if rank else average(run, tmp_path / "half", method="ema", **options)

    assert "--restart" in refused(work, staging / "state.json")
    refused(lambda: finalize(tmp_path / "half"), staging / "state.json")
    assert files_in(staging) == before
    assert work(restart=True).reused == 0
    assert verify(tmp_path / "half").ok


def test_a_newer_version_that_died_while_it_published_is_not_undone(run: list[Path], tmp_path: Path) -> None:
    staging = half_done_by_0_1_0(tmp_path / "half", run)
    (staging / "publish.json").write_text(json.dumps({"schema": SCHEMA + 1}))
    refused(lambda: average(run, tmp_path / "half", method="ema"), staging / "publish.json")
    refused(lambda: average(run, tmp_path / "half", method="ema", restart=True), staging / "publish.json")
    assert (staging / "publish.json").exists()


def test_a_record_of_a_newer_version_vouches_for_nothing(run: list[Path], tmp_path: Path) -> None:
    staging = half_done_by_0_1_0(tmp_path / "half", run)
    change(staging / "done" / f"{FIRST}.json", schema=SCHEMA + 1)
    assert average(run, tmp_path / "half", method="ema").reused == 0


def test_a_state_that_cannot_be_understood_is_no_traceback(run: list[Path], tmp_path: Path) -> None:
    staging = half_done_by_0_1_0(tmp_path / "half", run)
    state = json.loads((staging / "state.json").read_bytes())["state"]
    change(staging / "state.json", state=state | {"request": state["request"] | {"unknown": 1}})
    with pytest.raises(OutputError, match="does not describe a run of this version") as raised:
        finalize(tmp_path / "half")
    assert "--restart" in raised.value.hint


def test_the_report_of_a_newer_sweep_is_not_overwritten(run: list[Path], tmp_path: Path) -> None:
    report = sweep(run, tmp_path / "sweep", methods=["sma"]).report
    change(report, schema=SCHEMA + 1)
    (finding,) = plan_sweep(run, tmp_path / "sweep", methods=["sma"]).findings
    assert finding.message == f"a newer version of pmerge wrote {report}"
