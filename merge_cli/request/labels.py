"""The step, stage and ingredient in the name of a checkpoint.

Steps are numbers: `ckpt_9` comes before `ckpt_10`, whatever order the shell gives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from merge_cli.errors import InputError

# No step if a letter or a fraction follows the number: `ckpt-7b`, `step_1.5k`. 18 digits fit int64.
_STEP = re.compile(
    r"(?:global[_-]?step|step|iteration|iter|checkpoint|ckpt|epoch)[-_=]?([0-9]{1,18})(?![0-9a-z]|\.[0-9])", re.IGNORECASE
)
_ENDING = re.compile(r"\.(?:safetensors|bin|pth?)$")
_SHARD = re.compile(r"-[0-9]+-of-[0-9]+$")
_STAGE = re.compile(r"(?:^|[-_])(stage[-_]?\d+)(?=[-_]|$)", re.IGNORECASE)
_INGREDIENT = re.compile(r"(?:^|[-_])(ingredient[-_]?\d+)(?=[-_]|$)", re.IGNORECASE)
_TOKENS = re.compile(r"(?:^|[-_])(?:tokens?[-_]?(\d{1,6})([MBT])|(\d{1,6})([MBT])T)(?=[-_]|$)", re.IGNORECASE | re.ASCII)
BARE_NUMBER = re.compile(r"[0-9]{1,18}")


class Tokens(NamedTuple):
    """A rounded number of tokens in a name: 4B is a `number` of 4e9 in a `unit` of 1e9."""

    number: Fraction
    unit: Fraction


@dataclass(frozen=True)
class StepLabel:
    """The step in a checkpoint's name, and the stage and ingredient of a run that has several.

    `tokens` only beside a step.
    """

    step: int | None
    stage: str | None = None
    ingredient: str | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be averaged; `path` is as given.

    `step_warning`: why the step may be wrong, such as another number in the name or a broken
    `trainer_state.json`. `in_run`: it was not named, its run folder was.
    """

    path: str
    step: int | None
    stage: str | None
    ingredient: str | None
    mtime_ns: int
    step_warning: InputError | None = None
    tokens: Tokens | None = None
    in_run: bool = False


def parse_label(name: str) -> StepLabel:
    """Read the name of a checkpoint folder or file: `step-001000-2BT`, `epoch=3-step=1200`,
    `iter_0001000`, `0001000`.

    The number after step outranks one after iter, checkpoint or ckpt, and these one after epoch.
    Tokens are `tokens5B` or `5BT`, beside a step: `7B` is the size of a model.
    """
    name = _SHARD.sub("", _ENDING.sub("", name))
    stage, ingredient = _STAGE.search(name), _INGREDIENT.search(name)
    found = {match[0].lower().rstrip("0123456789").rstrip("-_="): int(match[1]) for match in _STEP.finditer(name)}
    epoch = found.pop("epoch", None)  # an order, where there is no better number
    step = next((found[word] for word in found if word.endswith("step")), next(iter(found.values()), epoch))
    if step is None and BARE_NUMBER.fullmatch(name):
        step = int(name)
    tokens = _TOKENS.search(name) if found else None
    return StepLabel(step, stage and stage[1].lower(), ingredient and ingredient[1].lower(), tokens and _tokens(tokens))


def _tokens(match: re.Match[str]) -> Tokens:
    unit = Fraction(1000 ** ("MBT".index((match[2] or match[4]).upper()) + 2))
    return Tokens(int(match[1] or match[3]) * unit, unit)
