"""The errors for a path where no checkpoint is: what is there instead, and the command that was
probably meant.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from merge_cli.errors import InputError
from merge_cli.formats.foreign import recognize
from merge_cli.request.folders import checkpoints_in, entries_of, is_checkpoint, is_named_by_step, label_of
from merge_cli.stores.addresses import meant_address, name_on_the_hub
from merge_cli.stores.store import is_glob, is_local, join, name_of, open_store

_MOST_DEPTH, _MOST_FOLDERS = 2, 50  # of the look for checkpoints further down


def no_such_checkpoint(path: str) -> InputError:
    """The error for a path that does not exist. A glob in it was left as it is by a shell that
    found no match.
    """
    if not is_local(path):
        return InputError(f"no such checkpoint: {path}")
    parent = next((above for above in Path(path).parents if above.exists() and not is_glob(str(above))), Path())
    look = f"list the folder:  ls {parent}"
    if is_glob(path) and any(parent.glob(str(Path(path).relative_to(parent)))):
        return InputError(f"{path} is a pattern, and quoted: the shell did not expand it", hint=f"leave out the quotes:  {path}")
    if is_glob(path):
        return InputError(f"nothing matches {path}", details=["the shell found nothing, and left the pattern as it is"], hint=look)
    if Path(path).is_symlink():
        return InputError(f"{path} is a link to {Path(path).readlink()}, which leads nowhere", hint=look)
    near = get_close_matches(
        name_of(path), [entry.name for entry in entries_of(str(parent))] if parent == Path(path).parent else [], 1
    )
    meant = meant_address(path) or (str(parent / near[0]) if near else None)
    on_the_hub = name_on_the_hub(path) if not Path(path).parent.exists() else None
    hint = f"did you mean  {meant}" if meant else f"{look};  for a model on the Hub:  {on_the_hub}" if on_the_hub else look
    return InputError(f"no such checkpoint: {path}", hint=hint)


def nothing_found(path: str) -> InputError:
    entries = entries_of(path)
    folders = [join(path, entry.name) for entry in entries if entry.kind == "folder"]
    parts = _parts_below_steps(folders)
    run = None if parts else _run_below(folders)
    names = [entry.name for entry in entries]
    foreign = recognize(path)
    hint = "name a folder with *.safetensors files, or a run folder that contains such folders"
    if parts:
        several = (
            f"s hold several models ({', '.join(parts)}), to be averaged one by one" if len(parts) > 1 else " holds its checkpoint"
        )
        hint = f"the folder of each step{several}:  pmerge average {shlex.quote(path)}/*/{shlex.quote(parts[0])}"
    elif run is not None:
        hint = f"the checkpoints are further down:  pmerge average {shlex.quote(run)}"
    elif foreign is not None:
        hint = foreign.hint
    return InputError(
        f"no checkpoints in {path}",
        details=[
            f"found     {', '.join(names[:10]) or 'an empty folder'}",
            *([f"found     {foreign.what}"] if foreign and not (parts or run) else []),
            "expected  *.safetensors or .metadata with *.distcp, or folders that hold them",
        ],
        hint=hint,
    )


def _parts_below_steps(folders: Sequence[str]) -> list[str]:
    """The paths below folders named by step that lead to a checkpoint in each of them, as
    `actor/huggingface`, or `unet` and `vae`; those that are not so deep.
    """
    steps = [folder for folder in folders if label_of(folder).step is not None]
    below = [""] if len(steps) > 1 else []
    for _ in range(_MOST_DEPTH):
        below = [
            join(name, each) if name else each
            for name in below
            for each in _folders_in(join(steps[-1], name) if name else steps[-1])
        ]
        found = [name for name in below if all(_is_checkpoint_there(join(step, name)) for step in steps)]
        if found:
            return found
    return []


def _run_below(folders: Sequence[str]) -> str | None:
    """The first run folder among or below `folders`."""
    for _ in range(_MOST_DEPTH):
        for folder in folders[:_MOST_FOLDERS]:
            if any(map(is_named_by_step, checkpoints_in(folder)[0])):
                return folder
        folders = [join(folder, name) for folder in folders[:_MOST_FOLDERS] for name in _folders_in(folder)]
    return None


def _folders_in(path: str) -> list[str]:
    return [entry.name for entry in entries_of(path) if entry.kind == "folder" and not entry.name.startswith(".")]


def _is_checkpoint_there(path: str) -> bool:
    status = open_store(path).stat(path)
    return status is not None and status.kind == "folder" and is_checkpoint(path)
