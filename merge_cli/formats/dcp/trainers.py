"""Whose folder it is: where a trainer keeps `.metadata`, which files beside it its loader wants,
and the step that it recorded.

    torch       step-1000/.metadata                       torchtitan, torch's own writer
    olmo-core   step1000/model_and_optim/.metadata        beside: .metadata.json, config.json, train/rank0.pt
    megatron    iter_0001000/.metadata, metadata.json     beside: common.pt; above: latest_checkpointed_iteration.txt
    nemo        .../weights/.metadata, metadata.json      beside: context/

No pickle is opened: files that hold one are copied as bytes, and only where the trainer's loader
needs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from merge_cli.errors import InputError
from merge_cli.formats.dcp.entries import DROP
from merge_cli.formats.dcp.folder import METADATA_FILE, DcpFolder, locate
from merge_cli.formats.dcp.item import Envelopes
from merge_cli.stores.store import Entry, Kind, StrPath, as_path, folder_of, join, name_of, open_store, read_bytes, read_file
from merge_cli.system.json_text import parse_json

_INSIDE = {"model_and_optim": "olmo-core", "weights": "nemo"}
_MAX_SMALL_BYTES = 1 << 20
_ITERATION = re.compile(r"iter_([0-9]{1,18})")
_STEP_ENTRIES = ("train_state.step",)


@dataclass(frozen=True)
class DcpPlace:
    """A checkpoint: `folder` holds `.metadata`, and is `inside` of `path` ("" if it is `path`
    itself).
    """

    path: str
    inside: str
    trainer: str

    @property
    def folder(self) -> str:
        return join(self.path, self.inside) if self.inside else self.path


def find_dcp(path: StrPath) -> DcpPlace | None:
    """The distributed checkpoint at the folder `path`, None if it is none."""
    path = as_path(path)
    inside = _folders(path)
    if _is_described(inside.get("", ())):
        return DcpPlace(path, "", "megatron" if _is_megatron(path) else "torch")
    for name, trainer in _INSIDE.items():
        if _is_described(inside.get(name, ())):
            return DcpPlace(path, name, trainer)
    return None


def _is_described(entries: Sequence[Entry]) -> bool:
    """Whether there is a `.metadata`, and it is not the training state beside weights in
    safetensors.
    """
    names = [entry.name for entry in entries]
    beside_weights = any(name.endswith(".safetensors") for name in names) and not any(name.endswith(".distcp") for name in names)
    return Entry(METADATA_FILE, "file") in entries and not beside_weights


def is_dcp(path: StrPath) -> bool:
    """Whether the folder `path` is a distributed checkpoint."""
    return find_dcp(path) is not None


def is_unfinished(path: StrPath) -> bool:
    """Whether `path` has files of a distributed checkpoint and no metadata: a save that is under
    way, or broke off.
    """
    names = [entry.name for entries in _folders(as_path(path)).values() for entry in entries]
    return METADATA_FILE not in names and any(name.endswith(".distcp") for name in names)


def _folders(path: str) -> dict[str, Sequence[Entry]]:
    """The entries of the folder `path` (under "") and of those folders in it that may hold a
    checkpoint.
    """
    store = open_store(path)
    if not _is(path, "folder"):
        return {}
    found = {"": store.list(path)}
    for entry in found[""]:
        if entry.name in _INSIDE and entry.kind == "folder":
            found[entry.name] = store.list(join(path, entry.name))
    return found


def _is(path: str, kind: Kind) -> bool:
    status = open_store(path).stat(path)
    return status is not None and status.kind == kind


def _is_megatron(path: str) -> bool:
    if not _is(join(path, "metadata.json"), "file"):
        return False
    try:
        content = parse_json(read_file(join(path, "metadata.json"), _MAX_SMALL_BYTES))
    except (InputError, ValueError):
        return False
    return isinstance(content, dict) and content.get("sharded_backend") == "torch_dist"


def files_beside(place: DcpPlace, training_state: str) -> list[str]:
    """The files that the trainer's loader needs beside the checkpoint's own, as paths relative to
    `place.path`.

    Megatron's `common.pt` has the arguments and the iteration of the base, and nothing loads
    without it. OLMo-core resumes with `train/`, the pickles of its trainer: with `drop` they are
    left out, and it begins anew with these weights.
    """
    wanted: dict[str, tuple[str, ...]] = {
        "torch": (),
        "olmo-core": (".metadata.json", "config.json", "data_paths.txt"),
        "megatron": ("metadata.json", "common.pt"),
        "nemo": ("weights/metadata.json", "weights/common.pt"),
    }
    names = [name for name in wanted[place.trainer] if _is(join(place.path, name), "file")]
    if place.trainer == "olmo-core" and training_state != DROP and _is(join(place.path, "train"), "folder"):
        names += [name for name in _below(place.path, "train") if name.endswith(".pt") and name.count("/") == 1]
    if place.trainer == "nemo" and _is(join(place.path, "context"), "folder"):
        names += _below(place.path, "context")
    return names


def _below(root: str, folder: str) -> Iterator[str]:
    """The files below a folder, links to folders not followed: they may lead in circles."""
    store, here = open_store(root), join(root, folder)
    for entry in store.list(here):
        if entry.kind != "folder":
            yield f"{folder}/{entry.name}"
        elif store.resolve(join(here, entry.name)) == join(store.resolve(here), entry.name):
            yield from _below(root, f"{folder}/{entry.name}")


def missing_marker(path: StrPath) -> str | None:
    """Why the trainer itself takes the checkpoint at `path` for unfinished, in one line; None where
    it has set its marker, or sets none.

    NeMo keeps `PATH-unfinished` beside a save that is under way; OLMo-core writes `.metadata.json`
    last, Megatron `metadata.json` and then the iteration into the run folder.
    """
    path = as_path(path)
    if not _is(path, "folder"):
        return None
    if not path.startswith("hf://") and _is(path + "-unfinished", "file"):
        return f"{path}-unfinished says that the save of {path} is not finished"
    place = find_dcp(path)
    if place is None:
        return None
    if place.trainer == "olmo-core" and _is(join(path, "train"), "folder") and not _is(join(path, ".metadata.json"), "file"):
        return f"{path} has no .metadata.json, which OLMo-core writes last"
    if _is(join(place.folder, "common.pt"), "file") and not _is(join(place.folder, "metadata.json"), "file"):
        return f"{path} has no metadata.json, which Megatron writes last"
    latest, match = latest_iteration(folder_of(path)), _ITERATION.fullmatch(name_of(path))
    if latest is not None and match and int(match[1]) > latest:
        return f"{path} is newer than iteration {latest}, the last that Megatron recorded as complete"
    return None


def latest_iteration(run: StrPath) -> int | None:
    """The last complete iteration of Megatron's run folder, by its own record; None if there is
    none.
    """
    path = join(as_path(run), "latest_checkpointed_iteration.txt")
    if not _is(path, "file"):
        return None
    text = read_file(path, _MAX_SMALL_BYTES).strip()
    return int(text) if text.isdigit() and len(text) <= 18 else None


def recorded_step(folder: DcpFolder) -> int | None:
    """The step in torchtitan's `train_state.step`, an integer tensor without dimensions; None if
    there is none.
    """
    for name in _STEP_ENTRIES:
        tensor = folder.metadata.tensors.get(name)
        if tensor is None or tensor.shape or tensor.dtype not in ("I32", "I64"):
            continue
        ((_, _, payload),) = locate(folder, [(name, tensor, tensor.chunks[0])], Envelopes())
        with closing(folder.files[payload.file].source) as source:
            return int.from_bytes(read_bytes(source, payload.offset, payload.num_bytes), "little", signed=True)
    return None
