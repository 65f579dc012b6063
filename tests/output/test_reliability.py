"""The promises of docs/reliability.md, one by one: real processes, real files, one fault at a time.

The faults come from scripts/lib/faults, which tries every point; here each sweep takes some of
them.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults import circumstances, storage, sweeps
from faults.ground import COMMAND, FILESYSTEMS, PMERGE, CannotTry, Ground, Row, digests, write_checkpoint
from faults.runs import FaultRuns
from merge_cli import average, plan_average
from merge_cli.errors import OutputError
from merge_cli.output.folder import differences
from merge_cli.output.lock import Lock
from merge_cli.system.process import identity, is_dead

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="faults are injected by a library that gcc compiles")


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with tempfile.TemporaryDirectory(prefix="pmerge-test-") as folder, FaultRuns() as runs:
        Path(folder).chmod(0o755)  # one fault needs another user
        yield Ground(Path(folder) / "ground", runs)


def survives(attempt: Callable[[], Row]) -> None:
    try:
        row = attempt()
    except CannotTry as reason:
        pytest.skip(str(reason))
    assert not row.wrong, "\n".join(row.wrong)
    assert row.points > 0


def test_promise_1_inputs_are_opened_read_only_and_never_mapped(ground: Ground) -> None:
    ground.reset()
    code = """if True:
        import os, sys
        from pathlib import Path
        def hook(event, arguments):
            if event == "open" and "/in/" in str(arguments[0]):
                assert arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) == 0, arguments
                seen.append(arguments[0])
            assert event != "mmap.__new__" or arguments[0] == -1, arguments  # buffers have no file
        seen = []
        from merge_cli import average
        average([Path("in").resolve()], "out/merged")
        seen.clear()
        sys.addaudithook(hook)
        average([Path("in").resolve()], "out/again")
        print(len(seen))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ground.folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4
    assert digests(ground.folder / "in") == ground.inputs


@pytest.mark.parametrize("filesystem", list(FILESYSTEMS))
def test_promise_2_and_3_killed_anywhere_it_is_absent_or_complete_and_goes_on(ground: Ground, filesystem: str) -> None:
    survives(lambda: sweeps.sweep(ground, "any:kill:0", filesystem=filesystem, codes=(-9,), every=29, first=5))


def test_promise_2_and_3_hold_for_distributed_checkpoints(ground: Ground) -> None:
    survives(lambda: sweeps.distributed(ground, every=29, first=5))


@pytest.mark.parametrize("filesystem", ["Linux", "no renameat2 (NFS, Lustre)"])
def test_promise_2_overwrite_loses_neither_the_old_nor_the_new(ground: Ground, filesystem: str) -> None:
    survives(lambda: sweeps.sweep(ground, "any:kill:0", filesystem=filesystem, codes=(-9,), overwrite=True, every=37, first=9))
    for call in ("renamedir", "unlink"):
        every = 1 if call == "renamedir" else 7
        fault = f"{call}:kill:0"
        survives(partial(sweeps.sweep, ground, fault, filesystem=filesystem, codes=(-9,), overwrite=True, every=every))


def test_promise_2_a_folder_that_pmerge_did_not_make_is_left_alone(ground: Ground) -> None:
    ground.reset(overwrite=True)
    ours_not = [ground.out / "merged.pmerge-old" / "thesis.txt", ground.staging / "thesis.txt"]
    for path in ours_not:
        path.parent.mkdir()
        path.write_text("dear")
    arguments = (*COMMAND, "--overwrite")
    refused = ground.runs.run(arguments, ground.folder)
    assert refused.code == 1 and "no state.json" in refused.stderr and "thesis.txt" in refused.stderr
    assert ground.runs.run((*arguments, "--restart"), ground.folder).code == 0
    assert digests(ground.merged) == ground.expected
    assert all(path.read_text() == "dear" for path in ours_not)


