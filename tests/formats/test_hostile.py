"""Checkpoints that are broken or meant to do harm: one clear error that names the file and the
field, exit code 2, nothing written.

The rows "corrupted shard", "index attacks" and "semantic" of a fault list, in order. What could
take much memory or never end runs in a process of its own, whose peak memory is measured.
"""

import ast
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import INDEX, write_checkpoint, write_safetensors

import merge_cli
from merge_cli import average, plan_average
from merge_cli.cli.console import printable
from merge_cli.errors import InputError, PmergeError
from merge_cli.formats.opening import open_checkpoint

PMERGE = str(Path(sys.executable).with_name("pmerge"))
W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HALF, THIRD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GIGABYTE_KIB = 1 << 20


def tensors(fill: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 3), fill), "b.weight": torch.full((5,), fill).bfloat16(), "count": torch.tensor(3)}


def refused(paths: list[Path], out: Path, **options: Any) -> InputError:
    """The error with which planning refuses `paths`; nothing may have been written."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        plan_average(paths, out, **options)
    assert sorted(out.parent.rglob("*")) == before
    assert caught.value.exit_code == 2 and len(str(caught.value)) < 4000
    return caught.value


MEASURE = """
import os, resource, sys
pid = os.fork()  # a process keeps the peak of the one that it was forked from, so this small one stands in between
if pid == 0:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    os.execv(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(*arguments: object, cwd: Path) -> tuple[int, str, int]:
    """Run pmerge: its exit code, its stderr and its peak memory in KiB. It is stopped at 4 GiB of
    address space or 60 s of CPU.
    """
    command = [sys.executable, "-c", MEASURE, PMERGE, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr, int(done.stdout.split()[-1])


def shard(header: bytes | str | dict[str, Any], data: int = 8, length: int | None = None) -> bytes:
    """The bytes of a file with this header, `data` bytes of data, and a prefix that claims `length`
    bytes of header.
    """
    raw = json.dumps(header).encode() if isinstance(header, dict) else header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def entry(**changes: Any) -> bytes:
    return shard({"w": W | changes})


def literal(field: str, text: str) -> bytes:
    """A header in which `field` of the tensor `w` is `text` as it stands."""
    fields = {key: json.dumps(value) for key, value in W.items()} | {field: text}
    return shard('{"w":{' + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}}")


BROKEN_SHARDS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "not a complete safetensors file"),
    "header length 0": (struct.pack("<Q", 0) + bytes(8), "not a complete"),
    "header length 7 of a longer one": (shard({"w": W}, length=7), "tensor `w`"),
    "header length 2^63": (shard({"w": W}, length=2**63), "header has 9223372036854775808 bytes"),
    "header length 2^64 - 1": (shard({"w": W}, length=2**64 - 1), "not a complete"),
    "header longer than the file": (shard({"w": W}, length=10_000), "not a complete"),
    "file cut in the header": (shard({"w": W})[:40], "not a complete"),
    "file cut in the data": (shard({"w": W})[:-1], "does not fit its header"),
    "trailing bytes": (shard({"w": W}, data=9), "does not fit its header"),
    "a zip archive": (b"PK\3\4" + bytes(200), "not a complete"),
    "a pickle": (pickle.dumps({"w": [1.0] * 100}), "not a complete"),
    "not UTF-8": (shard(b'{"\xff":{}}'), "utf-8"),
    "surrogate in UTF-8": (shard(b'{"\xed\xa0\x80":{}}'), "utf-8"),
    "lone surrogate escape": (shard('{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "surrogates"),
    "byte order mark": (shard("\ufeff" + json.dumps({"w": W})), "not valid JSON"),
    "UTF-16": (shard(json.dumps({"w": W}).encode("utf-16")), "utf-8"),
    "a list": (shard("[1,2]"), "expected an object"),
    "no JSON": (shard("hello"), "expected an object"),
    "not closed": (shard('{"w":'), "tensor `w`"),
    "text after the object": (shard(json.dumps({"w": W}) + "{}"), "more text after the end"),
    "nested lists": (shard('{"w":' + "[" * 100_000), "tensor `w`"),
    "nested lists in a shape": (literal("shape", "[" * 3000 + "]" * 3000), "tensor `w`"),
    "duplicate name, same offsets": (shard('{"w":%s,"w":%s}' % ((json.dumps(W),) * 2)), "'w' occurs twice"),
    "duplicate field": (literal("shape", '[2],"shape":[2]'), "'shape' occurs twice"),
    "duplicate metadata": (shard('{"__metadata__":{},"__metadata__":{}}', data=0), "'__metadata__' occurs twice"),
    "overlap": (shard({"w": W, "v": W | {"data_offsets": [4, 12]}}, data=12), "tensor `v` begins at byte 4"),
    "same place twice": (shard({"w": W, "v": W}), "begins at byte 0 of the data, not at 8"),
    "hole": (shard({"w": W, "v": W | {"data_offsets": [12, 20]}}, data=20), "tensor `v` begins at byte 12"),
    "hole before the first": (entry(data_offsets=[4, 12]) + bytes(4), "begins at byte 4"),
    "offsets descend": (entry(data_offsets=[8, 0]), "data_offsets"),
    "offsets past the file": (entry(shape=[20], data_offsets=[0, 80]), "does not fit its header"),
    "offsets do not fit the shape": (entry(shape=[3]), "data_offsets span 8"),
    "offsets past 2^64": (entry(data_offsets=[2**64, 2**64 + 8]), "data_offsets"),
    "negative offsets": (entry(data_offsets=[-8, 0]), "-8 is negative"),
    "offsets as strings": (entry(data_offsets=["0", "8"]), "data_offsets"),
    "offsets as floats": (entry(data_offsets=[0.0, 8.0]), "data_offsets"),
    "three offsets": (entry(data_offsets=[0, 8, 8]), "data_offsets"),
    "shape overflows": (entry(shape=[2**40, 2**40]), "larger than any file"),
    "shape overflows to the right size": (entry(shape=[2**63, 2**62, 2]), "larger than any file"),
    "dimension past 2^64": (entry(shape=[2**64]), "shape: every dimension"),
    "dimension of 5000 digits": (literal("shape", "[" + "9" * 4000 + "]"), "tensor `w`"),
    "negative dimension": (entry(shape=[-2]), "-2 is negative"),
    "minus zero": (literal("shape", "[-0]"), "negative"),
    "dimension true": (entry(shape=[2, True]), "not True"),
    "dimension as a float": (entry(shape=[2.0]), "not 2.0"),
    "dimension 2e0": (literal("shape", "[2e0]"), "not 2.0"),
    "dimension as a string": (entry(shape=["2"]), "not '2'"),
    "dimension null": (entry(shape=[None]), "not None"),
    "dimension NaN": (literal("shape", "[NaN]"), "NaN is not"),
    "dimension Infinity": (literal("shape", "[Infinity]"), "Infinity is not"),
    "shape is no list": (entry(shape=2), "shape must be a list"),
    "half a byte": (entry(dtype="F4", shape=[15], data_offsets=[0, 8]), "takes 7.5 bytes"),
    "unknown dtype": (entry(dtype="F3"), "unknown dtype 'F3'"),
    "dtype is no string": (entry(dtype=["F32"]), "unknown dtype"),
    "field missing": (shard({"w": {"dtype": "F32", "shape": [2]}}), "tensor `w`: expected an object with exactly"),
    "field too many": (entry(strides=[1]), "tensor `w`: expected an object with exactly"),
    "entry is a list": (shard('{"w":["F32",[2],[0,8]]}'), "tensor `w`: expected an object"),
    "metadata is a list": (shard('{"__metadata__":[]}', data=0), "__metadata__ must be an object"),
    "metadata null": (shard('{"__metadata__":null}', data=0), "__metadata__ must be an object"),
    "metadata of numbers": (shard('{"__metadata__":{"a":1}}', data=0), "__metadata__ must map strings to strings; 'a'"),
    "metadata nested": (shard('{"__metadata__":{"a":{"b":' + "[" * 100_000, data=0), "__metadata__ must map strings"),
    "metadata with a lone surrogate": (shard('{"__metadata__":{"a":"\\udfff"}}', data=0), "surrogates"),
    "a name of 1 MB": (shard({"w" * 1_000_000: W | {"shape": [3]}}), "data_offsets span 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_a_corrupted_shard_is_named(tmp_path: Path, case: str) -> None:
    data, text = BROKEN_SHARDS[case]
    good = write_checkpoint(tmp_path / "ckpt_1", tensors(), shards=2)
    bad = write_checkpoint(tmp_path / "ckpt_2", tensors(), shards=2)
    (bad / THIRD).write_bytes(data)
    error = refused([good, bad], tmp_path / "out")
    assert text in str(error) and str(bad / THIRD) in error.message


@pytest.mark.parametrize("name", ["größe.重み", "../../etc/passwd", "/etc/passwd", "a\0b", "x" * 2000, "\x1b[2J", "\u202eabc", ""])
def test_odd_tensor_names_are_only_names(tmp_path: Path, name: str) -> None:
    run = [write_checkpoint(tmp_path / f"ckpt_{i}", {name: torch.full((3,), float(i))}, index=False) for i in (1, 2)]
    average(run, tmp_path / "out")
    assert {key: stored.info.shape for key, stored in open_checkpoint(tmp_path / "out").tensors.items()} == {name: (3,)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_1", "ckpt_2", "out"]


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return index


def with_map(folder: Path, **entries: Any) -> None:
    index = index_of(folder)
    index["weight_map"].update(entries)
    (folder / INDEX).write_text(json.dumps(index))


def put(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


def claim(file: Any) -> Callable[[Path], None]:
    return lambda folder: with_map(folder, **{"a.weight": file})


def replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Put something else in the place of the file `name`."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def outside(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.write_bytes(b"secret")
    path.symlink_to(elsewhere)


def case_clash(folder: Path) -> None:
    (folder / HALF.upper().replace(".SAFETENSORS", ".safetensors")).write_bytes((folder / HALF).read_bytes())
    with_map(folder, **{"b.weight": HALF.upper().replace(".SAFETENSORS", ".safetensors")})


INDEX_ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "path traversal": (claim("../../etc/x.safetensors"), "weight_map['a.weight'] is '../../etc/x.safetensors'"),
    "hidden traversal": (claim("sub/../../x.safetensors"), "weight_map['a.weight']"),
    "absolute path": (claim("/etc/x.safetensors"), "weight_map['a.weight']"),
    "current folder": (claim("./" + HALF), "weight_map['a.weight']"),
    "backslashes": (claim("..\\x.safetensors"), "weight_map['a.weight']"),
    "NUL": (claim("x\0.safetensors"), "weight_map['a.weight']"),
    "a pickle": (claim("pytorch_model.bin"), "weight_map['a.weight'] is 'pytorch_model.bin'"),
    "another file of the checkpoint": (claim("config.json"), "weight_map['a.weight']"),
    "name of 1 MB": (claim("x" * 1_000_000 + ".safetensors"), "weight_map['a.weight']"),
    "part of 300 characters": (claim("x" * 300 + ".safetensors"), "missing"),
    "an empty name": (claim(""), "weight_map['a.weight']"),
    "file as a number": (claim(1), "weight_map['a.weight'] is 1"),
    "file as a list": (claim([HALF]), "weight_map['a.weight']"),
    "file null": (claim(None), "weight_map['a.weight'] is null"),
    "missing file": (claim("model-9.safetensors"), "1 of 2 weight files are missing"),
    "missing folder": (claim("sub/model.safetensors"), "1 of 2 weight files are missing"),
    "case clash": (case_clash, "are one file where case does not count"),
    "tensor that its shard has not": (lambda folder: with_map(folder, ghost=HALF), "`ghost` in " + HALF),
    "tensor claimed by the other shard": (claim(THIRD), f"`a.weight` in {THIRD}"),
    "empty map": (put('{"weight_map":{}}'), "`weight_map` must be"),
    "no map": (put('{"metadata":{}}'), "`weight_map` must be"),
    "map is a list": (put('{"weight_map":["a"]}'), "`weight_map` must be"),
    "metadata of 2 MB": (put('{"metadata":"' + "x" * 2_000_000 + '","weight_map":{"a":"b"}}'), "longer than 1048576"),
    "metadata is a list": (put('{"metadata":[1],"weight_map":{"a":"b.safetensors"}}'), "`metadata` must be"),
    "metadata is a number": (put('{"metadata":1,"weight_map":{"a":"b.safetensors"}}'), "`metadata` must be"),
    "a list": (put("[]"), "expected an object"),
    "duplicate tensor": (put('{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'), "'a' of `weight_map` occurs twice"),
    "duplicate map": (put('{"weight_map":{},"weight_map":{}}'), "'weight_map' occurs twice"),
    "nested": (put('{"weight_map":' + "[" * 200_000), "nested too deeply"),
    "nested by 200": (put('{"metadata":{"a":' + "[" * 200 + "]" * 200 + '},"weight_map":{"a":"b"}}'), "nested too deeply"),
    "negative number": (put('{"metadata":{"total_size":-1},"weight_map":{"a":"b.safetensors"}}'), "-1 is negative"),
    "NaN": (put('{"metadata":{"total_size":NaN},"weight_map":{"a":"b.safetensors"}}'), "NaN is not"),
    "5000 digits": (put('{"metadata":{"total_size":' + "9" * 5000 + "}}"), "not valid JSON"),
    "not UTF-8": (lambda folder: (folder / INDEX).write_bytes(b'{"\xff":1}'), "utf-8"),
    "lone surrogate": (put('{"weight_map":{"\\ud800":"b.safetensors"}}'), "surrogates"),
    "byte order mark": (put("\ufeff{}"), "not valid JSON"),
    "empty": (lambda folder: (folder / INDEX).write_bytes(b""), "not valid JSON"),
    "sparse index of 1 TB": (lambda folder: os.truncate(folder / INDEX, 1 << 40), "too large"),
    "index is a pipe": (replace(INDEX, os.mkfifo), "not a regular file"),
    "index is a folder": (replace(INDEX, Path.mkdir), "not a regular file"),
    "index links out": (replace(INDEX, outside), "leads outside the checkpoint"),
    "index links to nothing": (replace(INDEX, lambda path: path.symlink_to("nothing")), "is not there"),
    "shard is a pipe": (replace(HALF, os.mkfifo), "not a regular file"),
    "shard is a folder": (replace(HALF, Path.mkdir), "not a regular file"),
    "shard is a device": (replace(HALF, lambda path: path.symlink_to("/dev/zero")), "leads outside the checkpoint"),
    "shard links out": (replace(HALF, outside), "leads outside the checkpoint"),
    "shard links to itself": (replace(HALF, lambda path: path.symlink_to(path.name)), HALF),
    "config links out": (replace("config.json", outside), "leads outside the checkpoint"),
    "config is a pipe": (replace("config.json", os.mkfifo), "not a regular file"),
    "config is a folder": (replace("config.json", Path.mkdir), "not a regular file"),
    "config is nested": (lambda folder: (folder / "config.json").write_text('{"a":' + "[" * 100_000), "config.json"),
    "config is nested by 200": (lambda folder: (folder / "config.json").write_text('{"a":' * 200 + "1" + "}" * 200), "too deeply"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "must be a JSON object"),
    "config is cut": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "sparse config of 1 TB": (lambda folder: os.truncate(folder / "config.json", 1 << 40), "too large"),
}  # fmt: skip
SIDE_FILE_ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tokenizer links out": (replace("tokenizer.json", outside), "leads outside the checkpoint"),
    "tokenizer links to nothing": (replace("tokenizer.json", lambda path: path.symlink_to("nothing")), "is not there"),
    "tokenizer links to itself": (replace("tokenizer.json", lambda path: path.symlink_to("tokenizer.json")), "tokenizer.json"),
    "folder of templates links out": (lambda folder: (folder / "chat_templates").symlink_to("/etc"), "leads outside"),
}  # fmt: skip


@pytest.mark.parametrize("case", SIDE_FILE_ATTACKS)
def test_a_link_is_refused_where_it_would_be_copied_and_stops_nothing_elsewhere(tmp_path: Path, case: str) -> None:
    attack, text = SIDE_FILE_ATTACKS[case]
    run = [write_checkpoint(tmp_path / f"ckpt_{i}", tensors(), shards=2) for i in (1, 2)]
    attack(run[0])
    out = average(run, tmp_path / "out").output
    assert not any(path.is_symlink() for path in out.rglob("*")) and not (out / "chat_templates").exists()
    attack(run[1])
    error = refused(run, tmp_path / "out2")
    assert text in str(error) and str(run[1]) in error.message


@pytest.mark.parametrize("newest", [True, False], ids=["base", "other"])
@pytest.mark.parametrize("case", INDEX_ATTACKS)
def test_an_index_attack_is_named(tmp_path: Path, case: str, newest: bool) -> None:
    attack, text = INDEX_ATTACKS[case]
    run = [write_checkpoint(tmp_path / f"ckpt_{i}", tensors(), shards=2) for i in (1, 2)]
    attack(run[newest])
    error = refused(run, tmp_path / "out")
    assert text in str(error) and str(run[newest]) in error.message


def test_files_without_an_index_must_be_files_of_the_checkpoint(tmp_path: Path) -> None:
    for attack in (os.mkfifo, Path.mkdir, outside, lambda path: path.symlink_to("nothing")):
        folder = write_checkpoint(tmp_path / "ckpt" / f"{len(list(tmp_path.rglob('*')))}", tensors(), index=False)
        attack(folder / "more.safetensors")
        assert "more.safetensors" in refused([folder], tmp_path / "out").message


def test_a_pipe_beside_the_weights_is_left_out(tmp_path: Path) -> None:
    run = [write_checkpoint(tmp_path / f"ckpt_{i}", tensors(), index=False) for i in (1, 2)]
    for folder in run:
        (folder / "tokenizer.json").unlink()
        os.mkfifo(folder / "tokenizer.json")
    assert "tokenizer.json" in plan_average(run, tmp_path / "out").merge.inputs[0].side_files.skipped


@pytest.mark.parametrize("other_disk", [False, True])
@pytest.mark.parametrize("subfolder", ["", "checkpoint-10"])
def test_links_of_a_hub_cache_are_followed(subfolder: str, other_disk: bool, tmp_path: Path) -> None:
    real = write_checkpoint(tmp_path / "real", tensors(2.0), shards=2)
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123abc" / subfolder
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(real.iterdir())):
        path.rename(cache / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../{'../' * (subfolder != '')}blobs/{number:040x}")
    if other_disk:
        (cache / "blobs").rename(tmp_path / "disk")
        (cache / "blobs").symlink_to(tmp_path / "disk")
    average([snapshot], tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("x")
    assert "leads outside" in refused([snapshot], tmp_path / "out2").message


def huge_header(piece: bytes, size: int, begin: bytes = b"{", end: bytes = b"}") -> bytes:
    return shard(begin + piece * ((size - 100) // len(piece)) + end, data=0)


def overlapping(count: int) -> bytes:
    header = {f"layers.{i}.weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for i in range(count)}
    return shard(header, data=1)


HUNGRY: dict[str, Callable[[], bytes]] = {
    "claims 2^63 bytes": lambda: struct.pack("<Q", 2**63) + bytes(100),
    "50 MB of [[[[": lambda: huge_header(b"[", 50_000_000, b'{"w":'),
    "50 MB of nested objects": lambda: huge_header(b'{"a":', 50_000_000, b""),
    "100 MB of [],": lambda: huge_header(b"[],", 100_000_000, b'{"w":['),
    "100 MB of [], in metadata": lambda: huge_header(b"[],", 100_000_000, b'{"__metadata__":{"a":['),
    "100 MB of one shape": lambda: huge_header(b"1,", 100_000_000, b'{"w":{"dtype":"U8","data_offsets":[0,1],"shape":['),
    "100 MB of one name": lambda: huge_header(b"x", 100_000_000, b'{"'),
    "100 MB of spaces": lambda: huge_header(b" ", 100_000_000, b"{", b""),
    "100 MB of wide characters": lambda: huge_header(b"x", 100_000_000, '{"😀'.encode()),
    "100 MB of one duplicate": lambda: huge_header(b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', 100_000_000),
    "100,000 overlapping tensors": lambda: overlapping(100_000),
}  # fmt: skip


@pytest.mark.parametrize("case", HUNGRY)
def test_a_hungry_header_takes_little_memory(tmp_path: Path, case: str) -> None:
    folder = write_checkpoint(tmp_path / "ckpt_1", tensors(), index=False)
    (folder / "model.safetensors").write_bytes(HUNGRY[case]())
    code, stderr, peak_kib = measured("average", folder, "-o", tmp_path / "out", cwd=tmp_path)
    (folder / "model.safetensors").unlink()
    assert code == 2 and "model.safetensors" in stderr and len(stderr) < 2000, stderr[:2000]
    print(f"{case}: peak {peak_kib >> 10} MiB")
    assert peak_kib < GIGABYTE_KIB, f"{peak_kib} KiB"
    assert not (tmp_path / "out").exists()


def many(entry: bytes, count: int) -> bytes:
    """An index with `count` entries, `entry` formatted with their number."""
    return b'{"weight_map":{' + b",".join(entry.replace(b"#", b"%d" % i) for i in range(count)) + b"}}"


HUNGRY_INDEXES: dict[str, Callable[[], bytes]] = {
    "100 MB of [],": lambda: b'{"weight_map":[' + b"[]," * 33_000_000,
    "100 MB of [], in metadata": lambda: b'{"metadata":[' + b"[]," * 33_000_000,
    "50 MB of [[[[": lambda: b'{"weight_map":' + b"[" * 50_000_000,
    "more than 100 MB": lambda: b'{"weight_map":{' + b" " * 100_000_000,
    "a million files": lambda: many(b'"#":"#.safetensors"', 1_000_000),
    "3 million tensors": lambda: many(b'"layer.#":"a.safetensors"', 3_000_000),
}


LARGEST = pytest.mark.slow(reason="it takes eight seconds; that of a million files is the fast test of the same bound")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=LARGEST if case == "3 million tensors" else ()) for case in HUNGRY_INDEXES]
)
def test_a_hungry_index_takes_bounded_memory(tmp_path: Path, case: str) -> None:
    folder = write_checkpoint(tmp_path / "ckpt_1", tensors(), shards=2)
    (folder / INDEX).write_bytes(HUNGRY_INDEXES[case]())
    code, stderr, peak_kib = measured("average", folder, "-o", tmp_path / "out", cwd=tmp_path)
    (folder / INDEX).unlink()
    assert code == 2 and "ckpt_1" in stderr and len(stderr) < 4000, stderr[:2000]
    print(f"{case}: peak {peak_kib >> 10} MiB")
    assert peak_kib < GIGABYTE_KIB, f"{peak_kib} KiB"
    assert not (tmp_path / "out").exists()


def test_no_pickle_is_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    run = [write_checkpoint(tmp_path / f"ckpt_{i}", tensors(), index=False) for i in (1, 2)]
    for folder in run:
        for name in ("optimizer.pt", "pytorch_model.bin", "training_args.bin", "model.pkl", "rng_state.pth", ".metadata"):
            (folder / name).write_bytes(pickle.dumps(Bomb()))
    average(run, tmp_path / "out")
    assert not (tmp_path / "exploded").exists()
    pickle.loads((run[0] / "optimizer.pt").read_bytes())
    assert (tmp_path / "exploded").exists(), "the bomb is none, so this test would show nothing"


def test_no_code_can_load_a_pickle() -> None:
    for path in Path(merge_cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not {"pickle", "shelve", "marshal", "dill", "joblib"} & {m.split(".")[0] for m in modules}, path
            if isinstance(node, ast.Attribute) and node.attr == "load":
                assert ast.unparse(node) == "json.load", f"{path}: {ast.unparse(node)}"


HOSTILE_NAME = "w\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202e"


def test_control_characters_are_never_printed_raw(tmp_path: Path) -> None:
    for step, size in ((1, 3), (2, 4)):
        folder = write_checkpoint(tmp_path / f"ckpt_{step}", {HOSTILE_NAME: torch.ones(size)}, index=False)
        (folder / "tokenizer\x1b[2J.json").write_text(str(step))
        (folder / "optimizer\x1b[2J").write_text(str(step))
    commands = [
        ["average", "ckpt_1", "ckpt_2", "-o", "out"],
        ["average", "ckpt_2", "-o", "out\x1b[2J"],
        ["average", "ckpt_2", "-o", "out2", "--json"],
        ["average", "ckpt_2", "--exclude", "w*", "--dry-run"],
        ["average", "ckpt_2", "--exclude", "\x1b[2J*", "--dry-run"],
        ["inspect", "ckpt_1", "ckpt_2"],
        ["inspect", "ckpt_1", "ckpt_2", "--json"],
        ["inspect", "none\x1b[2J"],
    ]
    for command in commands:
        done = subprocess.run([PMERGE, *command], cwd=tmp_path, capture_output=True, timeout=120)
        text = (done.stdout + done.stderr).decode("utf-8")
        raw = {char for char in text if not char.isprintable()} - {"\n"}
        assert text and not raw, (command, raw)
    assert "\\x1b[2J" in text


def test_progress_on_a_terminal_shows_no_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt\x1b]0;owned_1", {"evil\x1b]0;": torch.ones(5)}, index=False)
    script = f"{PMERGE} average ckpt*_1 -o out"
    done = subprocess.run(["script", "-qec", script, "/dev/null"], cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert b"\x1b]0;" not in done.stdout and b"owned" in done.stdout


def test_printable_keeps_what_can_be_read() -> None:
    assert printable("größe.重み 😀") == "größe.重み 😀"
    assert printable("\x1b\x9b\x7f\u202e\u2028\udc80") == "\\x1b\\x9b\\x7f\\u202e\\u2028\\udc80"


def change_newest(**changes: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The newest checkpoint with tensors replaced, added, or (None) removed."""

    def change(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in (own | changes).items() if tensor is not None}

    return change


EXPERT = "layers.0.mlp.experts.7.up_proj.weight"
SEMANTIC: dict[str, tuple[Any, str]] = {
    "missing expert": (change_newest(**{EXPERT: None}), EXPERT),
    "tied lm_head in only one": (change_newest(**{"lm_head.weight": torch.ones(2)}), "lm_head.weight"),
    "other shape": (change_newest(**{EXPERT: torch.ones(3)}), "disagree on the shape of `" + EXPERT),
    "float against integer": (change_newest(**{EXPERT: torch.ones(2, dtype=torch.int32)}), EXPERT),
    "quantized against unquantized": (change_newest(**{EXPERT: torch.ones(2).to(torch.float8_e4m3fn)}), EXPERT),
}


@pytest.mark.parametrize("case", SEMANTIC)
def test_checkpoints_that_do_not_fit_together_are_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    change, text = SEMANTIC[case]
    own = {EXPERT: torch.ones(2), "norm.weight": torch.ones(3)}
    run = [write_checkpoint(tmp_path / "ckpt_1", own, index=False), write_checkpoint(tmp_path / "ckpt_2", change(own), index=False)]
    assert text in str(refused(run, tmp_path / "out"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_name_tensor_and_checkpoint(tmp_path: Path, bad: float) -> None:
    run = [write_checkpoint(tmp_path / f"ckpt_{i}", {EXPERT: torch.tensor([1.0, v])}, index=False) for i, v in ((1, bad), (2, 1.0))]
    with pytest.raises(PmergeError) as caught:
        average(run, tmp_path / "out")
    assert EXPERT in str(caught.value) and str(run[0] / "model.safetensors") in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [[torch.nan, 1.0], [torch.inf, 1.0], [0.5, 0.6], [1.0], []])
def test_weights_that_are_none(tmp_path: Path, weights: list[float]) -> None:
    run = [write_checkpoint(tmp_path / f"ckpt_{i}", tensors(), index=False) for i in (1, 2)]
    with pytest.raises(PmergeError) as caught:
        plan_average(run, tmp_path / "out", method="weights", weights=weights)
    assert caught.value.exit_code == 2


def test_dtypes_that_differ_are_reported(tmp_path: Path) -> None:
    run = [write_checkpoint(tmp_path / f"ckpt_{i}", {EXPERT: torch.ones(2, dtype=dtype)}, index=False)
           for i, dtype in enumerate((torch.float32, torch.bfloat16))]  # fmt: skip
    assert any(EXPERT in note for note in plan_average(run, tmp_path / "out").merge.warnings)


def test_a_shard_that_shrinks_or_is_replaced_before_it_is_read_stops_the_run(tmp_path: Path) -> None:
    from merge_cli import run_average

    attacks: list[Callable[[Path], Any]] = [
        lambda path: os.truncate(path, 100),
        lambda path: write_safetensors(path, tensors(7.0)),
        replace("model.safetensors", os.mkfifo),
    ]
    for number, attack in enumerate(attacks):
        run = [write_checkpoint(tmp_path / f"run{number}" / f"ckpt_{i}", tensors(), index=False) for i in (1, 2)]
        plan = plan_average(run, tmp_path / "out")
        attack(run[0] if number == 2 else run[0] / "model.safetensors")
        with pytest.raises(PmergeError) as caught:
            run_average(plan)
        assert str(run[0]) in str(caught.value) and not (tmp_path / "out").exists()


# --- all together


def test_the_headers_of_all_checkpoints_together_are_bounded(tmp_path: Path) -> None:
    """One that several checkpoints have is kept once, and counts an eighth from the second on."""
    run = [write_checkpoint(tmp_path / f"ckpt_{i}", tensors(), index=False) for i in (1, 2, 3)]
    length = int.from_bytes((run[0] / "model.safetensors").read_bytes()[:8], "little")
    error = refused(run, tmp_path / "out", max_header=length + 2 * (length // 8) - 1)
    assert "the headers of all checkpoints together are larger than" in error.message and str(run[2]) in error.message
    assert "--max-header" in error.hint
    plan_average(run, tmp_path / "out", max_header=length + 2 * (length // 8))
    for step in (1, 2, 3):
        metadata = {"format": "pt", "step": str(step)}
        write_safetensors(run[step - 1] / "model.safetensors", tensors(), metadata=metadata)
    assert "--max-header" in refused(run, tmp_path / "out", max_header=2 * length).hint
    plan_average(run, tmp_path / "out", max_header=4 * length)
