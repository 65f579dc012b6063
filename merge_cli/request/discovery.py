"""Find checkpoints: from the paths that were typed to candidates with their steps.

Lists folders and reads `trainer_state.json`; never a weight. The step of a checkpoint is `global_step` of its trainer state, else
the number in its name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from merge_cli.errors import InputError, UsageError
from merge_cli.formats.checkpoint import RANK_FOLDER, SHARD_NUMBER
from merge_cli.names import MANIFEST, STAGING_SUFFIX
from merge_cli.request.labels import BARE_NUMBER, Candidate, parse_label
from merge_cli.request.spec import StrPath

_UNFINISHED = re.compile(r"^(?:tmp|temp|incomplete|partial)[-_.]|[-_.](?:tmp|temp|incomplete|partial)$", re.IGNORECASE)
_LARGEST_STEP = 10**18
_MAX_TRAINER_STATE_BYTES = 256 << 20
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".distcp", ".ckpt", ".gguf", ".npz", ".msgpack")


def read_candidate(path: Path) -> Candidate:
    """The checkpoint at `path` with its step; a file without a step in its name is told by the folder it lies in.

    A name that says nothing (`latest`, `.`) may be a link to one that does. A folder `stage1` above the checkpoint is its stage.
    The step of `trainer_state.json` outranks the name's; where it cannot be read, `doubt` says so.

    Raises InputError for a missing path.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise no_such_checkpoint(path) from error
    named = path.absolute()
    if path.is_file() and parse_label(path.name).step is None:
        named = named.parent
    label = parse_label(named.name)
    if label.step is None:
        label = parse_label(named.resolve().name)
    above = parse_label(named.parent.name)
    doubt = step = None
    try:
        step = _trainer_step(named / "trainer_state.json")
    except InputError as error:
        doubt = error
    if step is not None and label.step not in (None, step):
        doubt = InputError(f"{path} is step {step} by its trainer_state.json, not {label.step} as in its name")
    return Candidate(
        path,
        label.step if step is None else step,
        label.stage or above.stage,
        label.ingredient or above.ingredient,
        status.st_mtime_ns,
        doubt,
    )


def no_such_checkpoint(path: Path) -> InputError:
    """The error for a path where nothing is; a glob in it means that the shell found nothing either."""
    parent = next((above for above in path.parents if above.exists() and not _is_glob(above)), Path())
    hint = f"look what is there:  ls {parent}"
    if _is_glob(path):
        return InputError(f"nothing matches {path}", details=["the shell found nothing, and left the pattern as it is"], hint=hint)
    return InputError(f"no such checkpoint: {path}", hint=hint)


def _is_glob(path: Path) -> bool:
    return any(character in str(path) for character in "*?[")


