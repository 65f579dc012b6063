"""The one way in which JSON of files is parsed: any text gives a value or a ValueError, never a
RecursionError, and no value that cannot be walked or printed.

Large inputs (headers, indexes) are walked member by member instead: `formats/untrusted_json.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes | str, *, is_own: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError: no JSON, nested more than 100 deep, a string
    with half of a surrogate pair, a number of thousands of digits.

    Records of pmerge's own (`is_own`) may have such halves: they are bytes of file names that are
    not UTF-8.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode(json.detect_encoding(raw))
        value = json.loads(text)
        if is_too_deep(value):
            raise RecursionError
        if not is_own and may_hold_surrogates(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"it is nested too deeply, more than {DEEPEST} levels") from None
    return value


def is_too_deep(value: Any) -> bool:
    """Whether objects and lists are nested more than 100 deep, which would stop whoever walks them."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        members = (each.values() if isinstance(each, dict) else each for each in level)
        level = [inner for each in members for inner in each if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def may_hold_surrogates(text: str) -> bool:
    """Whether `text` has an escape that may be half of a pair; the decoded strings have to be
    looked at then.
    """
    return _SURROGATE.search(text) is not None
