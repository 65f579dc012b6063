"""Forecast and choice against real training: a language model in miniature, three seeds, each with
a real annealing.

A byte-level GPT reads Python's own sources, with AdamW at a constant rate, and is annealed linearly
over the last fifth of the run on the same batches. What `evaluate --plan auto` measures has to
foretell the annealed loss, and to propose a merge that is nearly the best of a grid.
"""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from merge_cli.features.evaluate import evaluate
from merge_cli.features.forecast import forecast
from merge_cli.trajectory.evaluators import Subject
from merge_cli.trajectory.results import Result

CONTEXT, WIDTH, LAYERS, HEADS, BATCH = 128, 80, 2, 4, 10
STEPS, EVERY, WARM_UP, DECAY, RATE = 2000, 20, 100, 400, 2e-3
HELD_OUT = 192
SEEDS = (1, 2, 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        added: Tensor = self.down(functional.gelu(self.up(self.between(x))))
        return x + added


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.02)

    def forward(self, text: Tensor) -> Tensor:
        """The mean loss of all bytes but the first of each row."""
        x = self.bytes(text[:, :-1]) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), text[:, 1:].flatten())


class Texts(NamedTuple):
    training: Tensor
    held_out: Tensor


@pytest.fixture(scope="module")
def texts() -> Iterator[Texts]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not {"site-packages", "test", "idlelib"} & set(path.relative_to(root).parts)
    )
    data = torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    pieces = data[: len(data) // 4096 * 4096].view(-1, 4096)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    held_out = pieces[order[:HELD_OUT], : CONTEXT + 1].long()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other at this size
    yield Texts(pieces[order[HELD_OUT:]].reshape(-1), held_out)
    torch.set_num_threads(threads)


def train(
    model: Gpt, optimizer: torch.optim.Optimizer, text: Tensor, seed: int, steps: range, rate: Callable[[int], float]
) -> None:
    """Train for `steps`; the batch of a step depends on the seed and the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
        loss = model(text[starts + torch.arange(CONTEXT + 1)].long())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def optimizer_of(model: Gpt) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))


class Loss:
    """Measures the held-out loss of a checkpoint in this process."""

    identity = "held-out loss of the miniature"
    warnings: Sequence[str] = ()
    at_once = 1

    def __init__(self, held_out: Tensor) -> None:
        self._held_out = held_out
        self._model = Gpt()

    def measure(self, subject: Subject, folder: Path, slot: int) -> Result:
        self._model.load_state_dict(load_file(subject.path / "model.safetensors"))
        with torch.no_grad():
            return Result({"loss": float(self._model(self._held_out))}, {}, (), "in process")

    def stop(self) -> None:
        pass


def run_of(folder: Path, texts: Texts, seed: int) -> Path:
    """A run at a constant rate, checkpoints over its second half; beside it `annealed/ckpt_N`."""
    torch.manual_seed(seed)
    model = Gpt()
    optimizer = optimizer_of(model)

    def constant(step: int) -> float:
        return RATE * min(1.0, (step + 1) / WARM_UP)

    def save(where: Path, one: Gpt) -> None:
        where.mkdir(parents=True)
        save_file(one.state_dict(), where / "model.safetensors", {"format": "pt"})
        (where / "config.json").write_text("{}")

    fork: tuple[dict[str, Any], dict[str, Any]] | None = None
    for step in range(EVERY, STEPS + 1, EVERY):
        train(model, optimizer, texts.training, seed, range(step - EVERY, step), constant)
        if step >= STEPS // 2:
            save(folder / "run" / f"ckpt_{step}", model)
        if step == STEPS - DECAY:
            fork = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert fork is not None
    annealed = Gpt()
    annealed.load_state_dict(fork[0])
    optimizer = optimizer_of(annealed)
    optimizer.load_state_dict(fork[1])
    train(annealed, optimizer, texts.training, seed, range(STEPS - DECAY, STEPS), lambda step: RATE * (STEPS - step) / DECAY)
    save(folder / "annealed" / f"ckpt_{STEPS}", annealed)
    return folder / "run"


GRID = [
    {"method": method, "last": last, "every": every, "at": STEPS}
    for method in ("sma", "wma")
    for every in (EVERY, 2 * EVERY, 4 * EVERY)
    for last in (2, 4, 6, 8, 12, 16, 24, 32)
    if every * (last - 1) <= STEPS // 2
]


@pytest.mark.slow(reason="trains three models for minutes; test_forecast.py has the closed forms, and figures of pilots")
def test_six_evaluations_foretell_the_annealed_loss_and_the_best_merge(texts: Texts, tmp_path: Path) -> None:
    """Figures of each seed are printed (`-s`)."""
    evaluator, errors, regrets = Loss(texts.held_out), [], []
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        run = run_of(folder, texts, seed)
        evaluate(run, evaluator, plan="auto", output=folder / "evals")
        found = forecast(run, output=folder / "evals")
        assert found.now is not None and found.choice is not None and found.level is not None, found.refusals
        annealed = evaluator.measure(Subject("annealed", folder / "annealed" / f"ckpt_{STEPS}", ""), folder, 0).metrics["loss"]
        drop = found.level.value - annealed
        errors.append((found.now.value - annealed) / drop)
        top = found.choice
        chosen = {"name": "chosen", "method": top.method, "last": top.n, "every": int(top.spacing), "at": STEPS}
        rows = evaluate(run, evaluator, plan=[chosen, *GRID], output=folder / "grid").rows
        losses = [row.metrics["loss"] for row in rows]
        best, chosen_loss = min(losses), rows[0].metrics["loss"]
        assert rows[0].name == "chosen"
        regrets.append((chosen_loss - best) / (found.level.value - best))
        print(
            f"seed {seed}: l(T) {found.level.value:.4f}, annealed {annealed:.4f}, forecast {found.now.value:.4f}"
            f" ({errors[-1]:+.1%} of the drop); {top.method} of {top.n} every {top.spacing:.0f}: {chosen_loss:.4f},"
            f" best of {len(losses)} {best:.4f} (regret {regrets[-1]:.1%})"
        )
    assert sum(map(abs, errors)) / len(errors) < 0.15 and max(map(abs, errors)) < 0.25, errors
    assert max(regrets) < 0.05, regrets