def _trainer_step(path: Path) -> int | None:
    if not path.is_file():
        return None
    remedy = "mend or remove it; the name then gives the step"
    try:
        if path.stat().st_size > _MAX_TRAINER_STATE_BYTES:
            raise InputError(f"{path} is larger than {_MAX_TRAINER_STATE_BYTES >> 20} MiB", hint=remedy)
        state = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a valid trainer state: {error}", hint=remedy) from error
    step = state.get("global_step") if isinstance(state, dict) else state
    if step is not None and not (type(step) is int and 0 <= step < _LARGEST_STEP):
        found = f"found     {step!r}"[:80] if isinstance(step, int | float | str) else f"found     a {type(step).__name__}"
        raise InputError(f"{path} has no step in `global_step`", details=[found, "expected  a whole number"], hint=remedy)
    return step


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds the safetensors files of one checkpoint, directly or in folders named like ranks.

    Files each named by a step of its own (`model_step_10.safetensors`) are several checkpoints, so their folder is not one.
    """
    entries = _entries(folder)
    if any(entry.name.endswith((".safetensors", ".safetensors.index.json")) for entry in entries):
        return len(_step_files(entries)) < 2
    ranks = [entry for entry in entries if RANK_FOLDER.match(entry.name) and entry.is_dir()]
    return any(inner.name.endswith(".safetensors") for rank in ranks for inner in _entries(rank))


def discover(paths: Sequence[str | os.PathLike[str]], on_skip: Callable[[str], None] | None = None) -> list[Path]:
    """The checkpoints that `paths` mean: themselves, and those inside every run folder, by number.

    A folder given alone is a run when it holds at least two checkpoints named by step, even if a final model was saved
    beside them; with others it is a checkpoint, if it can be. Of a run are left out: hidden and unfinished folders, and, told to
    `on_skip`, results of pmerge, links to a neighbour (`latest`), folders named by step without safetensors, and checkpoints
    without a step (`final`, `best`) where others have one.

    Raises InputError where nothing is found or one shard of several is given alone, UsageError when one checkpoint is named twice.
    """
    found: list[Path] = []
    for given in paths:
        if not os.fspath(given):
            raise UsageError("a checkpoint's path is empty", hint="is a variable of the shell unset?")
        path = Path(given)
        if not path.exists():
            raise no_such_checkpoint(path)
        if path.is_file():
            if path.suffix != ".safetensors":
                raise InputError(f"not a safetensors file: {path}", hint="pmerge reads safetensors; convert other formats first")
            shard = SHARD_NUMBER.match(path.name)
            if shard and int(shard["count"]) > 1:
                raise InputError(
                    f"{path} is one of {int(shard['count'])} shards of a checkpoint", hint=f"name its folder:  {path.parent}"
                )
            found.append(path)
            continue
        inside, skipped = _checkpoints_in(path)
        by_step = [entry for entry in inside if _is_named_by_step(entry)]
        if is_checkpoint(path) and not (len(paths) == 1 and len(by_step) >= 2):
            found.append(path)
        elif inside:
            found += by_step or inside
            skipped += [f"{entry} is left out: its name has no step" for entry in inside if by_step and entry not in by_step]
            if on_skip is not None:
                for line in skipped:
                    on_skip(line)
        else:
            raise _nothing_found(path)
    places: dict[Path, Path] = {}
    for path in found:
        other = places.setdefault(path.resolve(), path)
        if other is not path:
            raise UsageError(f"the same checkpoint is named twice: {other} and {path}", hint="name it once")
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda entry: (parse_label(entry.name).step or 0, entry.name))
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}", hint=f"ls -ld {folder}") from error


def _is_named_by_step(path: Path) -> bool:
    return parse_label(path.name).step is not None or (path / "trainer_state.json").is_file()


def _step_files(entries: Sequence[Path]) -> list[Path]:
    """The safetensors files that are a checkpoint each. A bare number is the number of a shard, and an index unites its files."""
    if any(entry.name.endswith(".safetensors.index.json") for entry in entries):
        return []
    files = [entry for entry in entries if entry.suffix == ".safetensors" and not entry.name.startswith(".")]
    return [f for f in files if not BARE_NUMBER.fullmatch(f.stem) and parse_label(f.name).step is not None and not f.is_dir()]


def _checkpoints_in(run: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints directly inside `run`, and a line for each thing that looks like one and is none."""
    entries, home = _entries(run), run.resolve()
    found, skipped = _step_files(entries), []
    for entry in entries:
        if RANK_FOLDER.match(entry.name) or not entry.is_dir():
            continue
        if entry.name.startswith(".") or entry.name.endswith(STAGING_SUFFIX):
            continue
        if _UNFINISHED.search(entry.name):
            skipped.append(f"{entry} is left out: its name says that it is unfinished")
        elif (entry / MANIFEST).exists():
            skipped.append(f"{entry} is left out: a result of pmerge; name it to average it")
        elif entry.is_symlink() and entry.resolve().parent == home:
            skipped.append(f"{entry} is left out: a link to {entry.resolve().name}")
        elif is_checkpoint(entry):
            found.append(entry)
        elif _is_named_by_step(entry):
            skipped.append(f"{entry} is left out: it holds no safetensors files")
    return found, skipped


def _nothing_found(path: Path) -> InputError:
    entries = _entries(path)
    folders = [entry for entry in entries if entry.is_dir()]
    runs = [folder for folder in folders if _checkpoints_in(folder)[0]]
    deeper = [entry for folder in folders for entry in _entries(folder)]
    other = next((entry for entry in [*entries, *deeper] if entry.name.endswith(_OTHER_FORMATS)), None)
    hint = "name a folder with *.safetensors files, or a run folder that contains such folders"
    if runs:
        hint = f"the checkpoints are one folder down:  pmerge average {runs[0]}"
    elif other is not None:
        way = "transformers' save_pretrained"
        if other.suffix == ".distcp":
            way = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {other.parent} model.pt, then safetensors"
        hint = f"pmerge reads safetensors; convert {other.relative_to(path)} first (for example with {way})"
    names = ", ".join(entry.name for entry in entries[:10])
    return InputError(
        f"no checkpoints in {path}",
        details=[f"found     {names or 'an empty folder'}", "expected  *.safetensors, or folders that hold them"],
        hint=hint,
    )


def find_candidates(paths: Sequence[StrPath]) -> tuple[list[Candidate], list[str]]:
    """The checkpoints that `paths` mean, and a line for each thing there that is left out. Raises InputError or UsageError."""
    if not paths:
        raise UsageError("no checkpoint to average", hint="pmerge average RUN_FOLDER")
    skipped: list[str] = []
    return [read_candidate(path) for path in discover(paths, skipped.append)], skipped
