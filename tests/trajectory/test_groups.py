"""The layer and kind of tensors, by the names that frameworks give them."""

import pytest

from merge_cli.trajectory.groups import KINDS, group_of

NAMES = {
    "model.embed_tokens.weight": (None, "embedding"),
    "model.layers.3.self_attn.q_proj.weight": (3, "attention"),
    "model.layers.3.self_attn.kv_a_layernorm.weight": (3, "norm"),
    "model.layers.3.self_attn.q_norm.weight": (3, "norm"),
    "model.layers.12.mlp.gate_proj.weight": (12, "MLP"),
    "model.layers.12.input_layernorm.weight": (12, "norm"),
    "model.layers.12.mlp.gate.weight": (12, "router"),
    "model.layers.12.mlp.gate.e_score_correction_bias": (12, "router bias"),
    "model.layers.12.mlp.experts.7.down_proj.weight": (12, "experts"),
    "model.layers.12.mlp.shared_experts.up_proj.weight": (12, "experts"),
    "model.layers.12.mlp.shared_expert_gate.weight": (12, "router"),
    "model.layers.0.block_sparse_moe.gate.weight": (0, "router"),
    "model.layers.0.block_sparse_moe.experts.0.w1.weight": (0, "experts"),
    "model.layers.0.mlp.router.bias": (0, "router"),
    "model.layers.0.mlp.experts.gate_up_proj_blocks": (0, "experts"),
    "model.norm.weight": (None, "norm"),
    "lm_head.weight": (None, "head"),
    "transformer.wte.weight": (None, "embedding"),
    "transformer.h.5.attn.c_attn.weight": (5, "attention"),
    "transformer.h.5.mlp.c_fc.weight": (5, "MLP"),
    "transformer.h.5.ln_1.weight": (5, "norm"),
    "transformer.ln_f.bias": (None, "norm"),
    "gpt_neox.embed_in.weight": (None, "embedding"),
    "embed_out.weight": (None, "head"),
    "gpt_neox.layers.1.attention.query_key_value.weight": (1, "attention"),
    "transformer.blocks.2.att_proj.weight": (2, "attention"),
    "transformer.blocks.2.ff_proj.weight": (2, "MLP"),
    "transformer.blocks.2.attn_norm.weight": (2, "norm"),
    "tok_embeddings.weight": (None, "embedding"),
    "layers.4.attention.wq.weight": (4, "attention"),
    "layers.4.attention_norm.weight": (4, "norm"),
    "layers.4.feed_forward.w1.weight": (4, "MLP"),
    "layers.4.moe.router.gate.weight": (4, "router"),
    "layers.4.moe.expert_bias": (4, "router bias"),
    "layers.4.moe.experts.w1": (4, "experts"),
    "output.weight": (None, "head"),
    "decoder.layers.0.self_attention.linear_qkv.weight": (0, "attention"),
    "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (0, "norm"),
    "decoder.layers.0.mlp.linear_fc1.weight": (0, "MLP"),
    "decoder.final_layernorm.weight": (None, "norm"),
    "output_layer.weight": (None, "head"),
    "embedding.word_embeddings.weight": (None, "embedding"),
    "rank-0.safetensors:layers.4.attention.wq.weight": (4, "attention"),
    "backbone.layers.3.mixer.A_log": (3, "other"),
    "vision_tower.patch.weight": (None, "other"),
}


@pytest.mark.parametrize("name", NAMES)
def test_layer_and_kind(name: str) -> None:
    group = group_of(name)
    assert tuple(group) == NAMES[name]
    assert group.kind in KINDS
