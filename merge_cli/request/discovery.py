"""Discovery: from the paths that were typed to checkpoints with their steps.

Lists folders and reads `trainer_state.json`, through a store; never a weight. The step of a
checkpoint is `global_step` of its trainer state, else the number in its name.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from merge_cli.errors import IncompleteError, InputError, UsageError, first_ten
from merge_cli.formats.checkpoint import RANK_FOLDER, SHARD_NUMBER
from merge_cli.formats.dcp.folder import METADATA_FILE, open_folder
from merge_cli.formats.dcp.trainers import find_dcp, is_dcp, is_unfinished, recorded_step
from merge_cli.formats.foreign import recognize
from merge_cli.formats.opening import Seen
from merge_cli.formats.pickled import ENDINGS, is_shard, pickled_files
from merge_cli.formats.torch_zip import TRAINING_STATE
from merge_cli.formats.universal import find_universal
from merge_cli.names import MANIFEST, STAGING_SUFFIX
from merge_cli.request.labels import BARE_NUMBER, Candidate, StepLabel, parse_label
from merge_cli.request.screening import check_none_is_merged, find_incomplete, offering_to_skip
from merge_cli.request.spec import Selection
from merge_cli.stores.addresses import meant_address, name_on_the_hub
from merge_cli.stores.store import (
    Entry,
    Store,
    StrPath,
    as_path,
    folder_of,
    is_glob,
    is_local,
    join,
    name_of,
    open_store,
    read_file,
    resolve,
)
from merge_cli.system.json_text import parse_json

_UNFINISHED = re.compile(r"^(?:tmp|temp|incomplete|partial)[-_.]|[-_.](?:tmp|temp|incomplete|partial)$", re.IGNORECASE)
_LARGEST_STEP = 10**18
_MAX_TRAINER_STATE_BYTES = 256 << 20
_EMPTY = "holds no weights that pmerge reads"


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
    if status.kind == "file" and _label_of(path).step is None:
        named = folder_of(named)
    label = _label_of(named)
    if label.step is None:
        label = _label_of(store.resolve(named))
    above = _label_of(folder_of(named))
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


def _label_of(path: str) -> StepLabel:
    """The label in the last part of a path; of a revision on the Hub, in the revision's name."""
    name = name_of(path)
    return parse_label(name if is_local(path) else name.rpartition("@")[2])


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
        name_of(path), [entry.name for entry in _entries(str(parent))] if parent == Path(path).parent else [], 1
    )
    meant = meant_address(path) or (str(parent / near[0]) if near else None)
    on_the_hub = name_on_the_hub(path) if not Path(path).parent.exists() else None
    hint = f"did you mean  {meant}" if meant else f"{look};  for a model on the Hub:  {on_the_hub}" if on_the_hub else look
    return InputError(f"no such checkpoint: {path}", hint=hint)


def _weights_time(store: Store, path: str) -> int:
    """The modification time of the newest weight file; that of a folder changes with any file that
    is added.
    """
    found = store.stat(path)
    if found is None or found.kind != "folder":
        return 0 if found is None else found.mtime_ns
    if (place := find_dcp(path)) is not None:
        return _weights_time(store, join(place.folder, METADATA_FILE))
    entries = _entries(path)
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


def is_checkpoint(folder: StrPath) -> bool:
    """Whether `folder` is a distributed checkpoint, finished or not, a universal one, or has the
    files of one (safetensors, or `pytorch_model*.bin`), directly or in folders of ranks.

    Files named by different steps (`model_step_10.safetensors`) are several checkpoints, so their
    folder is not one.
    """
    folder = as_path(folder)
    entries = _entries(folder)
    if is_dcp(folder) or is_unfinished(folder):
        return True
    names = {entry.name for entry in entries}
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return len(_step_files(entries)) < 2 or not names.isdisjoint(("model.safetensors", "config.json"))
    if pickled_files([entry.name for entry in entries if entry.kind == "file"]):
        return True
    ranks = [entry.name for entry in entries if RANK_FOLDER.match(entry.name) and entry.kind == "folder"]
    if any(inner.name.endswith(".safetensors") for rank in ranks for inner in _entries(join(folder, rank))):
        return True
    return find_universal(folder) is not None


