"""`pmerge verify`: a result as it was written passes, and a bit that flips anywhere in it is found."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import INDEX, nasty_run, read_layout, training_run, write_checkpoint, write_run
from command import pmerge
from forging import record_again, reseal
from safetensors.torch import save_file
from schemes import quantized_run

from merge_cli import average, verify
from merge_cli.errors import InputError, UsageError
from merge_cli.formats.safetensors import BoundError
from merge_cli.output.manifest import seal

FLIPS = 40  # for each file


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its average `out`."""
    place = tmp_path_factory.mktemp("verify")
    run = nasty_run(place / "run", layout="sharded")
    average(run, place / "out", method="ema", alpha=0.3)
    return place


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    """A copy of the average that may be damaged."""
    return Path(shutil.copytree(original / "out", tmp_path / "out"))


def problems(path: Path, **options: Any) -> str:
    found = verify(path, **options)
    assert found.ok == (not found.problems)
    return "\n".join(found.problems)


def test_a_result_passes(original: Path) -> None:
    out = original / "out"
    progress: list[Any] = []
    found = verify(out, against_inputs=True, sample=None, on_progress=progress.append)
    assert found.ok and not found.notes, found.problems
    assert set(found.files) == {path.name for path in out.iterdir()}
    assert set(found.files.values()) == {"ok"}
    assert found.recomputed == found.num_tensors == 23  # 25, of which 2 are empty
    assert 0 < progress[0].bytes_read < progress[-1].bytes_read == found.bytes_read <= progress[-1].bytes_to_read


def test_a_flipped_bit_in_any_file_is_found(out: Path) -> None:
    rng = random.Random(0)
    for path in sorted(out.iterdir()):
        data = path.read_bytes()
        for position in rng.sample(range(len(data)), min(FLIPS, len(data))):
            changed = bytearray(data)
            changed[position] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            assert path.name in problems(out), f"{path.name}: bit flip at byte {position}"
        path.write_bytes(data)
    assert problems(out) == ""


