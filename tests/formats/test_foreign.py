"""Checkpoints that pmerge does not read are recognized, and the next command is one that fits."""

from pathlib import Path

import pytest
from builders import write_checkpoint
from command import pmerge
from torch import ones

from merge_cli.errors import InputError, UnsupportedError
from merge_cli.features.average import plan_average
from merge_cli.request.discovery import discover
from merge_cli.stores.addresses import meant_address

FORMATS = {
    "megatron": (["iter_0001000/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"], "--ckpt-format torch_dist"),
    "megatron-pp": (["iter_0001000/mp_rank_00_001/model_optim_rng.pt"], "--ckpt-format torch_dist"),
    "deepspeed": (
        [
            "checkpoint-1/global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt",
            "checkpoint-1/latest",
            "checkpoint-1/zero_to_fp32.py",
        ],
        "checkpoint-1/zero_to_fp32.py",
    ),
    "deepspeed-16bit": (["checkpoint-1/zero_to_fp32.py", "checkpoint-1/model.bin"], "save_pretrained"),
    "transformers": (["checkpoint-1/model-00001-of-00002.bin", "checkpoint-1/optimizer.pt"], "from_pretrained"),
    "meta": (["step_1/consolidated.00.pth"], "safetensors.torch.save_file"),
    "lightning": (["run/epoch=1-step=100.ckpt"], "['state_dict']"),
    "gguf": (["step_1/model.gguf"], "average the safetensors that it was made from"),
    "onnx": (["step_1/model.onnx"], "with its framework"),
    "flax": (["step_1/flax_model.msgpack"], "with its framework"),
    "nanotron": (["10/model/model/token_embedding/model_weight.safetensors", "10/model_config.json"], "nanotron"),
    "optimizer": (["ckpt_1/optimizer.pt", "ckpt_1/trainer_state.json"], "into which the trainer saves the model"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_is_not_read_gets_its_own_next_command(name: str, tmp_path: Path) -> None:
    files, hint = FORMATS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    folder = tmp_path / files[0].split("/")[0]
    for path in (tmp_path, folder):  # a run folder, and a checkpoint that is named
        with pytest.raises(InputError) as refused:
            discover([path])
        assert hint in refused.value.hint, refused.value
        assert name in ("transformers", "deepspeed-16bit") or "save_pretrained" not in str(refused.value)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / f"step_{n}", {"w": ones(4)}, index=False) for n in (1, 2)]
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000000000\n"
    (paths[1] / "model.safetensors").write_text(pointer)
    with pytest.raises(UnsupportedError, match="is a Git LFS pointer") as refused:
        plan_average(tmp_path, tmp_path / "out")
    assert refused.value.hint == f"git -C {paths[1]} lfs pull"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("s3:/bucket/run", "s3://bucket/run"),
        ("s3:bucket/run", "s3://bucket/run"),
        ("hf:org/model@step1", "hf://org/model@step1"),
        ("gcs://bucket/run", "gs://bucket/run"),
        ("https://huggingface.co/org/model", "hf://org/model@step*"),
        ("https://huggingface.co/org/model/tree/step1", "hf://org/model@step1"),
        ("run/step_1", None),
        ("https://example.com/run", None),
    ],
)
def test_an_address_that_is_nearly_right(typed: str, meant: str | None) -> None:
    assert meant_address(typed) == meant
    with pytest.raises(InputError) as refused:
        discover([typed])
    assert ("did you mean" in refused.value.hint) == (meant is not None)
    assert meant is None or refused.value.hint == f"did you mean  {meant}"


def test_a_name_on_the_hub_and_a_folder_that_is_spelled_almost_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "step_1", {"w": ones(4)})
    hub = pmerge("average", "meta-llama/Llama-3.2-1B", cwd=tmp_path, expect=2)
    assert "hf://meta-llama/Llama-3.2-1B@step*" in hub.stderr
    assert "did you mean  " in (near := pmerge("average", "rnu", cwd=tmp_path, expect=2).stderr) and "run\n" in near
    assert "hf://" not in pmerge("average", "run/missing", cwd=tmp_path, expect=2).stderr


def test_an_index_of_other_shards_beside_a_whole_model_is_explained(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step_1", {"a": ones(4), "b": ones(4)}, shards=2)
    for shard in folder.glob("model-*"):
        shard.rename(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors is there, and the index does not name it"):
        plan_average([folder], tmp_path / "out")
