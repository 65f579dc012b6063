"""A Hub on loopback: repositories of commits in memory, ranges, links to a "CDN" on another host
name, and faults on demand.

    with HubServer(token="hf_x") as hub:
        hub.commit("org/model", "step1000", {"config.json": b"{}", "model.safetensors": data})

Large files (`LARGE`) are redirected, as the Hub does with LFS; the real CDN has another host name,
so this one has too (`localhost` for `127.0.0.1`): clients treat a redirect to another host
otherwise. It is also an HTTP proxy: a request for a whole URL is answered as one for its path.
huggingface_hub accepts it as a Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".distcp", ".bin")
_REPO = "([^/]+/[^/]+)"
_SENDING = {
    "lfs": "/lfs/([0-9a-f]{64})",
    "yaml": "/api/validate-yaml",
    "batch": rf"/{_REPO}\.git/info/lfs/objects/batch",
    "commits": rf"/api/models/{_REPO}/commits/(.+)",
    "branch": rf"/api/models/{_REPO}/branch/(.+)",
    "preupload": rf"/api/models/{_REPO}/preupload/(.+)",
    "commit": rf"/api/models/{_REPO}/commit/(.+)",
}


class Request(NamedTuple):
    """What a request was for ("refs", "info", "resolve", "cdn"), its target, host and token."""

    kind: str
    target: str
    host: str
    authorization: str


class HubServer:
    """`faults` are taken one a request for bytes: "503", "429", "truncate", "norange", "shift",
    "drop", "slow", "403".
    """

    def __init__(
        self, token: str = "", link_seconds: float = 3600.0, certificate: Path | None = None, key: Path | None = None
    ) -> None:
        self.token, self.link_seconds = token, link_seconds
        self.refs: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.requests: list[Request] = []
        self.faults: list[str] = []
        self.always_first: list[str] = []  # each range meets one of these when it is asked for first
        self.asked: list[str | None] = []
        self.retry_after = "0"
        self.api_faults: list[str] = []
        self.may_write = True
        self.history: dict[tuple[str, str], list[str]] = {}  # (repository, branch) -> its commits, newest first
        self.blobs: dict[str, bytes] = {}  # LFS objects that were uploaded, in a commit or in none
        self.send_faults: list[str] = []  # one an upload of an LFS object: "503", "403", "lose"
        self.on_request: Callable[[str], None] = lambda kind: None
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                with hub._lock:
                    hub.at_once += 1
                    hub.most_at_once = max(hub.most_at_once, hub.at_once)
                try:
                    hub._answer(self)
                finally:
                    with hub._lock:
                        hub.at_once -= 1

            do_HEAD = do_POST = do_PUT = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
        scheme = "http" if certificate is None else "https"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}"
        self.cdn = f"{scheme}://localhost:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo: str, ref: str, files: Mapping[str, bytes]) -> str:
        """Let `ref` be a new commit with exactly these files."""
        described = [[name, hashlib.sha1(data).hexdigest()] for name, data in sorted(files.items())]
        commit = hashlib.sha1(json.dumps([repo, described]).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs.setdefault(repo, {})[ref] = commit
        self.history.setdefault((repo, ref), []).insert(0, commit)
        return commit

    def counts(self) -> dict[str, int]:
        return dict(Counter(request.kind for request in self.requests))

    def _answer(self, h: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(h.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        kind = "cdn" if path.startswith("/cdn/") else "resolve" if "/resolve/" in path else path.rpartition("/")[2]
        sending = next((name for name, pattern in _SENDING.items() if re.fullmatch(pattern, path)), None)
        kind = kind if kind in ("cdn", "resolve", "refs") else sending or "info"
        body = h.rfile.read(int(h.headers.get("content-length") or 0)) if h.command in ("POST", "PUT") else b""
        self.on_request(kind)
        with self._lock:
            self.requests.append(Request(kind, h.path, h.headers.get("host", ""), h.headers.get("authorization", "")))
        if self.token and kind not in ("cdn", "lfs") and h.headers.get("authorization") != f"Bearer {self.token}":
            return self._json(h, 401, {"error": "no"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if kind != "cdn" and self.api_faults:
            return self._fault(h, self.api_faults.pop(0))
        if sending:
            return self._receive(h, sending, path, body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            if (refs := self.refs.get(found[1])) is None:
                return self._missing(h, "RepoNotFound")
            branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in refs.items()]
            return self._json(h, 200, {"branches": branches, "tags": [], "converts": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(h, found[1], found[2] or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(h, *found.groups())
        if found := re.fullmatch(r"/cdn/([0-9a-f]{40})/(.+)", path):
            if time.time() > float(query["Expires"][0]):
                return self._reply(h, 403, b"<Error><Code>AccessDenied</Code></Error>", {})
            data = self.commits[found[1]][found[2]]
            return self._data(h, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        self._missing(h, "EntryNotFound")

    def _find(self, repo: str, revision: str) -> str | None:
        refs = self.refs.get(repo, {})
        return refs.get(revision) or (revision if revision in self.commits else None)

    def _info(self, h: BaseHTTPRequestHandler, repo: str, revision: str) -> None:
        if repo not in self.refs:
            return self._missing(h, "RepoNotFound")
        if (commit := self._find(repo, revision)) is None:
            return self._missing(h, "RevisionNotFound")
        siblings = [_sibling(name, data) for name, data in sorted(self.commits[commit].items())]
        facts = {"id": repo, "modelId": repo, "private": False, "tags": [], "downloads": 0, "likes": 0}
        self._json(h, 200, {**facts, "sha": commit, "siblings": siblings})

    def _resolve(self, h: BaseHTTPRequestHandler, repo: str, revision: str, name: str) -> None:
        commit = self._find(repo, revision)
        if repo not in self.refs or commit is None:
            return self._missing(h, "RevisionNotFound")
        if (data := self.commits[commit].get(name)) is None:
            return self._missing(h, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_sha1(data)}"'}
        if not name.endswith(LARGE):
            return self._data(h, data, headers)
        link = f"{self.cdn}/cdn/{commit}/{name}?Expires={time.time() + self.link_seconds:.3f}"
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Location": link}
        self._reply(h, 302, b"", headers)

    # --- what is sent

    def _receive(self, h: BaseHTTPRequestHandler, kind: str, path: str, body: bytes) -> None:
        found = re.fullmatch(_SENDING[kind], path)
        assert found is not None
        if kind == "lfs":
            return self._keep(h, found[1], body)
        if kind == "yaml":
            return self._json(h, 200, {"warnings": [], "errors": []})
        if (refs := self.refs.get(found[1])) is None:
            return self._missing(h, "RepoNotFound")
        if kind == "commits":
            commits = self.history.get((found[1], found[2]), [])
            described = {"date": "2026-11-26T15:00:00.000Z", "authors": [], "title": "", "message": ""}
            return self._json(h, 200, [{"id": commit, **described} for commit in commits])
        if not self.may_write:
            return self._json(h, 403, {"error": "no"}, {"X-Error-Message": "Forbidden: you must use a write token"})
        if kind == "batch":
            return self._json(h, 200, {"transfer": "basic", "objects": [self._place(each) for each in json.loads(body)["objects"]]})
        if kind == "branch":
            start = json.loads(body)["startingPoint"]
            refs[found[2]] = start
            self.history[found[1], found[2]] = [start]
            return self._json(h, 200, {})
        if found[2] not in refs:
            return self._missing(h, "RevisionNotFound")
        if kind == "preupload":
            modes = [_mode(each["path"]) for each in json.loads(body)["files"]]
            return self._json(h, 200, {"files": modes})
        self._commit(h, found[1], found[2], [json.loads(line) for line in body.splitlines()])

    def _place(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of LFS for an object: with a link, or without one where it is there."""
        there = self.blobs.get(wanted["oid"])
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        return known if there is not None else {**known, "actions": {"upload": {"href": f"{self.cdn}/lfs/{wanted['oid']}"}}}

    def _keep(self, h: BaseHTTPRequestHandler, oid: str, body: bytes) -> None:
        fault = self.send_faults.pop(0) if self.send_faults else ""
        if fault in ("503", "403"):
            return self._fault(h, fault)
        if hashlib.sha256(body).hexdigest() != oid:
            return self._reply(h, 400, b"another hash", {})
        self.blobs[oid] = body[:-1] if fault == "lose" else body
        self._reply(h, 200, b"", {})

    def _commit(self, h: BaseHTTPRequestHandler, repo: str, branch: str, lines: Sequence[Mapping[str, Any]]) -> None:
        parent = self.refs[repo][branch]
        if lines[0]["value"].get("parentCommit", parent) != parent:
            return self._json(
                h, 412, {"error": "no"}, {"X-Error-Message": "A commit has happened since. Please refresh and try again."}
            )
        files = dict(self.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.commit(repo, branch, files)
        self._json(h, 200, {"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit})

    # --- bytes

    def _data(self, h: BaseHTTPRequestHandler, data: bytes, headers: dict[str, str]) -> None:
        with self._lock:
            fault = self.faults.pop(0) if h.command == "GET" and self.faults else ""
            asked_first = h.headers.get("range") not in self.asked
            if self.always_first and h.command == "GET" and asked_first:
                self.asked.append(h.headers.get("range"))
                fault = self.always_first[len(self.asked) % len(self.always_first)]
        if fault in ("503", "429", "403", "drop"):
            return self._fault(h, fault)
        status, begin, end = 200, 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("range") or "")
        if asked and fault != "norange":
            begin, end = int(asked[1]), min(len(data), int(asked[2]) + 1 if asked[2] else len(data))
            if begin >= len(data):
                return self._reply(h, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
            if fault == "shift":
                begin, end = begin + 1, end + 1
            status, headers = 206, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        body = data[begin:end]
        h.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            h.send_header(key, value)
        h.end_headers()
        if h.command == "HEAD":
            return
        if fault == "slow":
            for i in range(0, len(body), max(1, len(body) // 5)):
                h.wfile.write(body[i : i + max(1, len(body) // 5)])
                time.sleep(0.02)
            return
        h.wfile.write(body[: len(body) // 2] if fault == "truncate" else body)
        if fault == "truncate":
            h.close_connection = True

    def _fault(self, h: BaseHTTPRequestHandler, fault: str) -> None:
        if fault == "drop":
            h.close_connection = True
            h.connection.close()
            return
        self._reply(h, int(fault), b"busy", {"Retry-After": self.retry_after} if fault == "429" else {})

    def _missing(self, h: BaseHTTPRequestHandler, code: str) -> None:
        self._json(h, 404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, h: BaseHTTPRequestHandler, status: int, value: object, headers: Mapping[str, str] = {}) -> None:
        self._reply(h, status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _reply(self, h: BaseHTTPRequestHandler, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        h.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            h.send_header(key, value)
        h.end_headers()
        if h.command != "HEAD":
            h.wfile.write(data)


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_sha1(data)}
    if name.endswith(LARGE):
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
    return found
