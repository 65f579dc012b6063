"""The plan names the kernel, and torch in its place is mentioned once, unless somebody chose it."""

import json
from pathlib import Path

import pytest
from builders import write_trained
from typer.testing import CliRunner, Result

from merge_cli.cli.app import make_app
from merge_cli.engine.kernels import native

SLOWER = "torch does the sums"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    for step in (1000, 2000):
        write_trained(tmp_path / f"checkpoint-{step}", step)
    return tmp_path


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: "the native kernel was not built")


def typed(*arguments: object) -> Result:
    if arguments[0] == "sweep":
        arguments = (*arguments, "--method", "sma")
    done = CliRunner().invoke(make_app([str(arguments[0])]), list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    return done


@pytest.mark.parametrize("command", ["average", "sweep"])
def test_the_plan_names_the_kernel(run: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*native.kernels(), "torch"]:
        monkeypatch.setenv(native.VARIABLE, name)
        done = typed(command, run, "-o", run / "out", "--device", "cpu", "--dry-run", "--json")
        assert json.loads(done.stdout)["kernel"] == name
        assert f"device cpu, kernel {name}" in done.stderr
        assert SLOWER not in done.stderr


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("command", ["average", "sweep"])
def test_torch_in_place_of_the_kernel_is_mentioned_once(run: Path, command: str) -> None:
    done = typed(command, run, "-o", run / "out", "--device", "cpu")
    assert done.stderr.count(SLOWER) == 1
    assert "note: the native kernel was not built: torch does the sums" in done.stderr
    assert typed(command, run, "-o", run / "quiet", "--device", "cpu", "--quiet").stderr == ""
