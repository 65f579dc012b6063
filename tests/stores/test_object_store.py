"""`s3://` against a server on loopback: prefixes, replaced objects, faults, profiles. Needs
obstore, but for two tests.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from golden_inputs import RUNS
from s3_server import S3Server

from merge_cli import average, plan_average, run_average, verify
from merge_cli.errors import ChangedError, InputError, PmergeError, StoreError, UsageError
from merge_cli.features.inspect import inspect_checkpoints
from merge_cli.request.discovery import find_candidates
from merge_cli.stores import object_store
from merge_cli.stores.object_store import ObjectStore
from merge_cli.stores.store import Source, open_store, read_bytes

DATA = bytes(range(256)) * 20_000


def put(server: S3Server, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            server.objects[f"{prefix}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


@pytest.fixture
def local(tmp_path: Path) -> list[Path]:
    return RUNS["sharded"](tmp_path / "inputs")


@pytest.fixture
def far(local: list[Path], s3_server: S3Server) -> list[str]:
    for number, path in enumerate(local, 1):
        put(s3_server, path, f"bucket/run/step-{number}000")
        s3_server.objects[f"bucket/run/step-{number}000/"] = b""  # as some tools make folders
    s3_server.objects["bucket/run/notes.txt"] = b"notes"
    return [f"s3://bucket/run/step-{number}000" for number in range(1, len(local) + 1)]


@pytest.fixture
def source(s3_server: S3Server) -> Source:
    s3_server.objects["bucket/model.safetensors"] = DATA
    return open_store("s3://").open("s3://bucket/model.safetensors")


def content(folder: Path) -> dict[str, Any]:
    found = {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    record = json.loads(found.pop("pmerge.json"))
    return {**found, "coefficients": [each["coefficient"] for each in record["inputs"]], "files": record["files"]}


def test_a_run_below_a_prefix_is_averaged(local: list[Path], far: list[str], s3_server: S3Server, tmp_path: Path) -> None:
    expected = content(average(local, tmp_path / "near", device="cpu").output)
    plan = plan_average(["s3://bucket/run/"], tmp_path / "run", device="cpu")
    listed = [target for method, target, _ in s3_server.requests if "list-type" in target]
    assert len(listed) == len(set(listed)) == len(far) + 1  # each folder once
    assert not [target for method, target, _ in s3_server.requests if method == "HEAD"]
    assert content(run_average(plan).output) == expected
    for number, paths in enumerate((far, ["s3://bucket/run/step-*"])):
        assert content(average(paths, tmp_path / f"far{number}", device="cpu").output) == expected
    reads = [headers for method, target, headers in s3_server.requests if "list-type" not in target]
    assert all("if-match" in headers and "range" in headers for headers in reads)
    assert verify(tmp_path / "run", against_inputs=True, device="cpu").ok
    report = inspect_checkpoints(["s3://bucket/run"])
    assert [each.path for each in report.checkpoints] == far and not report.broken


def test_an_object_that_is_replaced_is_noticed(far: list[str], s3_server: S3Server, tmp_path: Path) -> None:
    plan = plan_average(far, tmp_path / "out", device="cpu")
    victim = plan.merge.inputs[0].files[0].path.removeprefix("s3://")
    s3_server.objects[victim] = s3_server.objects[victim][:-1] + b"\xff"
    with pytest.raises(ChangedError, match=f"{victim} was replaced or removed during the run"):
        run_average(plan)
    assert not (tmp_path / "out").exists()
    del s3_server.objects[victim]
    with pytest.raises(InputError, match="weight files are missing"):  # the next plan lists anew
        plan_average(far, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("fault", ["503", "truncate"])
def test_a_fault_that_passes_is_tried_again(fault: str, s3_server: S3Server, source: Source) -> None:
    s3_server.faults[:] = [fault]
    assert read_bytes(source, 1000, 4_000_000) == DATA[1000:4_001_000]
    assert not s3_server.faults


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("403", InputError, "access to s3://bucket/model.safetensors is refused"),
        ("norange", StoreError, "model.safetensors at byte 1000"),
    ],
)
def test_a_fault_that_stays_is_an_error_and_never_other_bytes(
    fault: str, error: type[PmergeError], text: str, s3_server: S3Server, source: Source
) -> None:
    s3_server.faults[:] = [fault] * 100
    with pytest.raises(error) as raised:
        read_bytes(source, 1000, 100_000)
    assert text in str(raised.value) and raised.value.hint


def test_many_threads_read_at_once(source: Source) -> None:
    ranges = [(i * 79_190 % 4_000_000, 1 + i * 104_729 % 1_000_000) for i in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: bytes(read_bytes(source, *at)), ranges))
    assert found == [DATA[begin : begin + size] for begin, size in ranges]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("s3://bucket/nothing", "no such checkpoint: s3://bucket/nothing"),
        ("s3://bucket/run/ckpt-*", "nothing matches s3://bucket/run/ckpt-*"),
        ("s3://bucket/run/notes.txt", "not a file of weights that pmerge reads: s3://bucket/run/notes.txt"),
        ("s3:///run", "names no bucket"),
    ],
)
def test_what_is_missing_is_named(path: str, text: str, far: list[str]) -> None:
    with pytest.raises(InputError) as error:
        find_candidates([path])
    assert text in str(error.value)


def test_requester_pays_and_profiles(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.objects["bucket/a/x"] = b"x"
    monkeypatch.setenv("AWS_REQUEST_PAYER", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "team")
    (tmp_path / "aws-credentials").write_text("[team]\naws_access_key_id = TEAMKEY\naws_secret_access_key = s\n")
    (tmp_path / "aws-config").write_text(f"[profile team]\nregion = eu-central-7\nendpoint_url = {s3_server.url}\n")
    monkeypatch.setattr(object_store, "STORE", ObjectStore())
    assert [entry.name for entry in open_store("s3://").list("s3://bucket/a")] == ["x"]
    headers = s3_server.requests[-1][2]
    assert "TEAMKEY/" in headers["authorization"] and "/eu-central-7/s3/" in headers["authorization"]
    assert headers["x-amz-request-payer"] == "requester"


# -- without obstore
# ----------------------------------------------------------------------------------------------------------


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "find_spec", lambda name: None)
    monkeypatch.setattr(object_store, "STORE", ObjectStore())
    with pytest.raises(UsageError, match=r"(?s)gs:// needs obstore.*pip install 'pmerge\[s3\]'"):
        find_candidates(["gs://bucket/run"])


def test_profiles_that_need_more_than_keys_say_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_PROFILE", "sso")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(object_store, "find_spec", lambda name: None if name == "boto3" else object())
    with pytest.raises(InputError, match="there is no profile sso"):
        object_store._s3_settings()
    (tmp_path / "config").write_text("[profile sso]\nsso_session = my\n")
    with pytest.raises(InputError, match=r"(?s)no keys of its own.*aws configure export-credentials --profile sso"):
        object_store._s3_settings()
