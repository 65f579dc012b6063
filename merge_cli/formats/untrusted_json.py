"""JSON that others wrote: unique keys, unsigned integers, no NaN, no unpaired surrogates, bounded
depth.

An object is walked member by member, so that whoever visits the members can stop at the first that
is wrong: 100 MB of "[]," then cost little more memory than their own text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from merge_cli.errors import InputError
from merge_cli.system.json_text import DEEPEST, is_too_deep

_SPACE = r"[ \t\n\r]*"
_BEGIN, _COLON, _NEXT = (re.compile(_SPACE + mark + _SPACE) for mark in (r"\{", ":", "([,}])"))
_LONGEST = 1 << 20


def check_depth(value: Any, what: str) -> None:
    """Raise InputError where objects and lists are nested more than 100 deep."""
    if is_too_deep(value):
        raise InputError(f"{what} is nested too deeply", details=[f"expected  at most {DEEPEST} levels"])


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:200]!r} occurs twice")
    return result


def _unsigned(text: str) -> int:
    if text[0] == "-":
        raise ValueError(f"the number {text[:40]} is negative")
    return int(text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=_unsigned, parse_constant=_no_constant)


def walk_object(text: str, at: int, visit: Callable[[str, int], int]) -> int:
    """Walk the JSON object at `at`; `visit(key, position)` reads a value and returns where it ends.
    Returns the object's end.
    """
    found = _BEGIN.match(text, at)
    if found is None:
        raise ValueError(f"expected an object at character {at}")
    at = found.end()
    if text.startswith("}", at):
        return at + 1
    while True:
        if not text.startswith('"', at):
            raise ValueError(f"expected a name in double quotes at character {at}")
        key, at = scanstring(text, at + 1)
        colon = _COLON.match(text, at)
        if colon is None:
            raise ValueError(f"expected a colon at character {at}")
        at = visit(key, colon.end())
        found = _NEXT.match(text, at)
        if found is None:
            raise ValueError(f"expected a comma or the end of the object at character {at}")
        if found[1] == "}":
            return found.end(1)
        at = found.end()


def parse_member(text: str, at: int, what: str) -> tuple[Any, int]:
    """Parse the value at `at`, of at most 1 MiB of characters, and say where it ends. Raises
    InputError or ValueError.
    """
    try:
        value, length = DECODER.raw_decode(text[at : at + _LONGEST])
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None
    except ValueError:
        if len(text) - at <= _LONGEST:
            raise
        raise InputError(f"{what} is not valid JSON, or longer than {_LONGEST} characters") from None
    check_depth(value, what)
    return value, at + length
