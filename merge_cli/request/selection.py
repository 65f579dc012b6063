"""Which candidates are averaged, in which order, with which coefficients. Pure.

select_checkpoints   candidates and a Selection -> checkpoints from oldest to newest
coefficients_of      checkpoints and a method   -> one coefficient each
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from typing import Any

from merge_cli.errors import MismatchError, UsageError, first_ten
from merge_cli.request.amounts import is_in_tokens, parse_amount
from merge_cli.request.coefficients import Coefficients, warnings_for
from merge_cli.request.labels import Candidate
from merge_cli.request.methods import METHODS, coefficients, needs_step_values
from merge_cli.request.spec import MergeSpec, Selection
from merge_cli.request.tokens import with_tokens_of_names


@dataclass(frozen=True)
class Selected:
    """The selected checkpoints, oldest to newest; notes that inform (how many are left out), and
    warnings.
    """

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def select_checkpoints(candidates: Sequence[Candidate], asked: Selection, method: str) -> Selected:
    """The checkpoints that `asked` selects from `candidates`, in the order that `method` needs.

    Raises UsageError or MismatchError if that selection is not possible, InputError for an
    unreadable step.
    """
    order = asked.order
    if METHODS[method].is_explicit and order == "step":
        order = "given"  # weights belong to the checkpoints as they were typed
    asked, told, doubts = with_tokens_of_names(asked, asked.amounts.values(), candidates)
    ordered = order_candidates(candidates, order, METHODS[method].needs_order or asked.last is not None)
    selected = select(ordered, asked)
    chosen = selected.candidates
    notes, warnings = check_steps(ordered, chosen)
    unknown = sum(candidate.step is None for candidate in chosen)
    if order == "step" and unknown and len(chosen) > 1:
        given = "that of their names" if all(each.in_run for each in chosen) else "the one given"
        about = f"no step is known for {unknown} of {len(chosen)} checkpoints: their order is {given}"
        (notes if unknown == len(chosen) else warnings).append(f"{about}, {chosen[-1].path} last")
    steps_known = [candidate.step for candidate in chosen if candidate.step is not None]
    if order == "given" and steps_known != sorted(steps_known):
        notes.append(f"the order given is not that of the steps; the last one, {chosen[-1].path}, counts as the newest")
    if asked.before is not None:
        newest = chosen[-1].path
        notes.append(f"to train on after a spike, roll back to {newest} with its optimizer: no merge did better (docs/resume.md)")
    if len(chosen) == 1:
        warnings.append(f"only one checkpoint is selected, {chosen[0].path}: nothing is averaged")
    return Selected(chosen, (*told, *selected.notes, *notes), (*doubts, *warnings))


def coefficients_of(candidates: Sequence[Candidate], spec: MergeSpec, order: str) -> tuple[Coefficients, list[str]]:
    """The coefficients of `candidates`, oldest to newest, and warnings about them. Raises
    UsageError.
    """
    steps = [candidate.step for candidate in candidates]
    places = _places(candidates, needs_step_values(spec.method, **spec.parameters))
    chosen = coefficients(spec.method, places, **spec.parameters)
    return chosen, warnings_for(chosen, places if order == "step" and steps == places else None)


def check_tokens_per_step(tokens_per_step: int | None, amounts: Iterable[int | str | None]) -> None:
    """Raise UsageError if the tokens of a step are given and none of `amounts` is in tokens."""
    if tokens_per_step is not None and not any(map(is_in_tokens, amounts)):
        raise UsageError(
            "--tokens-per-step is given, and no amount is in tokens",
            hint="leave it out: plain numbers are steps; an amount of tokens has a suffix, as  --every 8B",
        )


def order_candidates(candidates: Sequence[Candidate], by: str, needs_order: bool) -> list[Candidate]:
    """Order from oldest to newest by "step", as "given", or by "mtime".

    By step, checkpoints without a step are an error for a method that needs an order; other methods
    keep the order given. Two checkpoints with the same step, two with the same time that need an
    order, and mixed stages or ingredients are errors. As given, any order is right.

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
                hint=f"name the checkpoints of one {what}, or confirm the order as typed:  --order given",
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
            if candidate.step is None and candidate.step_warning is not None:
                raise candidate.step_warning
        raise MismatchError(
            f"no step is known for {len(unknown)} of {len(candidates)} checkpoints",
            details=first_ten(unknown),
            hint="leave them out, name them by step (ckpt_1000), or choose another order:  --order given  or  --order mtime",
        )
    by_step: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        by_step.setdefault(candidate.step or 0, []).append(candidate)
    for step, same in sorted(by_step.items()):
        if len(same) > 1:
            raise MismatchError(
                f"{len(same)} checkpoints have step {step}",
                details=first_ten([candidate.path for candidate in same]),
                hint="leave one of them out, or confirm the order as typed:  --order given",
            )
    return [by_step[step][0] for step in sorted(by_step)]


