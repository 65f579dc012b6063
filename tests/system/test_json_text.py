"""JSON of files: a value that can be walked and printed, or a ValueError."""

import json
import os
from pathlib import Path

import pytest

from merge_cli.system.files import read_json, read_regular
from merge_cli.system.json_text import parse_json


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b"[" * 101 + b"]" * 101,
        b'"\\ud800"',
        b'{"\\uDC00": 1}',
        '"\ud800"'.encode("utf-8", "surrogatepass"),
        b"1" * 5000,
    ],
)
def test_what_is_no_json_to_work_with_is_a_value_error(raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_json(raw)
    (tmp_path / "record.json").write_bytes(raw)
    assert read_json(tmp_path / "record.json") == ({"\udc00": 1} if b"uDC00" in raw else {})  # a name of bytes that are not UTF-8


@pytest.mark.parametrize("value", [None, 1, "é\U0001f600", [[]], {"a": {"b": [1.5, True]}}])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_in_every_encoding_that_it_may_have(value: object, encoding: str) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(encoding)) == value
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to itself", "device", "too large", "missing"])
def test_a_file_that_is_none_is_an_error_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "too large":
        path.write_bytes(b"0" * 11)
    with pytest.raises(OSError):
        read_regular(path, 10)
    if kind != "too large":
        assert read_json(path) == {}
