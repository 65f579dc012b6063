"""torchrun olmo_core_run.py save RUN | load RUN MERGED STATE CHECKPOINT...: OLMo-core's own
functions write checkpoints and load a result, which is compared with the mean of the checkpoints.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from olmo_core.distributed.checkpoint import load_model_and_optim_state, save_model_and_optim_state, unshard_checkpoint  # noqa: E402
from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemReader  # noqa: E402
from olmo_core.train.checkpoint import Checkpointer  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from trainers.common import all_equal, check, mean_of  # noqa: E402


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(61, 24), nn.Linear(24, 50), nn.GELU(), nn.Linear(50, 61))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def save(run: Path) -> None:
    model, optimizer = build(0)
    for step in (1000, 2000, 3000):
        for _ in range(3):
            model(torch.randint(0, 61, (4, 9))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = run / f"step{step}"
        save_model_and_optim_state(folder / "model_and_optim", model, optimizer)
        if dist.get_rank() == 0:
            (folder / "train").mkdir()
            torch.save({"global_step": step}, folder / "train" / "rank0.pt")
            (folder / ".metadata.json").write_text(json.dumps({"version": "v2.0", "ephemeral": False}))
            (folder / "config.json").write_text("{}")
        dist.barrier()


def load(merged: Path, kind: str, folders: list[Path]) -> None:
    expected = mean_of(folders, RemoteFileSystemReader)
    model, optimizer = build(99)
    load_model_and_optim_state(merged / "model_and_optim", model, None if kind == "drop" else optimizer)
    weights = {f"model.{name}": tensor.full_tensor() for name, tensor in model.state_dict().items()}
    ranks = dist.get_world_size()
    check("OLMo-core", f"{kind}: load_model_and_optim_state on {ranks} ranks, equal to the mean", all_equal(weights, expected))
    if kind == "drop":
        state = Checkpointer.dir_is_checkpoint(str(merged / "model_and_optim"))
        check("OLMo-core", f"{kind}: Checkpointer takes model_and_optim for a checkpoint of weights", state)
    else:
        check("OLMo-core", f"{kind}: Checkpointer takes the folder for a checkpoint", Checkpointer.dir_is_checkpoint(str(merged)))
        newest = mean_of(folders[-1:], RemoteFileSystemReader)
        names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
        moments = {f"optim.state.{names[p]}.exp_avg": entry["exp_avg"].full_tensor() for p, entry in optimizer.state.items()}
        of = "the mean" if kind == "average" else "the newest's"
        check("OLMo-core", f"{kind}: moments are {of}", all_equal(moments, expected if kind == "average" else newest))


def unshard(run: Path, merged: Path, kind: str, folders: list[Path]) -> None:
    """OLMo-core's way to one file; it must not be called by ranks."""
    found, _ = unshard_checkpoint(merged / "model_and_optim", run / f"unsharded-{merged.name}", optim=False, save_overwrite=True)
    weights = {f"model.{name}": tensor for name, tensor in torch.load(found).items()}
    check(
        "OLMo-core", f"{kind}: unshard_checkpoint, equal to the mean", all_equal(weights, mean_of(folders, RemoteFileSystemReader))
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    given = [Path(each) / "model_and_optim" for each in sys.argv[5:]]
    alone = dist.get_world_size() == 1
    if sys.argv[1] == "save":
        save(Path(sys.argv[2]))
    else:
        load(Path(sys.argv[3]), sys.argv[4], given)
    dist.destroy_process_group()
    if alone:
        unshard(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], given)
