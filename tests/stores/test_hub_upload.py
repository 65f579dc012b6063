"""`pmerge push` to a Hub on loopback, by huggingface_hub's own client: order, resuming, faults and
other people's files.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from golden_inputs import RUNS
from hub_server import HubServer

from merge_cli import average, open_checkpoint, push
from merge_cli.errors import InputError, OutputError, PmergeError, UsageError

REPO = "org/merged"
ROOT = {".gitattributes": b"*.safetensors filter=lfs\n"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return average(RUNS["sharded"](tmp_path / "inputs"), tmp_path / "merged", method="ema", alpha=0.25, device="cpu").output


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub with a repository whose main has a model, and a token that may write."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # the server has no Xet
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    hub_server.token = "hf_x"
    hub_server.commit(REPO, "main", ROOT)
    hub_server.commit(REPO, "main", {**ROOT, "model.safetensors": b"another model", "config.json": b"{}"})
    return hub_server


def uploads(hub: HubServer) -> list[str]:
    return [request.target for request in hub.requests if request.kind == "lfs"]


def test_a_result_becomes_one_commit_of_a_new_branch(merged: Path, hub: HubServer) -> None:
    done = push(merged, f"hf://{REPO}@merged")
    local = files_of(merged)
    there = hub.commits[hub.refs[REPO]["merged"]]
    card = there["README.md"].decode()
    assert {**ROOT, **local, "README.md": card.encode()} == there
    assert done.address == f"hf://{REPO}@{hub.refs[REPO]['merged']}" and set(done.sent) == {*local, "README.md"}
    assert len(hub.history[REPO, "merged"]) == 2  # the first commit of main, and this one
    kinds = [request.kind for request in hub.requests]
    assert kinds.count("commit") == 1 and max(i for i, kind in enumerate(kinds) if kind == "lfs") < kinds.index("commit")
    assert not [request for request in hub.requests if request.kind == "lfs" and request.authorization]
    record = json.loads((merged / "pmerge.json").read_text())
    assert "`ema` with alpha 0.25" in card and str(merged.parent) not in card
    assert all(f"| {each['step']} | {each['coefficient']:.6g} |" in card for each in record["inputs"])
    assert set(open_checkpoint(done.address).tensors) == set(open_checkpoint(merged).tensors)
    assert files_of(merged) == local


def test_a_second_push_sends_nothing(merged: Path, hub: HubServer) -> None:
    first = push(merged, f"hf://{REPO}@merged")
    sent = len(uploads(hub))
    again = push(merged, f"hf://{REPO}@merged")
    assert again.address == first.address and not again.sent and set(again.kept) == set(first.sent)
    assert len(uploads(hub)) == sent and hub.counts()["commit"] == 1


def test_other_files_are_never_replaced(merged: Path, hub: HubServer) -> None:
    before = dict(hub.refs[REPO])
    with pytest.raises(OutputError, match=r"holds other files, and nothing there is replaced") as caught:
        push(merged, f"hf://{REPO}")
    assert "found  model.safetensors, 13 bytes" in caught.value.details and hub.refs[REPO] == before and not uploads(hub)
    hub.commit(REPO, "mine", {**ROOT, "README.md": b"my card", "LICENSE": b"mine"})
    push(merged, f"hf://{REPO}@mine")
    there = hub.commits[hub.refs[REPO]["mine"]]
    assert (there["README.md"], there["LICENSE"]) == (b"my card", b"mine") and there["pmerge.json"]


def test_a_repository_whose_first_commit_is_a_model_has_no_empty_branch(merged: Path, hub: HubServer) -> None:
    """Squashed histories begin so."""
    hub.commit("org/squashed", "main", {**ROOT, "model.safetensors": b"another model"})
    with pytest.raises(OutputError, match=r"holds other files") as caught:
        push(merged, "hf://org/squashed@merged")
    assert "repository" in caught.value.hint and "merged" not in hub.refs["org/squashed"]


def test_a_card_of_its_own_and_a_folder(merged: Path, hub: HubServer) -> None:
    (merged / "README.md").write_text("# Mine\n")
    done = push(merged, f"hf://{REPO}@merged/last-10", read_back=True)
    there = hub.commits[hub.refs[REPO]["merged"]]
    assert there == {**ROOT, **{f"last-10/{name}": data for name, data in files_of(merged).items()}}
    assert done.address.endswith("/last-10")


def test_a_push_that_broke_off_continues(merged: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.send_faults = ["", "403"]
    with pytest.raises(PmergeError, match=f"the token may not write to {REPO}|cannot push to {REPO}"):
        push(merged, f"hf://{REPO}@merged")
    assert hub.commits[hub.refs[REPO]["merged"]] == ROOT  # nothing that looks like a model
    kept = set(hub.blobs)
    assert kept
    hub.requests.clear()
    push(merged, f"hf://{REPO}@merged")
    assert not kept & {target.rpartition("/")[2] for target in uploads(hub)} and uploads(hub)
    assert files_of(merged).items() <= hub.commits[hub.refs[REPO]["merged"]].items()


def test_kill_9_at_the_commit_leaves_no_result_and_the_same_command_continues(merged: Path, hub: HubServer) -> None:
    """A process of its own, since the variables of the Hub are read when it starts."""
    command = [sys.executable, "-m", "merge_cli", "push", str(merged), f"hf://{REPO}@merged"]
    run: subprocess.Popen[str] | None = None

    def kill(kind: str) -> None:
        if kind == "commit" and run is not None:
            run.kill()
            raise ConnectionAbortedError

    hub.on_request = kill
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with run:
        run.communicate(timeout=120)
    assert run.returncode == -signal.SIGKILL
    assert hub.commits[hub.refs[REPO]["merged"]] == ROOT and len(hub.blobs) == len(list(merged.glob("*.safetensors")))
    run, sent = None, len(uploads(hub))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"hf://{REPO}@{hub.refs[REPO]['merged']}\n" and len(uploads(hub)) == sent
    assert "that were there" in done.stderr


def test_a_branch_that_moves_gets_nothing(merged: Path, hub: HubServer) -> None:
    hub.commit(REPO, "merged", ROOT)

    def move(kind: str) -> None:
        if kind == "lfs":
            hub.commit(REPO, "merged", {**ROOT, "notes.md": b"moved"})

    hub.on_request = move
    with pytest.raises(OutputError, match=f"merged of {REPO} moved during the push; nothing was added"):
        push(merged, f"hf://{REPO}@merged")
    assert set(hub.commits[hub.refs[REPO]["merged"]]) == {".gitattributes", "notes.md"}


def test_bytes_that_the_hub_lost_are_noticed(merged: Path, hub: HubServer) -> None:
    hub.send_faults = ["lose"]
    with pytest.raises(OutputError, match="does not hold what was sent") as caught:
        push(merged, f"hf://{REPO}@merged")
    assert len(caught.value.details) == 1 and "model-0000" in caught.value.details[0]


def test_a_folder_that_is_not_sound_is_not_sent(merged: Path, hub: HubServer) -> None:
    shard = next(merged.glob("*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="is not what pmerge wrote, and is not sent") as caught:
        push(merged, f"hf://{REPO}@merged")
    assert shard.name in caught.value.details[0] and "merged" not in hub.refs[REPO] and not uploads(hub)
    with pytest.raises(UsageError, match="no result of pmerge"):
        push(merged.parent, f"hf://{REPO}@merged")


def test_errors_name_the_command_that_helps(merged: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no model org/none on 127\.0\.0\.1") as caught:
        push(merged, "hf://org/none@merged")
    assert "hf repos create org/none --private" in caught.value.hint
    hub.may_write = False
    with pytest.raises(InputError, match=f"the token may not write to {REPO}: Forbidden") as caught:
        push(merged, f"hf://{REPO}@merged")
    assert "hf auth login" in caught.value.hint and "merged" not in hub.refs[REPO]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="needs a token that may write"):
        push(merged, f"hf://{REPO}@merged")
    for address, said in {
        "merged2": "no place to push to",
        "ftp://x/y": "no place to push to",
        f"hf://{REPO}@{'a' * 40}": "is a commit, which never changes",
        "hf://gpt2": "names no model",
    }.items():
        with pytest.raises(PmergeError, match=said):
            push(merged, address)


def test_hashes_are_those_of_the_record(merged: Path, hub: HubServer) -> None:
    push(merged, f"hf://{REPO}@merged")
    listed = json.loads((merged / "pmerge.json").read_text())["files"]
    assert {each["sha256"] for each in listed.values()} == set(hub.blobs)
    assert all(hashlib.sha256(data).hexdigest() == oid for oid, data in hub.blobs.items())
