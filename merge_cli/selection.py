"""Which checkpoints, in which order: from names to steps, then the last N, every V, from, to, before.

Steps are numbers: `ckpt_9` comes before `ckpt_10`, whatever order the shell gives. The step of a checkpoint is `global_step` of
its `trainer_state.json`, else the number in its name. Everything here is pure but for listing folders.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

from merge_cli.errors import InputError, MismatchError, UsageError, first_ten
from merge_cli.formats.checkpoint import RANK_FOLDER, SHARD_NUMBER

# A letter or a fraction after the number means that it is no step: `ckpt-7b`, `step_1.5k`. 18 digits fit any float and int64.
_STEP = re.compile(r"(?:global[_-]?step|step|iteration|iter|checkpoint|ckpt)[-_=]?([0-9]{1,18})(?![0-9a-z]|\.[0-9])", re.IGNORECASE)
_SHARD = re.compile(r"-[0-9]+-of-[0-9]+$")
_STAGE = re.compile(r"(?:^|[-_])(stage[-_]?\d+)(?=[-_]|$)", re.IGNORECASE)
_INGREDIENT = re.compile(r"(?:^|[-_])(ingredient[-_]?\d+)(?=[-_]|$)", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,18}")
_AMOUNT = re.compile(r"\s*([0-9]{1,18}(?:_[0-9]{1,18})*(?:\.[0-9]{1,18})?)\s*([kMBT]?)\s*", re.IGNORECASE)
_UNFINISHED = re.compile(r"^(?:tmp|temp|incomplete|partial)[-_.]|[-_.](?:tmp|temp|incomplete|partial)$", re.IGNORECASE)
_LARGEST_STEP = 10**18
_MAX_TRAINER_STATE_BYTES = 256 << 20
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".distcp", ".ckpt", ".gguf", ".npz", ".msgpack")


@dataclass(frozen=True)
class StepLabel:
    """What a checkpoint's name says: its step, and the stage and ingredient of a run that has several."""

    step: int | None
    stage: str | None = None
    ingredient: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be averaged; `path` is as it was given.

    `doubt` is why the step may be wrong: another number in the name, or a broken `trainer_state.json`.
    """

    path: Path
    step: int | None
    stage: str | None
    ingredient: str | None
    mtime_ns: int
    doubt: InputError | None = None


@dataclass(frozen=True)
class Selection:
    """The chosen checkpoints, oldest to newest; notes that inform (what is left out), and warnings."""

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def parse_label(name: str) -> StepLabel:
    """Read the name of a checkpoint folder or file: `step-001000-2BT`, `epoch=3-step=1200`, `iter_0001000`, `0001000` and so on.

    The number after step wins over one after iter, checkpoint or ckpt; token labels are rounded and not used.
    """
    name = _SHARD.sub("", name.removesuffix(".safetensors"))
    stage, ingredient = _STAGE.search(name), _INGREDIENT.search(name)
    found = {match[0].lower().rstrip("0123456789").rstrip("-_="): int(match[1]) for match in _STEP.finditer(name)}
    step = next((found[word] for word in found if word.endswith("step")), next(iter(found.values()), None))
    if step is None and _NUMBER.fullmatch(name):
        step = int(name)
    return StepLabel(step, stage and stage[1].lower(), ingredient and ingredient[1].lower())


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
    return [f for f in files if not _NUMBER.fullmatch(f.stem) and parse_label(f.name).step is not None and not f.is_dir()]


def _checkpoints_in(run: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints directly inside `run`, and a line for each thing that looks like one and is none."""
    entries, home = _entries(run), run.resolve()
    found, skipped = _step_files(entries), []
    for entry in entries:
        if RANK_FOLDER.match(entry.name) or not entry.is_dir():
            continue
        if entry.name.startswith(".") or entry.name.endswith((".pmerge-partial", ".pmerge-old")):
            continue
        if _UNFINISHED.search(entry.name):
            skipped.append(f"{entry} is left out: its name says that it is unfinished")
        elif (entry / "pmerge.json").exists():
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


