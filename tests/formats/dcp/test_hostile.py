"""Torch distributed checkpoints that are broken or meant to do harm: one clear error that names the
file, at bounded cost.

The metadata is made with torch's own classes and pickled, so that each case is one change of a
checkpoint that loads.
"""

import io
import itertools
import os
import pickle
import re
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dcp_checkpoints import grid, payloads_of, save_dcp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from merge_cli.errors import InputError
from merge_cli.formats.dcp.folder import open_folder
from merge_cli.formats.dcp.item import parse_item
from merge_cli.formats.dcp.metadata import parse_metadata

CASES = int(os.environ.get("PMERGE_FUZZ_CASES", "1500")) // 5
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = {"w": torch.arange(24.0).view(6, 4), "b": torch.ones(5).bfloat16(), "nested": {"step": 7}, "last": torch.zeros(3)}
    return save_dcp(tmp_path_factory.mktemp("dcp") / "step-7", state, {"w": grid((6, 4), (2, 2))}, files=2)


def copied(plain: Path, to: Path) -> Path:
    to.mkdir()
    for file in plain.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def refusal(path: Path) -> str:
    """The error with which the folder, or the first of its items, is refused."""
    with pytest.raises(InputError) as caught:
        payloads_of(open_folder(path))
    assert str(path) in caught.value.message and len(str(caught.value)) < 1500
    return str(caught.value)


# ------------------------------------------------------------------------------------------------
# folders


def test_incomplete_folders_are_refused(plain: Path, tmp_path: Path) -> None:
    here = copied(plain, tmp_path / "a")
    (here / "__0_7.distcp").write_bytes(b"stale")
    assert "not named by .metadata" in open_folder(here).notes[0]
    raw = (here / "__0_1.distcp").read_bytes()
    (here / "__0_1.distcp").write_bytes(raw[:-1])
    assert "ends before" in refusal(here)
    (here / "__0_1.distcp").unlink()
    assert "1 of 2 files are missing" in refusal(here)
    (here / "__0_1.distcp").symlink_to(plain / "__0_1.distcp")
    assert "leads outside" in refusal(here)
    (here / "__0_1.distcp").unlink()
    (here / "__0_1.distcp").mkdir()
    assert "not a regular file" in refusal(here)
    (here / ".metadata").unlink()
    assert "has no .metadata" in refusal(here)
    (here / "__0.metadata").touch()
    assert "use_collectives=False" in refusal(here)


def test_metadata_that_is_too_large_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    os.truncate(tmp_path / ".metadata", (256 << 20) + 1)
    assert "too large" in refusal(tmp_path)
    (tmp_path / ".metadata").unlink()
    (tmp_path / ".metadata").mkdir()
    assert "not a regular file" in refusal(tmp_path)
    (tmp_path / ".metadata").rmdir()
    os.mkfifo(tmp_path / ".metadata")
    assert "not a regular file" in refusal(tmp_path)


# -----------------------------------------------------------------------------------------------
# metadata


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


class Twin:
    """A second key of the storage of `b`, which a dict of real keys could not hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return MetadataIndex, (), {"fqn": "b", "offset": torch.Size((0,))}


def index(metadata: Metadata, fqn: str) -> MetadataIndex:
    found: MetadataIndex = next(key for key in metadata.storage_data if key.fqn == fqn)
    return found


def tensor(metadata: Metadata, fqn: str) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata[fqn]
    assert isinstance(found, TensorStorageMetadata)
    return found


def stored(fqn: str, **changes: Any) -> Callable[[Metadata], None]:
    """Change the storage of an entry's first item."""

    def change(metadata: Metadata) -> None:
        info = metadata.storage_data[index(metadata, fqn)]
        for name, value in changes.items():
            setattr(info, name, value)

    return change


def box(number: int, offsets: Any, sizes: Any) -> Callable[[Metadata], None]:
    """Change a chunk of `w`, and its storage's key with it."""

    def change(metadata: Metadata) -> None:
        chunks = tensor(metadata, "w").chunks
        old = MetadataIndex("w", chunks[number].offsets)
        new = MetadataIndex("w", torch.Size((0,) * 2))
        object.__setattr__(new, "offset", offsets)
        metadata.storage_data = {new if key == old else key: info for key, info in metadata.storage_data.items()}
        chunks[number] = ChunkStorageMetadata(offsets, sizes)

    return change


