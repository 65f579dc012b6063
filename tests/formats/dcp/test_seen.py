"""Metadata that differs only in the names of the save is parsed once; any other difference counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dcp_checkpoints import grid, save_dcp

from merge_cli.errors import PmergeError
from merge_cli.formats.dcp import seen
from merge_cli.formats.dcp.metadata import parse_metadata
from merge_cli.formats.dcp.seen import SeenDcp


def save(folder: Path, value: float, rows: int = 4) -> bytes:
    save_dcp(folder, {"w": torch.full((8, 4), value), "step": 3}, {"w": grid((8, 4), (rows, 1))})
    return (folder / ".metadata").read_bytes()


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def count(raw: bytes, what: str) -> Any:
        calls.append(what)
        return parse_metadata(raw, what)

    monkeypatch.setattr(seen, "parse_metadata", count)
    return calls


def test_saves_of_one_layout_are_parsed_once(tmp_path: Path, parsed: list[str]) -> None:
    first, second = save(tmp_path / "step-10", 1.0), save(tmp_path / "step-20", 2.0)
    assert first != second
    known = SeenDcp()
    assert known.parse(first, "a") is known.parse(second, "b") is known.parse(first, "c")
    assert parsed == ["a"]
    assert known.parse(second, "").tensors == parse_metadata(second, "").tensors
    assert known.parse(save(tmp_path / "step-30", 3.0, rows=2), "d").num_chunks == 2 and parsed == ["a", "d"]


def test_any_other_byte_counts(tmp_path: Path, parsed: list[str]) -> None:
    """Every byte changed in turn: the outcome is that of parsing the file by itself."""
    raw = save(tmp_path / "step-10", 1.0)
    known = SeenDcp()
    known.parse(raw, "")
    for at in range(len(raw)):
        changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        outcomes: list[Any] = []
        for parse in (known.parse, parse_metadata):
            try:
                found = parse(changed, "x")
                outcomes.append((found.tensors, found.blobs, found.paths))
            except PmergeError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1], at
    for changed in (raw + b"x", raw[:-1], raw[:-1] + b"0."):
        with pytest.raises(PmergeError):
            known.parse(changed, "x")
