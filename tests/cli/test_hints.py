"""Every hint gets further: each wrong command of a newcomer is run, then the command of its hint,
which must not end with the same error.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import pytest
import torch
from builders import write_checkpoint
from builders import write_trained as write
from command import pmerge, start
from safetensors.torch import save_file

STEPS = (1000, 2000, 3000, 4000)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a run of four checkpoints."""
    for step in STEPS:
        write(tmp_path / "run" / f"ckpt_{step}", step)
    return tmp_path


Setup = Callable[[Path], object]


def files(*names: str) -> Setup:
    """A setup that writes small files that are no checkpoints."""

    def make(here: Path) -> None:
        for name in names:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_text("{}")

    return make


def nothing(here: Path) -> None:
    """The run alone."""


def loop(here: Path) -> None:
    (here / "loop").symlink_to("loop")


def dangling(here: Path) -> None:
    (here / "gone").symlink_to("elsewhere/ckpt")


def earlier(here: Path) -> None:
    pmerge("average", "run", "--last", 2, "-o", "run/merged", "--quiet", cwd=here)


def result(here: Path) -> None:
    pmerge("average", "run", "--last", 2, "-o", "out", "--quiet", cwd=here)


def truncated(here: Path) -> None:
    shard = here / "run/ckpt_2000/model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])


def only_two_with_one_broken(here: Path) -> None:
    for step in STEPS[:2]:
        write(here / "two" / f"ckpt_{step}", step)
    (here / "two/ckpt_2000/model-00002-of-00002.safetensors").unlink()


def only_one_and_empty(here: Path) -> None:
    write(here / "two" / "ckpt_1000", 1000)
    (here / "two" / "ckpt_2000").mkdir()


def epochs(here: Path) -> None:
    for number in (9, 10, 11):
        write_checkpoint(here / "ep" / f"epoch_{number}", {"w": torch.ones(3)}, index=False)


def same_steps(here: Path) -> None:
    write(here / "run" / "step-4000", 4000)


def nan(here: Path) -> None:
    write_checkpoint(here / "nan" / "ckpt_1", {"w": torch.ones(3)})
    write_checkpoint(here / "nan" / "ckpt_2", {"w": torch.full((3,), float("nan"))})


def vocabularies(here: Path) -> None:
    write(here / "run" / "ckpt_5000", 5000, rows=41)


def missing_tensor(here: Path) -> None:
    for step in (1, 2):
        write_checkpoint(here / "tied" / f"ckpt_{step}", {"w": torch.ones(3), **({"head": torch.ones(3)} if step == 1 else {})})


def foreign(here: Path) -> None:
    for step in (1, 2):
        write(here / "mixed" / f"ckpt_{step}", step)
        (here / "mixed" / f"ckpt_{step}" / "config.json").write_text("[]")


def lone_shard(here: Path) -> None:
    (here / "part").mkdir()
    save_file({"w": torch.ones(3)}, str(here / "part" / "model-00001-of-00002.safetensors"))


ROWS: list[tuple[str, Setup]] = [
    ("averge run", nothing),
    ("merge run", nothing),
    ("average run --methd ema", nothing),
    ("average run --method slerp", nothing),
    ("average run --method mean", nothing),
    ("average run --method linear", nothing),
    ("average run --method EMA", nothing),
    ("average run --method sma --alpha 0.2", nothing),
    ("average run --method ema --alpha 2", nothing),
    ("average run --method ema --alpha 0.2 --half-life 3", nothing),
    ("average", nothing),
    ("average ../rnu", nothing),
    ("average rnu", nothing),
    ("average opt", files("opt/ckpt_1/optimizer.pt", "opt/ckpt_2/optimizer.pt")),
    ("average meg", files("meg/iter_0001000/mp_rank_00/model_optim_rng.pt", "meg/latest_checkpointed_iteration.txt")),
    ("average run", truncated),
    ("average two", only_two_with_one_broken),
    ("average two --incomplete error", only_one_and_empty),
    ("average two/ckpt_1000 two/ckpt_2000", only_two_with_one_broken),
    ("average run --last 20", nothing),
    ("average run --last 0", nothing),
    ("average run --last -3", nothing),
    ("average run --last ten", nothing),
    ("average run --every 7", nothing),
    ("average run --every 700", nothing),
    ("average run/ckpt_1000 run/ckpt_1000/", nothing),
    ("average run/ckpt_1000:0.5 run/ckpt_2000:0.6", nothing),
    ("average run/ckpt_1000:0.5 run/ckpt_2000", nothing),
    ("average run --weights 0.2,0.3,0.6 --last 3", nothing),
    ("average run --from 9000 --to 2000", nothing),
    ("average run --before 500", nothing),
    ("average run --before 8B", nothing),
    ("average run/ckpt_1000/config.json", nothing),
    ("average run/ckpt_1000/model-00001-of-00002.safetensors", nothing),
    ("average run -o run", nothing),
    ("average run -o run/ckpt_1000/out --overwrite", nothing),
    ("average run -o out", result),
    ("average run -o foreign", files("foreign/notes.txt")),
    ("average run -o foreign --overwrite", files("foreign/notes.txt")),
    ("average run -o notes.txt", files("notes.txt")),
    ("average run -o notes.txt/x", files("notes.txt")),
    ("average run/ckpt_1000 run/ckpt_2000 run/merged", earlier),
    ("average nan", nan),
    ("average run", vocabularies),
    ("average tied", missing_tensor),
    ("average run", same_steps),
    ("average ep --from 1B", epochs),
    ("average ep --last 2 --order given", epochs),
    ("average run --include '*.nothing*'", nothing),
    ("average run --device cuda:99", nothing),
    ("average run --threads 0", nothing),
    ("average run --rank 9 --world-size 4", nothing),
    ("average run --memory lots", nothing),
    ("average run --memory 10kB", nothing),
    ("average run --base run/ckpt_9", nothing),
    ("average run --dtype bfloat16", nothing),
    ("average run --order newest", nothing),
    ("average loop", loop),
    ("average run -o loop", loop),
    ("average run -o loop --overwrite", loop),
    ("average run -o loop/out", loop),
    ("average run --base loop", loop),
    ("average gone", dangling),
    ("average run -o gone", dangling),
    ("average part/model-00001-of-00002.safetensors", lone_shard),
    ("average part", lone_shard),
    ("average mixed", foreign),
    ("average 'run/step_*/'", nothing),
    ("average 'run/*'", nothing),
    ("average run -o ''", nothing),
    ("average run -o merged.safetensors", nothing),
    ("average run -o s3://bucket/merged", nothing),
    ("average run --tokens-per-step 4M", nothing),
    ("average run --exclude '*'", nothing),
    ("average run --storage-bandwidth 5GB", nothing),
    ("verify run/ckpt_1000", nothing),
    ("verify rnu", nothing),
    ("finalize run/ckpt_1000", nothing),
    ("inspect rnu", nothing),
    ("inspect loop", loop),
    ("methods mean", nothing),
    ("methods slerp", nothing),
    ("sweep run -o s --method mean", nothing),
    ("sweep run -o s --at 7777", nothing),
    ("sweep run -o loop", loop),
    ("sweep run -o s --last ten", nothing),
    ("verify out --sample 3", result),
    ("evaluate run", nothing),
    ("analyze rnu", nothing),
    ("forecast run", nothing),
    ("report run", nothing),
    ("push run/ckpt_1000 hf://org/model", nothing),
    ("watch rnu --once --last 2", nothing),
    ("watch loop --once --last 2", loop),
]

