"""Sending to an object store by obstore: `s3://bucket/folder`, `gs://`, `az://`.

An object is there as a whole or not at all, so shards need no other names while they are sent.
Large ones go in parts, in bounded memory; parts are signed with their hash, which S3 checks. Small
ones, `pmerge.json` first and the index last among them, are made only where nothing is: two pushes
of different results to one folder cannot mix.

The sha256 of each object is kept beside it, and tells a later push what need not be sent again.
Not guarded against: another program that writes the same shards at the same time. Parts of a push
that was killed are no objects, but are paid for, until a rule of the bucket removes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import Any

from merge_cli.errors import InputError, OutputError
from merge_cli.stores.object_store import connect, parse_place, translated
from merge_cli.stores.upload import Outgoing, There

PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
_MOST_PARTS = 9_000  # S3 has 10,000
_HASH = "sha256"


class ObjectTarget:
    """A folder of a bucket."""

    def __init__(self, address: str) -> None:
        self.place = parse_place(address)
        if not self.place.key:
            raise InputError(f"{address} is a whole bucket", hint=f"name a folder in it:  {address}/merged")

    def look(self, ours: Collection[str]) -> Mapping[str, There]:
        prefix = self.place.key + "/"
        try:
            bucket = connect(self.place.bucket)
            found = [each for some in import_module("obstore").list(bucket, prefix) for each in some]
            there = {each["path"].removeprefix(prefix): There(each["size"], "") for each in found}
            return {name: self._with_hash(bucket, name) if name in ours else each for name, each in there.items()}
        except Exception as error:
            raise translated(error, str(self)) from error

    def send(self, files: Sequence[Outgoing], title: str, on_sent: Callable[[int], None]) -> str:
        bucket = connect(self.place.bucket)
        for file in files:
            try:
                self._put(bucket, file)
            except Exception as error:
                if type(error).__name__ not in ("AlreadyExistsError", "PreconditionError"):
                    raise translated(error, f"{self}/{file.name}", verb="write") from error
                if not self._with_hash(bucket, file.name).equals(file):
                    raise OutputError(
                        f"{self}/{file.name} has appeared, and is of another push", hint="push to another folder"
                    ) from error
            on_sent(file.num_bytes)
        return str(self)

    def __str__(self) -> str:
        return f"{self.place.bucket}/{self.place.key}"

    def _key(self, name: str) -> str:
        return f"{self.place.key}/{name}"

    def _put(self, bucket: Any, file: Outgoing) -> None:
        put, kept = import_module("obstore").put, {_HASH: file.sha256}
        if file.num_bytes <= PART_BYTES:
            put(bucket, self._key(file.name), file.read(), attributes=kept, mode="create", use_multipart=False)
        else:
            part = max(PART_BYTES, -(-file.num_bytes // _MOST_PARTS))
            put(bucket, self._key(file.name), file.content, attributes=kept, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)

    def _with_hash(self, bucket: Any, name: str) -> There:
        """An object by its size and the hash that is kept beside it."""
        answer = import_module("obstore").get(bucket, self._key(name), options={"head": True})
        digest = answer.attributes.get(_HASH)
        return There(answer.meta["size"], f"sha256 {digest}" if digest else "")


def open_target(address: str) -> ObjectTarget:
    return ObjectTarget(address)
