"""The tensors of synthetic checkpoints, their names, dtypes and shapes, and the `config.json`
beside them.

Pure: no files, no torch. Every shape is one that exists: `dense` is a Llama, `moe` a Qwen3-MoE with
per-expert tensors, `fp8` a Llama in DeepSeek's block-FP8, `deepseek-v3` and `1t` are DeepSeek-V3
(671B and its MTP layer) and Kimi-K2 with their published sizes. Names, shapes and config agree, so
that tools which insist on a known architecture accept them.

The first three are cut to a size in bytes by choosing a hidden size and letting the MLP width take
what is left; small sizes with many tensors hit it only roughly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
FP8_BLOCK = 128
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}


class Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


class Checkpoint(NamedTuple):
    """Tensors in the order of the model, the `config.json`, and the number of shards it is
    published with.
    """

    tensors: list[Tensor]
    config: dict[str, object]
    num_shards: int


def bf16(name: str, *shape: int) -> Iterator[Tensor]:
    yield Tensor(name, "BF16", shape)


def linear(name: str, rows: int, columns: int, fp8: bool) -> Iterator[Tensor]:
    """One weight matrix; in block-FP8 followed by its scales, one for each 128 x 128 block."""
    if not fp8:
        yield Tensor(f"{name}.weight", "BF16", (rows, columns))
        return
    yield Tensor(f"{name}.weight", "F8_E4M3", (rows, columns))
    yield Tensor(f"{name}.weight_scale_inv", "F32", (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)))


def mlp(prefix: str, hidden: int, intermediate: int, fp8: bool) -> Iterator[Tensor]:
    yield from linear(f"{prefix}.gate_proj", intermediate, hidden, fp8)
    yield from linear(f"{prefix}.up_proj", intermediate, hidden, fp8)
    yield from linear(f"{prefix}.down_proj", hidden, intermediate, fp8)


def attention(prefix: str, hidden: int, kv_width: int, fp8: bool) -> Iterator[Tensor]:
    for name, rows in (("q", hidden), ("k", kv_width), ("v", kv_width), ("o", hidden)):
        yield from linear(f"{prefix}.{name}_proj", rows, hidden, fp8)


# --- cut to a size --------------------------------------------------------------------------------


class Cut(NamedTuple):
    """The sizes that a Llama-like model of about so many bytes has."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int
    tied: bool