def discover(
    paths: StrPath | Sequence[StrPath],
    on_skip: Callable[[str], None] | None = None,
    on_empty: Callable[[str], None] | None = None,
) -> list[str]:
    """The checkpoints at `paths` (or one path): themselves, and those inside every run folder, by
    number.

    A folder given alone is a run if it holds at least two checkpoints named by step, even with a
    final model saved beside them; a folder given with others is a checkpoint, if it can be. Hidden
    folders of a run are left out, as are, with a line each to `on_skip`, results of pmerge, folders
    whose name marks them as unfinished, links to a neighbor (`latest`), and checkpoints without a
    step (`final`, `best`) if others have one; folders named by step without weights go to
    `on_empty`, or without it are such a line too.

    Raises InputError if no checkpoint is found or one shard of several is given alone, UsageError
    if one checkpoint is named twice.
    """
    on_skip = on_skip or (lambda line: None)
    on_empty = on_empty or (lambda path: on_skip(f"{path} is left out: it {_EMPTY}"))
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: list[str] = []
    expanded = [(path, given) for given in paths for path in _expand(given, on_skip)]
    for path, given in expanded:
        if not is_local(path) and is_glob(os.fspath(given)):
            found.append(path)  # to look into each would be a request each, and most are not selected
            continue
        status = open_store(path).stat(path)
        if status is None or status.kind == "broken link":
            raise no_such_checkpoint(path)
        if status.kind == "file":
            _check_whole_file(path)
            found.append(path)
            continue
        inside, empty, skipped = _checkpoints_in(path)
        by_step = [entry for entry in inside if _is_named_by_step(entry)]
        if is_checkpoint(path) and not (len(expanded) == 1 and len(by_step) >= 2):
            found.append(path)
        elif inside:
            found += by_step or inside
            skipped += [f"{entry} is left out: its name has no step" for entry in inside if by_step and entry not in by_step]
            for line in skipped:
                on_skip(line)
            for folder in empty:
                on_empty(folder)
        else:
            raise _nothing_found(path)
    places: dict[str, str] = {}
    for path in found:
        other = places.setdefault(resolve(path), path)
        if other is not path:
            raise UsageError(f"the same checkpoint is named twice: {other} and {path}", hint="name it once")
    return found


def _expand(given: StrPath, on_skip: Callable[[str], None]) -> list[str]:
    """The paths that a pattern means, oldest first, without those that have no step, or are
    another's, where others have one.
    """
    if not os.fspath(given):
        raise UsageError("a checkpoint's path is empty", hint="is a variable of the shell unset?")
    path = as_path(given)
    store = open_store(path)
    matching = list(store.expand(path))
    if is_local(path) or not is_glob(path):
        return matching
    unfinished = [each for each in matching if _UNFINISHED.search(name_of(each))]
    for each in unfinished:
        on_skip(f"{each} is left out: its name says that it is unfinished")
    matching = [each for each in matching if each not in unfinished]
    named = sorted((each for each in matching if _label_of(each).step is not None), key=lambda each: (_label_of(each).step, each))
    if not named:
        return matching
    for each in matching:
        if each not in named:
            on_skip(f"{each} is left out: its name has no step")
    first: dict[str, str] = {}
    for each in named:
        other = first.setdefault(store.resolve(each), each)
        if other is not each:
            on_skip(f"{each} is left out: it is the same as {other}")
    return list(first.values())


def _check_whole_file(path: str) -> None:
    """Raise InputError for a file that is no checkpoint by itself."""
    if not path.endswith((".safetensors", *ENDINGS)):
        above = folder_of(path)
        hint = (
            f"name its folder:  {above}"
            if is_local(path) and is_checkpoint(above)
            else "pmerge reads safetensors; convert other formats first"
        )
        raise InputError(f"not a file of weights that pmerge reads: {path}", hint=hint)
    shard = SHARD_NUMBER.match(name_of(path))
    if (shard and int(shard["count"]) > 1) or is_shard(name_of(path)):
        raise InputError(f"{path} is one of several shards of a checkpoint", hint=f"name its folder:  {folder_of(path)}")


