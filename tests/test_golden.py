"""The bytes of every output are those of golden.json, and the flags of every command those of
flags.json.

Whoever changes one on purpose runs `scripts/golden` and says in the commit which rows change, and
why.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import (
    AVERAGES,
    BY_RANKS,
    FLAGS,
    GOLDEN,
    INPUTS,
    SWEEPS,
    Digests,
    by_ranks,
    changed,
    digests,
    digests_of_folders,
    flags,
    one_average,
    one_sweep,
)
from golden_inputs import write_all

EXPECTED: dict[str, Digests] = json.loads(GOLDEN.read_text(encoding="utf-8"))
HINT = "if that is on purpose: scripts/golden"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The training runs by name, oldest checkpoint first; nothing writes to them."""
    return write_all(tmp_path_factory.mktemp("golden"))


def assert_row(name: str, found: Digests) -> None:
    assert not changed({name: EXPECTED[name]}, {name: found}), HINT


def test_every_row_is_tested() -> None:
    assert list(EXPECTED) == [INPUTS, *AVERAGES, *SWEEPS], HINT


def test_the_inputs_are_the_same(runs: dict[str, list[Path]]) -> None:
    assert_row(INPUTS, digests_of_folders(runs["sharded"][0].parent.parent))


@pytest.mark.parametrize("name", AVERAGES)
def test_average(name: str, runs: dict[str, list[Path]], tmp_path: Path) -> None:
    row = AVERAGES[name]
    one_average(runs[row.run], tmp_path / "out", row.options)
    assert_row(name, digests(tmp_path / "out"))


@pytest.mark.parametrize("name", BY_RANKS)
def test_three_ranks_write_the_bytes_of_one(name: str, runs: dict[str, list[Path]], tmp_path: Path) -> None:
    row = AVERAGES[name]
    by_ranks(runs[row.run], tmp_path / "out", row.options)
    assert_row(name, digests(tmp_path / "out"))


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep(name: str, runs: dict[str, list[Path]], tmp_path: Path) -> None:
    row = SWEEPS[name]
    one_sweep(runs[row.run], tmp_path / "out", row.options)
    assert_row(name, digests_of_folders(tmp_path / "out"))


def test_the_flags_of_every_command() -> None:
    assert flags() == json.loads(FLAGS.read_text()), HINT
