"""Reading the inputs: what stays in the page cache, what goes past it, and how much is read at
once.
"""

import errno
import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli import average, sweep
from merge_cli.engine import storage
from merge_cli.engine.budget import fit_memory
from merge_cli.engine.device import Device
from merge_cli.engine.reader import InputFiles
from merge_cli.errors import ChangedError, UsageError
from merge_cli.features.average import plan_average
from merge_cli.formats.opening import open_checkpoint
from merge_cli.formats.weight_file import WeightFile
from merge_cli.stores.local import DIRECT_BLOCK_BYTES
from merge_cli.tuning import direct


def cached(path: Path, offset: int) -> bool:
    """Whether a page of the file can be had without waiting for the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(4096)], offset, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


@pytest.mark.parametrize("keep", [True, False])
def test_what_was_read_stays_cached_unless_told_otherwise(keep: bool, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"w": torch.ones(4 << 20)})
    file = open_checkpoint(path).files[0]
    fd = os.open(file.path, os.O_RDONLY)
    os.fsync(fd)  # only clean pages can be given back
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached(Path(file.path), 8 << 20):
            pytest.skip("this filesystem is memory (tmpfs): nothing can be dropped")
    except OSError as error:
        pytest.skip(f"this filesystem cannot say what is cached: {error.strerror}")
    finally:
        os.close(fd)
    with InputFiles(keep_cached=keep) as inputs:
        inputs.read_into(file, 0, memoryview(bytearray(file.file_bytes)))
    assert cached(Path(file.path), 8 << 20) == keep


# -- O_DIRECT
# -----------------------------------------------------------------------------------------------------------------


def has_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory: pytest.TempPathFactory) -> WeightFile:
    """A file whose size is no multiple of 4096, larger than some blocks."""
    torch.manual_seed(0)
    numbers = torch.randint(0, 256, (100_003,), dtype=torch.uint8)
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("odd") / "c", {"w": numbers})).files[0]


def block_for(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size + 2 * DIRECT_BLOCK_BYTES))


@given(data=st.data(), direct=st.booleans(), item_bytes=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=100, deadline=None)
def test_direct_reads_equal_buffered_reads(odd_file: WeightFile, data: st.DataObject, direct: bool, item_bytes: int) -> None:
    begin = data.draw(st.integers(0, odd_file.file_bytes) | st.sampled_from([0, 4095, 4096, 98304]))
    end = data.draw(st.integers(begin, odd_file.file_bytes) | st.just(odd_file.file_bytes))
    block = block_for(end - begin)
    with InputFiles(direct=direct) as inputs:
        start = inputs.read_block(odd_file, begin, end - begin, item_bytes, block)
    assert start % item_bytes == 0
    assert block[start : start + end - begin] == Path(odd_file.path).read_bytes()[begin:end]
    if (
        direct
        and has_direct(Path(odd_file.path))
        and end - begin >= DIRECT_BLOCK_BYTES
        and begin % DIRECT_BLOCK_BYTES % item_bytes == 0
    ):
        assert start == begin % DIRECT_BLOCK_BYTES


def test_a_file_that_ends_early_is_named_by_direct_reads_too(tmp_path: Path) -> None:
    file = open_checkpoint(write_checkpoint(tmp_path / "c", {"w": torch.ones(50_000)})).files[0]
    with InputFiles(direct=True) as inputs:
        inputs.read_block(file, 0, 10_000, 4, block_for(10_000))  # now it is open
        os.truncate(file.path, 150_000)
        inputs.read_block(file, 140_000, 10_000, 4, block_for(10_000))
        with pytest.raises(ChangedError, match=r"changed during the run|ended at byte 150000"):
            inputs.read_block(file, 140_000, 20_000, 4, block_for(20_000))


@pytest.mark.parametrize("where", ["open", "preadv"])
def test_storage_without_direct_reads_is_read_through_the_cache(
    where: str, odd_file: WeightFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_direct(monkeypatch, where)
    with InputFiles(direct=True) as inputs:
        for begin in (100, 5000):
            block = block_for(9000)
            assert inputs.read_block(odd_file, begin, 9000, 1, block) == 0
            assert block[:9000] == Path(odd_file.path).read_bytes()[begin : begin + 9000]


def without_direct(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Let O_DIRECT fail as on filesystems that do not have it: at the opening, or at the first
    read.
    """
    real_open, real_preadv = os.open, os.preadv
    direct: set[int] = set()

    def fake_open(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = real_open(path, flags & ~os.O_DIRECT, *more)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def fake_preadv(fd: int, *more: Any) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_preadv(fd, *more)

    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(os, "preadv", fake_preadv)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        torch.manual_seed(step)
        shapes = {"a": (3,), "w": (70_001,), "x": (300, 301), "z": (1,)}
        weights = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
        write_checkpoint(tmp_path / "run" / f"step_{step}", weights | {"n": torch.randn(5001), "i": torch.arange(3)})
    return tmp_path / "run"


@pytest.mark.parametrize("chunk_size", [None, 8192, 100_000])
def test_direct_does_not_change_the_bytes(chunk_size: int | None, run: Path, tmp_path: Path) -> None:
    expected = weights_of(average([run], tmp_path / "off", method="ema", direct="off").output)
    assert weights_of(average([run], tmp_path / "on", method="ema", direct="on", chunk_size=chunk_size).output) == expected
    methods = ["sma", "ema", "ema:0.3", "decay:1-sqrt"]
    made = sweep([run], tmp_path / "sweep", methods=methods, direct="on", chunk_size=chunk_size, memory=8 << 20)
    assert weights_of(made.outputs[1]) == expected
    plain = sweep([run], tmp_path / "plain", methods=methods, direct="off")
    assert [weights_of(output) for output in made.outputs] == [weights_of(output) for output in plain.outputs]


@pytest.mark.parametrize("alike", [True, False])
def test_direct_reads_at_equal_and_at_different_places_of_their_blocks(alike: bool, tmp_path: Path) -> None:
    """Inputs whose data begins at the same place of a block are one tensor to the engine, others
    are not.
    """
    paths = []
    for step in (1, 2, 3):
        torch.manual_seed(step)
        weights = {"w": torch.randn(70_001).bfloat16(), "x": torch.randn(300, 301).bfloat16()}
        metadata = {"format": "pt", "more": "." * (40 if alike else 40 * step)}
        paths.append(write_checkpoint(tmp_path / "run" / f"step_{step}", weights, metadata=metadata))
    methods = ["ema:0.1", "ema:0.3", "decay:1-sqrt"]
    direct, plain = (sweep(paths, tmp_path / mode, methods=methods, direct=mode) for mode in ("on", "off"))
    assert [weights_of(output) for output in direct.outputs] == [weights_of(output) for output in plain.outputs]


FP8_SCALE = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}


