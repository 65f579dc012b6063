"""Mutations of JSON that know its structure, and of bytes that do not: everything from one
`random.Random`.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

Path = tuple[Any, ...]
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 255, 2**31, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30, 10**400),
    *(1e308, float("inf"), float("-inf"), float("nan"), 0.5, -0.0),
    *("", "a", ".", "../x", "/etc/passwd", "../../victim", "a\0b", "\x1b[31mred\x07", "\x9b31m", "\u202egnp", "\ud800", "x" * 300),
    *("x" * 5000, "\n", "con", "bf16", "F8_E4M3", "fp8", "NaN", "1e999", "model.safetensors"),
    *([], {}, [[]], [None], [0], [-1], [2**40, 2**40], [2**63, 0], [0, 2**64], [1, 2, 3], {"a": 1}, {"": {}}),
)
NAMES = tuple(value for value in ODD if isinstance(value, str))
TAILS = ("\0", "\x1b]0;e\x07", "/../..", "\u2028", "\u200b")


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of all parts of a JSON value."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in entries:
        yield from paths(part, (*path, key))


def at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def mutated(value: Any, numbers: random.Random) -> Any:
    """A copy with one to three parts replaced, removed, renamed, exchanged, repeated or stretched."""
    value = copy.deepcopy(value)
    for _ in range(numbers.choice((1, 1, 1, 2, 3))):
        known = list(paths(value))
        path = numbers.choice(known)
        if path:
            mutate(at(value, path[:-1]), path[-1], value, known, numbers)
        elif numbers.random() < 0.1:
            value = copy.deepcopy(numbers.choice(ODD))
    return value


def mutate(parent: Any, key: Any, whole: Any, known: list[Path], numbers: random.Random) -> None:
    """Change the part `key` of `parent` in place."""
    how, part = numbers.random(), parent[key]
    if how < 0.55:
        parent[key] = copy.deepcopy(numbers.choice(ODD))
    elif how < 0.65:
        del parent[key]
    elif how < 0.75 and isinstance(parent, dict):
        parent[numbers.choice(NAMES)] = parent.pop(key)
    elif how < 0.85:
        parent[key] = copy.deepcopy(at(whole, numbers.choice(known)))
    elif isinstance(part, int) and not isinstance(part, bool):
        parent[key] = numbers.choice((part + 1, part - 1, -part, part * 2, part * 1000))
    elif isinstance(part, list):
        parent[key] = part * numbers.choice((2, 100))
    elif isinstance(part, str):
        parent[key] = part + numbers.choice(TAILS)


def dumped(value: Any, numbers: random.Random) -> bytes:
    """The value as JSON; one in six is damaged as bytes: flipped, cut, with a key twice, nested, in
    another encoding.
    """
    data = json.dumps(value, ensure_ascii=numbers.random() < 0.7).encode("utf-8", "surrogatepass")
    if numbers.random() > 1 / 6 or len(data) < 3:
        return data
    how = numbers.randrange(8)
    if how == 0:
        return flipped(data, numbers)
    if how == 1:
        return data[: numbers.randrange(len(data))]
    if how == 2:
        return b"{" + data[1:-1] + b"," + data[1:]
    if how == 3:
        depth = numbers.choice((90, 150, 900, 3000, 100_000))
        return data.replace(b"0", b"[" * depth + b"]" * depth, 1)
    if how == 4:
        return b"\xef\xbb\xbf" + data
    if how == 5:
        return data.decode("utf-8", "replace").encode("utf-16")
    if how == 6:
        return data + b"\0" * numbers.choice((1, 100))
    return data.replace(b"1", b"1e999", 1)


def flipped(data: bytes, numbers: random.Random) -> bytes:
    """Some bytes replaced, or the file cut."""
    found = bytearray(data)
    for _ in range(numbers.choice((1, 2, 5))):
        found[numbers.randrange(len(found))] = numbers.randrange(256)
    return bytes(found[: numbers.randrange(len(found))]) if numbers.random() < 0.1 else bytes(found)
