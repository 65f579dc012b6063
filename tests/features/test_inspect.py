"""Inspecting checkpoints with equal headers costs as much as one, and reports each on its own."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CONFIG, write_checkpoint

from merge_cli.features import inspect
from merge_cli.features.inspect import inspect_checkpoints
from merge_cli.formats import checkpoint, index, safetensors
from merge_cli.formats.alike import Moved

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def write(folder: Path, rows: int = 3) -> Path:
    tensors = {
        "a": torch.ones(rows, 5),
        "x.weight": torch.ones(130, 140).to(torch.float8_e4m3fn),
        "x.weight_scale_inv": torch.ones(2, 2),
        "layers.0.experts.0.w": torch.ones(2),
        "layers.0.experts.1.w": torch.ones(2),
    }
    return write_checkpoint(folder, tensors, shards=2, config={**CONFIG, "quantization_config": FP8})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function that costs was called."""
    counts: Counter[str] = Counter()

    def counted(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def count(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return real(*given, **named)

        monkeypatch.setattr(owner, name, count)

    counted(safetensors, "parse_header")
    counted(checkpoint, "_weight_file")
    counted(index, "_parse_index")
    counted(Moved, "__getitem__")
    counted(inspect, "experts_per_layer")
    return counts


def test_equal_headers_are_parsed_counted_and_compared_once(tmp_path: Path, calls: Counter[str]) -> None:
    report = inspect_checkpoints([write(tmp_path / f"ckpt_{step}") for step in range(1, 5)])
    assert calls == {"parse_header": 2, "_weight_file": 8, "_parse_index": 1, "experts_per_layer": 1}
    assert report.differences == []
    first, *others = [each.as_dict() for each in report.checkpoints]
    assert first["num_tensors"] == 5
    assert first["num_parameters"] == 15 + 130 * 140 + 4
    assert (first["experts"], first["quantization"]) == ({2: 1}, {"fp8 block 128x128": 1})
    assert [{**each, "path": first["path"], "step": 1} for each in others] == [first] * 3


def test_other_headers_are_counted_and_compared_for_themselves(tmp_path: Path, calls: Counter[str]) -> None:
    paths = [write(tmp_path / "ckpt_1", rows=4), *(write(tmp_path / f"ckpt_{step}") for step in range(2, 5))]
    report = inspect_checkpoints(paths)
    assert calls["__getitem__"] == 0
    assert calls["experts_per_layer"] == 2
    assert [each.num_parameters - 130 * 140 for each in report.checkpoints] == [24, 19, 19, 19]
    assert report.differences == [f"`a`  F32 [4, 5] in {paths[0]}, F32 [3, 5] in {paths[3]}"]
