"""Torch distributed checkpoints: values are found where torch wrote them, and torch loads a clone
of the files around others.
"""

import random
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tensor_bytes
from dcp_checkpoints import grid, load_dcp, load_state, payloads_of, read_values, save_dcp, write_clone
from torch import Tensor

from merge_cli.errors import UsageError
from merge_cli.formats.dcp.clone import Copied, write_metadata
from merge_cli.formats.dcp.entries import is_main_weight, is_moment, is_training_state, treat
from merge_cli.formats.dcp.folder import DcpFolder, open_folder
from merge_cli.formats.dcp.item import parse_item
from merge_cli.formats.dcp.metadata import FILESYSTEM, OLMO_CORE, parse_metadata
from merge_cli.formats.safetensors import DTYPES


def every_kind() -> dict[str, Tensor]:
    """Every dtype, scalars, empty tensors, and tensors whose memory is not in the order of their
    elements.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = normal(64, 32)
    return {
        "fp32": normal(37, 19), "bf16": normal(33, 8).bfloat16(), "fp16": normal(5, 7, 3).half(), "fp64": normal(4, 4).double(),
        "i64": torch.arange(10), "i32": torch.arange(6, dtype=torch.int32).view(2, 3), "i16": torch.arange(5, dtype=torch.int16),
        "i8": torch.arange(7, dtype=torch.int8), "u8": torch.arange(200, dtype=torch.uint8),
        "u16": torch.arange(5).to(torch.uint16), "u32": torch.arange(5).to(torch.uint32),
        "u64": torch.arange(5).to(torch.uint64), "bool": torch.tensor([True, False]),
        "c64": torch.randn(3, 2, dtype=torch.complex64, generator=generator), "fp8": normal(16, 16).to(torch.float8_e4m3fn),
        "fp8.e5m2": normal(3).to(torch.float8_e5m2), "fp8.e8m0": torch.ones(3).to(torch.float8_e8m0fnu),
        "scalar": torch.tensor(3.25), "scalar.i64": torch.tensor(7), "empty": torch.empty(0, 5), "one": normal(1),
        "transposed": normal(12, 20).t(), "permuted": normal(4, 5, 6).permute(2, 0, 1), "view": base[10:20, 3:9],
        "expanded": normal(1, 8).expand(4, 8), "channels_last": normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(normal(6, 6)), "größe.重み": normal(3), "wide": normal(5, 23), "cube": normal(7, 9, 4),
    }  # fmt: skip


CUTS: dict[str, Any] = {
    "fp32": grid((37, 19), (4, 1)),
    "wide": grid((5, 23), (1, 3)),
    "cube": grid((7, 9, 4), (2, 3, 1)),
    "transposed": grid((20, 12), (3, 2)),
    # a pinwheel: no cut goes all the way through
    "fp8": [((0, 0), (10, 4)), ((10, 0), (6, 10)), ((6, 10), (10, 6)), ((0, 4), (6, 12)), ((6, 4), (4, 6))],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of every kind in three files, some in several chunks, with entries that are no
    tensors.
    """
    state = {
        **every_kind(),
        "optimizer": {"state": {"fp32": {"exp_avg": torch.ones(37, 19)}}, "lr": 1e-3},
        "name": "run",
        "step": 7,
    }
    return save_dcp(tmp_path_factory.mktemp("dcp") / "step-7", state, CUTS, files=3)


def chunk_of(whole: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    return whole[tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))]


def test_every_chunk_is_where_torch_finds_it(plain: Path) -> None:
    folder, loaded = open_folder(plain), load_dcp(plain)
    assert not folder.notes and set(folder.metadata.tensors) == set(loaded)
    assert set(folder.metadata.blobs) == {"optimizer.lr", "name", "step"}
    payloads = payloads_of(folder)
    for name, tensor in folder.metadata.tensors.items():
        whole = loaded[name]
        assert (DTYPES[tensor.dtype].torch, tensor.shape) == (str(whole.dtype).removeprefix("torch."), tuple(whole.shape))
        assert len(tensor.chunks) == len(CUTS.get(name, [()]))
        for chunk in tensor.chunks:
            payload = payloads[chunk.item]
            storage = torch.frombuffer(bytearray(read_values(folder, payload) or b"\0" * 16), dtype=whole.dtype)
            found = storage.as_strided(chunk.sizes, payload.strides)
            assert tensor_bytes(found) == tensor_bytes(chunk_of(whole, chunk.offsets, chunk.sizes)), name