def order_candidates(candidates: Sequence[Candidate], by: str, needs_steps: bool) -> list[Candidate]:
    """Order from oldest to newest by "step", as "given", or by "mtime".

    By step, checkpoints without a step are an error for a method that needs an order; others then keep the order given. Two with
    the same step, two with the same time that need an order, and mixed stages or ingredients are errors. As given, anything goes.

    Raises MismatchError.
    """
    if by == "given":
        return list(candidates)
    for what in ("stage", "ingredient"):
        values = {getattr(candidate, what) for candidate in candidates}
        if len(values) > 1:
            raise MismatchError(
                f"the checkpoints belong to different {what}s: {', '.join(sorted(str(value or 'none') for value in values))}",
                details=first_ten([str(candidate.path) for candidate in candidates]),
                hint=f"name the checkpoints of one {what}, or say that you mean it:  --order given",
            )
    if by == "mtime":
        ordered = sorted(candidates, key=lambda candidate: (candidate.mtime_ns, str(candidate.path)))
        tied = [f"{a.path}  {b.path}" for a, b in pairwise(ordered) if a.mtime_ns == b.mtime_ns]
        if tied and needs_steps:
            raise MismatchError(
                "checkpoints with the same modification time have no order",
                details=first_ten(tied),
                hint="type them from oldest to newest:  --order given",
            )
        return ordered
    unknown = [str(candidate.path) for candidate in candidates if candidate.step is None]
    if unknown:
        if len(candidates) == 1 or not needs_steps:
            return list(candidates)
        for candidate in candidates:
            if candidate.step is None and candidate.doubt is not None:
                raise candidate.doubt
        raise MismatchError(
            f"no step is known for {len(unknown)} of {len(candidates)} checkpoints",
            details=first_ten(unknown),
            hint="leave them out, name them by step (ckpt_1000), or say what the order is:  --order given  or  --order mtime",
        )
    by_step: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        by_step.setdefault(candidate.step or 0, []).append(candidate)
    for step, same in sorted(by_step.items()):
        if len(same) > 1:
            raise MismatchError(
                f"{len(same)} checkpoints have step {step}",
                details=first_ten([str(candidate.path) for candidate in same]),
                hint="leave one of them out, or say that the order is right as typed:  --order given",
            )
    return [by_step[step][0] for step in sorted(by_step)]


def select(
    candidates: Sequence[Candidate],
    *,
    last: int | None = None,
    every: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    before: int | None = None,
) -> Selection:
    """Choose from `candidates`, oldest to newest: first by step range, then one every `every` steps, then the `last` N.

    `from_step` and `to_step` are inclusive, `before` is not. Raises UsageError when steps are needed and unknown or too few
    checkpoints remain, MismatchError with the list of gaps when `every` finds none near a place.
    """
    chosen = list(candidates)
    if any(option is not None for option in (every, from_step, to_step, before)):
        unknown = [str(candidate.path) for candidate in chosen if candidate.step is None]
        if unknown:
            raise UsageError(
                "--every, --from, --to and --before need the step of every checkpoint",
                details=first_ten([f"{path}  has none" for path in unknown]),
                hint="name the folders by step (ckpt_1000), or list the checkpoints that you want",
            )
        low = from_step if from_step is not None else 0
        chosen = [c for c in chosen if (c.step or 0) >= low]
        chosen = [c for c in chosen if to_step is None or (c.step or 0) <= to_step]
        chosen = [c for c in chosen if before is None or (c.step or 0) < before]
    if not chosen:
        asked = [f"from step {from_step}"] if from_step is not None else []
        asked += [f"up to step {to_step}"] if to_step is not None else []
        asked += [f"before step {before}"] if before is not None else []
        steps = [str(candidate.step) for candidate in candidates]
        raise UsageError(
            "the selection leaves no checkpoint",
            details=[f"asked     {', '.join(asked)}", f"found     step {', '.join(first_ten(steps))}"],
            hint="widen the range of --from, --to and --before",
        )
    if last is not None and last < 1:
        raise UsageError(f"--last must be at least 1, not {last}")
    if every is not None:
        chosen = _every(chosen, every, last)
    if last is not None:
        if len(chosen) < last:
            raise UsageError(
                f"--last {last} asks for more checkpoints than there are",
                details=[f"found     {len(chosen)}"],
                hint=f"--last {len(chosen)}",
            )
        chosen = chosen[-last:]
    left_out = len(candidates) - len(chosen)
    notes = (f"{left_out} of {len(candidates)} checkpoints are left out by the selection",) if left_out else ()
    return Selection(tuple(chosen), notes)


