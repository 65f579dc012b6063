"""Which candidates are averaged, in which order: the last N, every V, from, to, before; then their coefficients. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from typing import Any

from merge_cli.errors import MismatchError, UsageError, first_ten
from merge_cli.request.amounts import is_in_tokens, parse_amount
from merge_cli.request.labels import Candidate
from merge_cli.request.methods import METHODS, Coefficients, coefficients, needs_step_values, warnings_for


@dataclass(frozen=True)
class Selection:
    """The chosen checkpoints, oldest to newest; notes that inform (what is left out), and warnings."""

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def order_candidates(candidates: Sequence[Candidate], by: str, needs_order: bool) -> list[Candidate]:
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
                details=first_ten([candidate.path for candidate in candidates]),
                hint=f"name the checkpoints of one {what}, or say that you mean it:  --order given",
            )
    if by == "mtime":
        ordered = sorted(candidates, key=lambda candidate: (candidate.mtime_ns, candidate.path))
        tied = [f"{a.path}  {b.path}" for a, b in pairwise(ordered) if a.mtime_ns == b.mtime_ns]
        if tied and needs_order:
            raise MismatchError(
                "checkpoints with the same modification time have no order",
                details=first_ten(tied),
                hint="type them from oldest to newest:  --order given",
            )
        return ordered
    unknown = [candidate.path for candidate in candidates if candidate.step is None]
    if unknown:
        if len(candidates) == 1 or not needs_order:
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
                details=first_ten([candidate.path for candidate in same]),
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
        unknown = [candidate.path for candidate in chosen if candidate.step is None]
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


def check_tokens_per_step(tokens_per_step: int | None, amounts: Iterable[int | str | None]) -> None:
    """Raise UsageError when the tokens of a step are given and none of `amounts` is in tokens."""
    if tokens_per_step is not None and not any(map(is_in_tokens, amounts)):
        raise UsageError(
            "--tokens-per-step is given, and no amount is in tokens",
            hint="amounts in tokens have a suffix (--every 8B); plain numbers are steps, and do not need --tokens-per-step",
        )


def choose(
    candidates: Sequence[Candidate],
    method: str,
    parameters: Mapping[str, Any],
    *,
    order: str = "step",
    last: int | None = None,
    every: int | str | None = None,
    from_step: int | str | None = None,
    to_step: int | str | None = None,
    before: int | str | None = None,
    tokens_per_step: int | None = None,
) -> Selection:
    """Which of `candidates` a request means, oldest to newest; options as of `plan_average`.

    Raises UsageError or MismatchError where they do not give that selection, InputError for a doubtful step.
    """
    if parameters.get("weights") is not None and order == "step" and method == "weights":
        order = "given"  # weights belong to the checkpoints as they were typed

    def steps(option: str, amount: int | str | None, rounding: Callable[[Fraction], int]) -> int | None:
        return None if amount is None else parse_amount(amount, tokens_per_step, option=option, rounding=rounding)

    ordered = order_candidates(candidates, order, METHODS[method].needs_order or last is not None)
    selection = select(
        ordered,
        last=last,
        every=steps("--every", every, round),
        from_step=steps("--from", from_step, math.ceil),
        to_step=steps("--to", to_step, math.floor),
        before=steps("--before", before, math.ceil),
    )
    notes, warnings = check_doubts(ordered, selection.candidates)
    chosen = selection.candidates
    unknown = sum(candidate.step is None for candidate in chosen)
    if order == "step" and unknown and len(chosen) > 1:
        about = f"no step is known for {unknown} of {len(chosen)} checkpoints: their order is the one given"
        (notes if unknown == len(chosen) else warnings).append(f"{about}, {chosen[-1].path} last")
    steps_known = [candidate.step for candidate in chosen if candidate.step is not None]
    if order == "given" and steps_known != sorted(steps_known):
        notes.append(f"the order given is not that of the steps; the last one, {chosen[-1].path}, counts as the newest")
    merged = [candidate.path for candidate in chosen if candidate.is_merged]
    if merged:
        warnings.append(f"results of pmerge are averaged again: {', '.join(first_ten(merged))}")
    if len(chosen) == 1:
        warnings.append(f"only one checkpoint is selected, {chosen[0].path}: nothing is averaged")
    return Selection(chosen, (*selection.notes, *notes), tuple(warnings))


def weigh(
    candidates: Sequence[Candidate], method: str, parameters: Mapping[str, Any], order: str = "step"
) -> tuple[Coefficients, list[str]]:
    """The coefficients of `candidates`, oldest to newest, and what is known to hurt about them. Raises UsageError."""
    steps = [candidate.step for candidate in candidates]
    places = _places(candidates, needs_step_values(method, **parameters))
    chosen = coefficients(method, places, **parameters)
    return chosen, warnings_for(chosen, places if order == "step" and steps == places else None)


def _places(candidates: Sequence[Candidate], must_be_steps: bool) -> list[float]:
    """The steps, or the positions 0, 1, 2 ... where they are not known or not in order."""
    steps = [candidate.step for candidate in candidates]
    known = [float(step) for step in steps if step is not None]
    if len(known) == len(steps) and all(a < b for a, b in pairwise(known)):
        return known
    if must_be_steps:
        raise UsageError(
            "this method is defined over steps, and the checkpoints have none (or not ascending)",
            details=[f"{candidate.path}  step {candidate.step}" for candidate in candidates[:10]],
            hint="name the folders by step (ckpt_1000), or use a method that only needs the order: --method wma",
        )
    return [float(position) for position in range(len(candidates))]
