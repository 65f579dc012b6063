"""Checkpoints that hold the same experts in different dialects, as transformers writes them, and
what is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from builders import perturbed, read_layout, write_checkpoint
from models import SMALL
from quantizing import encoded
from reference import load
from transformers import AutoConfig, AutoModelForCausalLM, logging

from merge_cli import average, plan_average
from merge_cli.errors import MismatchError, UnsupportedError
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.layout import Grid

pytestmark = pytest.mark.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()

MOE: dict[str, dict[str, Any]] = {
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {**SMALL, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "exaone_moe": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention"] * 2,
    },
    "granitemoe": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        **SMALL,
        "layers_block_type": ["moe", "attention"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    },
}


def both_dialects(folder: Path, family: str) -> tuple[list[Path], list[Path]]:
    """The same four checkpoints with single experts and with fused ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MOE[family])).to(torch.bfloat16)
    single: list[Path] = []
    fused: list[Path] = []
    for step in (100, 200, 300, 400):
        model.load_state_dict(perturbed(model.state_dict(), step))
        for paths, name, original in ((single, "single", True), (fused, "fused", False)):
            paths.append(folder / name / f"checkpoint-{step}")
            model.save_pretrained(paths[-1], max_shard_size="20KB", save_original_format=original)
    return single, fused


@pytest.mark.parametrize("family", MOE)
def test_either_dialect_is_read_as_the_other(family: str, tmp_path: Path) -> None:
    single, fused = both_dialects(tmp_path, family)
    assert load(single[0]).keys() != load(fused[0]).keys()
    for base, others in ((single, fused), (fused, single)):
        expected = load(average(base, tmp_path / f"expected-{base[0].parent.name}", method="ema").output)
        mixed = [others[0], base[1], others[2], base[3]]
        plan = plan_average(mixed, tmp_path / f"mixed-{base[0].parent.name}", method="ema")
        assert len([note for note in plan.merge.notes if "experts" in note or "each expert" in note]) == 2
        merged = load(average(mixed, plan.output, method="ema").output)
        assert read_layout(plan.output) == read_layout(base[3])
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_an_expert_that_is_missing_is_no_other_dialect(tmp_path: Path) -> None:
    single, fused = both_dialects(tmp_path, "qwen3_moe")
    index = json.loads((single[1] / "model.safetensors.index.json").read_text())
    lost = [name for name in index["weight_map"] if ".experts.3." in name]
    tensors = {name: tensor for name, tensor in load(single[1]).items() if name not in lost}
    short = write_checkpoint(tmp_path / "short" / "checkpoint-200", tensors)
    with pytest.raises((MismatchError, UnsupportedError), match="experts"):
        plan_average([single[0], short])
    with pytest.raises(UnsupportedError, match="cannot be mapped"):
        plan_average([short, fused[3]])


def test_transposed_experts_are_refused(tmp_path: Path) -> None:
    """[E, H, 2I], as Llama-4 and gpt-oss have them, are not the rows of the single experts."""
    single, fused = both_dialects(tmp_path, "qwen3_moe")
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if name.endswith(("gate_up_proj", "experts.down_proj")) else tensor
        for name, tensor in load(fused[0]).items()
    }
    transposed = write_checkpoint(tmp_path / "t" / "checkpoint-500", tensors)
    for paths in ([*single, transposed], [transposed, single[0]]):
        with pytest.raises(UnsupportedError, match="cannot be mapped"):
            plan_average(paths)


def test_single_quantized_experts_go_into_a_fused_base(tmp_path: Path) -> None:
    """Each expert is decoded into its rows of the fused tensor."""
    generator = torch.Generator().manual_seed(0)
    codec, (experts, wide, narrow) = Fp8(Grid(16, 16)), (3, 24, 40)
    prefix = "model.layers.0.mlp.experts"
    singles: dict[str, torch.Tensor] = {}
    rows: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for e in range(experts):
        for name, shape in (("gate_proj", (wide, narrow)), ("up_proj", (wide, narrow)), ("down_proj", (narrow, wide))):
            parts = encoded(codec, torch.randn(shape, generator=generator), shape, None, 1)
            key = f"{prefix}.{e}.{name}.weight"
            singles[key] = parts["codes"].view(torch.float8_e4m3fn).view(shape)
            singles[f"{key}_scale_inv"] = parts["scale"].view(torch.float32).view(-(-shape[0] // 16), -(-shape[1] // 16))
            values = codec.decode(parts, shape, 0, shape[0])
            rows["down_proj" if name == "down_proj" else "gate_up_proj"].append(values)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    coded = write_checkpoint(tmp_path / "step_1", singles, shards=2, config=config)
    fused = {
        f"{prefix}.gate_up_proj": torch.cat(rows["gate_up_proj"]).view(experts, 2 * wide, narrow).bfloat16(),
        f"{prefix}.down_proj": torch.cat(rows["down_proj"]).view(experts, narrow, wide).bfloat16(),
    }
    plain = write_checkpoint(tmp_path / "step_2", {name: torch.zeros_like(tensor) for name, tensor in fused.items()})
    merged = load(average([coded, plain], tmp_path / "out", weights=[1.0, 0.0], method="weights").output)
    assert all(torch.equal(merged[name], tensor) for name, tensor in fused.items())
    with pytest.raises(UnsupportedError, match="not mapped"):
        stacked = {
            f"{prefix}.gate_up_proj": torch.zeros(experts, 2 * wide, narrow).to(torch.float8_e4m3fn),
            f"{prefix}.gate_up_proj_scale_inv": torch.ones(experts, 3, 3),
            f"{prefix}.down_proj": torch.zeros(experts, narrow, wide).to(torch.float8_e4m3fn),
            f"{prefix}.down_proj_scale_inv": torch.ones(experts, 3, 2),
        }
        plan_average([write_checkpoint(tmp_path / "step_0", stacked, config=config), coded])


def test_layers_for_multi_token_prediction_and_shared_experts_are_averaged_like_any_other(tmp_path: Path) -> None:
    """DeepSeek-V3 keeps its MTP layer under the number `num_hidden_layers`, with copies of
    embedding and head.
    """
    names = [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.enorm.weight",
        "model.layers.2.mlp.experts.0.gate_proj.weight",
        "model.layers.2.shared_head.head.weight",
    ]
    run = [{name: torch.randn(5, 3).bfloat16() for name in names} for _ in range(2)]
    paths = [
        write_checkpoint(tmp_path / f"step_{i}", tensors, config={"num_hidden_layers": 2, "num_nextn_predict_layers": 1})
        for i, tensors in enumerate(run)
    ]
    merged = load(average(paths, tmp_path / "out").output)
    for name in names:
        assert torch.equal(merged[name], ((run[0][name].float() + run[1][name].float()) / 2).bfloat16())


def test_router_biases_keep_their_dtype_and_are_listed(tmp_path: Path) -> None:
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    run = [{name: torch.tensor([4.001 + step, -3.002]), "w": torch.ones(3)} for step in range(2)]
    paths = [write_checkpoint(tmp_path / f"step_{step}", tensors) for step, tensors in enumerate(run)]
    plan = plan_average(paths, dtype="bf16")
    assert any("1 router biases" in note and "F32" in note for note in plan.merge.notes)
    merged = load(average(paths, tmp_path / "out", dtype="bf16").output)
    assert merged["w"].dtype == torch.bfloat16
    assert torch.equal(merged[name], torch.tensor([4.501, -3.002]))
