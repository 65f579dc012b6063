"""Write the values that `inert_pickle` reads: a pickle that Python's and torch's own loaders read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from merge_cli.formats.inert_pickle import LARGEST_INT, Global, Inert

_U4, _I4, _F8 = (struct.Struct(form) for form in ("<I", "<i", ">d"))


def dumps(value: Any) -> bytes:
    """The pickle (protocol 4) of numbers, strings, tuples, lists, dicts, `Global` and `Inert`;
    equal strings are stored once.

    For values of bounded depth, as whoever read them has checked; shared parts other than strings
    are written again.
    """
    out = bytearray(b"\x80\x04")
    _write(value, out, {})
    return bytes(out + b".")


def _write(value: Any, out: bytearray, memo: dict[Any, int]) -> None:
    kind = type(value)
    if kind in _CONSTANTS:
        out += _CONSTANTS[kind](value)
    elif kind in (str, Global):
        if value in memo:
            out += b"j" + _U4.pack(memo[value])
            return
        if kind is Global:
            _write(value.module, out, memo)
            _write(value.name, out, memo)
            out += b"\x93\x94"  # STACK_GLOBAL, MEMOIZE
        else:
            raw = value.encode()
            out += b"X" + _U4.pack(len(raw)) + raw + b"\x94"
        memo[value] = len(memo)
    elif kind is Inert:
        _write(value.of, out, memo)
        _write(value.args, out, memo)
        out += b"\x81" if value.is_new else b"R"
        if value.state is not None:
            _write(value.state, out, memo)
            out += b"b"  # BUILD
    elif kind in _CONTAINERS:
        begin, end = _CONTAINERS[kind]
        out += begin
        for item in value.items() if kind is dict else value:
            for part in item if kind is dict else (item,):
                _write(part, out, memo)
        out += end
    else:
        raise TypeError(f"a {kind.__name__} cannot be written")


def _write_int(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + _I4.pack(value)
    return b"\x8a" + bytes([LARGEST_INT]) + value.to_bytes(LARGEST_INT, "little", signed=True)


_CONSTANTS: dict[Any, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    int: _write_int,
    float: lambda value: b"G" + _F8.pack(value),
}
_CONTAINERS: dict[Any, tuple[bytes, bytes]] = {tuple: (b"(", b"t"), list: (b"](", b"e"), dict: (b"}(", b"u")}
