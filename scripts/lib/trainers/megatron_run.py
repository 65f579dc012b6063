"""torchrun megatron_run.py save RUN EP PP | load MERGED CHECKPOINT...: a MoE model of Megatron-Core
on CPU, saved with these parallel sizes, loaded 1 x 1 and compared with the mean of the checkpoints.

Megatron-Core asks for CUDA in three places that a checkpoint on CPU does not need; they are
replaced.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
import torch  # noqa: E402

torch.cuda.synchronize = lambda *_: None
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
torch.cuda.Stream = lambda *_, **__: None  # type: ignore[assignment,misc]
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from trainers.common import all_equal, check, mean_of  # noqa: E402

ITERATIONS = (1000, 2000, 3000)


def build(experts: int, pipeline: int) -> Any:
    parallel_state.initialize_model_parallel(
        1, pipeline, expert_model_parallel_size=experts, expert_tensor_parallel_size=1 if experts > 1 else None
    )
    torch.manual_seed(7 + parallel_state.get_pipeline_model_parallel_rank())
    config = TransformerConfig(
        num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, gated_linear_unit=True,
        add_bias_linear=False, use_cpu_initialization=True, pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32,
        expert_model_parallel_size=experts, expert_tensor_parallel_size=1 if experts > 1 else None, params_dtype=torch.bfloat16,
        bf16=True, num_moe_experts=4, moe_ffn_hidden_size=48, moe_router_topk=2, bias_dropout_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False, moe_token_dispatcher_type="alltoall",
        activation_func=torch.nn.functional.silu,
    )  # fmt: skip
    return GPTModel(
        config, get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False), vocab_size=128, max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    ).bfloat16()  # fmt: skip


def save(run: Path, experts: int, pipeline: int) -> None:
    model = build(experts, pipeline)
    generator = torch.Generator().manual_seed(dist.get_rank() // 2)
    for iteration in ITERATIONS:
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator).bfloat16() * 0.02
        folder = run / f"iter_{iteration:07d}"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        state = {
            "model": model.sharded_state_dict(),
            "iteration": iteration,
            "args": {"hidden_size": 32},
            "checkpoint_version": 3.0,
        }
        dist_checkpointing.save(state, str(folder))
        dist.barrier()
    if dist.get_rank() == 0:
        (run / "latest_checkpointed_iteration.txt").write_text(str(ITERATIONS[-1]))


def load(merged: Path, folders: list[Path]) -> None:
    model = build(1, 1)
    expected = mean_of(folders)
    plain = dist_checkpointing.load_plain_tensors(str(merged))  # with the entries of common.pt
    tensors = {name: value for name, value in plain.items() if isinstance(value, torch.Tensor)}
    check("Megatron-Core", "load_plain_tensors, equal to the mean", len(tensors) == len(expected) and all_equal(tensors, expected))
    found = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(merged))
    keys = model.load_state_dict(found["model"], strict=False)
    missing = [key for key in (*keys.missing_keys, *keys.unexpected_keys) if "_extra_state" not in key]
    check("Megatron-Core", "dist_checkpointing.load into one rank: all keys match", not missing)
    weights, stacked = model.state_dict(), "decoder.layers."
    same = torch.equal(weights["embedding.word_embeddings.weight"], expected["embedding.word_embeddings.weight"])
    for layer in range(4):
        qkv = f"{stacked}{layer}.self_attention.linear_qkv.weight"
        same &= torch.equal(weights[qkv], expected[f"{stacked}self_attention.linear_qkv.weight"][layer])
        for expert in range(4):
            for part in ("linear_fc1", "linear_fc2"):
                name = f"{stacked}{layer}.mlp.experts.local_experts.{expert}.{part}.weight"
                same &= torch.equal(weights[name], expected[f"{stacked}mlp.experts.experts.{part}.weight"][layer, expert])
    check("Megatron-Core", "embedding, qkv and every expert of every layer equal to the mean", same)
    common = dist_checkpointing.load_common_state_dict(str(merged))
    check("Megatron-Core", f"common.pt is the base's, iteration {common['iteration']}", common["iteration"] == ITERATIONS[-1])


def main() -> None:  # a function: Megatron-Core starts processes that import this file
    dist.init_process_group("gloo")
    if sys.argv[1] == "save":
        save(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        load(Path(sys.argv[2]), [Path(each) for each in sys.argv[3:]])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
