"""Pickles of others as inert values: an interpreter that imports nothing, calls nothing, and can
build only data.

A pickle is a program for a stack machine, and the usual interpreters import any name and call it.
This one knows the opcodes that checkpoints need (`OPCODES`) and refuses every other by name.
Numbers, strings, tuples, lists and dicts are built; a class or function is a `Global`, which is two
strings; an object of a class that the caller allows is an `Inert`, which is the class's name, its
arguments and its state. `pickle_writer.dumps` writes such values again.

Bounds: time grows with the bytes of the file and with nothing else. Memory is at most about 50
times the file: no opcode allocates by a number that the file claims, memo numbers must follow each
other, and containers are counted. Values may share parts, so a few bytes can mean a tree of
exponential size: the interpreter never walks one, and whoever does has to bound it.

Opcodes: the comments of Python's `pickletools`.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from merge_cli.errors import IncompleteError, InputError, UnsupportedError

_DEEPEST = 64  # marks; checkpoints nest about ten deep
_BYTES_PER_CONTAINER = 4  # real files have one container for 12 bytes and more
_LONGEST_KEY = 16
_STOP = b"."  # the last byte of every pickle
LARGEST_INT = 9  # bytes: an unsigned 64-bit integer and its sign
_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}


class Global(NamedTuple):
    """The name of a class, a function or a constant."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """An object of the class `of`, or the result of the function `of`, with the arguments and the
    state that the pickle gave.

    `is_new` objects are made without their `__init__`, as pickles do with most classes.
    """

    __slots__ = ("args", "is_new", "of", "state")

    def __init__(self, of: Global, args: tuple[Any, ...] = (), state: Any = None, is_new: bool = False) -> None:
        self.of, self.args, self.state, self.is_new = of, args, state, is_new


class Refused(Exception):
    """A pickle does what is not allowed; the message says it. Becomes an UnsupportedError that
    names the file.
    """


Allowed = Mapping[Global, Callable[..., Any] | None]
"""The names that a pickle may use. One with a function may be called, and that function of ours is
called in its place.
"""


def inert(module: str, name: str) -> tuple[Global, Callable[..., Any]]:
    """An entry of `Allowed` for a class whose objects become `Inert`."""
    of = Global(module, name)
    return of, lambda *args: Inert(of, args)


def named(module: str, name: str) -> tuple[Global, None]:
    """An entry of `Allowed` for a constant, or a class that is only named."""
    return Global(module, name), None


def loads(raw: bytes, allowed: Allowed, what: str) -> Any:
    """The value of the pickle `raw`, read from `what` (which errors name).

    Raises UnsupportedError for an opcode or a name that is not allowed, IncompleteError for a
    pickle that ends early, InputError for bytes that are no pickle.
    """
    machine = _Machine(raw, allowed)
    try:
        return machine.run()
    except Refused as error:
        raise UnsupportedError(
            f"{what}: {error}",
            details=[f"found     at byte {machine.at} of the pickle"],
            hint="the file holds more than tensors, or is not what its name says: save it again with torch's own writer",
        ) from None
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        details = [f"found     {type(error).__name__} near byte {machine.at} of {len(raw)}"]
        if not raw.endswith(_STOP):
            raise IncompleteError(f"{what} is not a complete pickle", details=details) from None
        raise InputError(
            f"{what} is not a complete pickle", details=details, hint="the file is damaged; copy or save it again"
        ) from None


class _Machine:
    """`stack` holds the values since the last mark, `below` the stacks under it; `memo` what the
    pickle numbered.
    """

    def __init__(self, raw: bytes, allowed: Allowed) -> None:
        self.raw, self.allowed, self.at = raw, allowed, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: list[Any] = []
        self.containers_left = len(raw) // _BYTES_PER_CONTAINER + 100

    def run(self) -> Any:
        """Carry out the opcodes up to STOP; those that make up nine tenths of a file are here, the
        others in `OPCODES`.
        """
        raw, memo, at = self.raw, self.memo, 0
        while True:
            op = raw[at]
            at += 1
            if op == 0x94:  # MEMOIZE
                memo.append(self.stack[-1])
            elif op == 0x68:  # BINGET
                self.stack.append(memo[raw[at]])
                at += 1
            elif op == 0x6A:  # LONG_BINGET
                self.stack.append(memo[_U4.unpack_from(raw, at)[0]])
                at += 4
            elif op == 0x4B:  # BININT1
                self.stack.append(raw[at])
                at += 1
            elif op == 0x2E:  # STOP
                return self.result(at)
            else:
                self.at = at
                step = OPCODES.get(op)
                if step is None:
                    raise Refused(f"the pickle uses the opcode {_NAMES.get(op, hex(op))}, which no checkpoint needs")
                step(self)
                at = self.at

    def result(self, at: int) -> Any:
        self.at = at
        if self.below or len(self.stack) != 1 or at != len(self.raw):
            raise Refused("the pickle does not end with one value")
        return self.stack[0]

    def read(self, length: int) -> bytes:
        begin, self.at = self.at, self.at + length
        if self.at > len(self.raw):
            raise IndexError("the pickle ends early")
        return self.raw[begin : self.at]

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.raw, self.at)
        self.at += form.size
        return value

    def count_container(self) -> None:
        self.containers_left -= 1
        if self.containers_left < 0:
            raise Refused("the pickle holds more containers than its size allows")

    def pop_mark(self) -> list[Any]:
        """The values since the last mark, which is removed."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def push_tuple(self, count: int) -> None:
        self.count_container()
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def put(self, number: int) -> None:
        if number > len(self.memo):
            raise Refused(f"the pickle numbers a value {number} after {len(self.memo)} others")
        self.memo[number : number + 1] = [self.stack[-1]]

    def push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("the pickle makes up the name of a class")
        found = Global(module, name)
        if found not in self.allowed:
            raise Refused(f"the pickle asks for {str(found)[:200]}, which is no part of a plain checkpoint")
        self.stack.append(found)

    def call(self, is_new: bool) -> None:
        args, of = self.stack.pop(), self.stack.pop()
        make = self.allowed.get(of) if type(of) is Global else None
        if make is None or type(args) is not tuple:
            raise Refused(f"the pickle calls {str(of)[:200] if type(of) is Global else 'an object'}, which is not to be called")
        self.count_container()
        try:
            value = make(*args)
        except TypeError:
            raise Refused(f"the pickle calls {of} with other arguments than a checkpoint does") from None
        if type(value) is Inert:
            value.is_new = is_new
        self.stack.append(value)

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Inert and target.state is None:
            target.state = state
        elif type(target) is not dict:  # an OrderedDict may have attributes, which mean nothing here
            raise Refused("the pickle gives a state to a value that has none, or one already")

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused("the pickle appends to a value that is not a list")
        target.extend(values)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise Refused("the pickle sets items of a value that is not a dict")
        expected = len(target) + len(pairs) // 2
        for key in pairs[::2]:
            if type(key) is not str and not _is_key(key):
                raise Refused(f"the pickle uses a {type(key).__name__} as a key")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))
        if len(target) != expected:
            raise Refused("a key occurs twice in a dict of the pickle")


