"""`torch.save` files: every tensor is found where it lies, and what is not plain is refused by
name.
"""

import io
import shlex
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tensor_bytes
from torch import Tensor

from merge_cli.errors import InputError, UnsupportedError
from merge_cli.formats.torch_zip import list_tensors


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def read(path: Path, name: str, like: Tensor) -> bytes:
    """The elements of a tensor in C order, by the offset and strides that were found."""
    found = list_tensors(path)[name]
    item = like.element_size()
    raw = path.read_bytes()[found.offset :]
    span = 1 + sum((n - 1) * stride for n, stride in zip(found.shape, found.strides, strict=True)) if like.numel() else 0
    flat = torch.frombuffer(bytearray(raw[: span * item] or bytes(item)), dtype=like.dtype)
    return tensor_bytes(flat.as_strided(found.shape, found.strides))


def model() -> dict[str, Tensor]:
    weight = torch.randn(50, 8)
    return {
        "a.weight": weight.bfloat16(), "tied": weight, "again": weight, "view": weight[10:20, 2:4], "t": weight.t(),
        "parameter": torch.nn.Parameter(torch.randn(3, 3)), "scalar": torch.tensor(3.5), "count": torch.tensor(7),
        "empty": torch.empty(0, 4), "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn), "mask": torch.tensor([True, False]),
        "expanded": torch.ones(1, 3).expand(4, 3), "größe": torch.arange(3, dtype=torch.int16),
        "u16": torch.ones(2).to(torch.uint16),
    }  # fmt: skip


def test_every_tensor_is_where_torch_finds_it(tmp_path: Path) -> None:
    state: OrderedDict[str, Tensor] = OrderedDict(model())
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    path = saved(tmp_path / "pytorch_model.bin", state)
    loaded = torch.load(path, weights_only=True)
    assert list(list_tensors(path)) == list(loaded)
    for name, tensor in loaded.items():
        assert read(path, name, tensor) == tensor_bytes(tensor), name


def test_only_c_order_counts_as_contiguous(tmp_path: Path) -> None:
    found = list_tensors(saved(tmp_path / "x.pt", model()))
    assert {name for name, tensor in found.items() if not tensor.is_contiguous} == {"view", "t", "expanded"}
    assert found["tied"] == found["again"]


def test_nested_state_is_named_by_its_path(tmp_path: Path) -> None:
    value = {"model": model(), "ema": {"state": {0: {"shadow": torch.ones(3)}}, "groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
             "list": [torch.zeros(2), (torch.ones(1), None)], "shape": torch.Size((3, 4)), "step": 7, "name": "run"}  # fmt: skip
    found = list_tensors(saved(tmp_path / "x.pt", value))
    assert {"model.a.weight", "ema.state.0.shadow", "list.0", "list.1.0"} <= set(found)
    assert len(found) == len(model()) + 3


@pytest.mark.parametrize("key", ["optimizer", "optim", "optimizer_state_dict", "lr_schedulers", "cuda_rng_state"])
def test_a_file_of_the_whole_training_state_is_refused(key: str, tmp_path: Path) -> None:
    adam = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
    value = {"epoch": 1, key: torch.ones(3) if "rng" in key else adam, "model_state": {"w": torch.ones(3)}}
    path = saved(tmp_path / "ckpt.pt", value)
    with pytest.raises(UnsupportedError, match=rf"holds the state of training \(`{key}`\)") as caught:
        list_tensors(path)
    command = shlex.split(caught.value.hint.partition(":  ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2].replace("'model.pt'", repr(str(tmp_path / "model.pt"))), {})
    assert list(list_tensors(tmp_path / "model.pt")) == ["w"]


def test_names_of_a_model_are_no_training_state(tmp_path: Path) -> None:
    for value in (
        {"opt.w": torch.ones(3), "optimal": {"w": torch.ones(3)}},
        {"rng": torch.ones(3), "w": torch.ones(3)},
        {"model": {"scheduler": torch.ones(3)}, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}},
    ):
        assert list_tensors(saved(tmp_path / "x.pt", value))


def test_a_bare_tensor_has_no_name(tmp_path: Path) -> None:
    assert list(list_tensors(saved(tmp_path / "x.pt", torch.ones(3)))) == [""]


class LossScaler:
    pass


REFUSED: dict[str, tuple[Any, str]] = {
    "a class of somebody's": ({"scaler": LossScaler()}, f"asks for {__name__}.LossScaler"),
    "a dtype": ({"dtype": torch.float32, "device": torch.device("cpu")}, "asks for torch.device"),
    "a whole module": (torch.nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
    "conjugated": ({"w": torch.randn(2, dtype=torch.complex64).conj()}, "flag (conj)"),
    "one name twice": ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "two tensors that would be called `a.b`"),
    "no tensors": ({"step": 7}, "holds no tensors"),
    "deep": ([[[torch.ones(1)]]], ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused_by_name(name: str, tmp_path: Path) -> None:
    value, expected = REFUSED[name]
    if name == "deep":
        for _ in range(40):
            value = [value]
        expected = "nested too deeply"
    path = saved(tmp_path / "x.pt", value)
    with pytest.raises(InputError) as caught:
        list_tensors(path)
    assert expected in str(caught.value) and str(path) in caught.value.message and len(str(caught.value)) < 1500


def test_files_that_are_no_archives_of_tensors_are_refused(tmp_path: Path) -> None:
    def refusal(raw: bytes) -> str:
        (tmp_path / "x.pt").write_bytes(raw)
        with pytest.raises(InputError) as caught:
            list_tensors(tmp_path / "x.pt")
        return str(caught.value)

    stream = io.BytesIO()
    torch.save({"w": torch.ones(3)}, stream, _use_new_zipfile_serialization=False)
    assert "older than torch 1.6" in refusal(stream.getvalue())
    assert "older than torch 1.6" in refusal(b"PK\5\6" + bytes(18))
    good = saved(tmp_path / "good.pt", {"w": torch.ones(3)}).read_bytes()
    assert "no end record" in refusal(good[:-1])
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    root = next(name for name in members if name.endswith("/data.pkl")).removesuffix("data.pkl")

    def zipped(changes: dict[str, bytes]) -> bytes:
        with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
            for name, raw in (members | changes).items():
                archive.writestr(name, raw)
        return stream.getvalue()

    assert "no archive of tensors" in refusal(zipped({root + "constants.pkl": b""}))
    assert "big-endian" in refusal(zipped({root + "byteorder": b"big"}))
    assert "of another size" in refusal(zipped({root + "data/0": b"1234"}))
    bomb = b"\x80\x02(]q\x00]q\x01(" + b"h\0" * 2000 + b"e]q\x02(" + b"h\1" * 2000 + b"e](" + b"h\2" * 2000 + b"et."
    assert "holds more than" in refusal(zipped({root + "data.pkl": bomb}))