def cut(total_bytes: int, largest_bytes: int, layers: int, experts: int, fp8: bool) -> Cut:
    """Choose sizes for `layers` layers of attention and `experts` MLPs each.

    `largest_bytes` is the size of the embedding, which is then tied, so that it is the one tensor
    of that size; 0 leaves embedding and head at about a seventh of the model.
    """
    item = 1 if fp8 else 2
    body_bytes = total_bytes - largest_bytes
    if body_bytes <= 0:
        raise ValueError("the largest tensor must be smaller than the checkpoint")
    step = 256 if body_bytes > 500_000_000 else FP8_BLOCK if fp8 else 64
    # A dense layer has about 11 hidden^2 weights (MLP 2.7 x hidden); a narrow expert has one.
    per_layer = 11 if experts == 1 else 3 + experts
    hidden = max(step, int(math.sqrt(body_bytes / item / layers / per_layer)) // step * step)
    head_dim = 64
    heads = hidden // head_dim
    kv_heads = heads // 4 if heads % 4 == 0 else heads
    row_bytes = 2 * hidden
    vocab = largest_bytes // row_bytes or min(32_000, max(64, total_bytes // 7 // (2 * row_bytes)))
    embedding_bytes = row_bytes * vocab * (1 if largest_bytes else 2)
    attention_bytes = item * layers * 2 * hidden * (hidden + kv_heads * head_dim)
    left = (total_bytes - embedding_bytes - attention_bytes) / (3 * hidden * layers * experts * item)
    multiple = FP8_BLOCK if fp8 else 8
    intermediate = max(multiple, round(left / multiple) * multiple)
    return Cut(hidden, heads, kv_heads, head_dim, vocab, intermediate, tied=bool(largest_bytes))


def around(body: Iterable[Tensor], sizes: Cut) -> list[Tensor]:
    head = [] if sizes.tied else bf16("lm_head.weight", sizes.vocab, sizes.hidden)
    embedding = bf16("model.embed_tokens.weight", sizes.vocab, sizes.hidden)
    return [*embedding, *body, *bf16("model.norm.weight", sizes.hidden), *head]


def common_config(sizes: Cut, layers: int) -> dict[str, object]:
    return {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": 4096,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": sizes.tied,
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.vocab,
    }


def llama(total_bytes: int, num_tensors: int, largest_bytes: int, fp8: bool = False) -> Checkpoint:
    """A Llama; with `fp8` its linear layers in block-FP8."""
    tensors_per_layer = 16 if fp8 else 9
    layers = max(1, round((num_tensors - 3) / tensors_per_layer)) if num_tensors else 16
    sizes = cut(total_bytes, largest_bytes, layers, 1, fp8)

    def body() -> Iterator[Tensor]:
        for i in range(layers):
            layer = f"model.layers.{i}"
            yield from bf16(f"{layer}.input_layernorm.weight", sizes.hidden)
            yield from attention(f"{layer}.self_attn", sizes.hidden, sizes.kv_heads * sizes.head_dim, fp8)
            yield from bf16(f"{layer}.post_attention_layernorm.weight", sizes.hidden)
            yield from mlp(f"{layer}.mlp", sizes.hidden, sizes.intermediate, fp8)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **common_config(sizes, layers),
        "mlp_bias": False,
        **({"quantization_config": QUANTIZATION} if fp8 else {}),
    }
    return Checkpoint(around(body(), sizes), config, 3)


def qwen3_moe(total_bytes: int, num_tensors: int, largest_bytes: int) -> Checkpoint:
    """A Qwen3-MoE with one tensor for each expert and projection; 20,000 tensors unless told
    otherwise.
    """
    num_tensors = num_tensors or 20_000
    experts = 128 if num_tensors >= 4000 else 8
    layers = max(1, round((num_tensors - 3) / (3 * experts + 9)))
    sizes = cut(total_bytes, largest_bytes, layers, experts, fp8=False)

    def body() -> Iterator[Tensor]:
        for i in range(layers):
            layer = f"model.layers.{i}"
            yield from bf16(f"{layer}.input_layernorm.weight", sizes.hidden)
            yield from attention(f"{layer}.self_attn", sizes.hidden, sizes.kv_heads * sizes.head_dim, False)
            yield from bf16(f"{layer}.self_attn.q_norm.weight", sizes.head_dim)
            yield from bf16(f"{layer}.self_attn.k_norm.weight", sizes.head_dim)
            yield from bf16(f"{layer}.post_attention_layernorm.weight", sizes.hidden)
            yield from bf16(f"{layer}.mlp.gate.weight", experts, sizes.hidden)
            for e in range(experts):
                yield from mlp(f"{layer}.mlp.experts.{e}", sizes.hidden, sizes.intermediate, False)

    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **common_config(sizes, layers),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.intermediate,
        "norm_topk_prob": True,
        "num_experts": experts,
        "num_experts_per_tok": min(8, experts),
    }
    return Checkpoint(around(body(), sizes), config, 3)


# --- as published ---------------------------------------------------------------------------------

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": QUANTIZATION,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}

KIMI_K2: dict[str, Any] = {
    **DEEPSEEK_V3,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}