def _is_key(key: Any) -> bool:
    """Whether a dict may have this key: what hashes in little time, and is equal to no key of
    another type.
    """
    kind = type(key)
    if kind in (str, int, Inert, Global):
        return True
    return kind is tuple and len(key) <= _LONGEST_KEY and all(type(part) in (str, int) for part in key)


_U2, _I4, _U4, _U8, _F8 = (struct.Struct(form) for form in ("<H", "<i", "<I", "<Q", ">d"))


def _proto(m: _Machine) -> None:
    (version,) = m.read(1)
    if not 2 <= version <= 5:
        raise Refused(f"the pickle is of protocol {version}; checkpoints have 2 to 5")


def _mark(m: _Machine) -> None:
    if len(m.below) == _DEEPEST:
        raise Refused(f"the pickle is nested more than {_DEEPEST} deep")
    m.below.append(m.stack)
    m.stack = []


def _tuple(m: _Machine) -> None:
    m.count_container()
    values = m.pop_mark()
    m.stack.append(tuple(values))


def _empty(m: _Machine, make: Callable[[], Any]) -> None:
    m.count_container()
    m.stack.append(make())


def _string(m: _Machine, length: int) -> None:
    m.stack.append(m.read(length).decode("utf-8"))


def _long(m: _Machine) -> None:
    (length,) = m.read(1)
    if length > LARGEST_INT:
        raise Refused("the pickle holds an integer of more than 64 bits")
    m.stack.append(int.from_bytes(m.read(length), "little", signed=True))