def test_promise_2_a_destination_that_appears_during_the_run_is_not_replaced(ground: Ground) -> None:
    for refuse in ({}, {"renameat2": errno.ENOSYS}):
        ground.reset()
        fault = "pwrite:5:signal:19:/out"
        other = ground.merged / "thesis.txt"

        def appear(other: Path = other) -> None:
            other.parent.mkdir()
            other.write_text("dear")

        ended = ground.runs.run(COMMAND, ground.folder, fault=fault, refuse=refuse, when_stopped=appear)
        assert ended.code == 1 and "exists already" in ended.stderr
        assert [path.name for path in ground.merged.iterdir()] == ["thesis.txt"]
        shutil.rmtree(ground.merged)
        assert ground.continued(refuse) == ""


def test_promise_3_power_loss_leaves_it_absent_or_complete(ground: Ground) -> None:
    survives(lambda: storage.power_loss(ground, 29))


def test_promise_4_a_run_that_died_after_its_rename_is_finished_by_the_same_command(ground: Ground) -> None:
    ground.reset()
    assert ground.runs.run(COMMAND, ground.folder, fault="rmdir:1:kill:0:pmerge-partial").code == -9
    assert digests(ground.merged) == ground.expected and ground.staging.exists()
    shutil.copytree(ground.out, ground.folder / "copy")
    other = ground.runs.run((*COMMAND, "--method", "wma"), ground.folder)
    assert other.code == 1 and "exists already" in other.stderr
    shutil.rmtree(ground.folder / "copy")


def test_promise_4_another_request_is_refused_with_the_differences(ground: Ground) -> None:
    survives(lambda: circumstances.another_request(ground))
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": [3]}, "d": {}}) == [
        "a, c  was 2, is [3]",
        "d  was absent, is present",
    ]


def test_promise_4_another_request_begins_where_nothing_was_finished(ground: Ground) -> None:
    ground.reset()
    arguments = (*COMMAND, "--method", "wma")
    assert ground.runs.run(arguments, ground.folder, fault="pwrite:4:kill:0:/out").code == -9
    assert (ground.staging / "state.json").exists()
    assert ground.continued({}) == ""


def test_promise_4_damaged_finished_files_are_written_again(ground: Ground) -> None:
    survives(lambda: circumstances.damaged_finished_file(ground))


def test_promise_5_random_kills_do_not_change_the_bytes(ground: Ground) -> None:
    survives(lambda: sweeps.soak(ground, 4))


@pytest.mark.parametrize(("field", "text"), [("f_bavail", "not enough space"), ("f_favail", "not enough inodes")])
def test_promise_6_space_and_inodes_are_found_missing_before_anything_is_written(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, field: str, text: str
) -> None:
    ground.reset()
    real = os.statvfs
    names = [name for name in dir(os.statvfs_result) if name.startswith("f_")]

    class Full:
        def __init__(self, path: Path) -> None:
            for name in names:
                setattr(self, name, getattr(real(path), name))
            setattr(self, field, 3)

    monkeypatch.setattr(os, "statvfs", Full)
    plan = plan_average([ground.folder / "in"], ground.merged)
    assert [finding.message.partition(" for ")[0] for finding in plan.findings] == [text]
    assert not any(ground.out.iterdir())


def test_promise_6_places_that_cannot_be_written_are_said_before(ground: Ground) -> None:
    survives(lambda: storage.no_permission(ground))
    survives(lambda: storage.read_only(ground))
    survives(lambda: storage.inodes(ground))


def test_promise_7_inputs_that_change_during_the_run_stop_it(ground: Ground) -> None:
    survives(lambda: circumstances.changed_inputs(ground))


def test_promise_7_read_errors_name_file_byte_and_tensor(ground: Ground) -> None:
    survives(lambda: sweeps.sweep(ground, "pread:error:5", match="/in/", codes=(1, 2), text="Input/output error"))
    said = set()
    for k in range(1, 25):  # headers first, then weights
        ground.reset()
        said.add(ground.runs.run(COMMAND, ground.folder, fault=f"pread:{k}:error:5:/in/").stderr)
    for shard in (1, 2):
        where = f"in/checkpoint-200/model-0000{shard}-of-00002.safetensors at byte 256: Input/output error"
        assert any(where in text and f"tensor    `layers.{shard}.0`" in text for text in said), said


