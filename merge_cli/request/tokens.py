"""The tokens of a step, from names that have both: `stage1-step1000-tokens5B`.

Such labels are rounded, some up, some to nearest. Each says that a step has between (label - 1) and
(label + 1) units a step; the tokens of a step lie where all of these ranges overlap. Long runs give
it within a part in a thousand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from merge_cli.errors import UsageError
from merge_cli.request.amounts import is_in_billions
from merge_cli.request.labels import Candidate
from merge_cli.request.spec import Selection

_MOST_DOUBT = Fraction(1, 50)


class Range(NamedTuple):
    """The tokens of a step lie between the two."""

    least: Fraction
    most: Fraction


def with_tokens_of_names(
    asked: Selection, amounts: Iterable[int | str], candidates: Sequence[Candidate]
) -> tuple[Selection, list[str], list[str]]:
    """`asked` with the tokens of a step by the names, if `amounts` in B or T need them; notes and
    warnings.

    Raises UsageError if the names say too little, or contradict each other.
    """
    found = tokens_per_step(candidates)
    if asked.tokens_per_step is not None:
        if found is None or found.least <= asked.tokens_per_step <= found.most:
            return asked, [], []
        given = f"--tokens-per-step {asked.tokens_per_step:,} is not what the names give"
        return asked, [], [f"{given}: {_shown(found)}" if found.least <= found.most else f"{given}, which contradict each other"]
    if found is None or not any(map(is_in_billions, amounts)):
        return asked, [], []
    middle = (found.least + found.most) / 2
    if found.least > found.most or found.most - found.least > 2 * _MOST_DOUBT * middle:
        reason = "too few" if found.least <= found.most else "not in proportion to the steps"
        raise UsageError(
            f"the tokens in the names are {reason}, so the tokens of a step are not known",
            details=[f"found  {each.path}" for each in candidates[:3]],
            hint="name them:  --tokens-per-step 4M",
        )
    note = f"a step has {_shown(found)} by the names; --tokens-per-step gives another number"
    return replace(asked, tokens_per_step=round(middle)), [note], []


def tokens_per_step(candidates: Sequence[Candidate]) -> Range | None:
    """The range of the tokens of a step; its least is above its most if names contradict each
    other, None if no name has tokens.
    """
    ranges = [
        Range((each.tokens.number - each.tokens.unit) / each.step, (each.tokens.number + each.tokens.unit) / each.step)
        for each in candidates
        if each.tokens is not None and each.step
    ]
    if not ranges:
        return None
    return Range(max(each.least for each in ranges), min(each.most for each in ranges))


def _shown(found: Range) -> str:
    return f"{round((found.least + found.most) / 2):,} tokens (within {float((found.most - found.least) / 2):,.0f})"
