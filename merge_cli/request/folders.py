"""What a folder is: a checkpoint, a run that holds some, or neither. By names and kinds of entries,
never by content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from merge_cli.formats.checkpoint import RANK_FOLDER
from merge_cli.formats.dcp.trainers import is_dcp, is_unfinished
from merge_cli.formats.pickled import ENDINGS, pickled_files
from merge_cli.formats.torch_zip import TRAINING_STATE
from merge_cli.formats.universal import find_universal
from merge_cli.names import MANIFEST, STAGING_SUFFIX
from merge_cli.request.labels import BARE_NUMBER, StepLabel, parse_label
from merge_cli.stores.store import Entry, StrPath, as_path, folder_of, is_local, join, name_of, open_store, resolve

UNFINISHED = re.compile(r"^(?:tmp|temp|incomplete|partial)[-_.]|[-_.](?:tmp|temp|incomplete|partial)$", re.IGNORECASE)


def label_of(path: str) -> StepLabel:
    """The label in the last part of a path; of a revision on the Hub, in the revision's name."""
    name = name_of(path)
    return parse_label(name if is_local(path) else name.rpartition("@")[2])


def is_checkpoint(folder: StrPath) -> bool:
    """Whether `folder` is a distributed checkpoint, finished or not, a universal one, or has the
    files of one (safetensors, or `pytorch_model*.bin`), directly or in folders of ranks.

    Files named by different steps (`model_step_10.safetensors`) are several checkpoints, so their
    folder is not one.
    """
    folder = as_path(folder)
    entries = entries_of(folder)
    if is_dcp(folder) or is_unfinished(folder):
        return True
    names = {entry.name for entry in entries}
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return len(_step_files(entries)) < 2 or not names.isdisjoint(("model.safetensors", "config.json"))
    if pickled_files([entry.name for entry in entries if entry.kind == "file"]):
        return True
    ranks = [entry.name for entry in entries if RANK_FOLDER.match(entry.name) and entry.kind == "folder"]
    if any(inner.name.endswith(".safetensors") for rank in ranks for inner in entries_of(join(folder, rank))):
        return True
    return find_universal(folder) is not None


def entries_of(folder: str) -> list[Entry]:
    return sorted(open_store(folder).list(folder), key=lambda entry: (parse_label(entry.name).step or 0, _natural(entry.name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts `v9` before `v10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]{1,18})", name) if part]


def is_named_by_step(path: str) -> bool:
    if label_of(path).step is not None:
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


def checkpoints_in(run: str) -> tuple[list[str], list[str], list[str]]:
    """The checkpoints directly inside `run`, the folders named by step without weights, and a line
    for each other entry that looks like a checkpoint and is none.
    """
    store, entries, home = open_store(run), entries_of(run), resolve(run)
    found, empty, skipped, merged = [join(run, name) for name in _step_files(entries)], [], [], []
    for entry in entries:
        path = join(run, entry.name)
        if RANK_FOLDER.match(entry.name) or entry.kind != "folder":
            continue
        if entry.name.startswith(".") or entry.name.endswith(STAGING_SUFFIX):
            continue
        if UNFINISHED.search(entry.name):
            skipped.append(f"{path} is left out: its name marks it as unfinished")
        elif store.stat(join(path, MANIFEST)) is not None:
            merged.append(path)
        elif (real := store.resolve(path)) != join(home, entry.name) and folder_of(real) == home:
            skipped.append(f"{path} is left out: a link to {name_of(real)}")
        elif is_checkpoint(path):
            found.append(path)
        elif is_named_by_step(path):
            empty.append(path)
    if merged:
        what = "a result of pmerge; name it to average it" if len(merged) == 1 else "results of pmerge; name them to average them"
        skipped.append(f"{few(merged)} left out: {what}")
    return found, empty, skipped


def few(paths: Sequence[str], most: int = 3) -> str:
    """The first of `paths`, the number of the others, and the verb."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"{', '.join(paths[:most])}{more} {'is' if len(paths) == 1 else 'are'}"