def test_promise_8_nan_stops_the_run_and_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step_{step}").mkdir()
        values = torch.tensor([1.0, float("nan") if step == 2 else 0.0])
        save_file({"w": values}, tmp_path / f"step_{step}" / "model.safetensors")
    command = [*PMERGE, "average", "step_1", "step_2", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "`w`" in done.stderr and "step_2" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("pwrite:errors:28", "No space left on device"),
        ("pwrite:error:5", "Input/output error"),
        ("pwrite:error:122", "quota"),
        ("fallocate:error:28", "need  "),
        ("fallocate:error:27", "ulimit -f"),
        ("fsync:error:5", "Input/output error"),
        ("rename:error:5", "Input/output error"),
        ("renamedir:error:5", "Input/output error"),
    ],
)
def test_promise_9_output_errors_are_said_and_lose_nothing(ground: Ground, fault: str, text: str) -> None:
    survives(lambda: sweeps.sweep(ground, fault, text=text, every=4))


def test_promise_9_short_writes_and_reads_are_continued(ground: Ground) -> None:
    survives(lambda: sweeps.sweep(ground, "pwrite:short:0", codes=(0,), every=3))
    survives(lambda: sweeps.sweep(ground, "pread:short:0", match="/in/", codes=(0,), every=3))


def test_promise_9_real_limits(ground: Ground) -> None:
    survives(lambda: circumstances.file_size_limit(ground))
    survives(lambda: circumstances.few_descriptors(ground))
    survives(lambda: storage.space(ground))
    survives(lambda: storage.fsync_fails(ground))


def test_promise_10_the_manifest_holds_what_is_needed_to_check_and_repeat(ground: Ground) -> None:
    ground.reset()
    assert ground.runs.run(COMMAND, ground.folder).code == 0
    manifest = json.loads((ground.merged / "pmerge.json").read_text())
    for name, entry in manifest["files"].items():
        assert digests(ground.merged)[name] == entry["sha256"]
        assert (ground.merged / name).stat().st_size == entry["bytes"]
    assert {"version", "header_sha256", "file_bytes"} <= manifest["inputs"][0]["files"][0].keys()
    assert {"coefficient", "path", "step"} <= manifest["inputs"][0].keys()


def test_promise_11_two_runs_never_share_a_destination(ground: Ground) -> None:
    survives(lambda: circumstances.locks(ground))


