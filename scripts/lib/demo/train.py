"""Train a tiny byte-level model on Python's own source and leave real checkpoints, for
`scripts/demo`.

The folders `ckpt_<step>` look as a training framework leaves them: sharded safetensors with an
index, the config, and beside them the state that a restart needs (optimizer.pt, scheduler.pt,
rng_state.pth, trainer_state.json). As with `save_total_limit`, only the last checkpoints of the run
are there. With `--dcp` they are `step-<step>`, distributed checkpoints of model, optimizer and step
as torchtitan writes them. The learning rate stays constant after a short warm-up: averaging the
last checkpoints then does the work of the decay that never happened.

The text is the standard library, so nothing is downloaded. Every 16th file is held out of training
and goes to `held_out.txt`, which `evaluate.py` reads. The same seed gives the same run on the same
machine; other machines and other Python versions give slightly different figures.
"""

import argparse
import random
import sysconfig
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    get_constant_schedule_with_warmup,
)
from transformers.trainer_callback import TrainerState

# Not English and Python in the usual mix (tables, data), not there in every version, or not the
# library's own.
SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "idlelib", "lib2to3", "distutils",
    "tkinter", "turtledemo", "ensurepip",
}  # fmt: skip
HELD_OUT_EVERY = 16
HELD_OUT_BYTES = 2**18
WINDOW_BYTES = 128
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20


def standard_library() -> tuple[bytes, bytes]:
    """The standard library's sources as (training text, held-out text), split by file in sorted
    order.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not SKIPPED.intersection(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    held_out = files[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    training = [path for path in files if path not in set(held_out)]
    texts = [b"".join((root / path).read_bytes() for path in part) for part in (training, held_out)]
    return texts[0], texts[1]


def make_model(moe: bool) -> transformers.PreTrainedModel:
    """About a million parameters, freshly initialized: dense Llama-style, or Mixtral-style with 8
    experts.
    """
    sizes = {
        "vocab_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": WINDOW_BYTES,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if moe:
        config = MixtralConfig(
            hidden_size=96, intermediate_size=96, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
            **sizes,
        )  # fmt: skip
        return MixtralForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=352, num_key_value_heads=4, **sizes))


def save_checkpoint(
    folder: Path,
    model: transformers.PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    state: TrainerState,
) -> None:
    model.save_pretrained(folder, max_shard_size="1MB")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    rng_state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    torch.save(rng_state, folder / "rng_state.pth")
    state.save_to_json(folder / "trainer_state.json")


def save_distributed(folder: Path, model: transformers.PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save with torch.distributed.checkpoint, in two files as two ranks would."""
    content = {
        **model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "train_state": {"step": torch.tensor(step)},
    }
    save(content, storage_writer=FileSystemWriter(folder, thread_count=2), no_dist=True)


def train(out: Path, *, moe: bool, dcp: bool = False, num_steps: int, save_every: int, num_checkpoints: int, seed: int) -> None:
    """Train for `num_steps` and leave the last `num_checkpoints` checkpoints, `save_every` steps
    apart, in `out`.
    """
    torch.set_num_threads(min(4, torch.get_num_threads()))  # more threads only wait for each other at this size
    transformers.set_seed(seed)
    transformers.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = standard_library()
    (out / "held_out.txt").write_bytes(held_out[:HELD_OUT_BYTES])
    text = torch.frombuffer(bytearray(training), dtype=torch.uint8)
    model = make_model(moe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = get_constant_schedule_with_warmup(optimizer, WARMUP_STEPS)
    state = TrainerState(max_steps=num_steps, save_steps=save_every, train_batch_size=BATCH_SIZE)
    print(
        f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f}M parameters, "
        f"{len(training) / 1e6:.1f} MB of Python source, {num_steps} steps at a learning rate of {LEARNING_RATE:g}"
    )

    started, losses = time.monotonic(), []
    first_saved = num_steps - (num_checkpoints - 1) * save_every
    offsets = torch.arange(WINDOW_BYTES)
    # The load-balancing loss is for training only, so it is asked for here and not written in the
    # config.
    extra = {"output_router_logits": True} if moe else {}
    model.train()
    for step in range(1, num_steps + 1):
        starts = torch.randint(len(text) - WINDOW_BYTES, (BATCH_SIZE, 1))
        batch = text[starts + offsets].long()
        loss = model(input_ids=batch, labels=batch, use_cache=False, **extra).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, num_steps // 8) == 0 or step == num_steps:
            recent = sum(losses) / len(losses)
            losses.clear()
            state.log_history.append({"step": step, "loss": recent, "learning_rate": scheduler.get_last_lr()[0]})
            print(f"  step {step:5d}  training loss {recent:.3f}  {time.monotonic() - started:4.0f} s", flush=True)
        if step >= first_saved and (step - first_saved) % save_every == 0:
            state.global_step = step
            if dcp:
                save_distributed(out / f"step-{step}", model, optimizer, step)
                continue
            save_checkpoint(out / f"ckpt_{step}", model, optimizer, scheduler, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the checkpoints")
    parser.add_argument("--moe", action="store_true", help="a mixture of experts instead of a dense model")
    parser.add_argument("--dcp", action="store_true", help="distributed checkpoints instead of safetensors")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--checkpoints", type=int, default=10, help="how many of the last checkpoints to leave")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch's own, in saving
    train(
        args.out,
        moe=args.moe,
        dcp=args.dcp,
        num_steps=args.steps,
        save_every=args.save_every,
        num_checkpoints=args.checkpoints,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