def deepseek(config: dict[str, Any], num_shards: int, fp8: bool = True) -> Checkpoint:
    """A model of DeepSeek-V3's kind. Without `fp8` the matrices are bf16, as they are in a training
    run.
    """
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    experts, layers = config["n_routed_experts"], config["num_hidden_layers"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]

    def decoder_layer(i: int) -> Iterator[Tensor]:
        layer = f"model.layers.{i}"
        yield from bf16(f"{layer}.input_layernorm.weight", hidden)
        yield from linear(f"{layer}.self_attn.q_a_proj", q_rank, hidden, fp8)
        yield from bf16(f"{layer}.self_attn.q_a_layernorm.weight", q_rank)
        yield from linear(f"{layer}.self_attn.q_b_proj", heads * (nope + rope), q_rank, fp8)
        yield from linear(f"{layer}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden, fp8)
        yield from bf16(f"{layer}.self_attn.kv_a_layernorm.weight", kv_rank)
        yield from linear(f"{layer}.self_attn.kv_b_proj", heads * (nope + value), kv_rank, fp8)
        yield from linear(f"{layer}.self_attn.o_proj", hidden, heads * value, fp8)
        yield from bf16(f"{layer}.post_attention_layernorm.weight", hidden)
        if i < config["first_k_dense_replace"]:
            yield from mlp(f"{layer}.mlp", hidden, config["intermediate_size"], fp8)
            return
        yield from bf16(f"{layer}.mlp.gate.weight", experts, hidden)
        yield Tensor(f"{layer}.mlp.gate.e_score_correction_bias", "F32", (experts,))
        width = config["moe_intermediate_size"]
        yield from mlp(f"{layer}.mlp.shared_experts", hidden, width * config["n_shared_experts"], fp8)
        for e in range(experts):
            yield from mlp(f"{layer}.mlp.experts.{e}", hidden, width, fp8)

    def tensors() -> Iterator[Tensor]:
        yield from bf16("model.embed_tokens.weight", vocab, hidden)
        for i in range(layers):
            yield from decoder_layer(i)
        for i in range(layers, layers + config["num_nextn_predict_layers"]):  # multi-token prediction
            yield from bf16(f"model.layers.{i}.embed_tokens.weight", vocab, hidden)
            yield from bf16(f"model.layers.{i}.enorm.weight", hidden)
            yield from bf16(f"model.layers.{i}.hnorm.weight", hidden)
            yield from bf16(f"model.layers.{i}.eh_proj.weight", hidden, 2 * hidden)
            yield from decoder_layer(i)
            yield from bf16(f"model.layers.{i}.shared_head.norm.weight", hidden)
            yield from bf16(f"model.layers.{i}.shared_head.head.weight", vocab, hidden)
        yield from bf16("model.norm.weight", hidden)
        yield from bf16("lm_head.weight", vocab, hidden)

    if not fp8:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    return Checkpoint(list(tensors()), config, num_shards)


# --- by name --------------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[int, int, int], Checkpoint]] = {
    "dense": llama,
    "moe": qwen3_moe,
    "fp8": lambda total, count, largest: llama(total, count, largest, fp8=True),
    "deepseek-v3": lambda *_: deepseek(DEEPSEEK_V3, 163),
    "deepseek-v3-bf16": lambda *_: deepseek(DEEPSEEK_V3, 163, fp8=False),
    "1t": lambda *_: deepseek(KIMI_K2, 61),
    "1t-bf16": lambda *_: deepseek(KIMI_K2, 61, fp8=False),
}
PUBLISHED = tuple(name for name in SHAPES if name.startswith(("deepseek", "1t")))


def split_into_shards(tensors: list[Tensor], num_shards: int) -> list[list[Tensor]]:
    """Cut `tensors` into consecutive shards of about equal bytes.

    A tensor goes where its first byte falls, so a very large one can leave fewer shards than asked.
    Within a shard: widest dtype first, then by name, as safetensors writes them. A weight and its
    scale may end up in different shards, as they do in DeepSeek-V3.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    shards: dict[int, list[Tensor]] = {}
    offset = 0
    for tensor in tensors:
        shards.setdefault(offset * num_shards // total, []).append(tensor)
        offset += tensor.nbytes
    return [sorted(shard, key=lambda t: (-ITEM_BYTES[t.dtype], t.name)) for shard in shards.values()]
