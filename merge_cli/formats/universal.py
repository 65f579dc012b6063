"""Universal checkpoints of DeepSpeed (`ds_to_universal.py`): a folder for each parameter, whole and
in float32, beside the states of the optimizer.

    global_step1000_universal/zero/NAME/fp32.pt     {"param": tensor, ...}, written by torch.save
    latest_universal                                beside it: the name of that folder

Read only, never unpickled; the result is safetensors under the names of the folders. Buffers, which
have no optimizer state, are not in there. A parameter that is missing altogether shows only beside
a checkpoint that has it.

Source: deepspeed/checkpoint/ds_to_universal.py of DeepSpeed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from merge_cli.errors import IncompleteError, UnsupportedError, first_ten
from merge_cli.formats.checkpoint import Checkpoint, Stored, holds_safetensors, read_config
from merge_cli.formats.pickled import LAYOUT, open_archive, pickled_files
from merge_cli.formats.side_files import list_side_files
from merge_cli.formats.weight_file import WeightFile
from merge_cli.stores.store import StrPath, as_path, join, open_store, read_file

_WEIGHTS = "fp32.pt"
_LATEST = "latest_universal"
_PARAMETERS = "zero"
_MAX_NAME_BYTES = 1000


def find_universal(path: StrPath) -> str | None:
    """The folder of parameters of the universal checkpoint at `path`, relative to it; None if there
    is none, or safetensors or files of `torch.save` beside it, which count instead.
    """
    path = as_path(path)
    store = open_store(path)
    status = store.stat(path)
    if status is None or status.kind != "folder":
        return None
    entries = list(store.list(path))
    kinds = {entry.name: entry.kind for entry in entries}
    inside = _PARAMETERS
    if kinds.get(_LATEST) == "file" and _PARAMETERS not in kinds:
        named = read_file(join(path, _LATEST), _MAX_NAME_BYTES).decode(errors="replace").strip()
        if kinds.get(named) != "folder":
            return None
        inside = f"{named}/{_PARAMETERS}"
    elif kinds.get(_PARAMETERS) != "folder":
        return None
    folder = join(path, inside)
    status = store.stat(folder)
    if status is None or status.kind != "folder":
        return None
    first = next((entry.name for entry in store.list(folder) if entry.kind == "folder"), None)
    if first is None or not any(entry.name.endswith(".pt") for entry in store.list(join(folder, first))):
        return None
    return None if pickled_files(list(kinds)) or holds_safetensors(path, entries) else inside


def parameter_files(folder: str) -> dict[str, str]:
    """The file of each parameter in the folder that holds all of them, by its name; some may be
    missing.
    """
    names = [entry.name for entry in open_store(folder).list(folder) if entry.kind == "folder"]
    return {name: join(join(folder, name), _WEIGHTS) for name in names}


def open_universal(path: StrPath, inside: str) -> Checkpoint:
    """Open the universal checkpoint at `path`, whose parameters are in the folder `inside`. Raises
    InputError.
    """
    path = as_path(path)
    store = open_store(path)
    files = {name: f"{inside}/{name}/{_WEIGHTS}" for name in sorted(parameter_files(join(path, inside)))}
    missing = [file for file in files.values() if store.stat(join(path, file)) is None]
    if missing:
        raise IncompleteError(f"{len(missing)} of {len(files)} parameters have no {_WEIGHTS} in {path}", details=first_ten(missing))
    for file in files.values():
        store.check_inside(path, join(path, file))

    with ThreadPoolExecutor(store.requests_at_once) as pool:
        opened = list(pool.map(lambda name: _open_parameter(join(path, files[name]), files[name], name), files))
    store.check_inside(path, join(path, "config.json"))
    return Checkpoint(
        path=path,
        root=path,
        layout=LAYOUT,
        files=tuple(file for file, _ in opened),
        tensors={stored.name: stored for _, stored in opened},
        config=read_config(join(path, "config.json")),
        side_files=list_side_files(path, set(files.values())),
    )


def _open_parameter(path: str, file: str, name: str) -> tuple[WeightFile, Stored]:
    opened, tensors = open_archive(path, file)
    if tensors.keys() != {"param"}:
        raise UnsupportedError(
            f"{path} is not one parameter of a universal checkpoint",
            details=[f"found     {', '.join(sorted(tensors))[:200]}", "expected  one tensor, `param`"],
            hint="convert the checkpoint again with DeepSpeed's ds_to_universal.py",
        )
    return opened, tensors["param"]._replace(name=name)
