"""The index of a sharded checkpoint, `*.safetensors.index.json`: which shard holds which tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from merge_cli.errors import IncompleteError, InputError
from merge_cli.formats.untrusted_json import DECODER, parse_member, walk_object
from merge_cli.stores.store import read_file
from merge_cli.system.json_text import may_hold_surrogates

INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000  # as much as a header; the largest in use have about 20 MB

Index = tuple[dict[str, str], dict[str, Any]]
"""The `weight_map` (tensor name -> file name) and `metadata` of an index file."""


def read_index(path: str, seen: dict[str, Index] | None = None) -> Index:
    """The `weight_map` and `metadata` of an index file, checked to be of that shape; those in
    `seen` by the sha256 of the file are not parsed again.
    """
    raw = read_file(path, MAX_INDEX_BYTES)
    digest = hashlib.sha256(raw).hexdigest()
    seen = {} if seen is None else seen
    if digest not in seen:
        seen[digest] = _checked_index(raw, path)
    return seen[digest]


def _checked_index(raw: bytes, path: str) -> Index:
    weight_map, metadata = _parse_index(raw, path)
    if not weight_map:
        raise InputError(f"{path}: `weight_map` must be an object that maps tensors to files, and not empty")
    names = set(weight_map.values())
    folded = {name.casefold(): name for name in names}
    if len(folded) < len(names):
        twice = next(name for name in sorted(names) if folded[name.casefold()] != name)
        raise InputError(f"{path}: {twice[:200]!r} and {folded[twice.casefold()][:200]!r} are one file where case does not count")
    return weight_map, metadata


def _parse_index(raw: bytes, path: str) -> Index:
    weight_map: dict[str, str] = {}
    members: dict[str, Any] = {}
    names: dict[str, str] = {}  # each file name once, however many tensors it holds

    def add_tensor(tensor: str, at: int) -> int:
        if tensor in weight_map:
            raise InputError(f"{path}: the key {tensor[:200]!r} of `weight_map` occurs twice")
        name, end = DECODER.raw_decode(text, at) if text.startswith('"', at) else (None, at)
        if name is None or (name not in names and not _is_plain_path(name)):
            found = f"{name!r:.200}" if name is not None else text[at : at + 40]
            raise InputError(
                f"{path}: weight_map[{tensor[:200]!r}] is {found}, which is not the name of a safetensors file here",
                hint="an index may only name *.safetensors files beside it, without '..' or a leading '/'",
            )
        weight_map[tensor] = names.setdefault(name, name)
        return end

    def add_member(key: str, at: int) -> int:
        if key in members:
            raise InputError(f"{path}: the key {key[:200]!r} occurs twice")
        members[key] = None
        if key == "weight_map" and text.startswith("{", at):
            return walk_object(text, at, add_tensor)
        members[key], end = parse_member(text, at, f"{path}: `{key[:200]}`")
        return end

    try:
        text = raw.decode("utf-8")
        if text[walk_object(text, 0, add_member) :].strip(" \t\n\r"):
            raise ValueError("more text after the end of the object")
        if may_hold_surrogates(text):
            json.dumps([weight_map, members], ensure_ascii=False).encode()
    except ValueError as error:
        kind = InputError if raw.rstrip().endswith(b"}") else IncompleteError
        raise kind(f"{path} is not valid JSON: {error}") from error
    metadata = members.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: `metadata` must be an object")
    return weight_map, metadata


def _is_plain_path(name: str) -> bool:
    parts = name.split("/")
    return (
        len(name) <= 1000
        and name.endswith(".safetensors")
        and "\0" not in name
        and "\\" not in name
        and all(p not in ("", ".", "..") for p in parts)
    )


def choose_index(folder: str, indexes: Sequence[str], found: Sequence[str]) -> str:
    if "model" + INDEX_SUFFIX in indexes:
        return "model" + INDEX_SUFFIX
    if len(indexes) > 1:
        raise InputError(f"several indexes in {folder}", details=indexes, hint="keep one of them")
    if indexes and not found:
        raise IncompleteError(f"{folder} has {indexes[0]} but none of its shards")
    return indexes[0] if indexes else ""
