"""Numbers as people type them: steps and tokens ("500", "2k", "8B"), counts ("4M"), sizes ("2GiB",
"5GB").
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from merge_cli.errors import UsageError

_AMOUNT = re.compile(r"\s*([0-9]{1,18}(?:_[0-9]{1,18})*(?:\.[0-9]{1,18})?)\s*([kMBT]?)\s*", re.IGNORECASE)
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kMGT]?)(i?)B?\s*", re.IGNORECASE)


def is_in_tokens(amount: int | str | None) -> bool:
    """Whether `amount` has a suffix (k, M, B, T), and so is in tokens if the tokens of a step are
    known.
    """
    return isinstance(amount, str) and bool(_AMOUNT.fullmatch(amount)) and amount.strip()[-1].isalpha()


def is_in_billions(amount: int | str | None) -> bool:
    """Whether `amount` has the suffix B or T, and so can be no number of steps."""
    return is_in_tokens(amount) and str(amount).strip()[-1].upper() in "BT"


def parse_amount(
    text: int | str,
    tokens_per_step: int | None = None,
    *,
    option: str = "--every",
    rounding: Callable[[Fraction], int] = round,
) -> int:
    """Steps of "500", "2k", "1_000"; with `tokens_per_step`, a number with a suffix is in tokens:
    "8B".

    A plain number is always in steps. Tokens become whole steps by `rounding`. Raises UsageError,
    which names `option`.
    """
    if tokens_per_step is not None and tokens_per_step < 1:
        raise UsageError(f"--tokens-per-step must be at least 1, not {tokens_per_step}", hint="--tokens-per-step 4M")
    match = _AMOUNT.fullmatch(str(text))
    if not match:
        raise UsageError(
            f"{option} cannot be {text!r}", details=["expected  a number such as 500, 10_000, 2k or 8B"], hint=f"{option} 2k"
        )
    amount = Fraction(match[1]) * 1000 ** " KMBT".index(match[2].upper() or " ")
    if tokens_per_step is None or not match[2]:
        if match[2].upper() in ("B", "T"):
            raise UsageError(f"{option} {text} is an amount of tokens", hint="name the tokens of a step:  --tokens-per-step 4M")
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


def parse_count(value: int | str, option: str = "--tokens-per-step") -> int:
    """A count of "4M", "2_000" or 4000000. Raises UsageError, which names `option`."""
    return parse_amount(value, 1, option=option)


def parse_size(value: int | str, option: str = "--memory") -> int:
    """Bytes of "2GiB" (binary), "5GB" (decimal), "1000" or 1000, above 0. Raises UsageError, which
    names `option`.
    """
    match = _SIZE.fullmatch(str(value))
    if isinstance(value, bool) or not match or (match[3] and not match[2]):
        raise UsageError(
            f"{option} cannot be {value!r}", details=["expected  a size such as 2GiB, 500MB or 1000000"], hint=f"{option} 2GiB"
        )
    base = 1024 if match[3] else 1000
    size = int(Fraction(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size <= 0:
        raise UsageError(f"{option} must be more than 0 bytes")
    return size


def parse_whole(value: int | str, option: str, least: int = 0, most: int | None = None) -> int:
    """A whole number from `least` to `most`. Raises UsageError, which names `option`."""
    example = f"{option} {max(2, least) if most is None else min(max(2, least), most)}"
    if isinstance(value, bool) or not re.fullmatch(r"\s*-?[0-9]{1,18}\s*", str(value)):
        raise UsageError(f"{option} cannot be {value!r}", details=["expected  a whole number"], hint=example)
    number = int(value)
    if number < least:
        raise UsageError(f"{option} must be at least {least}, not {number}", hint=example)
    if most is not None and number > most:
        raise UsageError(f"{option} must be at most {most}, not {number}", hint=f"{option} {most}")
    return number