def test_promise_11_a_lock_on_a_folder_that_was_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run removes its folder between the second's opening of the lock file and its
    locking.
    """
    path = tmp_path / "out.pmerge-partial" / "lock"
    first, second = Lock(path, tmp_path / "out"), Lock(path, tmp_path / "out")
    first.acquire()
    flock = second._flock
    calls: list[int] = []

    def late(fd: int) -> bool:
        if not calls:
            first.remove_files()
            path.parent.rmdir()
            first.release()
        calls.append(fd)
        return flock(fd)

    monkeypatch.setattr(second, "_flock", late)
    second.acquire()
    assert len(calls) == 2 and path.exists()
    with pytest.raises(OutputError, match="another run"):
        Lock(path, tmp_path / "out").acquire()
    second.release()


def test_promise_11_only_a_process_that_is_known_to_be_gone_is_dead() -> None:
    me = identity()
    assert not is_dead(me)
    assert is_dead({**me, "started": "1"}) and is_dead({**me, "pid": 2**22 + 1}) and is_dead({**me, "boot": "another"})
    assert not is_dead({**me, "host": "elsewhere", "started": "1"})
    assert not is_dead({**me, "namespace": "pid:[1]", "started": "1"})
    assert not is_dead({})


def test_promise_11_without_flock_a_living_holder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_flock)
    path = tmp_path / "out.pmerge-partial" / "lock"
    owner = path.with_name("lock.owner")
    with Lock(path, tmp_path / "out"), pytest.raises(OutputError, match="another run") as refused:
        Lock(path, tmp_path / "out").acquire()
    assert f"rm {owner}" in refused.value.hint or "rm " in refused.value.hint
    assert not owner.exists()
    owner.write_text(json.dumps({**identity(), "host": "elsewhere"}))
    with pytest.raises(OutputError, match="another run"):
        Lock(path, tmp_path / "out").acquire()
    owner.write_text(json.dumps({**identity(), "started": "1"}))
    with Lock(path, tmp_path / "out"):
        assert json.loads(owner.read_text())["started"] == identity()["started"]


def test_promise_12_an_output_in_an_input_is_refused_whatever_its_name(ground: Ground) -> None:
    (ground.folder / "alias").symlink_to(ground.folder / "in")
    for output in ("alias/checkpoint-100/merged", "alias/checkpoint-100", "alias"):
        ended = ground.runs.run(("average", "in", "-o", output, "--overwrite"), ground.folder)
        assert ended.code == 2 and "inputs are never written to" in ended.stderr
    assert digests(ground.folder / "in") == ground.inputs


def test_promise_13_modes_follow_the_umask(ground: Ground) -> None:
    ground.reset()
    script = 'umask 027; exec "$0" "$@"'
    subprocess.run(["bash", "-c", script, *PMERGE, *COMMAND], cwd=ground.folder, check=True, timeout=60)
    assert {path.stat().st_mode & 0o777 for path in ground.merged.rglob("*") if path.is_file()} == {0o640}
    assert ground.merged.stat().st_mode & 0o777 == 0o750
    ground.reset()
    subprocess.run(["bash", "-c", script.replace("027", "777"), *PMERGE, *COMMAND], cwd=ground.folder, check=True, timeout=60)
    assert ground.merged.stat().st_mode & 0o777 == 0o700, "the owner's own rights are not given up"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_at_any_point_and_say_how_to_go_on(ground: Ground, number: int) -> None:
    survives(lambda: sweeps.sweep(ground, f"any:signal:{int(number)}", codes=(128 + number,), every=47, first=3))
    ground.reset()
    ended = ground.runs.run(COMMAND, ground.folder, fault=f"pwrite:4:signal:{int(number)}:/out")
    assert "run the same command again:  pmerge average in -o out/merged --threads 1 --quiet" in ended.stderr


def test_signals_stop_within_two_seconds_whatever_the_storage_does(ground: Ground) -> None:
    survives(lambda: storage.slow_storage(ground))


def test_signals_that_the_process_was_started_to_ignore_stay_ignored(ground: Ground) -> None:
    ground.reset()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; a child inherits it
    command = [*PMERGE, *COMMAND]
    process = subprocess.Popen(command, cwd=ground.folder, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    deadline = time.monotonic() + 60
    while not ground.staging.exists() and process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr


@pytest.mark.parametrize(
    "merges", [30, pytest.param(300, marks=pytest.mark.slow(reason="300 merges take a minute; 30 merges are the fast test"))]
)
def test_soak_merges_in_one_process_keep_memory_and_descriptors(merges: int, tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step_{step}", step, 500)

    def rounds(count: int) -> tuple[int, int]:
        for number in range(count):
            method = ("sma", "wma")[number % 2]  # else the result is the requested one already
            average([tmp_path / "step_1", tmp_path / "step_2"], tmp_path / "out", method=method, overwrite=True, threads=2)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), sum(1 for _ in Path("/proc/self/fd").iterdir())

    memory, descriptors = rounds(20)
    later, later_descriptors = rounds(merges)
    assert later_descriptors == descriptors
    assert later - memory < 8 << 20
    assert load_file(tmp_path / "out" / "model-00001-of-00002.safetensors").keys() == {"layers.1.0", "layers.1.1", "layers.1.2"}
