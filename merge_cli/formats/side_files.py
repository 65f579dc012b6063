"""What lies beside the weights of a checkpoint: which files a merged checkpoint keeps, and which stay out.

The rule is by exclusion, because a tokenizer or a custom model may bring any file: everything small that sits directly in the
checkpoint is kept, except training state, weights in any format, logs and hidden files. Sub-folders are kept only where
transformers itself reads them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_cli.formats.files import check_stays_inside, list_folder, read_regular_file
from merge_cli.names import MANIFEST

SKIPPED = (
    # training state
    "optimizer*", "optim*", "scheduler*", "scaler*", "rng_state*", "random_states*", "trainer_state.json", "training_args.*",
    "global_step*", "latest", "zero_to_fp32.py", "zero_pp_rank*", "mp_rank*", "*.distcp", ".metadata", "train_state*",
    "dataloader*", "iter_*", "runs", "wandb", "checkpoint-*", "latest_checkpointed_iteration.txt",
    # weights in this or another format, and indexes of them
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.npz",
    "*.tflite", "*.pkl", "*.pickle", "*.mlmodel",
    # traces
    "*.log", "*.out", "*.err", "events.out.tfevents*", "*.lock", "*.tmp", "*.partial", "*.swp", "*~", "__pycache__",
    MANIFEST,
)  # fmt: skip
KEPT_BINARIES = ("tokenizer*.model", "spiece.model", "sentencepiece*.model", "*.tiktoken")
KEPT_FOLDERS = ("additional_chat_templates", "chat_templates", "tokenizer", "processor")
MAX_SIDE_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class SideFiles:
    """Paths relative to the checkpoint: `kept` goes into a merged checkpoint, `skipped` does not."""

    kept: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def list_side_files(folder: Path, weights: set[str]) -> SideFiles:
    """Sort everything in `folder` but its weight files and index (`weights`) into kept and skipped.

    Raises InputError for a link among the kept files that is broken or leaves the checkpoint.
    """
    kept: list[str] = []
    skipped: list[str] = []
    holders = {name.split("/")[0] for name in weights if "/" in name}
    for entry in list_folder(folder):
        if entry.name in weights:
            continue
        if (folder / entry.name).is_dir():
            if entry.name not in holders and entry.name not in KEPT_FOLDERS:
                skipped.append(entry.name + "/")
                continue
            check_stays_inside(folder, folder / entry.name)
            inside = [f"{entry.name}/{inner.name}" for inner in list_folder(folder / entry.name)]
            if entry.name in holders:
                skipped += [name for name in inside if name not in weights]
            else:
                kept += [name for name in inside if _is_small_file(folder, name)]
        elif _is_kept(entry.name) and _is_small_file(folder, entry.name):
            kept.append(entry.name)
        else:
            skipped.append(entry.name)
    return SideFiles(tuple(kept), tuple(skipped))


def _is_small_file(root: Path, name: str) -> bool:
    """Whether `name` in the checkpoint `root` is a regular file that is small enough to be copied."""
    check_stays_inside(root, root / name)
    return (root / name).is_file() and (root / name).stat().st_size <= MAX_SIDE_FILE_BYTES


def _is_kept(name: str) -> bool:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in KEPT_BINARIES):
        return True
    return not name.startswith(".") and not any(fnmatch.fnmatchcase(name, pattern) for pattern in SKIPPED)


def differing_files(folders: Sequence[Path], kept: Sequence[str], base: Path) -> list[str]:
    """For each side file of `base` that decides what tokens and weights mean, the checkpoints where it differs, as warnings.

    Documentation and generation settings may differ freely; `config.json` is compared by content elsewhere.
    """
    warnings = []
    for name in kept:
        if not _gives_meaning(name):
            continue
        expected = _digest(base / name)
        others = [folder for folder in folders if folder != base and _digest(folder / name) != expected]
        if others:
            shown = ", ".join(str(folder) for folder in others[:3]) + (" ..." if len(others) > 3 else "")
            warnings.append(f"{name} differs between {base} (which is kept) and {shown}")
    return warnings


def _gives_meaning(name: str) -> bool:
    patterns = (
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.model",
        "*.tiktoken",
    )
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _digest(path: Path) -> str:
    if not os.path.lexists(path):
        return "absent"
    return hashlib.sha256(read_regular_file(path, MAX_SIDE_FILE_BYTES)).hexdigest()
