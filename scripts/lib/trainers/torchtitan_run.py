"""torchrun torchtitan_run.py train RUN | resume RUN MERGED STATE CHECKPOINT...: a tiny model, FSDP2
and torchtitan's own CheckpointManager; the result is compared with the mean of the checkpoints.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torchtitan.components.checkpointer.dcp import CheckpointManager  # noqa: E402

from trainers.common import all_equal, check, mean_of  # noqa: E402

VOCABULARY, WIDTH = 67, 24
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        block = {str(i): nn.Sequential(nn.Linear(WIDTH, 50), nn.GELU(), nn.Linear(50, WIDTH)) for i in range(2)}
        self.layers = nn.ModuleDict(block)
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Any) -> Any:
        hidden = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            hidden = hidden + layer(hidden)
        return self.output(hidden)


class Optimizer(Stateful):
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=FLAT)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state, options=FLAT)


class Schedule(Stateful):
    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class TrainState(Stateful):
    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


def main() -> None:
    mode, run = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    torch.manual_seed(0 if mode == "train" else 99)
    model = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, state = torch.optim.AdamW(model.parameters(), lr=3e-3), TrainState()
    options: dict[str, Any] = dict(enable=True, folder="checkpoint", interval=10, keep_latest_k=0, last_save_model_only=False)
    if mode == "resume":
        options |= dict(
            initial_load_path=str(Path(sys.argv[3]).absolute()),
            initial_load_model_only=sys.argv[4] == "drop",
            folder=f"resumed-{sys.argv[4]}-{dist.get_world_size()}",
        )
    manager = CheckpointManager(
        CheckpointManager.Config(**options), dataloader=Schedule(), model_parts=[model], optimizers=Optimizer(model, optimizer),
        lr_schedulers=Schedule(), states={"train_state": state}, sd_adapter=None, base_folder=str(run),
    )  # fmt: skip
    if mode == "resume":
        resume([Path(each) for each in sys.argv[5:]], sys.argv[4], manager, model, optimizer, state)
    losses = train(model, optimizer, state, manager, 30 if mode == "train" else state.step + 10, mode == "train")
    if mode == "resume":
        check("torchtitan", f"{sys.argv[4]}: trains on, loss {losses[0]:.3f} to {losses[-1]:.3f}", losses[-1] < losses[0])
    manager.close()
    dist.destroy_process_group()


def resume(
    merged: list[Path], kind: str, manager: Any, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
) -> None:
    loaded = manager.load()
    weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    expected = mean_of(merged)
    ranks = dist.get_world_size()
    check(
        "torchtitan",
        f"{kind}: CheckpointManager loads the result on {ranks} ranks, equal to the mean",
        loaded and all_equal(weights, expected),
    )
    check(
        "torchtitan",
        f"{kind}: step {state.step}, {len(optimizer.state)} optimizer entries",
        state.step == (0 if kind == "drop" else 30),
    )
    if kind != "drop":
        newest = mean_of(merged[-1:])
        names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
        moments = {f"optimizer.state.{names[p]}.exp_avg": entry["exp_avg"].full_tensor() for p, entry in optimizer.state.items()}
        of = "the mean" if kind == "average" else "the newest's"
        check("torchtitan", f"{kind}: moments are {of}", all_equal(moments, expected if kind == "average" else newest))


def train(model: nn.Module, optimizer: Any, state: TrainState, manager: Any, last: int, save: bool) -> list[float]:
    data = torch.randint(0, VOCABULARY, (400, 17), generator=torch.Generator().manual_seed(5))
    data[:, 1:] = (data[:, :1] * 3 + torch.arange(1, 17)) % VOCABULARY
    losses = []
    for step in range(state.step + 1, last + 1):
        batch = data[(step * 16) % 384 : (step * 16) % 384 + 16]
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        state.step = step
        losses.append(loss.item())
        if save:
            manager.save(step)
    return losses


if __name__ == "__main__":
    main()
