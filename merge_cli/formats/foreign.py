"""The format of a folder that holds no checkpoint that pmerge reads, and the next command.

Trainers are known by the names of their files; nothing is opened. The commands
are those of the trainers' own tools.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

from merge_cli.names import OTHER_WEIGHTS
from merge_cli.stores.store import Store, folder_of, join, name_of, open_store

_MOST_FOLDERS = 200  # a run has many alike: the first ones are enough


class Foreign(NamedTuple):
    """A recognized format: a file with `what` it is, and the `hint` with the next command."""

    what: str
    hint: str


class _Format(NamedTuple):
    patterns: tuple[str, ...]  # of paths relative to the folder, or of their last part
    what: str
    hint: Callable[[str, str], str]  # of the folder, and of the file that matched


def _of_deepspeed(folder: str, file: str) -> str:
    checkpoint = join(folder, file).split("/global_step")[0] if "global_step" in file else folder_of(join(folder, file))
    script, out = join(checkpoint, "zero_to_fp32.py"), checkpoint + "-fp32"
    command = shlex.join(["python", script, checkpoint, out, "--safe_serialization"])
    return f"DeepSpeed left a script for that:  {command}"


def _of_transformers(folder: str, file: str) -> str:
    there = folder_of(join(folder, file))
    load = f"AutoModelForCausalLM.from_pretrained({there!r}, dtype='auto').save_pretrained({there + '-safetensors'!r})"
    return f'save it as safetensors:  python -c "from transformers import AutoModelForCausalLM; {load}"'


def _of_lightning(folder: str, file: str) -> str:
    path = join(folder, file)
    load = f"torch.load({path!r}, map_location='cpu', weights_only=False)['state_dict']"
    save = f"save_file({{k: v.clone() for k, v in {load}.items()}}, {path.rpartition('.')[0] + '.safetensors'!r})"
    return f'save its weights as safetensors:  python -c "import torch; from safetensors.torch import save_file; {save}"'


_FORMATS = (
    _Format(
        ("*mp_rank_??*/model_optim_rng.pt", "*mp_rank_??*/model_rng.pt", "*mp_rank_??*/distrib_optim.pt"),
        "a checkpoint of Megatron in its older format (mp_rank_*)",
        lambda folder, file: "load it in Megatron and save it with --ckpt-format torch_dist, which pmerge reads",
    ),
    _Format(("model*.bin",), "weights in pickles (.bin)", _of_transformers),
    _Format(
        ("zero_pp_rank_*", "*_model_states.pt", "bf16_zero_pp_rank_*", "zero_to_fp32.py"),
        "a checkpoint of DeepSpeed, whose weights lie in the shares of its ranks",
        _of_deepspeed,
    ),
    _Format(("*.ckpt",), "a checkpoint of Lightning, with its training state", _of_lightning),
    _Format(
        ("consolidated*.pth", "*.pth", "model*.pt", "pytorch_model*.pt", "iter_*.pt", "step*.pt", "ckpt*.pt"),
        "weights in a pickle",
        lambda folder, file: (
            "save them as safetensors: load the file, take its dictionary of tensors, and give that to safetensors.torch.save_file"
        ),
    ),
    _Format(
        ("*.gguf",),
        "weights that were quantized for llama.cpp (GGUF)",
        lambda folder, file: "average the safetensors that it was made from, and convert the result",
    ),
    _Format(
        ("*.msgpack", "*.h5", "*.npz", "*.onnx", "*.tflite"),
        "weights of another framework",
        lambda folder, file: f"convert {file} to safetensors with its framework",
    ),
    _Format(
        ("*.safetensors",),
        "a tree of *.safetensors files, one for each parameter or so, as nanotron writes it",
        lambda folder, file: "convert it to one folder of shards with its trainer (nanotron: convert_nanotron_to_hf.py)",
    ),
    _Format(
        ("optimizer*", "optim*", "scheduler.pt", "rng_state*", "random_states*", "trainer_state.json"),
        "training state without weights",
        lambda folder, file: "name the folder into which the trainer saves the model",
    ),
)


def recognize(folder: str) -> Foreign | None:
    """The format of the checkpoints in `folder`, or in the folders inside it; None for an unknown
    one.
    """
    files = _files(open_store(folder), folder)
    for each in _FORMATS:
        for file in files:
            if any(_matches(file, pattern) for pattern in each.patterns):
                return Foreign(f"{file}: {each.what}", each.hint(folder, file))
    other = next((file for file in files if file.endswith(OTHER_WEIGHTS)), None)
    return None if other is None else Foreign(f"{other}: no safetensors file", f"convert {other} to safetensors first")


def _matches(file: str, pattern: str) -> bool:
    return fnmatchcase(file if "/" in pattern else name_of(file), pattern)


def _files(store: Store, folder: str) -> list[str]:
    """The files below `folder` as paths relative to it, outer ones first."""
    found: list[str] = []
    waiting = [""]
    for listed, above in enumerate(waiting):
        if listed == _MOST_FOLDERS:
            break
        for entry in store.list(join(folder, above) if above else folder):
            path = f"{above}/{entry.name}" if above else entry.name
            (waiting if entry.kind == "folder" else found).append(path)
    return found