def _append(m: _Machine) -> None:
    value = m.stack.pop()
    m.extend([value])


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items([key, value])


def _global(m: _Machine) -> None:
    """GLOBAL: two lines of text."""
    parts = []
    for _ in range(2):
        end = m.raw.find(b"\n", m.at, m.at + 200)
        if end < 0 and m.at + 200 > len(m.raw):
            raise IndexError("the pickle ends early")
        if end < 0:
            raise Refused("the pickle has the name of a class that is too long")
        parts.append(m.read(end - m.at).decode("utf-8"))
        m.at += 1
    m.push_global(*parts)


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.push_global(module, name)


def _persistent(m: _Machine) -> None:
    """BINPERSID: a tuple that means a value stored elsewhere, as torch does for the storage of a
    tensor.
    """
    m.count_container()
    m.stack.append(Inert(PERSISTENT, (m.stack.pop(),)))


PERSISTENT = Global("", "persistent")

OPCODES: dict[int, Callable[[_Machine], None]] = {
    0x80: _proto,
    0x95: lambda m: m.number(_U8),  # FRAME: a size for whoever reads a stream
    0x28: _mark,
    0x4E: lambda m: m.stack.append(None),  # NONE
    0x88: lambda m: m.stack.append(True),  # NEWTRUE
    0x89: lambda m: m.stack.append(False),  # NEWFALSE
    0x4A: lambda m: m.stack.append(m.number(_I4)),  # BININT
    0x4D: lambda m: m.stack.append(m.number(_U2)),  # BININT2
    0x8A: _long,  # LONG1
    0x47: lambda m: m.stack.append(m.number(_F8)),  # BINFLOAT
    0x8C: lambda m: _string(m, m.read(1)[0]),  # SHORT_BINUNICODE
    0x58: lambda m: _string(m, m.number(_U4)),  # BINUNICODE
    0x29: lambda m: m.stack.append(()),  # EMPTY_TUPLE
    0x74: _tuple,
    0x85: lambda m: m.push_tuple(1),
    0x86: lambda m: m.push_tuple(2),
    0x87: lambda m: m.push_tuple(3),
    0x5D: lambda m: _empty(m, list),  # EMPTY_LIST
    0x61: _append,
    0x65: lambda m: m.extend(m.pop_mark()),  # APPENDS
    0x7D: lambda m: _empty(m, dict),  # EMPTY_DICT
    0x73: _set_item,
    0x75: lambda m: m.set_items(m.pop_mark()),  # SETITEMS
    0x63: _global,
    0x93: _stack_global,
    0x81: lambda m: m.call(is_new=True),  # NEWOBJ
    0x52: lambda m: m.call(is_new=False),  # REDUCE
    0x62: _Machine.build,
    0x51: _persistent,
    0x71: lambda m: m.put(m.read(1)[0]),  # BINPUT
    0x72: lambda m: m.put(m.number(_U4)),  # LONG_BINPUT
}
"""What the opcodes do, but for the five that `_Machine.run` carries out itself."""
