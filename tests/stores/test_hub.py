"""`hf://` against a Hub on loopback: patterns over revisions, pins, links that expire, faults,
tokens, proxies, the local cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from golden_inputs import RUNS
from hub_server import HubServer

from merge_cli import average, plan_average, run_average, verify
from merge_cli.errors import ChangedError, InputError, PmergeError, StoreError
from merge_cli.features.inspect import inspect_checkpoints
from merge_cli.request.discovery import find_candidates
from merge_cli.request.labels import Tokens
from merge_cli.stores import http, hub
from merge_cli.stores.store import Source, open_store, read_bytes, read_file

REPO = "allenai/OLMo-2-1124-7B"
DATA = bytes(range(256)) * 2000


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def local(tmp_path: Path) -> list[Path]:
    return RUNS["sharded"](tmp_path / "inputs")


@pytest.fixture
def published(local: list[Path], hub_server: HubServer) -> HubServer:
    """The run as branches, with the names that OLMo 2 has, and `main`, which is the last of them."""
    for number, path in enumerate(local, 1):
        hub_server.commit(REPO, f"stage1-step{number}000-tokens{4 * number}B", files_of(path))
    hub_server.commit(REPO, "main", files_of(local[-1]))
    hub_server.commit(REPO, "stage2-ingredient1-step1000-tokens5B", {**files_of(local[0]), "README.md": b"stage 2"})
    return hub_server


@pytest.fixture
def source(hub_server: HubServer) -> Source:
    hub_server.commit("org/model", "main", {"model.safetensors": DATA, "config.json": b"{}"})
    return open_store("hf://").open("hf://org/model/model.safetensors")


def content(folder: Path) -> dict[str, Any]:
    found = files_of(folder)
    record = json.loads(found.pop("pmerge.json"))
    return {**found, "coefficients": [each["coefficient"] for each in record["inputs"]], "files": record["files"]}


# -- the whole job
# ------------------------------------------------------------------------------------------------------------


def test_revisions_are_averaged_by_a_pattern(local: list[Path], published: HubServer, tmp_path: Path) -> None:
    expected = content(average(local[-3:], tmp_path / "near", device="cpu").output)
    plan = plan_average([f"hf://{REPO}@stage1-step*"], tmp_path / "far", last=3, device="cpu")
    assert [candidate.step for candidate in plan.candidates] == [1000 * i for i in range(len(local) - 2, len(local) + 1)]
    assert plan.candidates[0].tokens == Tokens(Fraction(4 * (len(local) - 2) * 10**9), Fraction(10**9))
    note = next(line for line in plan.notes if line.startswith("reading takes about"))
    assert plan.budget.workers == 16
    assert content(run_average(plan).output) == expected
    assert not (tmp_path / "hub").exists()  # nothing is stored
    foretold = int(re.findall(r"about ([0-9,]+) requests", note)[0].replace(",", ""))
    counts = published.counts()
    assert counts["refs"] == 1 and counts["info"] == 3  # of the revisions that are used alone
    files = sum(len(checkpoint.files) for checkpoint in plan.merge.inputs)
    resolved = [request.target for request in published.requests if request.kind == "resolve" and ".safetensors" in request.target]
    assert len([target for target in resolved if not target.endswith(".json")]) == files  # one link a file
    assert counts["cdn"] - 2 * files <= foretold <= counts["cdn"] + files  # headers are read at the beginning and at the end
    record = json.loads((tmp_path / "far" / "pmerge.json").read_bytes())
    commits = [published.refs[REPO][f"stage1-step{c.step}-tokens{4 * (c.step or 0) // 1000}B"] for c in plan.candidates]
    assert [entry["path"] for entry in record["inputs"]] == [f"hf://{REPO}@{commit}" for commit in commits]
    assert verify(tmp_path / "far", against_inputs=True, device="cpu").ok


def test_stages_are_not_mixed(published: HubServer, tmp_path: Path) -> None:
    with pytest.raises(PmergeError, match="different stages"):
        plan_average([f"hf://{REPO}@stage*"], tmp_path / "out")
    found, skipped, _ = find_candidates([f"hf://{REPO}@*"])
    assert f"hf://{REPO}@main is left out: its name has no step" in skipped
    assert {candidate.stage for candidate in found} == {"stage1", "stage2"}
    assert {candidate.ingredient for candidate in found} == {None, "ingredient1"}


def test_folders_of_a_revision_are_a_run(local: list[Path], hub_server: HubServer, tmp_path: Path) -> None:
    files = {f"checkpoint-{i}/{name}": data for i, path in enumerate(local, 1) for name, data in files_of(path).items()}
    hub_server.commit("me/run", "main", files)
    hub_server.commit("me/run", "feature/x", files)
    expected = content(average(local, tmp_path / "near", device="cpu").output)
    for number, path in enumerate(["hf://me/run", "hf://me/run@feature%2Fx/", "hf://me/run@main/checkpoint-*"]):
        assert content(average([path], tmp_path / f"far{number}", device="cpu").output) == expected
    report = inspect_checkpoints(["hf://me/run"])
    assert [each.path for each in report.checkpoints] == [f"hf://me/run/checkpoint-{i}" for i in range(1, len(local) + 1)]


def test_a_branch_that_moves_changes_nothing(local: list[Path], published: HubServer, tmp_path: Path) -> None:
    plan = plan_average([f"hf://{REPO}@stage1-step*"], tmp_path / "far", device="cpu")
    for name in list(published.refs[REPO]):
        published.commit(REPO, name, {"config.json": b"{}"})
    assert content(run_average(plan).output) == content(average(local, tmp_path / "near", device="cpu").output)
    with pytest.raises(InputError, match="no safetensors files"):  # the next plan begins anew
        plan_average([f"hf://{REPO}@stage1-step*"], tmp_path / "again")


def test_two_names_of_one_commit_count_once(hub_server: HubServer) -> None:
    for name in ("step1", "step2", "step2-copy"):
        hub_server.commit("org/model", name, {"model.safetensors": name[:5].encode()})
    found, skipped, _ = find_candidates(["hf://org/model@step*"])
    assert [candidate.path for candidate in found] == ["hf://org/model@step1", "hf://org/model@step2"]
    assert skipped == ["hf://org/model@step2-copy is left out: it is the same as hf://org/model@step2"]


# -- what is not there
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("hf://nobody/none", "there is no model nobody/none on 127.0.0.1, or no access to it"),
        (f"hf://{REPO}@nope", f"{REPO} has no branch, tag or commit nope"),
        (f"hf://{REPO}@step9*", "no branch or tag of allenai/OLMo-2-1124-7B matches step9*"),
        (f"hf://{REPO}@main/sub", f"no such checkpoint: hf://{REPO}@main/sub"),
        ("hf://datasets/org/name", "names no model on the Hub"),
        ("hf://gpt2", "names no model on the Hub"),
    ],
)
def test_what_is_missing_is_named(path: str, text: str, published: HubServer) -> None:
    with pytest.raises(InputError) as error:
        find_candidates([path])
    assert text in str(error.value)


def test_a_token_is_asked_for_and_sent_to_the_hub_alone(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.token = "hf_secret"
    with pytest.raises(InputError, match=r"(?s)Invalid credentials.*hf auth login"):
        find_candidates([f"hf://{REPO}@stage1-*"])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    store = hub.HubStore()
    monkeypatch.setattr(hub, "STORE", store)
    published.requests.clear()
    average([f"hf://{REPO}@stage1-*"], tmp_path / "out", device="cpu")
    sent = {(request.kind, request.host.split(":")[0]): request.authorization for request in published.requests}
    assert sent["cdn", "localhost"] == "" and sent["resolve", "127.0.0.1"] == "Bearer hf_secret"
    assert all(request.authorization == "" for request in published.requests if request.host.startswith("localhost"))
    store.client.close()


# -- answers that are wrong
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["503", "429", "truncate", "norange", "shift", "drop", "slow", "403"])
def test_a_fault_that_passes_is_tried_again(fault: str, hub_server: HubServer, source: Source) -> None:
    hub_server.faults[:] = [fault]
    assert read_bytes(source, 1000, 100_000) == DATA[1000:101_000]
    assert not hub_server.faults


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("503", "answered 503"),
        ("429", "answered 429"),
        ("norange", "ignores ranges: it sent the whole file"),
        ("shift", "sent another range: bytes 1001-101000/512000, not bytes 1000-100999/512000"),
        ("drop", "at byte 1000"),
        ("403", "answered 403"),
    ],
)
def test_a_fault_that_stays_is_an_error_and_never_other_bytes(fault: str, text: str, hub_server: HubServer, source: Source) -> None:
    hub_server.faults[:] = [fault] * 100
    with pytest.raises(StoreError) as error:
        read_bytes(source, 1000, 100_000)
    assert text in str(error.value) and source.path in str(error.value)


def test_a_truncated_answer_goes_on_where_it_ended(hub_server: HubServer, source: Source) -> None:
    hub_server.faults[:] = ["truncate"] * 12  # more often than a request that brings nothing is tried
    assert read_bytes(source, 0, len(DATA)) == DATA


def test_the_same_bytes_by_other_headers_are_refused(hub_server: HubServer, source: Source) -> None:
    """The link leads to a file of another size: what a cache on the way may do."""
    commit = hub_server.refs["org/model"]["main"]
    hub_server.commits[commit]["model.safetensors"] = DATA[:-1]
    with pytest.raises(ChangedError, match=r"has 511999 bytes by its link, and 512000 by its listing"):
        read_bytes(source, 0, 10)
    hub_server.commits[commit]["model.safetensors"] = DATA
    read_bytes(source, 0, 10)
    hub_server.commits[commit]["model.safetensors"] = DATA[:-1]
    with pytest.raises(ChangedError, match="changed during the run"):
        read_bytes(source, 0, 10)


def test_links_that_expire_are_renewed_once_for_all_threads(hub_server: HubServer, source: Source) -> None:
    hub_server.link_seconds = 0.2
    read_bytes(source, 0, 10)
    time.sleep(0.3)
    hub_server.link_seconds = 3600.0
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: bytes(read_bytes(source, i * 1000, 1000)), range(64)))
    assert b"".join(found) == DATA[:64_000]
    assert hub_server.counts()["resolve"] == 2


def test_all_threads_wait_when_the_server_asks_to(hub_server: HubServer, source: Source) -> None:
    read_bytes(source, 0, 10)
    hub_server.faults[:], hub_server.retry_after = ["429"], "1"
    began = time.monotonic()
    read_bytes(source, 0, 10)
    assert time.monotonic() - began >= 0.9
    hub_server.faults[:] = ["429"]
    hub_server.requests.clear()
    began, arrivals = time.monotonic(), []

    def read(i: int) -> None:
        time.sleep(0.2 if i else 0.0)  # the others come while the first one waits
        read_bytes(source, i * 10, 10)
        arrivals.append(time.monotonic() - began)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert min(arrivals) >= 0.9 and len(hub_server.requests) == 5


def test_a_server_that_asks_for_more_patience_than_is_sane_is_an_error(hub_server: HubServer, source: Source) -> None:
    read_bytes(source, 0, 10)
    hub_server.faults[:], hub_server.retry_after = ["429"], "3600"
    with pytest.raises(StoreError, match="answered 429"):
        read_bytes(source, 0, 10)


def test_listing_is_tried_again_too(published: HubServer) -> None:
    published.api_faults[:] = ["503", "429", "drop"]
    assert len(find_candidates([f"hf://{REPO}@stage1-*"])[0]) > 1
    published.api_faults[:] = ["503"] * 100
    with pytest.raises(StoreError, match=r"127\.0\.0\.1 answered 503"):
        find_candidates([f"hf://{REPO}@stage1-*"])


def test_a_server_that_is_not_there_is_named(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "STORE", hub.HubStore())
    with pytest.raises(StoreError, match=r"(?s)cannot read http://127\.0\.0\.1:9.*Connection refused.*tried 4 times"):
        find_candidates(["hf://org/model@*"])


def test_random_ranges_by_many_threads_under_faults(hub_server: HubServer, source: Source) -> None:
    hub_server.always_first = ["503", "truncate", "drop", "norange", "429", "403", "shift"]
    ranges = [(i * 7919 % 400_000, 1 + i * 104_729 % 100_000) for i in range(100)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: bytes(read_bytes(source, *at)), ranges))
    assert found == [DATA[begin : begin + size] for begin, size in ranges]
    assert len(hub_server.asked) >= 100


# -- proxies, certificates, the cache
# -----------------------------------------------------------------------------------------


def test_proxies_are_honored(hub_server: HubServer, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with HubServer() as proxy:
        proxy.refs, proxy.commits = hub_server.refs, hub_server.commits
        monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://user:pass@"))
        client = http.HttpClient(hub_server.url, None)
        hub_server.requests.clear()
        assert client.head(f"{hub_server.url}/org/model/resolve/main/config.json").status == 200
        assert not hub_server.requests and proxy.requests[0].target.startswith(hub_server.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert client.head(f"{hub_server.url}/org/model/resolve/main/config.json").status == 200
        assert len(hub_server.requests) == 1
        client.close()


def test_a_certificate_that_is_not_trusted_is_refused_until_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_server: HubServer
) -> None:
    certificate = tmp_path / "cert.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    try:
        subprocess.run([*command, "-keyout", str(tmp_path / "key.pem"), "-out", str(certificate)], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    with HubServer(certificate=certificate, key=tmp_path / "key.pem") as secure:
        secure.commit("org/model", "main", {"model.safetensors": DATA})
        monkeypatch.setenv("HF_ENDPOINT", secure.url)
        monkeypatch.setattr(hub, "STORE", hub.HubStore())
        with pytest.raises(StoreError, match=r"(?s)the certificate is not trusted.*SSL_CERT_FILE"):
            open_store("hf://").stat("hf://org/model/config.json")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        store = hub.HubStore()
        monkeypatch.setattr(hub, "STORE", store)
        assert read_file("hf://org/model/model.safetensors", 1 << 20) == DATA
        store.client.close()


def test_the_local_cache_is_used_and_alone_when_offline(
    published: HubServer, local: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch, name = "stage1-step1000-tokens4B", next(path.name for path in sorted(local[0].glob("*.safetensors")))
    put_in_cache(tmp_path / "hub", REPO, branch, published.refs[REPO][branch], files_of(local[0]))
    with closing(open_store("hf://").open(f"hf://{REPO}@{branch}/{name}")) as online:
        published.requests.clear()
        assert read_bytes(online, 0, online.num_bytes) == (local[0] / name).read_bytes()
    assert not published.requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "STORE", hub.HubStore())
    with closing(open_store("hf://").open(f"hf://{REPO}@{branch}/{name}")) as offline:
        assert (offline.version, offline.num_bytes) == (online.version, online.num_bytes)
    expected = content(average(local[:1], tmp_path / "near", device="cpu").output)
    assert content(average([f"hf://{REPO}@{branch}"], tmp_path / "far", device="cpu").output) == expected
    assert not published.requests
    with pytest.raises(InputError, match=r"(?s)is not in the local cache.*hf download"):
        find_candidates([f"hf://{REPO}@main"])
    with pytest.raises(InputError, match="cannot be listed with HF_HUB_OFFLINE=1"):
        find_candidates([f"hf://{REPO}@stage1-*"])


def test_of_several_revisions_the_one_in_the_cache_is_not_fetched(published: HubServer, local: list[Path], tmp_path: Path) -> None:
    names = [f"stage1-step{number}000-tokens{4 * number}B" for number in (1, 2)]
    put_in_cache(tmp_path / "hub", REPO, names[0], published.refs[REPO][names[0]], files_of(local[0]))
    expected = content(average(local[:2], tmp_path / "near", device="cpu").output)
    assert content(average([f"hf://{REPO}@{name}" for name in names], tmp_path / "far", device="cpu").output) == expected
    fetched = [request.target for request in published.requests if request.kind in ("cdn", "resolve")]
    assert fetched and not [target for target in fetched if published.refs[REPO][names[0]] in target]


def put_in_cache(cache: Path, repo: str, ref: str, commit: str, files: dict[str, bytes]) -> None:
    """As huggingface_hub lays out its cache: blobs by hash, snapshots of links, refs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs" / ref).write_text(commit)
    for name, data in files.items():
        large = name.endswith(".safetensors")
        blob = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (root / "blobs" / blob).write_bytes(data)
        path = root / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(root / "blobs" / blob)


def test_huggingface_hub_takes_the_server_for_a_hub(
    published: HubServer, local: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what pmerge asks is what the Hub answers: the same routes, fields and headers as its
    own client uses.
    """
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the tests are offline, but for this server
    api = HfApi(endpoint=published.url)
    refs = {ref.name: ref.target_commit for ref in api.list_repo_refs(REPO).branches}
    assert refs == published.refs[REPO]
    name = next(path.name for path in sorted(local[0].glob("*.safetensors")))
    info = api.model_info(REPO, revision="stage1-step1000-tokens4B", files_metadata=True)
    url = hf_hub_url(REPO, name, revision=info.sha, endpoint=published.url)
    metadata = get_hf_file_metadata(url)
    with closing(open_store("hf://").open(f"hf://{REPO}@{info.sha}/{name}")) as source:
        assert (metadata.commit_hash, metadata.size, f"sha256 {metadata.etag}") == (info.sha, source.num_bytes, source.version)