def set_to(fqn: str, **changes: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in changes.items():
            setattr(tensor(metadata, fqn), name, value)

    return change


def renamed(metadata: Metadata) -> None:
    metadata.state_dict_metadata["x"] = metadata.state_dict_metadata.pop("w")


def cut_along_seven(metadata: Metadata) -> None:
    sizes = torch.Size([2] * 7)
    chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size([1] * 7)) for o in itertools.product((0, 1), repeat=7)]
    metadata.state_dict_metadata["b"] = TensorStorageMetadata(tensor(metadata, "b").properties, sizes, chunks)
    for number, chunk in enumerate(chunks):
        metadata.storage_data[MetadataIndex("b", chunk.offsets)] = _StorageInfo("__0_0.distcp", 100_000 + number, 1)


S = torch.Size
CHANGES: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "a call": (lambda m: vars(m)["state_dict_metadata"].update(x=Evil()), "asks for posix.system"),
    "a path up": (stored("b", relative_path="../x"), "'../x', which is not the name of a file"),
    "an absolute path": (stored("b", relative_path="/etc/passwd"), "not the name of a file"),
    "an empty path": (stored("b", relative_path=""), "not the name of a file"),
    "a path with NUL": (stored("b", relative_path="a\0b"), "not the name of a file"),
    "a path that is no string": (stored("b", relative_path=7), "is not a file, an offset and a length"),
    "a file that is not there": (stored("b", relative_path="x.distcp"), "1 of 3 files are missing"),
    "a negative offset": (stored("b", offset=-1), "is not a file, an offset and a length"),
    "an offset that is True": (stored("b", offset=True), "is not a file, an offset and a length"),
    "an offset beyond the file": (stored("b", offset=1 << 40), "ends before `b`"),
    "an offset beyond any file": (stored("b", offset=1 << 63), "is not a file, an offset and a length"),
    "a length beyond the file": (stored("last", length=1 << 40), "`last`"),
    "a length that overlaps": (stored("b", offset=1), "share bytes of"),
    "no length": (stored("b", length=0), "has 0 bytes"),
    "a shorter length": (stored("b", length=100), "no end record"),
    "another item's bytes": (lambda m: m.storage_data.pop(index(m, "b")), "`b`, the chunk at [0], has no storage"),
    "no storage for what is no tensor": (lambda m: m.storage_data.pop(index(m, "nested.step")), "`nested.step` has no storage"),
    "an extension": (stored("b", transform_descriptors=["stream.zstd/1"]), "behind an extension: stream.zstd/1"),
    "chunks that overlap": (box(1, S((0, 1)), S((3, 2))), "do not cover its size [6, 4] exactly once"),
    "chunks with a hole": (box(1, S((0, 2)), S((3, 1))), "do not cover its size [6, 4] exactly once"),
    "an overlap and a hole of one size": (box(1, S((1, 2)), S((3, 2))), "do not cover its size [6, 4] exactly once"),
    "two storages of one chunk": (lambda m: m.storage_data.update({Twin(): m.storage_data[index(m, "b")]}), "two storages for"),
    "offsets of tuples": (box(1, ((0,), (2,)), S((3, 2))), "not a name with offsets"),
    "a chunk outside": (box(1, S((0, 3)), S((3, 2))), "lies outside [6, 4]"),
    "a chunk of other dimensions": (box(1, S((0,)), S((3,))), "of 2 dimensions"),
    "a chunk far outside": (box(1, S((0, 1 << 62)), S((3, 2))), "lies outside"),
    "a missing chunk": (lambda m: tensor(m, "w").chunks.pop(), "do not cover its size"),
    "no chunk": (set_to("b", chunks=[]), "do not cover its size [5]"),
    "a scalar in two chunks": (lambda m: tensor(m, "b").chunks.append(tensor(m, "b").chunks[0]), "exactly once"),
    "cut along seven dimensions": (cut_along_seven, "along more than 6 dimensions"),
    "a size of floats": (set_to("b", size=(5.0,)), "has no size"),
    "a size that is a list": (set_to("b", size=[5]), "has no size"),
    "a size of tuples": (set_to("b", size=((5,),)), "has no size"),
    "a size larger than any file": (set_to("b", size=S((1 << 40, 1 << 40))), "larger than any file"),
    "another size": (set_to("b", size=S((6,))), "do not cover"),
    "no properties": (set_to("b", properties=None), "has no properties"),
    "chunks that are no list": (set_to("b", chunks={}), "no list of chunks"),
    "a chunk that is none": (set_to("b", chunks=[7]), "is not a ChunkStorageMetadata"),
    "a tensor that is none": (lambda m: vars(m)["state_dict_metadata"].update(b=7), "`b` is not a TensorStorageMetadata"),
    "a name that is none": (lambda m: vars(m)["state_dict_metadata"].update({7: None}), "not a string"),
    "a tensor under another name": (renamed, "`x`, the chunk at"),
    "no entries": (lambda m: setattr(m, "state_dict_metadata", None), "state_dict_metadata is not a dict"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", {}), "names no tensors"),
    "no storage at all": (lambda m: setattr(m, "storage_data", None), "storage_data is not a dict"),
    "storage of numbers": (lambda m: setattr(m, "storage_data", {1: 2}), "is not a MetadataIndex"),
    "storage that is none": (lambda m: m.storage_data.update({index(m, "b"): 7}), "is not a _StorageInfo"),
    "paths that are none": (lambda m: setattr(m, "planner_data", {"w": (("w",),)}), "planner_data does not map"),
    "the properties of another dtype": (
        lambda m: set_to("b", properties=tensor(m, "w").properties)(m), "is not the chunk that the metadata says"),
    "the chunk of another tensor": (
        lambda m: m.storage_data.update({index(m, "b"): m.storage_data[index(m, "last")],
                                         index(m, "last"): m.storage_data[index(m, "b")]}), "is not the chunk"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_that_is_not_plain_is_refused(name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change, expected = CHANGES[name]
    metadata = pickle.loads((plain / ".metadata").read_bytes())
    change(metadata)
    here = copied(plain, tmp_path / "a")
    (here / ".metadata").write_bytes(pickle.dumps(metadata))
    assert expected in refusal(here)
    assert not (tmp_path / "owned").exists()


P4 = b"\x80\x04"
BOMBS = {
    "os.system": pickle.dumps(Evil()),
    "eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "getattr": b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__class__'\ntR.",
    "memo, 2**28": P4 + b"Nr" + struct.pack("<I", 1 << 28) + b".",
    "memo, 2**31": P4 + b"Nr" + struct.pack("<I", 1 << 31) + b".",
    "bytes of 1 TiB": P4 + b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "frame of 1 TiB": P4 + b"\x95" + struct.pack("<Q", 1 << 40) + b"N.",
    "integer of 1 GB": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"x.",
    "nested tuples": P4 + b"(" * 2_000_000 + b"t" * 2_000_000 + b".",
    "nested tuples without marks": P4 + b")" + b"\x85" * 300_000 + b".",
    "doubled tuples": P4 + b")" + b"2\x86" * 30 + b".",
    "a size of a string": P4 + b"ctorch\nSize\n(X\x01\x00\x00\x00atR.",
    "a state for a class": P4 + b"ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
    "a size of sizes, doubled": P4
    + b"ctorch\nSize\n\x94)\x94"
    + b"".join(b"h\0h" + bytes([i + 1]) + b"h" + bytes([i + 1]) + b"\x86\x85R\x94" for i in range(40))
    + b".",
    "nothing": b"",
    "text": b"not a pickle",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_would_cost_much_is_refused_for_little(name: str) -> None:
    raw = BOMBS[name]
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=re.escape("x/.metadata")):
            parse_metadata(raw, "x/.metadata")
        assert tracemalloc.get_traced_memory()[1] < (1 << 20) + 50 * len(raw)
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 10


def mutated(data: st.DataObject, raw: bytes) -> bytes:
    """`raw` with a few bytes changed, removed, repeated or put in."""
    found = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(found)))
        kind = data.draw(st.sampled_from(["flip", "insert", "remove", "repeat", "cut", "number"]))
        if kind == "flip" and at < len(found):
            found[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "insert":
            found[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "remove":
            del found[at : at + data.draw(st.integers(1, 4))]
        elif kind == "repeat":
            found[at:at] = found[max(0, at - data.draw(st.integers(1, 40))) : at]
        elif kind == "cut":
            del found[at:]
        elif kind == "number":
            found[at : at + 4] = struct.pack("<I", data.draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, len(raw)])))
    return bytes(found)