def quantized_run(folder: Path, rows: int, **file_options: Any) -> Path:
    """Two checkpoints with an FP8 tensor of `rows` KiB, its scale, and a bf16 tensor of the same
    bytes; one with bf16 alone.
    """
    for step in (1, 2):
        codes = torch.arange(rows << 10).mul(2654435761 * step).bitwise_and(0x7F).clamp(max=0x7E).to(torch.uint8)
        tensors = {
            "a.weight": codes.view(torch.float8_e4m3fn).view(rows, 1 << 10),
            "a.weight_scale": torch.tensor(0.25 * step),
            "b.weight": torch.full((rows, 1 << 9), 0.5 * step).bfloat16(),
        }
        write_checkpoint(folder / f"step_{step}", tensors, config=FP8_SCALE, **file_options)
    plain = {"a.weight": tensors["a.weight"].bfloat16(), "b.weight": tensors["b.weight"]}
    write_checkpoint(folder / "step_0", plain, **file_options)
    return folder


@pytest.fixture
def through_the_cache(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the reads that were not direct."""
    sizes: list[int] = []
    read_into = InputFiles.read_into

    def counting(self: InputFiles, file: WeightFile, offset: int, buffer: memoryview) -> None:
        sizes.append(len(buffer))
        read_into(self, file, offset, buffer)

    monkeypatch.setattr(InputFiles, "read_into", counting)
    return sizes


def needs_direct(checkpoint: Path) -> None:
    if not has_direct(Path(open_checkpoint(checkpoint).files[0].path)):
        pytest.skip("this filesystem has no O_DIRECT")


@pytest.mark.parametrize("requantize", [False, True])
def test_quantized_tensors_go_past_the_page_cache_too(requantize: bool, tmp_path: Path, through_the_cache: list[int]) -> None:
    run = quantized_run(tmp_path / "run", 1 << 10)
    needs_direct(run / "step_1")
    result = average([run], tmp_path / "out", direct="on", requantize=requantize)
    assert result.statistics.bytes_read >= 7 << 20
    assert sum(through_the_cache) < 4096


def test_integers_are_compared_past_the_page_cache_too(tmp_path: Path, through_the_cache: list[int]) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / "run" / f"step_{step}", {"mask": torch.arange(300_001), "w": torch.ones(9)})
    needs_direct(tmp_path / "run" / "step_1")
    average([tmp_path / "run"], tmp_path / "out", direct="on")
    assert sum(through_the_cache) < 3 * 4096


@pytest.mark.parametrize("after", ["", " ", "     "])
@pytest.mark.parametrize("memory", [None, 12 << 20])
def test_direct_does_not_change_the_bytes_of_quantized_checkpoints(after: str, memory: int | None, tmp_path: Path) -> None:
    """Wherever in their blocks the codes begin."""
    run = quantized_run(tmp_path / "run", 301, multiple=1, after=after)
    every: list[dict[str, Any]] = [{}, {"requantize": True}, {"exclude": ["a.*"]}]
    for number, options in enumerate(every):
        made = [
            average([run], tmp_path / f"{mode}{number}", direct=mode, memory=memory, **options).output for mode in ("on", "off")
        ]
        assert weights_of(made[0]) == weights_of(made[1])


def weights_of(checkpoint: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))]


@pytest.mark.parametrize("where", ["open", "preadv"])
def test_a_note_says_why_reads_are_not_direct(where: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_direct(monkeypatch, where)
    plan = plan_average([run], tmp_path / "out", direct="on")
    assert plan.budget.size.slack_bytes == 0
    assert any("O_DIRECT fails for" in note and "Invalid argument" in note for note in plan.notes)


@pytest.mark.parametrize("direct_speed, chosen", [(3e9, True), (2.1e9, False), (1e9, False)])
def test_auto_takes_what_is_clearly_faster(
    direct_speed: float, chosen: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_probe", lambda file: None)
    monkeypatch.setattr(direct, "_bytes_per_s", lambda path, begin, size, flags: direct_speed if flags else 2e9)
    assert plan_average([run], tmp_path / "out").notes == plan_average([run], tmp_path / "out", direct="off").notes
    monkeypatch.setattr(direct, "is_larger_than_cache", lambda plan: True)
    plan = plan_average([run], tmp_path / "out")
    assert (plan.budget.size.slack_bytes > 0) == chosen
    assert any(f"{direct_speed / 1e9:.2f} GB/s with O_DIRECT, 2.00 GB/s without" in note for note in plan.notes)


def test_auto_really_times_both(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "is_larger_than_cache", lambda plan: True)
    notes = plan_average([run], tmp_path / "out").notes
    assert any("GB/s with O_DIRECT" in note or "O_DIRECT fails" in note for note in notes)


def test_direct_is_auto_on_or_off(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--direct cannot be 'yes'"):
        plan_average([run], tmp_path / "out", direct="yes")


# -- the size of a chunk
# ------------------------------------------------------------------------------------------------------


def test_chunks_are_small_where_data_is_local_and_large_where_it_may_not_be(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = plan_average([run], tmp_path / "out").merge
    big = replace(merge, files=tuple(replace(file, extents=tuple(map(lengthen, file.extents))) for file in merge.files))
    cpu = Device("cpu")
    chunks = [fit_memory(big, 1 << 30, cpu, chunk_bytes=size).size.num_bytes for size in (None, 1 << 20, 5000)]
    assert chunks == [(1 << 18) * 8, 1 << 20, 4096 * 8]  # the widest input has 8 bytes an element
    monkeypatch.setattr(storage, "_LOCAL", {})
    assert fit_memory(big, 1 << 30, cpu).size.num_bytes == 4 << 20


def lengthen(extent: Any) -> Any:
    return replace(extent, num_elements=1 << 24)
