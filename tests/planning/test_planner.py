"""Checkpoints with equal headers are parsed and looked at once, and planned as if each were alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from builders import CONFIG, write_checkpoint, write_safetensors

from merge_cli.formats import index, safetensors
from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.planning.extent import Extent, Location, QuantizedExtent, QuantizedSource
from merge_cli.planning.plan import MergePlan, Output
from merge_cli.planning.planner import build_plan
from merge_cli.planning.record import fingerprint
from merge_cli.request.coefficients import Coefficients
from merge_cli.request.spec import MergeSpec

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def plain(step: int) -> dict[str, torch.Tensor]:
    return {
        "a": torch.full((3, 5), float(step), dtype=torch.bfloat16),
        "b": torch.ones(7),
        "count": torch.tensor([4]),
        "c": torch.zeros(2),
    }


def quantized(step: int) -> dict[str, torch.Tensor]:
    codes = torch.full((130, 140), 1.5 + step).to(torch.float8_e4m3fn)
    return {"x.weight": codes, "x.weight_scale_inv": torch.full((2, 2), 0.5), **plain(step)}


def write(folder: Path, layout: str, step: int) -> Path:
    if layout == "one file":
        write_safetensors(folder.with_suffix(".safetensors"), plain(step))
        return folder.with_suffix(".safetensors")
    if layout == "ranks":
        for rank in range(2):
            (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
            write_safetensors(folder / f"mp_rank_{rank:02d}/model.safetensors", plain(step + rank))
        return folder
    if layout == "quantized":
        return write_checkpoint(folder, quantized(step), shards=2, config={**CONFIG, "quantization_config": FP8})
    return write_checkpoint(folder, plain(step), shards=2)


def planned(inputs: Sequence[Checkpoint], **options: Any) -> MergePlan:
    count = len(inputs)
    coefficients = Coefficients((1 / count,) * count)
    output = Output(tuple(range(count)), coefficients, count - 1)
    return build_plan(MergeSpec(**options), inputs, [None] * count, count - 1, [output])


def places(plan: MergePlan) -> list[object]:
    """Every source of every extent, by paths and offsets."""

    def place(source: Location | QuantizedSource) -> object:
        if isinstance(source, Location):
            return source.file.path, source.offset, source.dtype
        return source.codec, [(part.role, part.file.path, part.offset, part.num_bytes) for part in source.parts]

    def facts(extent: Extent | QuantizedExtent) -> Mapping[str, object]:
        return {
            "keys": extent.keys,
            "sources": [place(source) for source in extent.sources],
            "read": extent.source_bytes,
            "dtypes": extent.value_dtypes,
        }

    return [(file.name, file.header, [facts(extent) for extent in file.extents]) for file in plan.files]


@pytest.mark.parametrize("layout", ["index", "one file", "ranks", "quantized"])
@pytest.mark.parametrize("options", [{}, {"exclude": ("*a",)}, {"int_policy": "newest"}], ids=["plain", "exclude", "newest"])
def test_inputs_opened_together_are_planned_as_those_opened_apart(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    paths = [write(tmp_path / f"c{step}", layout, step) for step in range(3)]
    seen = Seen()
    together = planned([open_checkpoint(path, seen=seen) for path in paths], **options)
    apart = planned([open_checkpoint(path) for path in paths], **options)
    assert places(together) == places(apart)
    assert fingerprint(together) == fingerprint(apart)


def test_only_requantizing_needs_the_base_in_its_own_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"c{step}", "quantized", step) for step in range(2)]
    seen = Seen()
    together = planned([open_checkpoint(path, seen=seen) for path in paths], requantize=True, exclude=("x.weight",))
    assert places(together) == places(planned(list(map(open_checkpoint, paths)), requantize=True, exclude=("x.weight",)))


def test_equal_headers_and_indexes_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def counted(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        def count(*given: Any) -> Any:
            parsed.append(name)
            return real(*given)

        monkeypatch.setattr(module, name, count)

    counted(safetensors, "parse_header")
    counted(index, "_parse_index")
    seen = Seen()
    for step in range(4):
        open_checkpoint(write(tmp_path / f"c{step}", "index", step), seen=seen)
    assert sorted(parsed) == ["_parse_index", "parse_header", "parse_header"]


def test_the_first_checkpoint_opened_need_not_be_an_input(tmp_path: Path) -> None:
    seen = Seen()
    paths = [write(tmp_path / f"c{step}", "quantized", step) for step in range(3)]
    opened = [open_checkpoint(path, seen=seen) for path in paths]
    assert places(planned(opened[1:])) == places(planned(list(map(open_checkpoint, paths[1:]))))


def test_one_record_a_tensor_is_held_for_inputs_with_equal_headers(tmp_path: Path) -> None:
    seen = Seen()
    inputs = [open_checkpoint(write(tmp_path / f"c{step}", "quantized", step), seen=seen) for step in range(4)]
    other = write_checkpoint(tmp_path / "other", quantized(9), shards=3, config={**CONFIG, "quantization_config": FP8})
    plan = planned([*inputs, open_checkpoint(other, seen=seen)])
    (extent,) = [extent for file in plan.files for extent in file.extents if isinstance(extent, QuantizedExtent)]
    assert len(extent.sources) == 5
    assert len(extent.sources.firsts) == 2


def test_notes_on_a_checkpoint_name_its_own_folder(tmp_path: Path) -> None:
    seen = Seen()
    for step in range(2):
        folder = write(tmp_path / f"c{step}", "index", step)
        write_safetensors(folder / "extra.safetensors", {"more": torch.ones(2)})
        (note,) = open_checkpoint(folder, seen=seen).notes
        assert note.startswith(f"{folder}: `more` in extra.safetensors")