_ROUNDING: Mapping[str, tuple[str, Callable[[Fraction], int]]] = {
    "every": ("--every", round),
    "from_step": ("--from", math.ceil),
    "to_step": ("--to", math.floor),
    "before": ("--before", math.ceil),
    "at": ("--at", math.floor),
}


def in_steps(selection: Mapping[str, Any], tokens_per_step: int | None) -> dict[str, Any]:
    """The options of a selection by name, with their amounts as numbers of steps. Raises
    UsageError.
    """
    found = dict(selection)
    for name in _ROUNDING.keys() & found.keys():
        flag, rounding = _ROUNDING[name]
        found[name] = parse_amount(found[name], tokens_per_step, option=flag, rounding=rounding)
    return found


def select(candidates: Sequence[Candidate], asked: Selection) -> Selected:
    """Select from `candidates`, oldest to newest: first by step range, then one every V steps, then
    the last N.

    `from_step`, `to_step` and `at` are inclusive, `before` is not. Raises UsageError if steps are
    needed and unknown or too few checkpoints remain, MismatchError with the list of gaps if `every`
    finds none near a place.
    """
    amounts = {name: getattr(asked, name) for name in _ROUNDING if getattr(asked, name) is not None}
    every, first, last, before, at = map(in_steps(amounts, asked.tokens_per_step).get, _ROUNDING)
    chosen = list(candidates)
    if asked.amounts:
        _check_steps_are_known(chosen)
    if first is not None:
        chosen = [each for each in chosen if (each.step or 0) >= first]
    for end in (last, at, None if before is None else before - 1):
        if end is not None:
            chosen = [each for each in chosen if (each.step or 0) <= end]
    if not chosen:
        raise _nothing_left(candidates, first, last if at is None else at, before)
    if every is not None:
        chosen = _every(chosen, every, asked.last)
    if asked.last is not None:
        if len(chosen) < asked.last:
            raise UsageError(
                f"--last {asked.last} asks for more checkpoints than there are",
                details=[f"found     {len(chosen)}"],
                hint=f"--last {len(chosen)}",
            )
        chosen = chosen[-asked.last :]
    if at is not None and chosen[-1].step != at and not (asked.tokens_per_step is not None and is_in_tokens(asked.at)):
        raise UsageError(f"there is no checkpoint at step {at}", details=[f"the newest up to there is step {chosen[-1].step}"])
    left_out = len(candidates) - len(chosen)
    notes = (f"{left_out} of {len(candidates)} checkpoints are left out by the selection",) if left_out else ()
    return Selected(tuple(chosen), notes)


def _check_steps_are_known(candidates: Sequence[Candidate]) -> None:
    unknown = [candidate.path for candidate in candidates if candidate.step is None]
    if unknown:
        raise UsageError(
            "--every, --from, --to and --before need the step of every checkpoint",
            details=first_ten([f"{path}  has none" for path in unknown]),
            hint="name the folders by step (ckpt_1000), or list the checkpoints that you want",
        )


def _nothing_left(candidates: Sequence[Candidate], first: int | None, last: int | None, before: int | None) -> UsageError:
    asked = [f"from step {first}"] if first is not None else []
    asked += [f"up to step {last}"] if last is not None else []
    asked += [f"before step {before}"] if before is not None else []
    steps = [str(candidate.step) for candidate in candidates]
    wider = [f"--from {steps[0]}"] if first is not None else []
    wider += [f"--to {steps[-1]}"] if last is not None else []
    wider += [f"--before {steps[-1]}"] if before is not None else []
    return UsageError(
        "the selection leaves no checkpoint",
        details=[f"asked     {', '.join(asked)}", f"found     step {', '.join(first_ten(steps))}"],
        hint=f"the steps go from {steps[0]} to {steps[-1]}:  {' '.join(wider)}",
    )