def test_random_ranges_of_the_bytes_are_those_of_torch(plain: Path) -> None:
    folder, loaded, rng = open_folder(plain), load_dcp(plain), random.Random(0)
    payloads = payloads_of(folder)
    for name, tensor in folder.metadata.tensors.items():
        for chunk in tensor.chunks:
            payload = payloads[chunk.item]
            stored = torch.empty_strided(chunk.sizes, payload.strides, dtype=loaded[name].dtype)
            stored.copy_(chunk_of(loaded[name], chunk.offsets, chunk.sizes))
            expected = bytes(stored.untyped_storage())
            assert len(expected) == payload.num_bytes
            for _ in range(3):
                begin = rng.randint(0, payload.num_bytes)
                end = rng.randint(begin, payload.num_bytes)
                with (plain / payload.file).open("rb") as file:
                    file.seek(payload.offset + begin)
                    assert file.read(end - begin) == expected[begin:end], name


def test_an_item_is_its_envelope_around_its_values(plain: Path) -> None:
    folder = open_folder(plain)
    for item, payload in payloads_of(folder).items():
        raw = Path(folder.files[item.file].path).read_bytes()[item.offset : item.offset + item.length]
        envelope, values = payload.envelope, read_values(folder, payload)
        assert raw == envelope.head + values + envelope.trailer(zlib.crc32(values))


def test_an_envelope_around_other_values_is_what_torch_writes_for_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_dcp(tmp_path / name, {"w": torch.randn(5, 3, generator=torch.Generator().manual_seed(ord(name))).bfloat16()})
    a, b = (open_folder(tmp_path / name) for name in ("a", "b"))
    (envelope,) = (payload.envelope for payload in payloads_of(a).values())
    ((item, payload),) = payloads_of(b).items()
    values = read_values(b, payload)
    assert envelope.head + values + envelope.trailer(zlib.crc32(values)) == Path(b.path, item.file).read_bytes()


def test_tensors_larger_than_32_bits_are_found(tmp_path: Path) -> None:
    path, size = tmp_path / "large.pt", (1 << 32) + 4096
    with torch.serialization.skip_data():  # a sparse file: two pages are written
        torch.save(torch.empty(size, dtype=torch.uint8), path)

    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    envelope = parse_item(read, path.stat().st_size, "large")
    assert envelope.num_bytes == size and len(envelope.head) + size + envelope.tail_bytes == path.stat().st_size
    trailer = envelope.trailer(0x12345678)
    assert trailer[4:24] == bytes.fromhex("78563412") + size.to_bytes(8, "little") * 2
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("large/data/0").file_size == size


# ----------------------------------------------------------------------------------------------- a
# clone


def negated(name: str, values: bytes) -> bytes:
    return bytes(255 - value for value in values)


def training_checkpoint(folder: Path) -> Path:
    state = {
        "model": {"w": torch.randn(8, 4), "norm": torch.ones(4), "w._extra_state": b"fp8 scales"},
        "optimizer": {
            "state": {"w": {"exp_avg": torch.randn(8, 4), "exp_avg_sq": torch.rand(8, 4), "step": torch.tensor(5.0)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}],
        },
        "train_state": {"step": torch.tensor(30), "ntokens": 123}, "rng": torch.get_rng_state(), "lr_scheduler": {"last_epoch": 2},
    }  # fmt: skip
    cuts = {"model.w": grid((8, 4), (2, 1)), "optimizer.state.w.exp_avg": grid((8, 4), (2, 1))}
    return save_dcp(folder, state, cuts, files=2)


@pytest.mark.parametrize("training_state", ["drop", "base", "average"])
def test_torch_loads_a_clone(tmp_path: Path, training_state: str) -> None:
    base = training_checkpoint(tmp_path / "run" / "step-30")
    write_clone(open_folder(base), tmp_path / "merged", training_state, negated)
    before, after = load_dcp(base), load_dcp(tmp_path / "merged")
    model = {"model.w", "model.norm"}
    moments = {"optimizer.state.w.exp_avg", "optimizer.state.w.exp_avg_sq"}
    assert set(after) == (model if training_state == "drop" else set(before))
    for name, tensor in after.items():
        changed = name in model or (name in moments and training_state == "average")
        expected = negated(name, tensor_bytes(before[name])) if changed else tensor_bytes(before[name])
        assert tensor_bytes(tensor) == expected, name
    blobs: dict[str, Any] = {"model.w._extra_state": b""}
    if training_state != "drop":
        blobs |= {"train_state.ntokens": 0, "optimizer.param_groups.0.lr": 0.0, "lr_scheduler.last_epoch": 0}
    loaded = load_state(tmp_path / "merged", blobs)
    assert loaded["model.w._extra_state"] == b"fp8 scales"
    assert training_state == "drop" or (loaded["train_state.ntokens"], loaded["optimizer.param_groups.0.lr"]) == (123, 1e-3)
    # names go into the trainer's nested state as before, and no path of the trainer is in the
    # result
    nested = {"model": {"w": torch.zeros(8, 4), "norm": torch.zeros(4)}}
    assert tensor_bytes(load_state(tmp_path / "merged", nested)["model"]["w"]) == tensor_bytes(after["model.w"])
    assert b"step-30" in (base / ".metadata").read_bytes()
    assert b"step-30" not in (tmp_path / "merged" / ".metadata").read_bytes()


