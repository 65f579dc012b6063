"""Pickles as inert values: what checkpoints hold is read and written, everything else is refused by
name, at bounded cost.
"""

import pickle
import pickletools
import struct
import time
import tracemalloc
from collections import OrderedDict
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.errors import IncompleteError, InputError, UnsupportedError
from merge_cli.formats.inert_pickle import OPCODES, PERSISTENT, Allowed, Global, Inert, inert, loads, named
from merge_cli.formats.pickle_writer import dumps

PATH = dict([inert("pathlib", "PurePosixPath"), named("torch", "float32"), (Global("collections", "OrderedDict"), dict)])
PROTO = b"\x80\x04"


def refusal(raw: bytes, allowed: Allowed = PATH) -> str:
    with pytest.raises(InputError) as caught:
        loads(raw, allowed, "x/.metadata")
    assert "x/.metadata" in caught.value.message and len(str(caught.value)) < 600
    return str(caught.value)


PLAIN = [
    None, True, False, 0, 255, 256, -1, 65535, 65536, 2**31 - 1, -(2**31), 2**31, 2**63, -(2**63), 2**64 - 1, 1.5, -0.0,
    "", "größe.重み", "x" * 300, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], [1, 2],
    {}, {"a": 1}, {"a": [{"b": ("c", 1)}], 7: None, ("p", 0): 1}, ["same", "same", ("same",)], OrderedDict(a=1, b=2),
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:30])
def test_reads_plain_values_as_pickle_does_and_writes_them_for_pickle(value: Any, protocol: int) -> None:
    found = loads(pickle.dumps(value, protocol), PATH, "x")
    assert found == value
    assert pickle.loads(dumps(found)) == value
    assert loads(dumps(found), PATH, "x") == value


def test_names_stay_names_and_objects_stay_inert() -> None:
    raw = pickle.dumps([PurePosixPath("a/b")], 4)
    (path,) = loads(raw, PATH, "x")
    assert type(path) is Inert and path.of == Global("pathlib", "PurePosixPath") and path.args == ("a", "b") and not path.is_new
    assert pickle.loads(dumps([path])) == [PurePosixPath("a/b")]
    assert loads(b"\x80\x02ctorch\nfloat32\n.", PATH, "x") == Global("torch", "float32")
    found = loads(b"\x80\x02(X\x07\x00\x00\x00storageK\x01tQ.", PATH, "x")
    assert found.of == PERSISTENT and found.args == (("storage", 1),)


class Stateful:
    def __init__(self) -> None:
        self.count = 3


def test_an_object_keeps_its_state_and_gets_it_back() -> None:
    allowed = dict([inert(__name__, "Stateful")])
    found = loads(pickle.dumps(Stateful()), allowed, "x")
    assert found.is_new and found.args == () and found.state == {"count": 3}
    again = pickle.loads(dumps(found))
    assert type(again) is Stateful and again.count == 3


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1/0",)


