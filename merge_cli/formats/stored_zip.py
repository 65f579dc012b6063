"""Where the members of a zip archive lie, for archives whose members are stored as they are, as
`torch.save` writes them.

Only the directory at the end and the local headers are read, by ranges; the members' own bytes stay
where they are. Archives that compress or encrypt, carry a comment, span disks, name a member twice,
or whose members overlap each other or the directory are refused. ZIP64 is understood. CRC-32s are
reported, not checked: that would mean to read everything.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (4.3.7, 4.3.12, 4.3.14 to
4.3.16, 4.5.3)
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import NamedTuple

from merge_cli.errors import IncompleteError, InputError, UnsupportedError

MAX_DIRECTORY_BYTES = 64 << 20
_END, _END64, _LOCATOR64 = struct.Struct("<IHHHHIIH"), struct.Struct("<IQHHIIQQQQ"), struct.Struct("<IIQI")
_ENTRY, _LOCAL = struct.Struct("<IHHHHHHIIIHHHHHII"), struct.Struct("<IHHHHHIIIHH")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_TAIL = _END64.size + _LOCATOR64.size + _END.size

Read = Callable[[int, int], bytes]
"""`read(offset, length)`: exactly that many bytes of the archive, or an error."""


class Member(NamedTuple):
    """A member: its header begins at `header`, its `size` bytes at `data`, both from the archive's
    beginning.

    `entry` is where its entry of the directory begins.
    """

    name: str
    header: int
    data: int
    size: int
    crc: int
    entry: int

    @property
    def end(self) -> int:
        return self.data + self.size


def list_members(read: Read, length: int, what: str) -> dict[str, Member]:
    """The members of the archive `what` of `length` bytes, in the order of the directory. Raises
    InputError or UnsupportedError.
    """
    begin, size, count = _directory(read, length, what)
    raw = read(begin, size)
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > size:
            raise _damaged(what, "its directory ends early")
        entry = _ENTRY.unpack_from(raw, at)
        signature, _, _, flags, method, _, _, crc, packed, unpacked, name_bytes, extra_bytes, comment_bytes, disk, *_, header = (
            entry
        )
        extra_at = at + _ENTRY.size + name_bytes
        if signature != 0x02014B50 or extra_at + extra_bytes + comment_bytes > size:
            raise _damaged(what, "its directory is broken")
        name = _name(raw[at + _ENTRY.size : extra_at], what)
        packed, unpacked, header = _wide(raw[extra_at : extra_at + extra_bytes], packed, unpacked, header, what)
        if method or flags & 0x2041 or packed != unpacked or disk not in (0, _FULL16):
            raise UnsupportedError(f"{what}: the member {name[:200]!r} is compressed, encrypted or on another disk", hint=_HINT)
        if name in members:
            raise _damaged(what, f"the member {name[:200]!r} occurs twice")
        data = _data(read, name, header, begin, what)
        members[name] = Member(name, header, data, unpacked, crc, begin + at)
        at = extra_at + extra_bytes + comment_bytes
    if at != size:
        raise _damaged(what, "its directory is longer than its entries")
    _check_apart(members, begin, what)
    return members


_HINT = "torch.save writes plain archives: save it again, or copy it again if it is damaged"


def _damaged(what: str, why: str) -> InputError:
    return InputError(f"{what} is not a complete zip archive: {why}", hint=_HINT)


def _cut_off(what: str, why: str) -> IncompleteError:
    """The end is not there, which writers of archives write last."""
    return IncompleteError(f"{what} is not a complete zip archive: {why}")


def _directory(read: Read, length: int, what: str) -> tuple[int, int, int]:
    """The beginning, size and number of entries of the directory, by the records at the very end."""
    if length < _END.size:
        raise _cut_off(what, f"it has {length} bytes")
    tail = read(length - min(length, _TAIL), min(length, _TAIL))
    signature, *_, count, size, begin, comment = _END.unpack_from(tail, len(tail) - _END.size)
    if signature != 0x06054B50:
        raise _cut_off(what, "no end record at its end")
    if comment:
        raise _damaged(what, "it carries a comment")
    end = length - _END.size
    if len(tail) == _TAIL and tail[_END64.size : _END64.size + 4] == b"PK\6\7":
        _, _, at, _ = _LOCATOR64.unpack_from(tail, _END64.size)
        record = _END64.unpack_from(tail, 0)
        if record[0] != 0x06064B50 or at != length - _TAIL:
            raise _damaged(what, "its ZIP64 record is broken")
        *_, count, size, begin = record
        end = at
    elif _FULL32 in (size, begin) or count == _FULL16:
        raise _damaged(what, "no ZIP64 record")
    if begin + size != end:
        raise _damaged(what, "its directory does not lie before its end record")
    if size > MAX_DIRECTORY_BYTES:
        raise UnsupportedError(f"{what}: the archive's directory has {size} bytes", hint="pmerge reads up to 64 MiB of it")
    return begin, size, count


def _wide(extra: bytes, packed: int, unpacked: int, header: int, what: str) -> tuple[int, int, int]:
    """The sizes and the offset; those that do not fit 32 bits are in a ZIP64 field, in this order."""
    values = [unpacked, packed, header]
    if _FULL32 not in values:
        return packed, unpacked, header
    at = 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            field = extra[at + 4 : at + 4 + size]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            values = [next(wide, _FULL32) if value == _FULL32 else value for value in values]
            break
        at += 4 + size
    if _FULL32 in values:
        raise _damaged(what, "a ZIP64 field is missing")
    return values[1], values[0], values[2]


def _name(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _damaged(what, "the name of a member is not UTF-8") from None


def _data(read: Read, name: str, header: int, end: int, what: str) -> int:
    """Where the bytes of the member whose local header is at `header` begin."""
    encoded = name.encode()
    if header + _LOCAL.size + len(encoded) > end:
        raise _damaged(what, f"the header of {name[:200]!r} lies outside")
    raw = read(header, _LOCAL.size + len(encoded))
    signature, _, flags, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack_from(raw)
    if signature != 0x04034B50 or method or flags & 0x2041 or name_bytes != len(encoded) or raw[_LOCAL.size :] != encoded:
        raise _damaged(what, f"the header of {name[:200]!r} is not that of its entry")
    return int(header + _LOCAL.size + name_bytes + extra_bytes)


def _check_apart(members: dict[str, Member], directory: int, what: str) -> None:
    ordered = sorted(members.values(), key=lambda member: member.header)
    for a, b in itertools.pairwise(ordered):
        if a.end > b.header:
            raise _damaged(what, f"the members {a.name[:100]!r} and {b.name[:100]!r} overlap")
    if ordered and ordered[-1].end > directory:
        raise _damaged(what, f"the member {ordered[-1].name[:200]!r} reaches into its directory")
