"""The result that a destination holds already: is it the requested one, is it complete, and if not,
what is it?

A result counts by its records alone: pmerge.json names the same plan and the same inputs, and every
file has its recorded size. Bytes are compared where that is asked for, and before `--overwrite`
leaves a result as it is.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from merge_cli.errors import InputError, OutputError, first_ten
from merge_cli.formats.weight_file import recorded_fingerprint
from merge_cli.names import MANIFEST, is_below
from merge_cli.output.folder import differences, staging_path
from merge_cli.output.manifest import MAX_MANIFEST_BYTES, is_sealed
from merge_cli.output.schema import is_newer
from merge_cli.planning.plan import MergePlan
from merge_cli.planning.record import fingerprint, input_records, request_record
from merge_cli.stores.store import is_local, read_file
from merge_cli.system.files import sha256_of
from merge_cli.system.held import is_held_by_nfs
from merge_cli.system.json_text import parse_json
from merge_cli.system.process import process_start


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a result's pmerge.json; {} if there is none, or if it does not match its own
    seal.
    """
    try:
        raw = read_file(str(folder / MANIFEST), MAX_MANIFEST_BYTES)
        content = parse_json(raw, is_own=True) if is_sealed(raw) else {}
    except (OSError, InputError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_merged(folder: Path) -> bool:
    """Whether a folder looks like a result of pmerge."""
    return not folder.is_symlink() and (folder / MANIFEST).is_file()


def is_empty_folder(path: Path) -> bool:
    """Whether `path` is a real folder with nothing in it, which a result may replace."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def is_published(path: Path, merge: MergePlan, *, hashed: bool = False, is_cleaning: bool = False) -> bool:
    """Whether `path` holds the complete result of this very plan and these very inputs; `hashed`
    compares its bytes too. With `is_cleaning` another process is known to be past the renaming, so
    its note about that counts for nothing.
    """
    if path.is_symlink() or (not is_cleaning and (staging_path(path) / "publish.json").exists()):
        return False
    content = read_manifest(path)
    try:
        inputs = [[recorded_fingerprint(file) for file in each["files"]] for each in content["inputs"]]
        now = input_records(merge)
        if content["plan"] != fingerprint(merge) or inputs != [each["files"] for each in now]:
            return False
        if not all(_may_be_at(each["path"], other["path"]) for each, other in zip(content["inputs"], now, strict=True)):
            return False
        files = {**content["files"], **content["side_files"]}
        return all((path / name).stat().st_size == file["bytes"] for name, file in files.items()) and not (
            hashed and any(corrupt_files(path))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _may_be_at(recorded: str, path: str) -> bool:
    """Whether an input that was recorded at one path may be at another: under a second name of the
    same mount, or moved, so that nothing is there any more. The versions of stores identify the
    content; times of local files do not. Raises OSError, TypeError or ValueError for no path.
    """
    then = Path(recorded)
    return recorded == path or not is_local(recorded) or not then.exists() or then.samefile(path)


def own_files(folder: Path) -> set[str]:
    """The names of the files in a result that are pmerge's, by its pmerge.json; none if that cannot
    be read, names files elsewhere, or is by a newer version, which may have files of other kinds.
    """
    recorded = read_manifest(folder)
    try:
        own = {MANIFEST, *recorded["files"], *recorded["side_files"]}
        return own if not is_newer(recorded) and all(is_below(name) for name in own) else set()
    except (KeyError, TypeError):
        return set()


def strangers(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the files `names` in a result that pmerge did not write, for people."""
    own = own_files(folder)
    if not own:
        return [
            f"{MANIFEST} is damaged, names files elsewhere, or is by a newer version of pmerge, so it is not known what is whose"
        ]
    return [name for name in names if name not in own and not is_held_by_nfs(name)]


def would_remove(destination: Path, names: Sequence[str]) -> OutputError:
    """The error for strangers in a result that --overwrite would remove."""
    return OutputError(
        f"{destination} holds files that pmerge did not write, and --overwrite would remove them",
        details=first_ten(names),
        hint=f"move them away, or {elsewhere(destination)}",
    )


def corrupt_files(path: Path) -> Iterator[str]:
    """The files of a published result whose sha256 is not the one in pmerge.json. Reads up to all
    of them.
    """
    content = read_manifest(path)
    for name, file in {**content["files"], **content["side_files"]}.items():
        if sha256_of(path / name) != file["sha256"]:
            yield name


def is_published_since_start(path: Path) -> bool:
    """Whether a result was published after this process was started, as far as the clocks of hosts
    agree.
    """
    return (path / MANIFEST).stat().st_mtime >= process_start()


def is_in_the_way(destination: Path) -> bool:
    """Whether something is at the destination that a result may not replace unasked."""
    return os.path.lexists(destination) and not is_empty_folder(destination)


def elsewhere(destination: Path) -> str:
    """The hint at a free name in the current folder, after that of `destination`."""
    name = Path(destination.name or "merged")
    names = chain([name], (name.with_name(f"{name.name}-{number}") for number in count(2)))
    return f"choose another place:  -o {shlex.quote(str(next(each for each in names if not os.path.lexists(each))))}"


def already_there(destination: Path, merge: MergePlan | None = None) -> OutputError:
    """The error for a destination that exists; with the plan of the run, how the result there
    differs from it, in words.
    """
    hint = elsewhere(destination) + ("  or replace it:  --overwrite" if is_merged(destination) else "")
    content = read_manifest(destination)
    if merge is None or not content:
        return OutputError(f"{destination} exists already", hint=hint)
    found, expected = _in_words(content, _steps(content)), _in_words(request_record(merge.spec), merge.steps)
    details = [f"found     {found}", f"expected  {expected}"]
    if found == expected:
        details += first_ten(_differences(content, merge), "more differences")
    return OutputError(f"{destination} exists already, and is not what is asked for", details=details, hint=hint)


def _differences(content: Mapping[str, Any], merge: MergePlan) -> list[str]:
    """The recorded and the requested options and inputs that differ; without any, the files that
    are not as recorded.
    """
    inputs = {entry["path"]: {file["name"]: file for file in entry["files"]} for entry in input_records(merge)}
    now = json.loads(json.dumps({**request_record(merge.spec), "inputs": inputs}))
    try:
        recorded = {
            entry["path"]: {file["name"]: recorded_fingerprint(file) for file in entry["files"]} for entry in content["inputs"]
        }
        was = {**{key: content.get(key) for key in now}, "inputs": recorded}
    except (KeyError, TypeError):
        return ["its pmerge.json was written by another version of pmerge"]
    return differences(was, now) or ["files of it are missing or have another size:  pmerge verify says which"]


def _in_words(request: Mapping[str, Any], steps: Sequence[Any]) -> str:
    """A request in words, as "ema alpha=0.2 over steps 8000 to 10000 (3 checkpoints), as bf16"."""
    parameters = request.get("parameters")
    values = "".join(f" {k}={v}" for k, v in parameters.items()) if isinstance(parameters, dict) else ""
    count = f"{len(steps)} checkpoint{'' if len(steps) == 1 else 's'}"
    known = bool(steps) and None not in steps
    over = f"over steps {steps[0]} to {steps[-1]} ({count})" if known and len(steps) > 1 else f"of {count}"
    over = f"of step {steps[0]}" if known and len(steps) == 1 else over
    dtype = request.get("dtype", "keep")
    return f"{request.get('method')}{values} {over}" + ("" if dtype == "keep" else f", as {dtype}")


def _steps(content: Mapping[str, Any]) -> list[Any]:
    inputs = content.get("inputs")
    return [entry.get("step") for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []
