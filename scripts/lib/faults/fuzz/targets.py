"""One target for each parser: where its bytes come from, how they are changed, and the command that
reads them.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from faults.attacks.world import World, rank, sealed
from faults.fuzz.mutate import dumped, flipped, mutated
from faults.ground import COMMAND

Change = Callable[[bytes, random.Random], bytes]
Command = tuple[str, ...]
INSPECT: Command = ("inspect", "fuzzed")
AVERAGE: Command = ("average", "fuzzed", *COMMAND[2:])
VERIFY: Command = ("verify", "out/merged", "--against-inputs", "--sample", "all", "--quiet")
SWEEP: Command = ("sweep", "in", "-o", "out/s", "--method", "sma,wma", "--dry-run")
LIST = [
    {"method": "ema", "alpha": 0.2, "last": 2, "name": "a"},
    {"method": "weights", "weights": [0.5, 0.5], "last": 2},
    {"method": "decay", "shape": "linear", "floor": 0.1, "at": 200},
    {"method": "power", "sigma_rel": 0.1, "every": 100, "from_step": 100, "to_step": 300, "order": "step"},
]


@dataclass(frozen=True)
class Target:
    """`files`: one of them, below the world's folder, gets changed bytes; then one of `commands` is
    run.

    `prepare` makes what `reset` has removed; after exit 0 of an average that has a `verify`, it
    must be found right.
    """

    name: str
    files: Sequence[str]
    change: Change
    commands: Sequence[Command]
    prepare: Callable[[World], object] = lambda world: None
    verify: bool = False


def of_json(data: bytes, numbers: random.Random) -> bytes:
    return dumped(mutated(json.loads(data), numbers), numbers)


def of_header(data: bytes, numbers: random.Random) -> bytes:
    """The JSON header of a safetensors file, its length, or raw bytes of the beginning."""
    length = struct.unpack("<Q", data[:8])[0]
    if numbers.random() < 0.6:
        header = of_json(data[8 : 8 + length], numbers)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    head = flipped(data[: 8 + length + 20], numbers)
    if numbers.random() < 0.3:
        odd = (0, 1, 2, 2**63 - 1, 2**63, 2**64 - 1, 10**8, 10**8 + 1, length + 1, length - 1, 2**32)
        head = struct.pack("<Q", numbers.choice(odd)) + head[8:]
    return head + data[8 + length + 20 :]


def of_config(data: bytes, numbers: random.Random) -> bytes:
    """Mostly the quantization section of a config.json."""
    config = json.loads(data)
    if "quantization_config" not in config or numbers.random() < 0.2:
        return of_json(data, numbers)
    config["quantization_config"] = mutated(config["quantization_config"], numbers)
    return dumped(config, numbers)


def of_manifest(data: bytes, numbers: random.Random) -> bytes:
    """pmerge.json, mostly sealed anew."""
    changed = mutated(json.loads(data), numbers)
    if isinstance(changed, dict) and numbers.random() < 0.8:
        try:
            return sealed(changed)
        except UnicodeEncodeError:
            pass
    return dumped(changed, numbers)


def of_list(_: bytes, numbers: random.Random) -> bytes:
    return dumped(mutated(LIST, numbers), numbers)


# --- What is fuzzed


def write_kinds(world: World) -> None:
    """Two checkpoints of every kind in `kinds/`: plain, FP8, int4, MXFP4, a torch distributed
    checkpoint.
    """
    for kind, (tensors, config) in kinds().items():
        for step in (1, 2):
            folder = world.folder / "kinds" / kind / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16", **config}))
            index = {"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            state = {"global_step": step, "epoch": 1.5, "log_history": [{"step": 1}]}
            (folder / "trainer_state.json").write_text(json.dumps(state))
    for step in (1, 2):
        write_dcp(world.folder / "kinds" / "dcp" / f"step-{step}", step)


def kinds() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    weight = "model.layers.0.self_attn.q_proj"
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    numbers = torch.Generator().manual_seed(0)
    group = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
    int4 = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group}},
        "ignore": ["lm_head"],
    }
    return {
        "plain": ({"a": torch.randn(8, 16, generator=numbers).bfloat16(), "b": torch.ones(3, dtype=torch.int64)}, {}),
        "fp8": (
            {
                f"{weight}.weight": torch.randn(256, 256, generator=numbers).to(torch.float8_e4m3fn),
                f"{weight}.weight_scale_inv": torch.rand(2, 2, generator=numbers) + 0.1,
            },
            {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}},
        ),
        "int4": (
            {
                f"{weight}.weight_packed": torch.randint(-(2**31), 2**31 - 1, (64, 16), dtype=torch.int32, generator=numbers),
                f"{weight}.weight_scale": (torch.rand(64, 4, generator=numbers) + 0.1).bfloat16(),
                f"{weight}.weight_shape": torch.tensor([64, 128]),
            },
            {"quantization_config": int4},
        ),
        "mxfp4": (
            {
                f"{experts}_blocks": torch.randint(0, 255, (2, 64, 4, 16), dtype=torch.uint8, generator=numbers),
                f"{experts}_scales": torch.randint(100, 130, (2, 64, 4), dtype=torch.uint8, generator=numbers),
            },
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}},
        ),
    }


def write_dcp(folder: Path, step: int) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    folder.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"model": {"a": torch.full((4, 4), float(step)), "b": torch.ones(3)}}
        save(state, checkpoint_id=str(folder), no_dist=True)


def fuzzed(kind: str) -> Callable[[World], object]:
    """Copies the checkpoints of a kind to `fuzzed`."""

    def copy(world: World) -> None:
        shutil.rmtree(world.folder / "fuzzed", ignore_errors=True)
        shutil.copytree(world.folder / "kinds" / kind, world.folder / "fuzzed")

    return copy


def published(world: World) -> None:
    shutil.copytree(world.folder / "expected", world.merged)


def staged(world: World) -> None:
    shutil.copytree(world.folder / "staged", world.staging)


def staged_by_ranks(world: World) -> None:
    shutil.copytree(world.folder / "staged-by-ranks", world.staging)


def listed(world: World) -> None:
    (world.out / "s").mkdir()
    (world.out / "s" / "sweep.json").write_text(json.dumps({"pmerge": "0.1.0", "schema": 1, "outputs": [{"name": "sma"}]}))
    (world.out / "list.json").write_text(json.dumps(LIST))


def targets() -> list[Target]:
    first = "fuzzed/checkpoint-1"
    of_inputs = [
        Target(f"{what}-{kind}", [f"{first}/{name}"], change, [INSPECT, AVERAGE], fuzzed(kind), verify=True)
        for kind in ("plain", "fp8", "int4", "mxfp4")
        for what, name, change in (("header", "model.safetensors", of_header), ("config", "config.json", of_config))
        if (what, kind) != ("config", "plain")
    ]
    partial = "out/merged.pmerge-partial"
    record = f"{partial}/done/model-00001-of-00002.safetensors.json"
    lone: list[Command] = [COMMAND, (*COMMAND, "--restart"), (*COMMAND, "--verify-resume"), ("finalize", "out/merged")]
    joint: list[Command] = [rank(0), ("finalize", "out/merged")]
    locks = [f"{partial}/{name}" for name in ("lock", "control", "ranks/world_size")]
    over: list[Command] = [(*COMMAND, "--overwrite"), rank(0), rank(0, "--overwrite"), ("finalize", "out/merged"), VERIFY]
    return [
        *of_inputs,
        Target("index", [f"{first}/model.safetensors.index.json"], of_json, [INSPECT, AVERAGE], fuzzed("plain"), verify=True),
        Target("trainer_state", [f"{first}/trainer_state.json"], of_json, [INSPECT, AVERAGE], fuzzed("plain"), verify=True),
        Target("dcp-metadata", ["fuzzed/step-1/.metadata"], flipped, [INSPECT, AVERAGE], fuzzed("dcp")),
        Target("dcp-file", ["fuzzed/step-1/__0_0.distcp"], flipped, [AVERAGE], fuzzed("dcp")),
        Target("pmerge-json", ["out/merged/pmerge.json"], of_manifest, over, published),
        Target("staging", [f"{partial}/state.json", f"{partial}/publish.json", record], of_json, lone, staged),
        Target("staging-of-ranks", [f"{partial}/state.json", record, *locks], of_json, joint, staged_by_ranks),
        Target("sweep-json", ["out/s/sweep.json"], of_json, [SWEEP], listed),
        Target("list", ["out/list.json"], of_list, [(*SWEEP[:4], "--list", "out/list.json", "--dry-run")], listed),
    ]