def _entries(folder: str) -> list[Entry]:
    return sorted(open_store(folder).list(folder), key=lambda entry: (parse_label(entry.name).step or 0, _natural(entry.name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts `v9` before `v10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]{1,18})", name) if part]


def _is_named_by_step(path: str) -> bool:
    if _label_of(path).step is not None:
        return True
    status = open_store(path).stat(join(path, "trainer_state.json"))
    return status is not None and status.kind == "file"


def _step_files(entries: Sequence[Entry]) -> list[str]:
    """The files that are a checkpoint each: safetensors, or where there are none, of torch.save.

    A bare number numbers a shard of safetensors; an index unites its files.
    """
    if any(entry.name.endswith(".safetensors.index.json") for entry in entries):
        return []
    files = [entry.name for entry in entries if entry.kind != "folder" and not entry.name.startswith(".")]
    names = [name for name in files if name.endswith(".safetensors")]
    if names:
        names = [name for name in names if not BARE_NUMBER.fullmatch(name.removesuffix(".safetensors"))]
    else:
        names = [name for name in files if name.endswith(ENDINGS) and not TRAINING_STATE.search(name)]
    named = [name for name in names if parse_label(name).step is not None]
    return named if len({re.sub(r"[0-9]+", "#", name) for name in named}) == 1 else []


def _checkpoints_in(run: str) -> tuple[list[str], list[str], list[str]]:
    """The checkpoints directly inside `run`, the folders named by step without weights, and a line
    for each other entry that looks like a checkpoint and is none.
    """
    store, entries, home = open_store(run), _entries(run), resolve(run)
    found, empty, skipped = [join(run, name) for name in _step_files(entries)], [], []
    for entry in entries:
        path = join(run, entry.name)
        if RANK_FOLDER.match(entry.name) or entry.kind != "folder":
            continue
        if entry.name.startswith(".") or entry.name.endswith(STAGING_SUFFIX):
            continue
        if _UNFINISHED.search(entry.name):
            skipped.append(f"{path} is left out: its name marks it as unfinished")
        elif store.stat(join(path, MANIFEST)) is not None:
            skipped.append(f"{path} is left out: a result of pmerge; name it to average it")
        elif (real := store.resolve(path)) != join(home, entry.name) and folder_of(real) == home:
            skipped.append(f"{path} is left out: a link to {name_of(real)}")
        elif is_checkpoint(path):
            found.append(path)
        elif _is_named_by_step(path):
            empty.append(path)
    return found, empty, skipped


def _nothing_found(path: str) -> InputError:
    entries = _entries(path)
    folders = [join(path, entry.name) for entry in entries if entry.kind == "folder"]
    below = _below_steps(folders)
    runs = [folder for folder in folders if _checkpoints_in(folder)[0]]
    names = [entry.name for entry in entries]
    foreign = recognize(path)
    hint = "name a folder with *.safetensors files, or a run folder that contains such folders"
    if below:
        hint = f"each checkpoint is in a folder of its step:  pmerge average {path}/*/{below}"
    elif runs:
        hint = f"the checkpoints are one folder down:  pmerge average {runs[0]}"
    elif foreign is not None:
        hint = foreign.hint
    return InputError(
        f"no checkpoints in {path}",
        details=[
            f"found     {', '.join(names[:10]) or 'an empty folder'}",
            *([f"found     {foreign.what}"] if foreign and not (below or runs) else []),
            "expected  *.safetensors or .metadata with *.distcp, or folders that hold them",
        ],
        hint=hint,
    )


def _below_steps(folders: Sequence[str]) -> str:
    """The one path below folders named by step that leads to a checkpoint in each of them, as
    `actor/huggingface`; "" if there is none.
    """
    steps = [folder for folder in folders if _label_of(folder).step is not None]
    if len(steps) < 2:
        return ""
    inner = [entry.name for entry in _entries(steps[-1]) if entry.kind == "folder"]
    inner += [f"{name}/{entry.name}" for name in inner for entry in _entries(join(steps[-1], name)) if entry.kind == "folder"]
    for name in inner:
        if all(open_store(each).stat(join(each, name)) is not None and is_checkpoint(join(each, name)) for each in steps):
            return name
    return ""


class Found(NamedTuple):
    """The checkpoints that were found, and lines on what is left out: notes, and warnings where it
    may surprise.
    """

    candidates: list[Candidate]
    notes: list[str]
    warnings: list[str]


def find_candidates(paths: StrPath | Sequence[StrPath], asked: Selection | None = None, seen: Seen | None = None) -> Found:
    """The checkpoints at `paths`. Raises InputError or UsageError.

    Of those in a run folder the newest is left out if it is incomplete, with a warning; all that
    are incomplete if `incomplete` is "skip"; none, so that opening it is an error, if "error", or
    if fewer than two would be left. Folders named by step without weights are left out with a
    warning, and are an error if `incomplete` is "error". `seen` as in `open_checkpoint`.
    """
    asked = asked or Selection()
    skipped: list[str] = []
    empty: list[str] = []
    candidates = list_candidates(paths, asked, skipped.append, empty.append)
    warnings = [f"{_few(empty)} left out as incomplete: {'it' if len(empty) == 1 else 'each'} {_EMPTY}"] if empty else []
    named = {as_path(path) for path in _typed(paths)}
    if any(is_glob(path) and not is_local(path) for path in named):
        return Found(candidates, skipped, warnings)  # revisions of the Hub are complete
    candidates = [replace(each, in_run=each.path not in named) for each in candidates]
    if empty and asked.incomplete == "error":
        with offering_to_skip(candidates, seen):
            raise IncompleteError(f"{empty[0]} {_EMPTY}", details=[f"as does  {path}" for path in first_ten(empty[1:])])
    in_runs = [each for each in candidates if each.in_run]
    left_out = find_incomplete(in_runs, asked.incomplete, seen)
    if len(candidates) - len(left_out) < 2:
        left_out = {}  # an average of one is none: opening it is the error that names it
    warnings += [f"{path} is left out as incomplete: {reason}" for path, reason in left_out.items()]
    return Found([each for each in candidates if each.path not in left_out], skipped, warnings)


def list_candidates(
    paths: StrPath | Sequence[StrPath],
    asked: Selection,
    on_skip: Callable[[str], None] | None = None,
    on_empty: Callable[[str], None] | None = None,
) -> list[Candidate]:
    """All checkpoints at `paths`, complete or not, with their steps; the other parameters as in
    `discover`.

    An earlier result of pmerge is an error unless `allow_merged` is set. Modification times are
    read only if `order` is "mtime". Raises InputError or UsageError.
    """
    typed = _typed(paths)
    if not typed:
        raise UsageError("no checkpoint to average", hint="pmerge average RUN_FOLDER")
    found = discover(typed, on_skip, on_empty)
    if asked.order == "given" and len(found) > len(typed):
        raise UsageError(
            "--order given is for checkpoints that are named one by one, and a run folder stands for several",
            details=[f"found     {', '.join(found[:3])} ..."],
            hint=f"name them in their order:  pmerge average {_all_or_first(found)} --order given",
        )
    if not asked.allow_merged:
        check_none_is_merged(found)
    return _with_steps_from_above([read_candidate(path, with_time=asked.order == "mtime") for path in found])


def _all_or_first(paths: Sequence[str], most: int = 12) -> str:
    return shlex.join(paths) if len(paths) <= most else f"{shlex.join(paths[:3])} ... {shlex.quote(paths[-1])}"


def _typed(paths: StrPath | Sequence[StrPath]) -> list[StrPath]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def _few(paths: Sequence[str], most: int = 3) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"{', '.join(paths[:most])}{more} {'is' if len(paths) == 1 else 'are'}"


def _with_steps_from_above(candidates: list[Candidate]) -> list[Candidate]:
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