HOSTILE = {
    "a call": (pickle.dumps(Evil()), "asks for builtins.eval"),
    "a call, protocol 2": (pickle.dumps(Evil(), 2), "asks for __builtin__.eval"),
    "a call in text": (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
    "a name that may not be called": (b"\x80\x02ctorch\nfloat32\n)R.", "calls torch.float32"),
    "a call of a value": (PROTO + b"K\x01)R.", "calls an object"),
    "arguments of another kind": (PROTO + b"cpathlib\nPurePosixPath\n}R.", "calls pathlib.PurePosixPath"),
    "arguments of another number": (PROTO + b"ccollections\nOrderedDict\n(K\x01K\x02tR.", "with other arguments"),
    "arguments by keyword": (PROTO + b"cpathlib\nPurePosixPath\n)}\x92.", "opcode NEWOBJ_EX"),
    "a memo number far away": (PROTO + b"Nr" + struct.pack("<I", 1 << 28) + b".", "numbers a value 268435456"),
    "a memo number that was not given": (PROTO + b"h\x07.", "not a complete pickle"),
    "a string longer than the file": (PROTO + b"X" + struct.pack("<I", (1 << 32) - 1) + b"x.", "not a complete pickle"),
    "bytes longer than the file": (PROTO + b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "opcode BINBYTES8"),
    "a bytearray": (pickle.dumps(bytearray(8), 5), "opcode BYTEARRAY8"),
    "a long integer": (b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"x.", "opcode LONG4"),
    "an integer of 80 bits": (pickle.dumps(1 << 79), "more than 64 bits"),
    "an integer in text": (b"\x80\x02I1\n.", "opcode INT"),
    "text": (b"\x80\x02S'a'\n.", "opcode STRING"),
    "deep marks": (PROTO + b"(" * 2_000_000 + b"t" * 2_000_000 + b".", "nested more than 64 deep"),
    "doubled tuples by DUP": (PROTO + b")" + b"2\x86" * 30 + b".", "opcode DUP"),
    "a state for a number": (PROTO + b"K\x01}b.", "gives a state"),
    "a state for a name": (b"\x80\x02ctorch\nfloat32\n}b.", "gives a state"),
    "a second state": (PROTO + b"cpathlib\nPurePosixPath\n)R}b}b.", "one already"),
    "items of a tuple": (PROTO + b")(K\x01K\x01u.", "not a dict"),
    "an odd number of items": (PROTO + b"}(K\x01u.", "not a dict"),
    "appending to a dict": (PROTO + b"}K\x01a.", "not a list"),
    "a key twice": (PROTO + b"}(K\x01NK\x01Nu.", "occurs twice"),
    "a key that is a list": (PROTO + b"}]Ns.", "a list as a key"),
    "a key that is a tuple of tuples": (PROTO + b"})\x85Ns.", "a tuple as a key"),
    "a key that is a long tuple": (PROTO + b"}(" + b"K\x01" * 17 + b"tNs.", "a tuple as a key"),
    "a key that is True, and so 1": (PROTO + b"}(K\x01N\x88Nu.", "a bool as a key"),
    "a made-up name": (PROTO + b"K\x01K\x02\x93.", "makes up the name"),
    "a name without an end": (b"\x80\x02ctorch", "not a complete pickle"),
    "a name that never ends": (b"\x80\x02c" + b"x" * 100_000, "too long"),
    "a string that is no UTF-8": (PROTO + b"\x8c\x01\xff.", "not a complete pickle"),
    "an unpaired surrogate": (PROTO + b"\x8c\x03\xed\xa0\x80.", "not a complete pickle"),
    "two values": (PROTO + b"NN.", "does not end with one value"),
    "no value": (PROTO + b".", "does not end with one value"),
    "an open mark": (PROTO + b"(N.", "does not end with one value"),
    "more after the end": (PROTO + b"N.N", "does not end with one value"),
    "no end": (PROTO + b"N", "not a complete pickle"),
    "nothing": (b"", "not a complete pickle"),
    "an empty stack": (PROTO + b"a.", "not a complete pickle"),
    "a tuple of too few": (PROTO + b"N\x86.", "not a complete pickle"),
    "a mark in the way": (PROTO + b"N(\x85.", "not a complete pickle"),
    "no mark": (PROTO + b"Nt.", "not a complete pickle"),
    "protocol 0": (b"\x80\x00N.", "protocol 0"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "an unknown opcode": (PROTO + b"\xff.", "opcode 0xff"),
    "an extension": (PROTO + b"\x82\x01.", "opcode EXT1"),
    "a buffer from elsewhere": (PROTO + b"\x97.", "opcode NEXT_BUFFER"),
}


@pytest.mark.parametrize(("raw", "expected"), HOSTILE.values(), ids=HOSTILE.keys())
def test_refuses_what_no_checkpoint_needs(raw: bytes, expected: str) -> None:
    started = time.process_time()
    tracemalloc.start()
    try:
        assert expected in refusal(raw)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 1


def test_every_opcode_is_read_or_refused_by_name() -> None:
    inside = {0x94, 0x68, 0x6A, 0x4B, 0x2E}  # in the machine's own loop
    for op in pickletools.opcodes:
        code = ord(op.code)
        if code not in OPCODES and code not in inside:
            assert f"opcode {op.name}," in refusal(PROTO + bytes([code]) + b"\0" * 16)
    assert len(OPCODES) + len(inside) < 40


@pytest.mark.parametrize(
    "piece",
    [b"}", b"]", b"N\x85", b"}\x94", b"N\x94\x94\x94", b"\x8c\x02ab", b"\x8c\x02ab\x94", b"M\xff\xff\x94", b"N", b"h\0"],
    ids=repr,
)
def test_memory_is_bounded_by_the_size_of_the_file(piece: bytes) -> None:
    raw = PROTO + b"N\x94" + piece * (200_000 // len(piece)) + b"."
    tracemalloc.start()
    try:
        refusal(raw)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(raw)
    finally:
        tracemalloc.stop()


def test_a_large_dict_is_within_the_bound() -> None:
    raw = PROTO + b"}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(1 << 16)) + b"u."
    tracemalloc.start()
    try:
        assert len(loads(raw, PATH, "x")) == 1 << 16
        assert tracemalloc.get_traced_memory()[1] < 50 * len(raw)
    finally:
        tracemalloc.stop()


def test_values_that_share_their_parts_cost_nothing_until_somebody_walks_them() -> None:
    doubled = b"".join(b"h" + bytes([i, ord("h"), i]) + b"\x86\x94" for i in range(60))  # each tuple holds the last one twice
    assert len(loads(PROTO + b"()\x94" + doubled + b"t.", PATH, "x")) == 61


def test_a_deep_value_is_built_and_freed_without_recursion() -> None:
    text = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)  # the size of the file allows as many containers
    value = loads(PROTO + b"(" + text + b")" + b"\x85" * 200_000 + b"t.", PATH, "x")
    depth = 0
    inner = value[1]
    while inner:
        (inner,) = inner
        depth += 1
    assert depth == 200_000


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, database=None)
@given(values, st.integers(2, 5))
def test_any_plain_value_makes_the_round_trip(value: Any, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol), {}, "x") == value
    assert pickle.loads(dumps(value)) == value


@settings(max_examples=400, deadline=None, database=None)
@given(st.data())
def test_damaged_bytes_give_one_clear_error_or_inert_data(data: st.DataObject) -> None:
    raw = bytearray(pickle.dumps({"a": [PurePosixPath("a/b"), (1, 2, 70000)], "b": {"c": 1.5}}, data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        loads(bytes(raw), PATH, "x")
    except InputError as error:
        assert isinstance(error, UnsupportedError) or "not a complete pickle" in error.message


def test_a_pickle_that_ends_early_is_incomplete_and_not_one_with_its_end() -> None:
    raw = pickle.dumps({"a": [1, 2.0, "text"], "b": (None, 1 << 40)}, 2)
    for length in range(len(raw)):
        with pytest.raises(IncompleteError):
            loads(raw[:length], {}, "x")
    with pytest.raises(InputError) as caught:
        loads(PROTO + b"a.", {}, "x")
    assert not isinstance(caught.value, IncompleteError)
