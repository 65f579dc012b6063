"""Whose folder it is: where a trainer keeps `.metadata`, which files beside it its loader wants, and the step that it recorded.

    torch       step-1000/.metadata                       torchtitan, torch's own writer
    olmo-core   step1000/model_and_optim/.metadata        beside: .metadata.json, config.json, train/rank0.pt
    megatron    iter_0001000/.metadata, metadata.json     beside: common.pt; above: latest_checkpointed_iteration.txt
    nemo        .../weights/.metadata, metadata.json      beside: context/

No pickle is opened: files that hold one are copied as bytes, and only where the trainer's loader needs them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from merge_cli.errors import InputError
from merge_cli.formats.dcp.entries import DROP
from merge_cli.formats.dcp.folder import METADATA_FILE, DcpFolder, locate
from merge_cli.formats.dcp.item import Envelopes
from merge_cli.formats.files import list_folder, read_exactly, read_regular_file

_INSIDE = {"model_and_optim": "olmo-core", "weights": "nemo"}
_MAX_SMALL_BYTES = 1 << 20
_STEP_ENTRIES = ("train_state.step",)


@dataclass(frozen=True)
class DcpPlace:
    """A checkpoint: `folder` holds `.metadata`, and is `inside` of `path` ("" if it is `path` itself)."""

    path: Path
    inside: str
    trainer: str

    @property
    def folder(self) -> Path:
        return self.path / self.inside


def find_dcp(path: Path) -> DcpPlace | None:
    """The distributed checkpoint at the folder `path`, None if it is none."""
    if (path / METADATA_FILE).is_file():
        return DcpPlace(path, "", "megatron" if _is_megatron(path) else "torch")
    for inside, trainer in _INSIDE.items():
        if (path / inside / METADATA_FILE).is_file():
            return DcpPlace(path, inside, trainer)
    return None


def is_dcp(path: Path) -> bool:
    """Whether the folder `path` is a distributed checkpoint."""
    return find_dcp(path) is not None


def is_unfinished(path: Path) -> bool:
    """Whether `path` has files of a distributed checkpoint and no metadata: a save that is under way, or broke off."""
    if not path.is_dir() or is_dcp(path):
        return False
    folders = [path, *(path / inside for inside in _INSIDE)]
    return any(entry.name.endswith(".distcp") for folder in folders if folder.is_dir() for entry in list_folder(folder))


def _is_megatron(path: Path) -> bool:
    if not (path / "metadata.json").is_file():
        return False
    try:
        content = json.loads(read_regular_file(path / "metadata.json", _MAX_SMALL_BYTES))
    except (InputError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("sharded_backend") == "torch_dist"


def files_beside(place: DcpPlace, training_state: str) -> list[str]:
    """The files that the trainer's loader needs beside the checkpoint's own, as paths relative to `place.path`.

    Megatron's `common.pt` has the arguments and the iteration of the base, and nothing loads without it. OLMo-core resumes with
    `train/`, the pickles of its trainer: with `drop` they are left out, and it begins anew with these weights.
    """
    wanted: dict[str, tuple[str, ...]] = {
        "torch": (),
        "olmo-core": (".metadata.json", "config.json", "data_paths.txt"),
        "megatron": ("metadata.json", "common.pt"),
        "nemo": ("weights/metadata.json", "weights/common.pt"),
    }
    names = [name for name in wanted[place.trainer] if (place.path / name).is_file()]
    if place.trainer == "olmo-core" and training_state != DROP and (place.path / "train").is_dir():
        names += [f"train/{entry.name}" for entry in list_folder(place.path / "train") if entry.name.endswith(".pt")]
    if place.trainer == "nemo" and (place.path / "context").is_dir():
        names += _below(place.path, "context")
    return names


def _below(root: Path, folder: str) -> list[str]:
    return sorted(
        (Path(parent) / name).relative_to(root).as_posix() for parent, _, names in os.walk(root / folder) for name in names
    )


def latest_iteration(run: Path) -> int | None:
    """The last complete iteration of Megatron's run folder, by its own record; None if there is none."""
    path = run / "latest_checkpointed_iteration.txt"
    if not path.is_file():
        return None
    text = read_regular_file(path, _MAX_SMALL_BYTES).strip()
    return int(text) if text.isdigit() and len(text) <= 18 else None


def recorded_step(folder: DcpFolder) -> int | None:
    """The step in torchtitan's `train_state.step`, an integer tensor without dimensions; None if there is none."""
    for name in _STEP_ENTRIES:
        tensor = folder.metadata.tensors.get(name)
        if tensor is None or tensor.shape or tensor.dtype not in ("I32", "I64"):
            continue
        ((_, _, payload),) = locate(folder, [(name, tensor, tensor.chunks[0])], Envelopes())
        with folder.files[payload.file].path.open("rb") as file:
            return int.from_bytes(read_exactly(file.fileno(), payload.num_bytes, payload.offset), "little", signed=True)
    return None
