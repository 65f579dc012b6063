"""An S3 server on loopback: objects in memory, ranges, If-Match, listing with a delimiter, faults;
uploads as a whole and in parts, If-None-Match, the hash that each request is signed with.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_TIME = "2026-11-26T15:00:00.000Z"


class S3Server:
    """`objects` maps "bucket/key" to bytes. `faults` are taken one a request for an object: "503",
    "403", "truncate", "norange".
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.faults: list[str] = []
        self.put_faults: list[str] = []  # one an upload, of an object or of a part: "403", "damage"
        self.metadata: dict[str, dict[str, str]] = {}
        self.parts: dict[str, dict[int, bytes]] = {}  # of uploads that are not complete
        self.on_put: Callable[[str], None] = lambda path: None
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                server._answer(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> S3Server:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, h: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(h.path)
        path, query = unquote(parts.path).strip("/"), {key: value[0] for key, value in parse_qs(parts.query).items()}
        with self._lock:
            self.requests.append((h.command, h.path, {key.lower(): value for key, value in h.headers.items()}))
            fault = self.faults.pop(0) if "list-type" not in query and h.command == "GET" and self.faults else ""
        if h.command in ("PUT", "POST", "DELETE"):
            return self._receive(h, path, query)
        if "list-type" in query:
            return self._list(h, path, query.get("prefix", ""), query.get("delimiter", ""))
        if fault in ("503", "403"):
            return self._reply(h, int(fault), b"<Error><Code>SlowDown</Code></Error>", {})
        if (data := self.objects.get(path)) is None:
            return self._reply(h, 404, b"<Error><Code>NoSuchKey</Code></Error>", {})
        etag = _etag(data)
        if (wanted := h.headers.get("If-Match")) is not None and wanted != etag:
            return self._reply(h, 412, b"<Error><Code>PreconditionFailed</Code></Error>", {})
        headers = {"ETag": etag, "Last-Modified": "Thu, 26 Nov 2026 15:00:00 GMT", "Accept-Ranges": "bytes"}
        headers |= self.metadata.get(path, {})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range") or "")
        if asked is None or fault == "norange":
            return self._reply(h, 200, data, headers)
        begin, end = int(asked[1]), min(len(data), int(asked[2]) + 1 if asked[2] else len(data))
        if begin >= len(data):
            return self._reply(h, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._reply(h, 206, data[begin:end], headers, truncate=fault == "truncate")

    def _receive(self, h: BaseHTTPRequestHandler, path: str, query: dict[str, str]) -> None:
        body = h.rfile.read(int(h.headers.get("Content-Length") or 0))
        if h.command == "DELETE":
            self.parts.pop(query.get("uploadId", ""), None)
            return self._reply(h, 204, b"", {})
        if h.command == "POST" and "uploadId" not in query:
            name = f"{path}#{len(self.requests)}"
            self.parts[name] = {}
            self.metadata[name] = _metadata(h)
            answer = f"<InitiateMultipartUploadResult><UploadId>{escape(name)}</UploadId></InitiateMultipartUploadResult>"
            return self._reply(h, 200, answer.encode(), {})
        if h.command == "POST":
            self.on_put(path)
            parts = self.parts.pop(query["uploadId"])
            self.metadata[path] = self.metadata.pop(query["uploadId"])
            self.objects[path] = b"".join(parts[number] for number in sorted(parts))
            etag = escape(_etag(self.objects[path]))
            answer = f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
            return self._reply(h, 200, answer.encode(), {})
        fault = self.put_faults.pop(0) if self.put_faults else ""
        if fault == "403":
            return self._reply(h, 403, b"<Error><Code>AccessDenied</Code></Error>", {})
        if fault == "damage":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if hashlib.sha256(body).hexdigest() != h.headers.get("x-amz-content-sha256"):
            return self._reply(h, 400, b"<Error><Code>XAmzContentSHA256Mismatch</Code></Error>", {})
        if "uploadId" in query:
            self.parts[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self.on_put(path)
            if h.headers.get("If-None-Match") == "*" and path in self.objects:
                return self._reply(h, 412, b"<Error><Code>PreconditionFailed</Code></Error>", {})
            self.objects[path] = body
            self.metadata[path] = _metadata(h)
        self._reply(h, 200, b"", {"ETag": _etag(body)})

    def _list(self, h: BaseHTTPRequestHandler, bucket: str, prefix: str, delimiter: str) -> None:
        keys = [key[len(bucket) + 1 :] for key in sorted(self.objects) if key.startswith(f"{bucket}/{prefix}")]
        found, folders = [], set()
        for key in keys:
            name, slash, _ = key[len(prefix) :].partition("/")
            if delimiter and slash and name:
                folders.add(prefix + name + "/")
            else:
                found.append(key)
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_TIME}</LastModified><ETag>{escape(_etag(data))}</ETag>"
            f"<Size>{len(data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key in found
            for data in [self.objects[f"{bucket}/{key}"]]
        )
        prefixes = "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(folders))
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}{prefixes}</ListBucketResult>"
        self._reply(h, 200, body.encode(), {"Content-Type": "application/xml"})

    def _reply(self, h: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], truncate: bool = False) -> None:
        h.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            h.send_header(key, value)
        h.end_headers()
        if h.command != "HEAD":
            h.wfile.write(data[: len(data) // 2] if truncate else data)
        if truncate:
            h.close_connection = True


def _metadata(h: BaseHTTPRequestHandler) -> dict[str, str]:
    return {key: value for key, value in h.headers.items() if key.lower().startswith("x-amz-meta-")}


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
