"""The same checkpoints in other places: as torch distributed checkpoints, and behind an object
store.

    places.py dcp OUT CHECKPOINT...             write each to OUT/NAME by torch's own writer, in eight row chunks a tensor
    places.py serve FOLDER DELAY_S BYTES_PER_S  S3 on loopback, read only: buckets are the folders in FOLDER; prints its port
    places.py read PORT THREADS BYTES KEY...    the bare client: ranges of BYTES of these objects, THREADS at once

The server waits DELAY_S before each answer, and sends no faster than BYTES_PER_S on a connection
(0: as fast as it can), as a store far away does. The bare client parses, checks and keeps nothing.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

CHUNKS = 8
PIECE_BYTES = 1 << 18
_TIME = "2026-11-26T15:00:00.000Z"


def write_dcp(out: Path, checkpoints: list[Path]) -> None:
    """Write the tensors of each checkpoint as a run on eight ranks would have, in as many files."""
    import torch
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

    class Rows(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            plan = super().create_local_plan()
            self.plan = replace(plan, items=[part for item in plan.items for part in self.cut(item)])
            return self.plan

        def cut(self, item: WriteItem) -> list[WriteItem]:
            found, data = self.state_dict[item.index.fqn], item.tensor_data
            if data is None or found.ndim == 0:
                return [item]
            rows, starts = -(-len(found) // CHUNKS), range(0, len(found), -(-len(found) // CHUNKS))
            boxes = [([at, *[0] * (found.ndim - 1)], [min(rows, len(found) - at), *found.shape[1:]]) for at in starts]
            return [
                WriteItem(
                    MetadataIndex(item.index.fqn, torch.Size(offsets)),
                    WriteItemType.SHARD,
                    tensor_data=replace(data, chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))),
                )
                for offsets, sizes in boxes
            ]

        def resolve_data(self, write_item: WriteItem) -> Any:
            found, data = self.state_dict[write_item.index.fqn], write_item.tensor_data
            if data is None or found.ndim == 0:
                return super().resolve_data(write_item)
            return found[data.chunk.offsets[0] :][: data.chunk.sizes[0]]

    for checkpoint in checkpoints:
        state = {name: each for file in sorted(checkpoint.glob("*.safetensors")) for name, each in load_file(file).items()}
        writer, planner = FileSystemWriter(out / checkpoint.name), Rows()
        planner.set_up_planner(state, writer.storage_meta(), True)
        writer.set_up_storage_writer(True)
        items = writer.prepare_local_plan(planner.create_local_plan()).items
        plans, metadata = planner.create_global_plan([SavePlan(items[rank::CHUNKS], planner_data={}) for rank in range(CHUNKS)])
        results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
        writer.finish(metadata, results)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of objects, and listings; the settings are those of the command line."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    delay_s = 0.0
    bytes_per_s = 0.0

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        time.sleep(self.delay_s)
        parts = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(parts.query).items()}
        path = self.folder / unquote(parts.path).strip("/")
        if "list-type" in query:
            self._reply(200, self._listing(path, query.get("prefix", "")), {})
        elif not path.is_file():
            self._reply(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
        else:
            self._send(path)

    def _listing(self, bucket: Path, prefix: str) -> bytes:
        folder = bucket / prefix
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        files = [(prefix + each.name, each) for each in found if each.is_file()]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_TIME}</LastModified><ETag>{_etag(each)}</ETag>"
            f"<Size>{each.stat().st_size}</Size></Contents>"
            for key, each in files
        )
        prefixes = "".join(
            f"<CommonPrefixes><Prefix>{escape(prefix + each.name)}/</Prefix></CommonPrefixes>" for each in found if each.is_dir()
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}{prefixes}</ListBucketResult>".encode()

    def _send(self, path: Path) -> None:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        begin, end = (int(asked[1]), min(size, int(asked[2]) + 1)) if asked else (0, size)
        about = {"ETag": _etag(path), "Last-Modified": "Thu, 26 Nov 2026 15:00:00 GMT"}
        if asked:
            about["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._head(206 if asked else 200, end - begin, about)
        if self.command == "HEAD":
            return
        began, sent = time.monotonic(), 0
        with path.open("rb") as file:
            while sent < end - begin:
                sent += os.sendfile(self.connection.fileno(), file.fileno(), begin + sent, min(PIECE_BYTES, end - begin - sent))
                if self.bytes_per_s:
                    time.sleep(max(0.0, began + sent / self.bytes_per_s - time.monotonic()))

    def _head(self, status: int, length: int, about: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**about, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _reply(self, status: int, body: bytes, about: dict[str, str]) -> None:
        self._head(status, len(body), about)
        self.wfile.write(body if self.command != "HEAD" else b"")


def _etag(path: Path) -> str:
    return f"&quot;{hashlib.sha256(str(path).encode()).hexdigest()[:16]}&quot;".replace("&quot;", '"')


def serve(folder: Path, delay_s: float, bytes_per_s: float) -> None:
    Handler.folder, Handler.delay_s, Handler.bytes_per_s = folder, delay_s, bytes_per_s
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


def read(port: int, threads: int, range_bytes: int, keys: list[str]) -> None:
    """Read every byte of the objects by ranges, each thread into a buffer of its own."""
    ranges = []
    for key in keys:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("HEAD", f"/{key}")
        size = int(connection.getresponse().headers["Content-Length"])
        ranges += [(key, at, min(range_bytes, size - at)) for at in range(0, size, range_bytes)]
    waiting, lock = iter(ranges), threading.Lock()

    def work() -> None:
        connection, buffer = http.client.HTTPConnection("127.0.0.1", port), memoryview(bytearray(range_bytes))
        while True:
            with lock:
                key, at, size = next(waiting, ("", 0, 0))
            if not key:
                return
            connection.request("GET", f"/{key}", headers={"Range": f"bytes={at}-{at + size - 1}"})
            answer, done = connection.getresponse(), 0
            while done < size:
                got = answer.readinto(buffer[done:size])
                if not got:
                    raise ConnectionError(f"{key} ends at {at + done}")
                done += got

    pool = [threading.Thread(target=work) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()


def main(how: str, *rest: str) -> None:
    if how == "dcp":
        write_dcp(Path(rest[0]), [Path(each) for each in rest[1:]])
    elif how == "serve":
        serve(Path(rest[0]), float(rest[1]), float(rest[2]))
    else:
        read(int(rest[0]), int(rest[1]), int(rest[2]), list(rest[3:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