@fuzz
@given(data=st.data())
def test_mutated_metadata_is_refused_or_consistent(
    data: st.DataObject, plain: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        metadata = parse_metadata(mutated(data, (plain / ".metadata").read_bytes()), "x/.metadata")
    except InputError as error:
        assert "x/.metadata" in error.message and len(str(error)) < 1500
        return
    items = sorted(item for tensor in metadata.tensors.values() for item in (chunk.item for chunk in tensor.chunks))
    assert all(a.file != b.file or a.offset + a.length <= b.offset for a, b in itertools.pairwise(items))
    for found in metadata.tensors.values():
        cells = torch.zeros(found.shape, dtype=torch.int) if found.shape and max(found.shape) < 1000 else None
        for chunk in found.chunks if cells is not None else ():
            cells[tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1  # type: ignore[index]
        assert cells is None or bool((cells == 1).all())


# --------------------------------------------------------------------------------------------------
# items


def archive(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def parse(raw: bytes) -> Any:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0 and offset + length <= len(raw) and length >= 0, "reads only what is there"
        return raw[offset : offset + length]

    return parse_item(read, len(raw), "x.distcp, `w`")


def item_refusal(raw: bytes) -> str:
    with pytest.raises(InputError) as caught:
        parse(raw)
    assert "x.distcp, `w`" in caught.value.message and caught.value.hint and len(str(caught.value)) < 1500
    return str(caught.value)


def zipped(names: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        for name, raw in names.items():
            file.writestr(name, raw)
    return stream.getvalue()


def members_of(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


class Subclass(torch.Tensor):
    pass


def test_tensors_that_are_not_plain_are_refused_by_name() -> None:
    base = torch.arange(24.0).view(4, 6)
    refused: dict[str, tuple[Any, str]] = {
        "conjugated": (torch.randn(3, dtype=torch.complex64).conj(), "a flag (conj)"),
        "negated": (torch.randn(3, dtype=torch.complex64).conj().imag, "a flag (neg)"),
        "sparse": (torch.eye(3).to_sparse(), "asks for torch._utils._rebuild_sparse_tensor"),
        "a subclass": (torch.ones(3).as_subclass(Subclass), "asks for torch._tensor._rebuild_from_type_v2"),
        "a view": (base[1:3], "a view of other values"),
        "a column": (base[:, 0], "a view of other values"),
        "expanded": (torch.ones(1).expand(4), "a view of other values"),
        "complex128": (torch.ones(3, dtype=torch.complex128), "asks for torch.ComplexDoubleStorage"),
        "a number": (7, "holds a int"),
        "a dict": ({"w": base}, "holds a dict"),
        "two tensors": ((base, base + 1), "holds a tuple"),
        "meta": (torch.ones(3, device="meta"), "_rebuild_meta_tensor_no_storage"),
    }
    for name, (value, expected) in refused.items():
        assert expected in item_refusal(archive(value)), name


def test_archives_that_are_not_plain_are_refused() -> None:
    raw = archive(torch.ones(3, 4))
    members = members_of(raw)
    changed = {
        "compressed": (zipped(members, zipfile.ZIP_DEFLATED), "is compressed"),
        "by another writer": (zipped(members), "has its CRC-32 before the values"),
        "big-endian": (zipped(members | {"archive/byteorder": b"big"}), "holds big-endian values"),
        "more members": (zipped(members | {"archive/code/x.py": b"1"}), "holds other members"),
        "no values": (zipped({k: v for k, v in members.items() if not k.endswith("data/0")}), "holds other members"),
        "no pickle": (zipped({k: v for k, v in members.items() if not k.endswith("data.pkl")}), "not an archive of one tensor"),
        "fewer values": (zipped(members | {"archive/data/0": bytes(44)}), "a view of other values"),
        "a comment": (raw[:-2] + b"\1\0x", "no end record"),
        "cut": (raw[:-1], "no end record"),
        "nothing": (b"", "0 bytes"),
        "safetensors": (b"\x08\0\0\0\0\0\0\0{}      " * 20, "no end record"),
    }
    for name, (each, expected) in changed.items():
        assert expected in item_refusal(each), name
    found = parse(raw)
    at = len(found.head) + found.num_bytes + 4
    assert "two different CRC-32s" in item_refusal(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])


def test_a_damaged_item_that_looks_like_another_is_refused(tmp_path: Path) -> None:
    folder = save_dcp(tmp_path / "a", {"a": torch.ones(4), "b": torch.ones(4)})
    file = folder / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    raw[raw.rfind(b"archive/byteorder") + 8] ^= 1  # in the directory of the second item
    file.write_bytes(raw)
    assert "not that of its entry" in refusal(folder)


@fuzz
@given(data=st.data())
def test_mutated_items_are_refused_or_hold_their_values(data: st.DataObject) -> None:
    raw = mutated(data, archive(torch.arange(12.0).view(3, 4)))
    try:
        found = parse(raw)
    except InputError as error:
        assert "x.distcp" in error.message and len(str(error)) < 1500
        return
    assert len(found.head) + found.num_bytes + found.tail_bytes == len(raw)
    assert found.trailer(found.crc_in(raw[-found.tail_bytes :])) == raw[-found.tail_bytes :]