def test_every_bit_of_the_manifest_counts(out: Path) -> None:
    from merge_cli.output.manifest import is_sealed

    raw = (out / "pmerge.json").read_bytes()
    assert is_sealed(raw)
    for position in range(len(raw)):
        assert not is_sealed(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
    assert not any(map(is_sealed, (b"", b"{}", raw[:-1], raw + b"\n", raw[1:])))


def test_a_file_cut_short_grown_missing_or_replaced_is_found(out: Path) -> None:
    for path in sorted(out.iterdir()):
        if path.name == "pmerge.json":
            continue
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        assert f"{path}: has {len(data) - 1} bytes, not {len(data)}" in problems(out)
        path.write_bytes(data + b"\0")
        assert f"{path}: has {len(data) + 1} bytes" in problems(out)
        path.unlink()
        assert f"{path}: is missing" in problems(out)
        path.mkdir()
        assert f"{path}: is not a regular file" in problems(out)
        path.rmdir()
        os.mkfifo(path)
        assert f"{path}: is not a regular file" in problems(out)
        path.unlink()
        (out.parent / "elsewhere").write_bytes(data)
        path.symlink_to("../elsewhere")
        assert "leads outside" in problems(out)
        path.unlink()
        path.write_bytes(data)
    assert problems(out) == ""


def test_the_index_must_fit_the_shards_whatever_the_checksums_say(out: Path) -> None:
    index = json.loads((out / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(tensor for tensor, file in index["weight_map"].items() if file == first)
    others = {tensor: file for tensor, file in index["weight_map"].items() if tensor != name}

    def problems_with(changed: dict[str, Any]) -> str:
        (out / INDEX).write_text(json.dumps(index | changed))
        record_again(out)
        return problems(out)

    assert problems_with({}) == ""
    assert f"`{name}` is missing in {last}" in problems_with({"weight_map": others | {name: last}})
    assert f"`{name}` of {first} is not listed" in problems_with({"weight_map": others})
    assert "`ghost` is missing in" in problems_with({"weight_map": index["weight_map"] | {"ghost": first}})
    assert "is missing in nowhere.safetensors" in problems_with({"weight_map": others | {name: "nowhere.safetensors"}})
    assert "total_size" in problems_with({"metadata": {"total_size": 1}})
    assert "total_size" in problems_with({"metadata": {}})
    assert "weight_map['x'] is '../x.safetensors'" in problems_with({"weight_map": {"x": "../x.safetensors"}})


def test_a_tensor_in_two_shards_is_found(out: Path) -> None:
    first, second, _ = sorted(path.name for path in out.glob("*.safetensors"))
    shutil.copy(out / first, out / second)
    record_again(out)
    assert "is in 2 files" in problems(out)


def test_a_broken_header_is_found_whatever_the_checksums_say(out: Path) -> None:
    path = next(iter(sorted(out.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes() + b"\0")
    record_again(out)
    assert "does not fit its header" in problems(out)


def test_weights_that_pmerge_did_not_write_are_a_problem_and_others_a_note(out: Path) -> None:
    (out / "README.md").write_text("our best model")
    (out / "sub").mkdir()
    (out / "sub" / "notes.txt").write_text("x")
    found = verify(out)
    assert found.ok and [Path(note.split(": ")[0]).name for note in found.notes] == ["README.md", "notes.txt"]
    for name in ("model.safetensors", "sub/pytorch_model.bin", "pytorch_model.bin.index.json", "MODEL.SAFETENSORS", "model.pkl"):
        (out / name).write_bytes(b"x")
        assert f"{out / name}: pmerge did not write these weights" in problems(out)
        (out / name).unlink()
    for name in ("modeling_evil.py", "adapter_config.json"):
        (out / name).write_bytes(b"x")
        assert f"{out / name}: pmerge did not write this file, and a loader may take it" in problems(out)
        (out / name).unlink()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"files":[]}',
        b'{"files":{"../x":{"bytes":1,"sha256":""}}}',
        b'{"files":{"x":1}}',
    ],
)
def test_a_broken_manifest_is_a_problem(out: Path, content: bytes) -> None:
    (out / "pmerge.json").write_bytes(content)
    assert "pmerge.json" in problems(out) and "pmerge.json" in problems(out, against_inputs=True)


def test_a_manifest_that_reaches_outside_is_refused(out: Path) -> None:
    (out.parent / "secret").write_text("x")
    reseal(out, side_files={"../secret": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}})
    assert "outside the folder" in problems(out)


def test_what_is_no_result_is_wrong_usage(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", {"w": torch.ones(3)})
    for path in (folder, tmp_path / "nowhere", folder / "config.json"):
        with pytest.raises(InputError, match="no result of pmerge"):
            verify(path)
    with pytest.raises(UsageError, match="sample of 0"):
        verify(folder, sample=0)


def test_weights_that_are_not_the_average_are_found_whatever_the_checksums_say(out: Path) -> None:
    """One bit of one tensor, in a checkpoint that is otherwise forged to perfection."""
    path = sorted(out.glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    record_again(out)
    last, _, _ = read_layout(out)[path.name][-1]
    assert problems(out) == ""
    assert problems(out, against_inputs=True, sample=None) == f"{path}: `{last}` is not what its inputs and coefficients give"


def test_a_sample_finds_a_wrong_tensor_as_often_as_it_is_drawn(tmp_path: Path) -> None:
    names = [f"layers.{i}.weight" for i in range(8)]
    run = training_run({name: torch.ones(5).bfloat16() for name in names}, 2)
    average(write_run(tmp_path / "run", run), tmp_path / "out")
    path = tmp_path / "out" / "model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last tensor
    path.write_bytes(data)
    record_again(tmp_path / "out")
    results = [verify(tmp_path / "out", against_inputs=True, sample=2) for _ in range(60)]
    assert {(found.recomputed, found.num_tensors) for found in results} == {(2, 8)}
    assert 3 < sum(not found.ok for found in results) < 30  # a quarter is expected
    assert {line for found in results for line in found.problems} == {
        f"{path}: `{names[-1]}` is not what its inputs and coefficients give"
    }


@pytest.mark.parametrize("layout", ["single", "sharded", "mixed"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "sma"},
        {"method": "wma", "dtype": "fp32"},
        {"method": "ema", "half_life": 150.0, "exclude": ["*norm*"]},
        {"method": "decay", "shape": "cosine", "accumulate": "fp32", "shard_size": 60_000},
        {"method": "weights", "weights": [0.5, -0.25, 0.5, 0.25], "base": 1},
    ],
    ids=lambda options: options["method"],
)
def test_any_run_can_be_computed_again(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    run = nasty_run(tmp_path / "run", layout=layout)
    given = options | ({"base": run[options["base"]]} if "base" in options else {})
    average(run, tmp_path / "out", **given)
    assert problems(tmp_path / "out", against_inputs=True, sample=None) == ""
    assert problems(tmp_path / "out", against_inputs=True, sample=5) == ""


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("case", ["DeepSeek-V3", "nvfp4", "gpt-oss", "packed int4, asymmetric", "per tensor"])
def test_quantized_weights_are_computed_again(tmp_path: Path, case: str, requantize: bool) -> None:
    paths, *_ = quantized_run(tmp_path, case)
    out = average(paths, tmp_path / "out", method="wma", requantize=requantize).output
    found = verify(out, against_inputs=True)
    assert found.ok and found.recomputed == found.num_tensors, found.problems
    for path in out.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        record_again(out)
        assert "is not what its inputs and coefficients give" in problems(out, against_inputs=True)


def test_ranks_and_single_files_are_computed_again(tmp_path: Path) -> None:
    run = training_run({"a.weight": torch.ones(7).bfloat16(), "count": torch.tensor(3)}, 2)
    for step, own in enumerate(run, 1):
        for rank in range(2):
            write_checkpoint(tmp_path / f"step_{step}" / f"mp_rank_0{rank}", own, index=False, config=None, side_files=False)
    ranks = [tmp_path / f"step_{step}" for step in (1, 2)]
    files = [folder / "mp_rank_00" / "model.safetensors" for folder in ranks]
    for number, paths in enumerate((ranks, files)):
        found = verify(average(paths, tmp_path / f"out{number}").output, against_inputs=True)
        assert found.ok and found.recomputed == (4, 2)[number], found.problems
        assert len(found.files) == (3, 2)[number]


def test_nan_that_was_allowed_is_computed_again(tmp_path: Path) -> None:
    run = [write_checkpoint(tmp_path / f"ckpt_{i}", {"w": torch.tensor([1.0, value])}) for i, value in ((1, torch.nan), (2, 1.0))]
    average(run, tmp_path / "out", allow_nonfinite=True)
    assert problems(tmp_path / "out", against_inputs=True) == ""


def test_inputs_that_changed_are_named(tmp_path: Path) -> None:
    run = nasty_run(tmp_path / "run", 3, layout="sharded")
    average(run, tmp_path / "out")
    shard = sorted(run[1].glob("model-*"))[0]
    before = shard.stat()
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert f"{shard}: this input has changed" in problems(tmp_path / "out", against_inputs=True)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert problems(tmp_path / "out", against_inputs=True) == ""
    shard.rename(shard.with_suffix(".gone"))
    assert f"missing in {run[1]}" in problems(tmp_path / "out", against_inputs=True)
    shutil.rmtree(run[1])
    assert str(run[1]) in problems(tmp_path / "out", against_inputs=True)
    assert problems(tmp_path / "out") == "", "without its inputs the result can still be checked"


def test_another_request_is_not_taken_for_the_recorded_one(out: Path) -> None:
    content = json.loads((out / "pmerge.json").read_bytes())
    content["inputs"][0]["coefficient"] += 1e-9
    reseal(out, inputs=content["inputs"])
    assert "another plan" in problems(out, against_inputs=True)
    reseal(out, inputs="none")
    assert "does not describe a run" in problems(out, against_inputs=True)


@pytest.mark.parametrize("key", ["files", "side_files"])
def test_a_record_without_its_lists_is_found(out: Path, key: str) -> None:
    content = json.loads((out / "pmerge.json").read_bytes())
    del content[key], content["sha256"]
    (out / "pmerge.json").write_bytes(seal(content))
    assert f"pmerge.json: has no `{key}`" in problems(out)
    assert f"pmerge.json: has no `{key}`" in problems(out, against_inputs=True)


def test_a_bound_on_headers_that_is_too_low_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    average(nasty_run(tmp_path / "run", layout="single"), tmp_path / "out")
    size = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert problems(tmp_path / "out", max_header=size) == ""
    with pytest.raises(BoundError, match=r"at .*/out/"):
        verify(tmp_path / "out", max_header=size - 1)
    with pytest.raises(BoundError, match=r"at .*/run/"):
        verify(tmp_path / "out", against_inputs=True, max_header=10)
    low = pmerge("verify", "out", "--max-header", "10", cwd=tmp_path, expect=2)
    assert "larger than 10 bytes" in low.stderr and "--max-header" in low.stderr


def test_the_command(out: Path) -> None:
    here = out.parent
    good = pmerge("verify", "out", "--against-inputs", "--sample", "all", cwd=here, expect=0)
    assert good.stdout.endswith("23 of 23 tensors computed again\nok\n") and good.stderr == ""
    assert pmerge("verify", "out", "--quiet", cwd=here, expect=0).stdout == ""
    (out / "tokenizer.json").write_text("{}")
    bad = pmerge("verify", "out", cwd=here, expect=1)
    assert "1 check failed" in bad.stdout and bad.stderr.startswith("error: out/tokenizer.json: has 2 bytes")
    quiet = pmerge("verify", "out", "-q", cwd=here, expect=1)
    assert quiet.stdout == "" and quiet.stderr == bad.stderr
    found = json.loads(pmerge("verify", "out", "--json", cwd=here, expect=1).stdout)
    assert found["ok"] is False and "tokenizer.json" in found["problems"][0] and found["files"][INDEX] == "ok"


def test_inputs_that_moved_are_found_below_their_new_root(tmp_path: Path) -> None:
    paths = nasty_run(tmp_path / "old" / "run", layout="sharded")
    average(paths, tmp_path / "out")
    shutil.copytree(tmp_path / "old" / "run", tmp_path / "new", copy_function=shutil.copyfile)  # with other times
    shutil.rmtree(tmp_path / "old")
    lost = pmerge("verify", "out", "--against-inputs", cwd=tmp_path, expect=1)
    assert "no such checkpoint" in lost.stderr
    again = ("verify", "out", "--against-inputs", "--inputs-root", "new")
    assert "computed again" in pmerge(*again, cwd=tmp_path).stdout
    assert "read them again:  --against-inputs" in pmerge("verify", "out", "--inputs-root", "new", cwd=tmp_path, expect=2).stderr
    shard = next((tmp_path / "new").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    pmerge(*again, cwd=tmp_path, expect=1)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_files_that_were_typed_through_links_have_not_changed(ending: str, tmp_path: Path) -> None:
    """As in the cache of the Hub, where blobs have other names."""
    typed = []
    for step in (1, 2):
        blob = tmp_path / "blobs" / f"{step:064x}"
        blob.parent.mkdir(exist_ok=True)
        if ending == "pt":
            blob = blob.with_suffix(".pt")
            torch.save({"w": torch.full((4,), float(step))}, blob)
        else:
            save_file({"w": torch.full((4,), float(step))}, str(blob))
        typed.append(tmp_path / f"model_step_{step}.{ending}")
        typed[-1].symlink_to(blob)
    average(typed, tmp_path / "out")
    assert verify(tmp_path / "out", against_inputs=True).problems == ()
    os.utime(typed[0], ns=(1, 1))
    assert any("has changed since" in line for line in verify(tmp_path / "out", against_inputs=True).problems)


def test_the_folder_of_a_sweep_is_verified_output_by_output(tmp_path: Path) -> None:
    nasty_run(tmp_path / "run", layout="sharded")
    pmerge("sweep", "run", "--method", "sma,wma", "-o", "sweep", cwd=tmp_path)
    good = pmerge("verify", "sweep", "--against-inputs", cwd=tmp_path)
    assert good.stdout.count("\nok\n") == 2 and "sweep/wma:" in good.stdout
    (tmp_path / "sweep" / "wma" / "config.json").write_text("{}")
    found = json.loads(pmerge("verify", "sweep", "--json", cwd=tmp_path, expect=1).stdout)
    assert [each["ok"] for each in found["outputs"]] == [True, False] and found["ok"] is False
    shutil.rmtree(tmp_path / "sweep" / "sma")
    lost = pmerge("verify", "sweep", cwd=tmp_path, expect=1)
    assert "no result of pmerge: sweep/sma" in lost.stderr and "error: sweep/wma/config.json" in lost.stderr
    found = json.loads(pmerge("verify", "sweep", "--json", cwd=tmp_path, expect=1).stdout)
    assert [len(each["problems"]) for each in found["outputs"]] == [1, 1]
    assert "--max-header" in pmerge("verify", "sweep", "--max-header", "10", cwd=tmp_path, expect=2).stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "no result of pmerge"),
        (["."], "no result of pmerge"),
        (["out", "--sample", "5"], "read them again:  --against-inputs"),
        (["out", "--against-inputs", "--sample", "0"], "--sample cannot be '0'"),
        (["out", "--against-inputs", "--sample", "9" * 5000], "--sample cannot be"),
        (["out", "--against-inputs", "--sample", "few"], "--sample cannot be 'few'"),
        ([], "missing argument"),
    ],
)
def test_wrong_usage_of_the_command(out: Path, arguments: list[str], text: str) -> None:
    assert text in pmerge("verify", *arguments, cwd=out.parent, expect=2).stderr
