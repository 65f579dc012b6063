"""Every example of the README runs as it stands, and every flag is in its table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import write_trained
from paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", README.split("## Five situations")[1], re.S)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for step in range(1000, 11000, 1000):
        write_trained(folder / "run" / f"ckpt_{step}", step)
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_there_are_examples() -> None:
    assert len(SHELL) == 6 and len(PYTHON) == 1


@pytest.mark.parametrize("example", SHELL)
def test_shell_example(example: str, place: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example], cwd=place, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_python_example(place: Path) -> None:
    subprocess.run([sys.executable, "-c", PYTHON[0]], cwd=place, check=True, timeout=120)
    assert (place / "merged" / "pmerge.json").exists()


@pytest.mark.parametrize("command", ["average", "finalize", "inspect", "methods", "sweep", "verify"])
def test_every_command_and_flag_is_documented(command: str) -> None:
    assert f"pmerge {command}" in README
    if command == "average":
        shown = subprocess.run(
            [Path(sys.executable).with_name("pmerge"), command, "--help"], capture_output=True, text=True, check=True, timeout=60
        )
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown.stdout)) - {"--help"}
        assert len(flags) > 25
        missing = {flag for flag in flags if f"`{flag}" not in README}
        assert not missing
