"""Errors of the command line: one form for all, and with --json an object on stdout too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from merge_cli.cli import app, console
from merge_cli.errors import PmergeError


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["average", "nowhere"], "no such checkpoint: nowhere", "ls ."),
        (["average", "run", "--method", "EMA"], "--method cannot be 'EMA'", "did you mean  --method ema"),
        (["average", "run", "--dtype", "bfloat16"], "--dtype cannot be 'bfloat16'", "did you mean  --dtype bf16"),
        (["average", "run", "--shape", "sqrt", "--method", "decay"], "--shape cannot be 'sqrt'", "did you mean  --shape 1-sqrt"),
        (["sweep", "run", "-o", "out", "--method", "sma,mean"], "--method cannot be 'mean'", "did you mean  --method sma"),
        (["methods", "mean"], "unknown method 'mean'", "did you mean  pmerge methods sma"),
        (["average", "run", "--methd", "sma"], "no such option", "did you mean  --method"),
        (["average"], "missing argument", "pmerge average --help"),
        (["averge"], "no such command 'averge'", "did you mean  average"),
        (["xyzzy"], "no such command 'xyzzy'", "pmerge --help"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_text_and_with_json_an_object_too(
    arguments: list[str],
    message: str,
    hint: str,
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pmerge", *arguments, *(["--json"] if as_json else [])])
    with pytest.raises(PmergeError) as error:
        app.run()
    assert error.value.exit_code == 2
    console.report_error(error.value)
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {message}") and hint in shown.err
    if as_json:
        found = json.loads(shown.out)
        assert found["error"].startswith(message) and hint in found["hint"] and isinstance(found["details"], list)
    else:
        assert shown.out == ""


def test_the_process_ends_with_the_exit_code_of_the_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "merge_cli", "average", "nowhere", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "no such checkpoint: nowhere"
    assert done.stderr.startswith("error: no such checkpoint: nowhere\n")


def test_a_rank_that_reports_to_another_leaves_stdout_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pmerge", "average", "run", "--json"])
    monkeypatch.setattr(console, "_prefix", "rank 1 of 2: ")
    console.report_error(PmergeError("broken"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", [[], ["average"], ["sweep"], ["methods"]])
def test_h_is_help(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for flag in ("-h", "--help"):
        monkeypatch.setattr(sys, "argv", ["pmerge", *command, flag])
        assert app.run() == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "Example:" in shown[0] and "-h, --help" in shown[0]


def test_without_a_command_the_help_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pmerge"])
    assert app.run() == 2
    shown = capsys.readouterr()
    assert "Commands:" in shown.out + shown.err