NO_COMMAND = {
    "average opt": "the trainer has to save the model first",
    "average meg": "Megatron has to save it in its newer format",
    "average two": "of two checkpoints one is incomplete: only a copy of it helps",
    "average two --incomplete error": "of two checkpoints one is empty: only a copy of it helps",
    "average two/ckpt_1000 two/ckpt_2000": "it was named, so it is not left out",
    "average part": "a shard is missing: only a copy of it helps",
    "average mixed": "the file is broken: only a copy of it helps",
    "average run --method ema --alpha 0.2 --half-life 3": "either may be meant",
    "average run/ckpt_1000 run/ckpt_1000/": "either is enough",
    "push run/ckpt_1000 hf://org/model": "other tools push what pmerge did not make",
    "average run --exclude '*'": "only its user knows the tensors that are meant",
}
"""Wrong commands whose hint names no command of this machine, and why."""

COMMANDS = ("pmerge", "ls")


def parts_of(hint: str) -> list[str]:
    """The commands and options in a hint: each lies between two spaces, or is the whole of it."""
    parts = [part.strip(" ,;") for part in re.split(r"  +|; ", hint)]
    before = ["", *parts]
    return [
        part
        for part, last in zip(parts, before, strict=False)
        if part.startswith(("-", *COMMANDS)) or last.endswith((":", "did you mean")) or " " not in hint
    ]


def with_part(typed: list[str], part: str) -> list[str]:
    """The typed command as the hint wants it: with an option set anew or added, or with the word
    that was meant.
    """
    words = shlex.split(part)
    if words[0] == "pmerge":
        return words[1:]
    if words[0].startswith("-"):
        typed = list(typed)
        while words:
            flag, value = words.pop(0), [words.pop(0)] if words and not words[0].startswith("-") else []
            if flag in typed:
                place = typed.index(flag)
                typed[place : place + 1 + len(value)] = [flag, *value]
            elif value or not (near := get_close_matches(flag, [word for word in typed if word.startswith("--")], 1)):
                typed += [flag, *value]
            else:
                typed[typed.index(near[0])] = flag
        return typed
    without = [word for word in typed if words[0].startswith(f"{word}:")]  # PATH:WEIGHT for PATH
    (nearest,) = without or get_close_matches(words[0], typed, 1, 0.0)
    return [words[0] if word == nearest else word for word in typed]


def expanded(word: str, here: Path) -> list[str]:
    """A word as a shell expands it where it is not quoted."""
    found = sorted(str(path.relative_to(here)) for path in here.glob(word)) if "*" in word and "/" in word else []
    return found or [word]


def error_of(stderr: str) -> str:
    return next((line for line in stderr.splitlines() if line.startswith("error: ")), "")


@pytest.mark.parametrize(("command", "setup"), ROWS, ids=[f"{text} {setup.__name__}" for text, setup in ROWS])
def test_the_command_of_a_hint_gets_further(command: str, setup: Setup, here: Path) -> None:
    setup(here)
    typed = shlex.split(command)
    wrong = start(*typed, cwd=here).end()
    error = error_of(wrong.stderr)
    assert error and wrong.code in (1, 2), wrong.stderr
    hint = wrong.stderr.rpartition("hint: ")[2].strip()
    parts = parts_of(hint)
    assert bool(parts) == (command not in NO_COMMAND), wrong.stderr
    for part in parts:
        if part.startswith("ls"):
            subprocess.run(shlex.split(part.partition("*")[0]), cwd=here, check=True, capture_output=True)
            continue
        again = [each for word in with_part(typed, part) for each in expanded(word, here)]
        after = start(*again, cwd=here).end()
        assert error_of(after.stderr) != error, f"{part}: {after.stderr}"
        assert "Traceback" not in after.stderr
