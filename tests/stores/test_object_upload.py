"""`pmerge push` to an S3 server on loopback: order, parts, resuming, and other people's objects."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import pmerge
from dcp_checkpoints import save_dcp
from golden_inputs import RUNS
from s3_server import S3Server

from merge_cli import average, open_checkpoint, plan_average, push
from merge_cli.errors import InputError, OutputError, PmergeError, UsageError
from merge_cli.features.inspect import inspect_checkpoints
from merge_cli.stores import object_upload

TO = "s3://bucket/run/merged"
INDEX = "model.safetensors.index.json"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def there(server: S3Server) -> dict[str, bytes]:
    return {key.removeprefix("bucket/run/merged/"): data for key, data in server.objects.items()}


def sent(server: S3Server) -> list[str]:
    """Keys in the order in which they became objects."""
    done = [
        path
        for method, path, _ in server.requests
        if (method, "?" in path) == ("PUT", False) or ("POST" in method and "uploadId" in path)
    ]
    return [path.partition("?")[0].removeprefix("/bucket/run/merged/") for path in done]


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return average(RUNS["sharded"](tmp_path / "inputs"), tmp_path / "merged", device="cpu").output


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_upload, "PART_BYTES", 5000)


def test_the_index_comes_last_and_pmerge_json_first(merged: Path, s3_server: S3Server) -> None:
    done = push(merged, TO + "/", read_back=True)
    assert done.address == TO and there(s3_server) == files_of(merged)
    order = sent(s3_server)
    assert (order[0], order[-1]) == ("pmerge.json", INDEX) and sorted(order) == sorted(files_of(merged))
    again = push(merged, TO)
    assert not again.sent and len(again.kept) == len(order) and len(sent(s3_server)) == len(order)
    report = inspect_checkpoints([TO])
    assert [each.path for each in report.checkpoints] == [TO] and not report.broken


def test_the_bound_on_headers_is_that_of_the_check_before(merged: Path, s3_server: S3Server) -> None:
    with pytest.raises(InputError, match="larger than 10 bytes"):
        push(merged, TO, max_header=10)
    low = pmerge("push", str(merged), TO, "--max-header", "10", cwd=merged.parent, expect=2)
    assert "larger than 10 bytes" in low.stderr and not there(s3_server)


@pytest.mark.usefixtures("in_parts")
def test_large_files_go_in_parts_that_are_signed(merged: Path, s3_server: S3Server) -> None:
    push(merged, TO, read_back=True)
    assert there(s3_server) == files_of(merged) and not s3_server.parts
    parts = [headers for method, path, headers in s3_server.requests if method == "PUT" and "partNumber" in path]
    assert len(parts) > 3 and all(len(each["x-amz-content-sha256"]) == 64 for each in parts)
    assert sent(s3_server)[-1] == INDEX


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("fault", ["403", "damage"])
def test_a_push_that_broke_off_continues(merged: Path, s3_server: S3Server, fault: str) -> None:
    s3_server.put_faults = [""] * 5 + [fault]
    with pytest.raises(PmergeError):
        push(merged, TO)
    kept = dict(s3_server.objects)
    assert kept and INDEX not in there(s3_server)
    s3_server.requests.clear()
    push(merged, TO, read_back=True)
    assert there(s3_server) == files_of(merged)
    assert not {f"bucket/run/merged/{name}" for name in sent(s3_server)} & set(kept)


def test_kill_9_before_the_index_and_the_same_command_continues(merged: Path, s3_server: S3Server) -> None:
    """A process of its own, since the variables of the server are read when it starts."""
    command = [sys.executable, "-m", "merge_cli", "push", str(merged), TO]
    run: subprocess.Popen[str] | None = None

    def kill(path: str) -> None:
        if path.endswith(INDEX) and run is not None:
            run.kill()
            run.wait()
            raise ConnectionAbortedError

    s3_server.on_put = kill
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with run:
        run.communicate(timeout=120)
    assert run.returncode == -signal.SIGKILL and set(there(s3_server)) == {*files_of(merged)} - {INDEX}
    run = None
    s3_server.requests.clear()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == TO + "\n" and sent(s3_server) == [INDEX] and there(s3_server) == files_of(merged)


def test_other_objects_are_never_replaced(merged: Path, s3_server: S3Server, tmp_path: Path) -> None:
    s3_server.objects["bucket/run/merged/step-1/model.safetensors"] = b"another"
    s3_server.objects["bucket/run/merged-2/model.safetensors"] = b"a neighbor"
    with pytest.raises(OutputError, match="holds other files, and nothing there is replaced") as caught:
        push(merged, TO)
    assert caught.value.details == ("found  step-1/model.safetensors, 7 bytes",) and not sent(s3_server)
    push(merged, "s3://bucket/run/other")
    wma = average(sorted((tmp_path / "inputs").iterdir()), tmp_path / "wma", method="wma", device="cpu").output
    with pytest.raises(OutputError, match="holds other files"):
        push(wma, "s3://bucket/run/other")
    data = (merged / INDEX).read_bytes()
    s3_server.objects["bucket/run/same/" + INDEX] = data  # of unknown origin: no hash beside it
    with pytest.raises(OutputError, match="holds other files"):
        push(merged, "s3://bucket/run/same")


def test_of_two_pushes_at_once_one_is_refused(merged: Path, s3_server: S3Server) -> None:
    def appear(path: str) -> None:
        if path.endswith("pmerge.json"):
            s3_server.objects[path] = b"of another push"

    s3_server.on_put = appear
    with pytest.raises(OutputError, match=f"{TO}/pmerge.json has appeared, and is of another push"):
        push(merged, TO)
    assert set(there(s3_server)) == {"pmerge.json"}


def test_an_object_that_is_damaged_later_is_found_by_reading_back(merged: Path, s3_server: S3Server) -> None:
    push(merged, TO)
    shard = next(key for key in s3_server.objects if key.endswith(".safetensors"))
    s3_server.objects[shard] = s3_server.objects[shard][:-1] + b"\xff"
    assert not push(merged, TO).sent  # sizes and kept hashes alone
    with pytest.raises(OutputError, match="does not hold what was sent"):
        push(merged, TO, read_back=True)


def test_of_a_distributed_checkpoint_the_metadata_come_last(s3_server: S3Server, tmp_path: Path) -> None:
    run = [save_dcp(tmp_path / f"step-{step}", {"model": {"w": torch.full((8, 4), float(step))}}, files=2) for step in (1, 3)]
    out = average(run, tmp_path / "out", device="cpu").output
    push(out, TO, read_back=True)
    assert sent(s3_server)[-1] == ".metadata" and there(s3_server) == files_of(out)
    assert list(open_checkpoint(TO).tensors) == list(open_checkpoint(out).tensors)


def test_errors(merged: Path, s3_server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="s3://bucket is a whole bucket"):
        push(merged, "s3://bucket")
    with pytest.raises(
        UsageError, match="the result is written to a folder of this machine, and s3://bucket/out is none"
    ) as caught:
        plan_average(sorted((tmp_path / "inputs").iterdir()), "s3://bucket/out")
    assert "pmerge push merged s3://bucket/out" in caught.value.hint
    s3_server.put_faults = ["403"] * 9
    with pytest.raises(InputError, match=f"access to {TO}/pmerge.json is refused"):
        push(merged, TO)
