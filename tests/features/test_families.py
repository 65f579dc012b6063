"""Checkpoints as transformers saves them: eighteen families, sharded small, merged, loaded back."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from builders import perturbed, read_layout
from checks import units_apart
from models import SMALL
from reference import coefficients, exact_mean, load, weighted_sum
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, logging

from merge_cli import average

pytestmark = pytest.mark.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()

QWEN_MOE: dict[str, Any] = {
    **SMALL,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": {**SMALL, "head_dim": 8, "tie_word_embeddings": True},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "deepseek_v3": {
        **SMALL,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "deepseek_v2": {
        **SMALL,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": QWEN_MOE,
    "qwen3_next": {**QWEN_MOE, **LINEAR_ATTENTION},
    "qwen3_5_moe_text": {**QWEN_MOE, **LINEAR_ATTENTION},
    "glm4_moe": {
        **SMALL,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "llama4_text": {**SMALL, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    "gpt_oss": {**SMALL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
    "gpt2": {
        "vocab_size": 96,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "mamba": {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    },
    "llava": {
        "text_config": {"model_type": "llama", **SMALL},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
        "image_token_index": 95,
    },
}


def model_class(family: str) -> Any:
    return AutoModelForImageTextToText if family == "llava" else AutoModelForCausalLM


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model: PreTrainedModel = model_class(family).from_config(config, dtype=torch.bfloat16)
    paths = []
    for step in (100, 200, 300, 400):
        state = model.state_dict()
        moved = perturbed(state, step)
        model.load_state_dict(moved)
        model.save_pretrained(folder / f"checkpoint-{step}", max_shard_size="20KB")
        paths.append(folder / f"checkpoint-{step}")
    return family, paths


@pytest.mark.parametrize("method", ["sma", "wma", "ema", "decay", "power"])
def test_merge_keeps_everything_equals_the_oracle_and_loads(run: tuple[str, list[Path]], method: str, tmp_path: Path) -> None:
    family, paths = run
    out = average(paths, tmp_path / "out", method=method).output
    assert read_layout(out) == read_layout(paths[-1])
    assert len(read_layout(out)) > 1
    inputs = [load(path) for path in paths]
    merged = load(out)
    different = total = 0
    for name, found in merged.items():
        tensors = [each[name] for each in inputs]
        if not found.is_floating_point():
            assert torch.equal(found, tensors[-1])
            continue
        if method in ("sma", "wma"):
            expected = exact_mean(tensors, [1] * 4 if method == "sma" else [1, 2, 3, 4], found.dtype)
            assert not units_apart(found.flatten(), expected.flatten()).any(), name
        else:
            expected = weighted_sum(tensors, coefficients(method, [100, 200, 300, 400]), found.dtype)
            apart = units_apart(found.flatten(), expected.flatten())
            assert apart.max() <= 1, name
            different += int(apart.sum())
        total += found.numel()
    assert different <= max(1, 1e-5 * total)
    model, report = model_class(family).from_pretrained(out, output_loading_info=True)
    assert not {key: value for key, value in report.items() if value}
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.keys() == merged.keys()
    assert all(torch.equal(again[name], merged[name]) for name in merged)
