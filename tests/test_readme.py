"""Every example of the README and of the pages that it opens runs as it stands, its plan is the
present one, and every flag is on a page.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import write_trained
from command import pmerge
from paths import REPOSITORY
from schemes import quantized_run

PAGES = ("README.md", *(f"docs/{name}.md" for name in ("selection", "sweeps", "verifying", "quantized", "ranks", "python")))
TEXT = {page: (REPOSITORY / page).read_text() for page in PAGES}
README = TEXT["README.md"]


def examples(language: str) -> list[tuple[str, str]]:
    """Each example of a page, but for those that set pmerge up."""
    found = [(page, text) for page in PAGES for text in re.findall(rf"```{language}\n(.*?)```", TEXT[page], re.S)]
    return [(page, text) for page, text in found if "scripts/" not in text]


SHELL, PYTHON = examples("sh"), examples("python")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for step in range(1000, 11000, 1000):
        write_trained(folder / "run" / f"ckpt_{step}", step)
    quantized_run(folder / "quantized", "DeepSeek-V3")
    return folder


@pytest.fixture
def place(runs: Path, tmp_path: Path) -> Path:
    """A folder with the runs and nothing else, for one example."""
    return Path(shutil.copytree(runs, tmp_path / "place"))


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}


def test_there_are_examples() -> None:
    assert {page for page, _ in [*SHELL, *PYTHON]} == set(PAGES) and len(SHELL) >= 12 and len(PYTHON) == 3


@pytest.mark.parametrize(("page", "example"), SHELL, ids=[page for page, _ in SHELL])
def test_shell_example(page: str, example: str, place: Path) -> None:
    """By the installed command, as it is typed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example], cwd=place, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(("page", "example"), PYTHON)
def test_python_example(page: str, example: str, place: Path) -> None:
    """In a process of its own, whose current folder is that of the example."""
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=place, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout
    assert "False" not in done.stdout


def test_the_plan_is_the_present_one(place: Path) -> None:
    (command,) = [text.split("\n")[0] for text in re.findall(r"```sh\n(pmerge average .*wma.*\n)```", README)]
    (shown,) = [text for text in re.findall(r"```text\n(.*?)```", README, re.S) if text.startswith("average of")]
    done = pmerge(*command.split()[1:], cwd=place)
    own = [line for line in done.stderr.splitlines() if not line.startswith(("  read ", "done in "))]
    assert shown.splitlines() == own, "paste the lines of stderr into the README"


def test_every_command_and_flag_is_documented() -> None:
    pages = "".join(TEXT.values())
    from merge_cli.cli.app import COMMANDS

    assert [name for name in COMMANDS if f"pmerge {name}" not in pages and f"`{name}`" not in pages] == []
    shown = subprocess.run(
        [Path(sys.executable).with_name("pmerge"), "average", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown.stdout)) - {"--help"}
    page = (REPOSITORY / "docs" / "flags.md").read_text()
    assert len(flags) > 25 and {flag for flag in flags if f"`{flag}" not in page} == set()


def test_links_lead_to_pages() -> None:
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