def test_a_clone_is_read_back_as_it_was_laid_out(plain: Path, tmp_path: Path) -> None:
    folder = open_folder(plain)
    clone = write_clone(folder, tmp_path / "merged", "base", lambda _, values: values)
    again = open_folder(tmp_path / "merged")
    assert again.metadata.tensors == clone.metadata.tensors and again.metadata.blobs == clone.metadata.blobs
    assert again.metadata.paths == folder.metadata.paths
    assert {name: file.num_bytes for name, file in again.files.items()} == {file.name: file.num_bytes for file in clone.files}
    loaded, expected = load_dcp(tmp_path / "merged"), load_dcp(plain)
    assert all(tensor_bytes(loaded[name]) == tensor_bytes(expected[name]) for name in expected)
    assert any(isinstance(part, Copied) for file in clone.files for part in file.parts)


def test_the_storage_class_of_olmo_core_is_read_and_torchs_is_written(plain: Path) -> None:
    raw = (plain / ".metadata").read_bytes()
    own, torchs = (b"\x8c" + bytes([len(name)]) + name.encode() for name in (OLMO_CORE, FILESYSTEM))
    assert torchs in raw
    metadata = parse_metadata(raw.replace(torchs, own), "x")
    assert metadata.tensors == parse_metadata(raw, "x").tensors
    assert FILESYSTEM.encode() in write_metadata(metadata) and OLMO_CORE.encode() not in write_metadata(metadata)


def test_a_file_of_which_nothing_is_kept_is_not_written(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(3)}, "optim": {"state": {"w": {"exp_avg": torch.ones(5000)}}}}
    base = open_folder(save_dcp(tmp_path / "a", state, files=2))
    assert len(base.files) == 2
    assert len(write_clone(base, tmp_path / "b", "drop", negated).files) == 1


NAMES = {
    "tok_embeddings.weight": "model", "layers.0.attention.wq.weight": "model", "model.blocks.0.w.weight": "model",
    "decoder.layers.mlp.linear_fc1.weight": "model", "decoder.layers.self_attention._extra_state/shard_0_4": "model",
    "app.model.w": "model", "state.model.w": "model", "model.optimizer_head.weight": "model", "scheduler_embedding.weight": "model",
    "optimizer.state.layers.0.w.exp_avg": "moment", "optim.state.w.exp_avg_sq": "moment", "app.optim.state.w.exp_avg": "moment",
    "chained_0.optimizer.state.exp_avg.decoder.layers.w": "moment", "optimizer.state.exp_avg_sq.decoder.layers.w": "moment",
    "optimizer.state.w.momentum_buffer": "moment", "optimizer.state.fp32_param.decoder.layers.w": "main",
    "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(bf16, fp32).bucket_idx_0.param": "main",
    "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(bf16, fp32).bucket_idx_0.exp_avg": "moment",
    "optimizer.state.w.step": "state", "optimizer.param_groups.w.lr": "state", "optim.param_groups.0.betas": "state",
    "lr_scheduler.last_epoch": "state", "train_state.step": "state", "dataloader.dp_rank_0": "state",
    "rng_state/shard_0.0_2": "state",
    "rng": "state", "step": "state", "state.rng": "state", "chained_1.optimizer.param_state_sharding_type": "state",
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_entries_are_sorted_by_name(name: str, kind: str) -> None:
    found = "main" if is_main_weight(name) else "moment" if is_moment(name) else "state" if is_training_state(name) else "model"
    assert found == kind
    assert is_training_state(name) == (kind != "model")


def test_main_weights_are_merged_wherever_they_are_kept(tmp_path: Path) -> None:
    state = {
        "w": torch.ones(3).bfloat16(),
        "optimizer.state.fp32_param.w": torch.ones(3),
        "optimizer.state.exp_avg.w": torch.ones(3),
    }
    metadata = open_folder(save_dcp(tmp_path / "a", state)).metadata
    assert treat(metadata, "drop") == {"w": "merge"}
    kept = {"w": "merge", "optimizer.state.fp32_param.w": "merge", "optimizer.state.exp_avg.w": "copy"}
    assert treat(metadata, "base") == kept
    assert treat(metadata, "average") == kept | {"optimizer.state.exp_avg.w": "merge"}
    with pytest.raises(UsageError, match="--training-state cannot be 'keep'"):
        treat(metadata, "keep")


def test_each_envelope_is_parsed_once(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import merge_cli.formats.dcp.item as module

    calls: Counter[str] = Counter()

    def counted(read: Any, length: int, what: str) -> Any:
        calls[what] += 1
        return parse_item(read, length, what)

    monkeypatch.setattr(module, "parse_item", counted)
    folder: DcpFolder = open_folder(plain)
    payloads = payloads_of(folder)
    kinds = {(t.dtype, tuple(c.sizes)) for t in folder.metadata.tensors.values() for c in t.chunks}
    assert len(calls) < len(payloads) and len(kinds) <= len(calls) <= len(kinds) + 4