def check_doubts(candidates: Sequence[Candidate], chosen: Sequence[Candidate]) -> tuple[list[str], list[str]]:
    """Notes and warnings on steps that may be wrong: a line on the checkpoints left out, and one on the chosen ones.

    Raises the InputError of a chosen checkpoint whose `trainer_state.json` is broken and whose name has no step either.
    """
    for candidate in chosen:
        if candidate.doubt is not None and candidate.step is None:
            raise candidate.doubt
    left_out = [candidate for candidate in candidates if candidate not in chosen]
    return _doubts(left_out), _doubts(chosen)


def _doubts(candidates: Sequence[Candidate]) -> list[str]:
    doubts = [candidate.doubt for candidate in candidates if candidate.doubt is not None]
    more = f" (and {len(doubts) - 1} more checkpoints with a doubtful step)" if len(doubts) > 1 else ""
    return [f"{doubts[0].message}{more}"] if doubts else []


def _every(candidates: Sequence[Candidate], every: int, last: int | None) -> list[Candidate]:
    """Walk back from the newest in strides of `every` steps, taking the nearest checkpoint within 10 % of a stride.

    The walk ends at the oldest checkpoint or after `last` strides. It costs a pass over the checkpoints, however many strides.
    """
    if every < 1:
        raise UsageError(f"--every must be at least 1 step, not {every}")
    steps = [candidate.step or 0 for candidate in candidates]
    if any(newer <= older for older, newer in pairwise(steps)):
        raise UsageError("--every needs checkpoints in the order of their steps", hint="--order step")
    newest, oldest = steps[-1], steps[0]
    num_strides = (10 * (newest - oldest) + every) // (10 * every) + 1
    if last is not None:
        num_strides = min(num_strides, last)
    taken: dict[int, tuple[int, Candidate]] = {}  # stride -> how far off, which
    for step, candidate in zip(steps, candidates, strict=True):
        stride = (2 * (newest - step) + every) // (2 * every)
        off = abs(newest - stride * every - step)
        if stride < num_strides and 10 * off <= every and (stride not in taken or off < taken[stride][0]):
            taken[stride] = (off, candidate)
    missing = num_strides - len(taken)
    if missing:
        gaps = []
        for stride in islice((k for k in range(num_strides) if k not in taken), 10):
            place = newest - stride * every
            nearest = min(steps, key=lambda step: abs(step - place))
            gaps.append(f"expected a checkpoint near step {place}; the nearest is step {nearest}")
        raise MismatchError(
            f"{missing} {'checkpoint is' if missing == 1 else 'checkpoints are'} missing for --every {every}",
            details=[*gaps, *([f"... and {missing - 10} more"] if missing > 10 else [])],
            hint="choose another --every or --last, or list the checkpoints that you want",
        )
    return [taken[stride][1] for stride in sorted(taken, reverse=True)]


def is_in_tokens(amount: int | str | None) -> bool:
    """Whether `amount` has a suffix (k, M, B, T), and so is in tokens where the tokens of a step are known."""
    return isinstance(amount, str) and bool(_AMOUNT.fullmatch(amount)) and amount.strip()[-1].isalpha()


def parse_amount(
    text: int | str,
    tokens_per_step: int | None = None,
    *,
    option: str = "--every",
    rounding: Callable[[Fraction], int] = round,
) -> int:
    """Steps of "500", "2k", "1_000"; or, where `tokens_per_step` is given, of tokens if there is a suffix: "8B".

    A plain number is always in steps. Tokens become whole steps by `rounding`. Raises UsageError, which names `option`.
    """
    if tokens_per_step is not None and tokens_per_step < 1:
        raise UsageError(f"--tokens-per-step must be at least 1, not {tokens_per_step}", hint="--tokens-per-step 4M")
    match = _AMOUNT.fullmatch(str(text))
    if not match:
        raise UsageError(f"{option} cannot be {text!r}", details=["expected  a number such as 500, 10_000, 2k or 8B"])
    amount = Fraction(match[1]) * 1000 ** " KMBT".index(match[2].upper() or " ")
    if tokens_per_step is None or not match[2]:
        if match[2].upper() in ("B", "T"):
            raise UsageError(
                f"{option} {text} is an amount of tokens", hint="say how many tokens a step has:  --tokens-per-step 4M"
            )
        if amount.denominator != 1:
            raise UsageError(f"{option} {text} is not a whole number of steps")
        return int(amount)
    steps = rounding(amount / tokens_per_step)
    if steps < 1:
        raise UsageError(
            f"{option} {text} tokens are less than one step of {tokens_per_step} tokens",
            hint=f"with --tokens-per-step a suffix means tokens; steps are plain numbers:  {option} {int(amount)}",
        )
    return steps
