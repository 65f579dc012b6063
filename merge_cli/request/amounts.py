"""Amounts as people type them: steps, and tokens where the tokens of a step are known ("500", "2k", "8B")."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from merge_cli.errors import UsageError

_AMOUNT = re.compile(r"\s*([0-9]{1,18}(?:_[0-9]{1,18})*(?:\.[0-9]{1,18})?)\s*([kMBT]?)\s*", re.IGNORECASE)


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