def check_steps(candidates: Sequence[Candidate], chosen: Sequence[Candidate]) -> tuple[list[str], list[str]]:
    """Notes and warnings on steps that may be wrong: a line on the checkpoints left out, and one on
    the chosen ones.

    Raises the InputError of a chosen checkpoint without a step whose `trainer_state.json` is
    broken.
    """
    for candidate in chosen:
        if candidate.step_warning is not None and candidate.step is None:
            raise candidate.step_warning
    left_out = [candidate for candidate in candidates if candidate not in chosen]
    return _step_warnings(left_out), _step_warnings(chosen)


def _step_warnings(candidates: Sequence[Candidate]) -> list[str]:
    found = [candidate.step_warning for candidate in candidates if candidate.step_warning is not None]
    more = f" (and {len(found) - 1} more checkpoints with a doubtful step)" if len(found) > 1 else ""
    return [f"{found[0].message}{more}"] if found else []


def _every(candidates: Sequence[Candidate], every: int, last: int | None) -> list[Candidate]:
    """Walk back from the newest in strides of `every` steps, to the nearest checkpoint within 10 %
    of a stride.

    The walk ends at the oldest checkpoint or after `last` strides. One pass over the checkpoints,
    for any number of strides.
    """
    if every < 1:
        raise UsageError(f"--every must be at least 1 step, not {every}")
    steps = [candidate.step or 0 for candidate in candidates]
    if any(newer <= older for older, newer in pairwise(steps)):
        raise UsageError("--every needs checkpoints in the order of their steps", hint="--order step")
    taken, num_strides = _strides(steps, every, last)
    missing = num_strides - len(taken)
    if not missing:
        return [candidates[taken[stride]] for stride in sorted(taken, reverse=True)]
    gaps = []
    for stride in islice((k for k in range(num_strides) if k not in taken), 3):
        place = steps[-1] - stride * every
        nearest = min(steps, key=lambda step: abs(step - place))
        gaps.append(f"expected a checkpoint near step {place}; the nearest is step {nearest}")
    apart = sorted({newer - older for older, newer in pairwise(steps)})
    good = next((value for value in apart[:20] if len((found := _strides(steps, value, last))[0]) == found[1]), None)
    near = f"the checkpoints are {apart[0]}{f' to {apart[-1]}' if len(apart) > 1 else ''} steps apart" if apart else ""
    raise MismatchError(
        f"{missing} {'checkpoint is' if missing == 1 else 'checkpoints are'} missing for --every {every}",
        details=[*gaps, *([f"... and {missing - 3} more"] if missing > 3 else [])],
        hint=f"{near}:  --every {good}" if good else f"{near or 'there is one checkpoint'}: leave --every out",
    )


def _strides(steps: Sequence[int], every: int, last: int | None) -> tuple[dict[int, int], int]:
    """By stride back from the newest of `steps`, the nearest checkpoint's place within 10 % of a
    stride; and the number of strides, of which some may have none.
    """
    newest, oldest = steps[-1], steps[0]
    num_strides = (10 * (newest - oldest) + every) // (10 * every) + 1
    if last is not None:
        num_strides = min(num_strides, last)
    taken: dict[int, tuple[int, int]] = {}  # stride -> how far off, which
    for i, step in enumerate(steps):
        stride = (2 * (newest - step) + every) // (2 * every)
        off = abs(newest - stride * every - step)
        if stride < num_strides and 10 * off <= every and (stride not in taken or off < taken[stride][0]):
            taken[stride] = (off, i)
    return {stride: i for stride, (_, i) in taken.items()}, num_strides


def _places(candidates: Sequence[Candidate], must_be_steps: bool) -> list[float]:
    """The steps, or the positions 0, 1, 2 ... if they are not known or not ascending."""
    steps = [candidate.step for candidate in candidates]
    known = [float(step) for step in steps if step is not None]
    if len(known) == len(steps) and all(a < b for a, b in pairwise(known)):
        return known
    if must_be_steps:
        raise UsageError(
            "this method is defined over steps, and the checkpoints have none (or not ascending)",
            details=[f"{candidate.path}  step {candidate.step}" for candidate in candidates[:10]],
            hint="name the folders by step (ckpt_1000), or use a method that only needs the order:  --method wma",
        )
    return [float(position) for position in range(len(candidates))]
