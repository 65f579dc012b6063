"""Fuzzing the header parser, with the safetensors library as the oracle: what it refuses, pmerge
refuses.

Where both accept a file they must see the same tensors. pmerge is stricter on purpose in these
points, and in no other (`STRICTER`; a refusal of what the library accepts that is none of them
fails the test):

- a name, or a key of `__metadata__`, that occurs twice: the library silently takes the last one;
- a tensor's entry that is not an object with exactly dtype, shape and data_offsets, or longer than
  4096 characters: the library ignores fields that it does not know, and also takes a list in place
  of the object;
- `"__metadata__": null`;
- a shape whose product, multiplied from the left, passes 2^64 bits before a zero makes it empty.

PMERGE_FUZZ_CASES sets the number of cases of each test (the default is small).
"""

import json
import os
import random
import re
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import nasty_tensors, write_safetensors
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from merge_cli.errors import InputError
from merge_cli.formats.index import read_index
from merge_cli.formats.safetensors import DTYPES, Header, read_header_at

CASES = int(os.environ.get("PMERGE_FUZZ_CASES", "1500"))
STRICTER = re.compile(r"occurs twice|expected an object with exactly|__metadata__ must be an object|is larger than any file")
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
Seen = dict[str, tuple[str, list[int]]]


def library(path: Path) -> Seen | None:
    """What the safetensors library sees in the file; None where it refuses it."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
    except (SafetensorError, OSError):
        return None


def pmerge(path: Path) -> tuple[Header | None, str]:
    """The header as pmerge reads it, or None and why it refuses it."""
    try:
        return read_header_at(str(path)), ""
    except InputError as error:
        assert str(path) in error.message
        assert len(str(error)) < 2000
        return None, str(error)


def compare(path: Path, data: bytes, tally: Counter[str]) -> None:
    path.write_bytes(data)
    expected, (header, why) = library(path), pmerge(path)
    if expected is None:
        assert header is None, "pmerge accepts what the library refuses"
        tally["both refuse"] += 1
    elif header is None:
        assert STRICTER.search(why) or has_a_name_twice(data), why
        tally["pmerge is stricter"] += 1
    else:
        assert {name: (info.dtype, list(info.shape)) for name, info in header.tensors.items()} == expected
        tally["both accept"] += 1


def has_a_name_twice(data: bytes) -> bool:
    """Whether the header has one: an earlier entry may then be broken, which the library never
    sees.
    """
    twice = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        twice.append(len({name for name, _ in pairs}) < len(pairs))

    json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=look)
    return any(twice)


@pytest.fixture
def tally() -> Any:
    """How the cases went; both outcomes must be frequent, or the fuzzing does not reach what it is
    for.
    """
    counts: Counter[str] = Counter()
    yield counts
    print(f"{counts.total()} cases: {dict(counts)}")  # pytest -s shows it
    assert counts["both accept"] > counts.total() / 50
    assert counts["both refuse"] > counts.total() / 50


class Literal(str):
    """Text that stands in the JSON as it is."""


def dump(value: Any) -> str:
    """JSON of `value`, where dicts are lists of pairs (keys may repeat) and a `Literal` stands for
    itself.
    """
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, tuple):
        return "{" + ",".join(f"{dump(key)}:{dump(member)}" for key, member in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


odd_numbers = st.sampled_from(
    [Literal(text) for text in ("-1", "-0", "01", "1.0", "1e2", "true", "null", '"4"', "NaN", "Infinity", "[2]", "{}", "9" * 5000)]
    + [2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 2**65]
)  # fmt: skip
names = st.sampled_from(
    ["a", "b", "größe.重み", "", "x" * 2000, "../up", "/abs", "a\\u0000b", "\x7f", "__metadata__", "😀", "\u2028"]
    + [Literal(text) for text in ('"\\ud800"', '"\\ud83d\\ude00"', '"\\u0061"', '"\n"', '"\\x"', "null", "'a'", '"\\/"')]
)  # fmt: skip
dtypes = st.sampled_from([*DTYPES, *DTYPES, "F8", "f32", "", Literal("null"), Literal("1")])
dims = st.sampled_from([0, 1, 2, 3, 4, 7, 8])
metadata = st.sampled_from(
    [Literal(text) for text in ("null", "[]", "{}", '{"a":1}', '{"a":null}', '{"a":"b","a":"c"}', '{"a":{"b":"c"}}', '"x"')]
    + [(("format", "pt"),), (("format", Literal('"\\udfff"')),), (("größe", "{[é"),)]
)  # fmt: skip
spaces = st.sampled_from(["", "", "", " ", "\n\t\r ", "\v", "\ufeff", "\u00a0", "\x00", "x", ",", "{}"])


@st.composite
def structured(draw: st.DrawFn) -> bytes:
    """A file whose header is right but for a few oddities, each as likely as not to be there."""
    odd = draw(st.integers(0, 3))

    def strange(chance: int = 8) -> bool:
        return odd > 0 and draw(st.integers(0, chance)) == 0

    entries: list[tuple[Any, Any]] = []
    end = 0
    for number in range(draw(st.integers(0, 4))):
        dtype = draw(dtypes) if strange() else draw(st.sampled_from(["F32", "BF16", "U8", "F4", "I64"]))
        shape: list[Any] = draw(st.lists(dims, max_size=3))
        size = DTYPES[dtype].bits if dtype in DTYPES else 8
        for dim in shape:
            size *= dim
        start, end = end, end + size // 8
        offsets: list[Any] = [start, end]
        if strange():
            offsets[draw(st.integers(0, 1))] = draw(odd_numbers | st.integers(0, 40))
        if strange(20):
            offsets = draw(st.sampled_from([[], [start], [start, end, end], [end, start], Literal("null"), Literal('"0,4"')]))
        if shape and strange():
            shape[draw(st.integers(0, len(shape) - 1))] = draw(odd_numbers)
        fields: list[tuple[Any, Any]] = [("dtype", dtype), ("shape", shape), ("data_offsets", offsets)]
        if strange():
            kind = draw(st.integers(0, 4))
            if kind == 0:
                del fields[draw(st.integers(0, 2))]
            elif kind == 1:
                fields.append(draw(st.sampled_from([("extra", 1), fields[0], fields[1], ("extra", "y" * 5000)])))
            elif kind == 2:
                fields[0] = (Literal('"\\u0064type"'), dtype)
            else:
                fields = draw(st.permutations(fields))
        entry: Any = tuple(fields)
        if strange(15):
            entry = draw(st.sampled_from([[value for _, value in fields], Literal("null"), Literal("[" * 3000), [entry], ()]))
        name = draw(names) if strange(4) else f"layers.{number}"
        entries.append((name, entry))
        if strange(15):
            entries.append((name, entry))
    if draw(st.booleans()):
        entries.insert(draw(st.integers(0, len(entries))), ("__metadata__", draw(metadata) if strange(2) else (("format", "pt"),)))
    entries = draw(st.permutations(entries)) if draw(st.booleans()) else entries
    before, after = (draw(spaces) if strange(3) else "" for _ in range(2))
    raw = (before + dump(tuple(entries)) + after).encode()
    if strange():
        place = draw(st.integers(0, len(raw)))
        raw = (
            raw[:place]
            + draw(st.sampled_from([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"}", b" ", b'"', b"\\"]))
            + raw[place:]
        )
    data_bytes = end + (draw(st.integers(-3, 3)) if strange() else 0)
    length = draw(st.sampled_from([0, 1, 7, len(raw) - 1, len(raw) + 1, 10**8 + 1, 2**63, 2**64 - 1])) if strange() else len(raw)
    return struct.pack("<Q", max(length, 0)) + raw + b"\1" * max(min(data_bytes, 1 << 16), 0)


@fuzz
@given(data=structured())
def run_structured(path: Path, tally: Counter[str], data: bytes) -> None:
    compare(path, data, tally)


def test_structured_headers(tmp_path: Path, tally: Counter[str]) -> None:
    run_structured(tmp_path / "case.safetensors", tally)
    assert tally["pmerge is stricter"] > 0


Mutation = Callable[[bytearray, random.Random], bytearray]


def flip(text: bytearray, rng: random.Random) -> bytearray:
    text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    return text


def cut(text: bytearray, rng: random.Random) -> bytearray:
    return text[: rng.randrange(len(text))]


def delete(text: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(text))
    del text[start : start + rng.choice([1, 1, 2, 5, 40])]
    return text


def insert(text: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(text) + 1)
    text[start:start] = rng.choice(
        [b" ", b"0", b"9", b",", b'"', b"[", b"}", b"\\u0061", b"\xff", b"-", b"e1", b".0", rng.randbytes(3)]
    )
    return text


def repeat(text: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(text))
    piece = text[start : start + rng.choice([1, 3, 20, 90])]
    to = rng.randrange(len(text) + 1)
    text[to:to] = piece
    return text


def swap(text: bytearray, rng: random.Random) -> bytearray:
    """Exchange two tokens of one kind: two numbers, two strings or two entries."""
    kind = rng.choice([rb"\d+", rb'"[^"]*"', rb'"[^"]*":\{[^{}]*\}', rb"\[[^\[\]]*\]"])
    found = [match.span() for match in re.finditer(kind, text)]
    if len(found) < 2:
        return text
    (a, b), (c, d) = sorted(rng.sample(found, 2))
    return text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]


def renumber(text: bytearray, rng: random.Random) -> bytearray:
    """Replace a number by another."""
    found = [match.span() for match in re.finditer(rb"\d+", text)]
    if not found:
        return text
    a, b = rng.choice(found)
    other = rng.choice([0, 1, int(text[a:b]) + 1, int(text[a:b]) * 2, 2**32, 2**63, 2**64])
    return text[:a] + str(other).encode() + text[b:]


MUTATIONS: list[Mutation] = [flip, cut, delete, insert, repeat, swap, swap, renumber]


def mutate(data: bytes, seed: int) -> bytes:
    """A real file with one to three changes; usually to the header alone, with its length mended,
    so that they get parsed.
    """
    rng = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    prefix, header, body = data[:8], bytearray(data[8 : 8 + length]), bytearray(data[8 + length :])
    place = rng.choice(["header", "header", "header", "header and padding", "file"])
    whole = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        mutation = rng.choice(MUTATIONS)
        if place == "file":
            whole = mutation(whole, rng) or bytearray(b"\0")
        else:
            header = mutation(header, rng) or bytearray(b"\0")
    if place == "file":
        return bytes(whole)
    if place == "header and padding":
        header += b" " * rng.choice([1, 7, 64])
    prefix = struct.pack("<Q", len(header)) if rng.random() < 0.95 else prefix
    return prefix + bytes(header) + bytes(body)


@pytest.fixture(scope="module")
def real_files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("real")
    small = {name: tensor for name, tensor in nasty_tensors().items() if tensor.numel() < 300}
    write_safetensors(folder / "nasty", small)
    write_safetensors(folder / "one", {"w": torch.ones(2, 3)}, metadata=None, multiple=1)
    write_safetensors(folder / "empties", {"a": torch.empty(0), "b": torch.empty(0, 5), "c": torch.tensor(1.0)}, before=" \n")
    write_safetensors(folder / "pairs", {f"layer.{i}": torch.zeros(2, 2, dtype=torch.bfloat16) for i in range(3)})
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@fuzz
@given(which=st.integers(0, 3), seed=st.integers(0, 2**62))
def run_mutated(path: Path, tally: Counter[str], real_files: list[bytes], which: int, seed: int) -> None:
    compare(path, mutate(real_files[which], seed), tally)


def test_mutated_files(tmp_path: Path, tally: Counter[str], real_files: list[bytes]) -> None:
    for number, data in enumerate(real_files):
        compare(tmp_path / f"{number}.safetensors", data, tally)
    assert tally == {"both accept": 4}
    run_mutated(tmp_path / "case.safetensors", tally, real_files)


INDEX = {"metadata": {"total_size": 12}, "weight_map": {"a": "x.safetensors", "größe": "y.safetensors", "b.c": "x.safetensors"}}


@fuzz
@given(ascii_only=st.booleans(), seed=st.integers(0, 2**62))
def run_index(path: Path, tally: Counter[str], ascii_only: bool, seed: int) -> None:
    rng = random.Random(seed)
    text = bytearray(json.dumps(INDEX, ensure_ascii=ascii_only, indent=rng.choice([None, 2])).encode())
    for _ in range(rng.choice([1, 1, 2, 3])):
        text = rng.choice(MUTATIONS)(text, rng) or bytearray(b"\0")
    path.write_bytes(text)
    try:
        weight_map, metadata = read_index(str(path))
    except InputError as error:
        assert str(path) in error.message and len(str(error)) < 2000
        tally["both refuse"] += 1
        return
    expected = json.loads(text)
    assert weight_map == expected["weight_map"] and metadata == (expected.get("metadata") or {})
    tally["both accept"] += 1


def test_mutated_indexes(tmp_path: Path, tally: Counter[str]) -> None:
    """What pmerge reads from an index is what the standard library reads."""
    run_index(tmp_path / "case.safetensors.index.json", tally)
