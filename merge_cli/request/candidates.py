"""A path as a candidate: the checkpoint there with its step, stage and time.

The step is `global_step` of its trainer state, else the number in its name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge_cli.errors import InputError
from merge_cli.formats.checkpoint import RANK_FOLDER
from merge_cli.formats.dcp.folder import METADATA_FILE, open_folder
from merge_cli.formats.dcp.trainers import find_dcp, recorded_step
from merge_cli.formats.pickled import pickled_files
from merge_cli.formats.universal import find_universal, parameter_files
from merge_cli.request.folders import entries_of, label_of
from merge_cli.request.labels import Candidate, parse_label
from merge_cli.request.misses import no_such_checkpoint
from merge_cli.stores.store import Store, StrPath, as_path, folder_of, is_local, join, name_of, open_store, read_file
from merge_cli.system.json_text import parse_json

_LARGEST_STEP = 10**18
_MAX_TRAINER_STATE_BYTES = 256 << 20


def read_candidate(path: StrPath, *, with_time: bool = False) -> Candidate:
    """The checkpoint at `path` with its step. A file without a step in its name has the step of its
    folder.

    A name without a step (`latest`, `.`) may be a link to a name with one. A folder `stage1` above
    the checkpoint is its stage. The step of `trainer_state.json` outranks that of the name; if it
    cannot be read, `step_warning` has the reason. The step that torchtitan stores in a distributed
    checkpoint counts if nothing else has one. With `with_time` the time is that of the newest
    weight file, else 0.

    Raises InputError for a missing path.
    """
    path = as_path(path)
    store = open_store(path)
    status = store.stat(path)
    if status is None:
        raise no_such_checkpoint(path)
    named = str(Path(path).absolute()) if is_local(path) else path
    if status.kind == "file" and label_of(path).step is None:
        named = folder_of(named)
    label = label_of(named)
    if label.step is None:
        label = label_of(store.resolve(named))
    above = label_of(folder_of(named))
    warning = step = None
    if is_local(path) or label.step is None:  # elsewhere each look is a request
        try:
            step = _trainer_step(store, join(named, "trainer_state.json"))
            if step is None and label.step is None and (place := find_dcp(path)) is not None:
                step = recorded_step(open_folder(place.folder))
        except InputError as error:
            warning = error
    if step is not None and label.step not in (None, step):
        warning = InputError(f"{path} is step {step} by its trainer_state.json, not {label.step} as in its name")
    return Candidate(
        path,
        label.step if step is None else step,
        label.stage or above.stage,
        label.ingredient or above.ingredient,
        _weights_time(store, path) if with_time else 0,
        warning,
        label.tokens if label.step is not None and step in (None, label.step) else None,
    )


def step_inside(path: str) -> int | None:
    """The step in the trainer state of the local folder `path`, which outranks any name that leads
    there; None where there is none, or it cannot be read.
    """
    try:
        return _trainer_step(open_store(path), join(path, "trainer_state.json")) if is_local(path) else None
    except InputError:
        return None


def _weights_time(store: Store, path: str) -> int:
    """The modification time of the newest weight file; that of a folder changes with any file that
    is added.
    """
    found = store.stat(path)
    if found is None or found.kind != "folder":
        return 0 if found is None else found.mtime_ns
    if (place := find_dcp(path)) is not None:
        return _weights_time(store, join(place.folder, METADATA_FILE))
    if (inside := find_universal(path)) is not None:
        return max(_weights_time(store, each) for each in parameter_files(join(path, inside)).values())
    entries = entries_of(path)
    names = [entry.name for entry in entries]
    weights = [join(path, name) for name in names if name.endswith(".safetensors")]
    weights += [join(path, name) for name in pickled_files(names)]
    ranks = [join(path, entry.name) for entry in entries if RANK_FOLDER.match(entry.name) and entry.kind == "folder"]
    return max((_weights_time(store, each) for each in [*weights, *ranks]), default=0)


def _trainer_step(store: Store, path: str) -> int | None:
    if (status := store.stat(path)) is None or status.kind != "file":
        return None
    remedy = "correct or remove it; the step is then that of the name"
    if status.num_bytes > _MAX_TRAINER_STATE_BYTES:
        raise InputError(f"{path} is larger than {_MAX_TRAINER_STATE_BYTES >> 20} MiB", hint=remedy)
    try:
        state = parse_json(read_file(path, _MAX_TRAINER_STATE_BYTES))
    except ValueError as error:
        raise InputError(f"{path} is not a valid trainer state: {error}", hint=remedy) from error
    step = state.get("global_step") if isinstance(state, dict) else state
    if step is not None and not (type(step) is int and 0 <= step < _LARGEST_STEP):
        found = f"found     {step!r}"[:80] if isinstance(step, int | float | str) else f"found     a {type(step).__name__}"
        raise InputError(f"{path} has no step in `global_step`", details=[found, "expected  a whole number"], hint=remedy)
    return step


def with_steps_from_above(candidates: list[Candidate]) -> list[Candidate]:
    """Candidates whose last names are all alike (`global_step_80/actor/huggingface`) get the step
    of a folder above.
    """
    above = [each.path for each in candidates]
    if len(above) < 2 or any(each.step is not None for each in candidates):
        return candidates
    while len({name_of(path) for path in above}) == 1 and all(folder_of(path) not in ("", path) for path in above):
        above = [folder_of(path) for path in above]
    labels = [parse_label(name_of(path)) for path in above]
    if any(label.step is None for label in labels):
        return candidates
    return [
        replace(each, step=label.step, stage=each.stage or label.stage, ingredient=each.ingredient or label.ingredient)
        for each, label in zip(candidates, labels, strict=True)
    ]
