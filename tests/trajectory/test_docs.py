"""Every example of docs/trajectory.md runs as it stands, and its tables name every plan and
finding.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY

from merge_cli.trajectory.findings import STOPS_FORECAST
from merge_cli.trajectory.plans import PLANS

PAGE = (REPOSITORY / "docs" / "trajectory.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model that reads bytes: noise around trained weights, and a path that comes
    nearer to them.
    """
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("docs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other at this size
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=32))
    text = torch.frombuffer(bytearray(PAGE.encode()), dtype=torch.uint8).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        batch = text[torch.randint(len(text) - 32, (16, 1)) + torch.arange(32)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1000, 2001, 50):
        away = 1 - 0.1 * (2000 - step) / 1000
        noisy = {name: value * away + 0.15 * value.std() * torch.randn(value.shape) for name, value in trained.items()}
        model.load_state_dict(noisy)
        model.save_pretrained(folder / "run" / f"ckpt_{step}")
    torch.set_num_threads(threads)
    (folder / "held_out.txt").write_text(PAGE)
    script = next(example for example in PYTHON if example.startswith("# eval_loss.py"))
    (folder / "eval_loss.py").write_text(script)
    return folder


@pytest.mark.slow(reason="trains a tiny model, seven processes; test_evaluate, test_forecast, test_report")
@pytest.mark.parametrize("example", SHELL)
def test_shell_example(example: str, place: Path) -> None:
    """Processes, because the examples are what a user types; --text loads transformers once."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "forecast:" in done.stdout and "pmerge average run/ --method" in done.stdout
    if "report" in example:
        data = re.findall(r'id="pmerge-data">(.*?)</script>', (place / "report.html").read_text())
        assert json.loads(data[0])["forecast"]["now"]["value"] > 0


@pytest.mark.slow(reason="trains a tiny model; test_evaluate.test_a_forecast_from_start_to_end")
def test_python_example(place: Path) -> None:
    """A process, as in the examples of the shell."""
    (example,) = (text for text in PYTHON if "from merge_cli" in text)
    done = subprocess.run([sys.executable, "-c", example], cwd=place, check=True, capture_output=True, text=True, timeout=120)
    verdict, choice = done.stdout.splitlines()
    assert verdict == "measure it" and choice.split()[0] in ("sma", "wma", "ema", "decay")


def test_the_page_names_every_plan_and_every_reason_to_refuse() -> None:
    assert len(SHELL) == 2 and len(PYTHON) == 2
    assert all(f"`--plan {name}`" in PAGE for name in PLANS)
    missing = [name for name, stops in STOPS_FORECAST.items() if stops and f"`{name}`" not in PAGE]
    assert missing in ([], ["learning rate"])
    assert max(map(len, PAGE.splitlines())) <= 120
