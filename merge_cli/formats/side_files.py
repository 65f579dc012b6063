"""What lies beside the weights of a checkpoint: which files a merged checkpoint keeps, and which
stay out.

The rule is by exclusion, because a tokenizer or a custom model may bring any file: everything small
that sits directly in the checkpoint is kept, except training state, weights in any format, logs and
hidden files. Sub-folders are kept only where transformers itself reads them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from merge_cli.errors import InputError
from merge_cli.names import MANIFEST, OTHER_WEIGHTS
from merge_cli.stores.store import Source, Store, is_local, join, open_store, read_bytes, read_file
from merge_cli.system.json_text import parse_json

SKIPPED = (
    # training state
    "optimizer*", "optim*", "scheduler*", "scaler*", "rng_state*", "random_states*", "trainer_state.json", "training_args.*",
    "global_step*", "latest", "latest_universal", "zero_to_fp32.py", "zero_pp_rank*", "mp_rank*", ".metadata", "train_state*",
    "dataloader*", "iter_*", "runs", "wandb", "checkpoint-*", "latest_checkpointed_iteration.txt",
    # weights in this or another format, and indexes of them
    "*.safetensors", "*.index.json", *(f"*{suffix}" for suffix in OTHER_WEIGHTS), "*.onnx", "*.tflite", "*.pkl", "*.pickle",
    "*.mlmodel",
    # traces
    "*.log", "*.out", "*.err", "events.out.tfevents*", "*.lock", "*.tmp", "*.partial", "*.swp", "*~", "__pycache__",
    MANIFEST,
)  # fmt: skip
KEPT_BINARIES = ("tokenizer*.model", "spiece.model", "sentencepiece*.model", "*.tiktoken")
KEPT_FOLDERS = ("additional_chat_templates", "chat_templates", "tokenizer", "processor")
MAX_SIDE_FILE_BYTES = 256 << 20
MAX_MODULES_BYTES = 1 << 20
TRAINERS_CODE = ("zero_to_fp32.py",)
DATA_OF_CODE = (".npz", ".npy")
"""Endings of data that custom code reads; kept where there is such code."""


_TRAINING_STATE = re.compile(r"(?:optimizers?|optim|schedulers?|scaler|rng_states?|random_states?)(?:[._-].*)?")


def without_training_state(names: Sequence[str]) -> list[str]:
    """Files of weights without those named as training state (`optimizer.safetensors`), if others
    are left.
    """
    return [name for name in names if not _TRAINING_STATE.fullmatch(name)] or list(names)


@dataclass(frozen=True)
class SideFiles:
    """Paths relative to the checkpoint: `kept` goes into a merged checkpoint, `skipped` does not."""

    kept: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def list_side_files(folder: str, weights: set[str]) -> SideFiles:
    """Sort everything in `folder` but its weight files and index (`weights`) into kept and skipped,
    by name, kind and size.
    """
    store = open_store(folder)
    kept: list[str] = []
    skipped: list[str] = []
    modules = module_folders(folder)
    has_code = any(_is_code(entry.name) for entry in store.list(folder))
    holders = {name.split("/")[0] for name in weights if "/" in name}
    for entry in store.list(folder):
        if entry.name in weights:
            continue
        if entry.kind == "folder":
            if entry.name not in holders and entry.name not in KEPT_FOLDERS and entry.name not in modules:
                skipped.append(entry.name + "/")
                continue
            inside = [f"{entry.name}/{inner.name}" for inner in store.list(join(folder, entry.name))]
            if entry.name in holders:
                skipped += [name for name in inside if name not in weights]
            else:
                kept += [name for name in inside if _can_be_copied(store, join(folder, name))]
        elif (_is_kept(entry.name) or (has_code and entry.name.endswith(DATA_OF_CODE))) and _can_be_copied(
            store, join(folder, entry.name)
        ):
            kept.append(entry.name)
        else:
            skipped.append(entry.name)
    return SideFiles(tuple(kept), tuple(skipped))


def check_side_files(root: str, names: Sequence[str]) -> None:
    """Raise InputError for a link among the side files `names` of the checkpoint `root` that is
    broken or leaves it.

    Only those of the base are copied, so a link in another checkpoint does no harm.
    """
    store = open_store(root)
    for name in names:
        store.check_inside(root, join(root, name))


def _can_be_copied(store: Store, path: str) -> bool:
    """Whether `path` is a file that is small enough; a broken link would be one, and is an error
    where it is to be copied.
    """
    status = store.stat(path)
    return status is not None and status.kind in ("file", "broken link") and status.num_bytes <= MAX_SIDE_FILE_BYTES


def module_folders(folder: str) -> tuple[str, ...]:
    """The folders that `modules.json` (sentence-transformers) names: parts of the model beside its
    body.
    """
    path = join(folder, "modules.json")
    if open_store(path).stat(path) is None:
        return ()
    try:
        found = parse_json(read_file(path, MAX_MODULES_BYTES))
    except (ValueError, InputError):
        return ()
    paths = [module.get("path") for module in found if isinstance(module, dict)] if isinstance(found, list) else []
    return tuple(path for path in paths if isinstance(path, str) and path and "/" not in path and path not in (".", ".."))


def _is_code(name: str) -> bool:
    return name.endswith(".py") and name not in TRAINERS_CODE and not name.startswith(".")


def _is_kept(name: str) -> bool:
    if _is_code(name):
        return True
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in KEPT_BINARIES):
        return True
    return not name.startswith(".") and not any(fnmatch.fnmatchcase(name, pattern) for pattern in SKIPPED)


def differing_files(folders: Sequence[str], kept: Sequence[str], base: str) -> list[str]:
    """For each side file of `base` that decides what tokens and weights mean, the checkpoints where
    it differs, as warnings.

    Documentation and generation settings may differ freely; `config.json` is compared by content
    elsewhere.
    """
    warnings = []
    for name in kept:
        if not _gives_meaning(name):
            continue
        digests = _digests([join(base, name), *(join(folder, name) for folder in folders)])
        others = [folder for folder, found in zip(folders, digests[1:], strict=True) if found != digests[0]]
        if others:
            shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
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


def _digests(paths: Sequence[str]) -> list[str]:
    """For each file something that is equal where the content is: its sha256, or its version where
    stores have hashes for that.
    """
    if not any(map(is_local, paths)):
        versions = [_fact(path, lambda source: source.version) for path in paths]
        if all(version.startswith(("sha256 ", "git ", "absent")) for version in versions):
            return versions
    return [_fact(path, lambda source: hashlib.sha256(read_bytes(source, 0, source.num_bytes)).hexdigest()) for path in paths]


def _fact(path: str, fact: Callable[[Source], str]) -> str:
    store = open_store(path)
    if store.stat(path) is None:
        return "absent"
    try:
        with closing(store.open(path)) as source:
            return fact(source) if source.num_bytes <= MAX_SIDE_FILE_BYTES else "unreadable"
    except InputError:
        return "unreadable"
