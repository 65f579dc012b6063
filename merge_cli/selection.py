"""Which checkpoints, in which order: from names to steps, then the last N, every V, from, to, before.

Steps are numbers: `ckpt_9` comes before `ckpt_10`, whatever order the shell gives. The step of a checkpoint is `global_step` of
its `trainer_state.json`, else the number in its name. Everything here is pure but for listing folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_cli.errors import InputError, MismatchError, UsageError, first_ten
from merge_cli.formats.checkpoint import RANK_FOLDER

_STEP = re.compile(r"(?:global[_-]?step|step|iteration|iter|checkpoint|ckpt)[-_=]?(\d+)", re.IGNORECASE)
_STAGE = re.compile(r"(?:^|[-_])(stage[-_]?\d+)(?=[-_]|$)", re.IGNORECASE)
_INGREDIENT = re.compile(r"(?:^|[-_])(ingredient[-_]?\d+)(?=[-_]|$)", re.IGNORECASE)
_NUMBER = re.compile(r"^\d+$")
_AMOUNT = re.compile(r"^\s*(\d[\d_]*(?:\.\d+)?)\s*([kMBT]?)\s*$", re.IGNORECASE)
_MAX_TRAINER_STATE_BYTES = 256 << 20


@dataclass(frozen=True)
class StepLabel:
    """What a checkpoint's name says: its step, and the stage and ingredient of a run that has several."""

    step: int | None
    stage: str | None = None
    ingredient: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be averaged; `path` is as it was given."""

    path: Path
    step: int | None
    stage: str | None
    ingredient: str | None
    mtime_ns: int


@dataclass(frozen=True)
class Selection:
    """The chosen checkpoints, oldest to newest, and notes on what the selection left out."""

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()


def parse_label(name: str) -> StepLabel:
    """Read the name of a checkpoint folder or file: `step-001000-2BT`, `epoch=3-step=1200`, `iter_0001000`, `0001000` and so on.

    The number after step wins over one after iter, checkpoint or ckpt; token labels are rounded and not used.
    """
    name = name.removesuffix(".safetensors")
    stage, ingredient = _STAGE.search(name), _INGREDIENT.search(name)
    found = {match[0].lower().rstrip("0123456789").rstrip("-_="): int(match[1]) for match in _STEP.finditer(name)}
    step = next((found[word] for word in found if word.endswith("step")), next(iter(found.values()), None))
    if step is None and _NUMBER.match(name):
        step = int(name)
    return StepLabel(step, stage and stage[1].lower(), ingredient and ingredient[1].lower())


def read_candidate(path: Path) -> Candidate:
    """The checkpoint at `path` with its step. Raises InputError for a missing path or a broken `trainer_state.json`."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"no such checkpoint: {path}", hint=f"ls -d {path.parent}/*") from error
    label = parse_label(path.name or path.resolve().name)
    if label.step is None and path.is_file():
        label = parse_label(path.absolute().parent.name)
    step = _trainer_step(path / "trainer_state.json") if path.is_dir() else None
    return Candidate(path, label.step if step is None else step, label.stage, label.ingredient, status.st_mtime_ns)


def _trainer_step(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_TRAINER_STATE_BYTES:
            raise InputError(f"{path} is larger than {_MAX_TRAINER_STATE_BYTES >> 20} MiB")
        step = json.loads(path.read_bytes()).get("global_step")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a valid trainer state: {error}", hint="mend or remove it; the name then gives the step"
        ) from error
    return step if type(step) is int and step >= 0 else None


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds safetensors files, directly or in folders named like ranks."""
    entries = list(folder.iterdir())
    if any(entry.name.endswith((".safetensors", ".safetensors.index.json")) for entry in entries):
        return True
    ranks = [entry for entry in entries if RANK_FOLDER.match(entry.name) and entry.is_dir()]
    return any(inner.name.endswith(".safetensors") for rank in ranks for inner in rank.iterdir())


def discover(paths: Sequence[Path]) -> list[Path]:
    """The checkpoints that `paths` mean: themselves, and those inside every run folder.

    A folder given alone is a run when it holds at least two checkpoints named by step, even if a final model was saved
    beside them. Merged results and unfinished ones inside a run are not its checkpoints.

    Raises InputError where nothing is found, UsageError when one checkpoint is named twice.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"no such checkpoint: {path}", hint=f"ls -d {path.parent}/*")
        inside = _checkpoints_in(path) if path.is_dir() else []
        if path.is_file():
            if path.suffix != ".safetensors":
                raise InputError(f"not a safetensors file: {path}", hint="pmerge reads safetensors; convert other formats first")
            found.append(path)
        elif len(paths) == 1 and len(inside) >= 2:
            found += inside
        elif is_checkpoint(path):
            found.append(path)
        elif inside:
            found += inside
        else:
            raise _nothing_found(path)
    places: dict[Path, Path] = {}
    for path in found:
        other = places.setdefault(path.resolve(), path)
        if other is not path:
            raise UsageError(f"the same checkpoint is named twice: {other} and {path}", hint="name it once")
    return found


def _checkpoints_in(run: Path) -> list[Path]:
    found = []
    for entry in sorted(run.iterdir()):
        hidden = entry.name.startswith(".") or entry.name.endswith((".pmerge-partial", ".pmerge-old"))
        if hidden or RANK_FOLDER.match(entry.name):
            continue
        if entry.is_dir():
            if not (entry / "pmerge.json").exists() and is_checkpoint(entry):
                found.append(entry)
        elif entry.suffix == ".safetensors" and parse_label(entry.name).step is not None:
            found.append(entry)
    return found


def _nothing_found(path: Path) -> InputError:
    entries = sorted(entry.name for entry in path.iterdir())
    other = [name for name in entries if name.endswith((".bin", ".pt", ".pth", ".distcp", ".ckpt", ".gguf"))]
    hint = "name a folder with *.safetensors files, or a run folder that contains such folders"
    if other:
        hint = f"pmerge reads safetensors; convert {other[0]} first (for example with transformers' save_pretrained)"
    return InputError(f"no checkpoints in {path}", details=[f"found     {', '.join(entries[:10]) or 'an empty folder'}"], hint=hint)


def order_candidates(candidates: Sequence[Candidate], by: str, needs_steps: bool) -> list[Candidate]:
    """Order from oldest to newest by "step", as "given", or by "mtime".

    By step, checkpoints without a step are an error for a method that needs an order; others then keep the order given. Two with
    the same step, and stages or ingredients that are mixed, are errors. Raises MismatchError.
    """
    if by == "given":
        return list(candidates)
    if by == "mtime":
        return sorted(candidates, key=lambda candidate: (candidate.mtime_ns, str(candidate.path)))
    for what in ("stage", "ingredient"):
        values = {getattr(candidate, what) for candidate in candidates}
        if len(values) > 1:
            raise MismatchError(
                f"the checkpoints belong to different {what}s: {', '.join(sorted(map(str, values)))}",
                details=first_ten([str(candidate.path) for candidate in candidates]),
                hint=f"name the checkpoints of one {what}, or say that you mean it:  --order given",
            )
    unknown = [str(candidate.path) for candidate in candidates if candidate.step is None]
    if unknown:
        if not needs_steps or len(candidates) == 1:
            return list(candidates)
        raise MismatchError(
            f"no step is known for {len(unknown)} checkpoints, and the method needs an order",
            details=first_ten(unknown),
            hint="name them by step (ckpt_1000), or say what the order is:  --order given  or  --order mtime",
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
        steps = [candidate.step for candidate in candidates if candidate.step is not None]
        raise UsageError(
            "the selection leaves no checkpoint",
            details=[f"found     steps {min(steps)} to {max(steps)}" if steps else "found     no steps"],
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


def _every(candidates: Sequence[Candidate], every: int, last: int | None) -> list[Candidate]:
    """Walk back from the newest in strides of `every` steps, taking the nearest checkpoint within 10 % of a stride."""
    if every < 1:
        raise UsageError(f"--every must be at least 1 step, not {every}")
    steps = {candidate.step or 0: candidate for candidate in candidates}
    newest, oldest = max(steps), min(steps)
    chosen: list[Candidate] = []
    gaps: list[str] = []
    place = newest
    while (last is None and place >= oldest - every // 10) or (last is not None and len(chosen) + len(gaps) < last and place >= 0):
        nearest = min(steps, key=lambda step: abs(step - place))
        if 10 * abs(nearest - place) <= every and (not chosen or steps[nearest] is not chosen[-1]):
            chosen.append(steps[nearest])
        else:
            gaps.append(f"expected a checkpoint near step {place}; the nearest is step {nearest}")
        place -= every
    if gaps:
        raise MismatchError(
            f"{len(gaps)} checkpoints are missing for --every {every}",
            details=first_ten(gaps),
            hint="choose another --every or --last, or list the checkpoints that you want",
        )
    return chosen[::-1]


def parse_amount(text: str, tokens_per_step: int | None = None) -> int:
    """Steps of "500", "2k", "1_000"; or of "8B" and other amounts in tokens when `tokens_per_step` is known.

    With `tokens_per_step` every amount is in tokens. Raises UsageError.
    """
    match = _AMOUNT.match(text)
    if not match:
        raise UsageError(f"not a number of steps or tokens: {text!r}", details=["expected  500, 2k or, in tokens, 8B"])
    amount = float(match[1].replace("_", "")) * 1000.0 ** " KMBT".index(match[2].upper() or " ")
    if tokens_per_step is None:
        if match[2].upper() in ("B", "T"):
            raise UsageError(f"{text} is an amount of tokens", hint="say how many tokens a step has:  --tokens-per-step 4M")
        return int(amount)
    steps = round(amount / tokens_per_step)
    if steps < 1:
        raise UsageError(f"{text} tokens are less than one step of {tokens_per_step} tokens")
    return int(steps)
