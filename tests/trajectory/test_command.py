"""Evaluation commands, filled in for paths as odd as a filesystem allows, and their results read."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from merge_cli.errors import UsageError
from merge_cli.trajectory.command import check_command, fill, variables
from merge_cli.trajectory.results import ResultError, digits, is_loss, lower_is_better, main_metric, pick, read_result

ODD = ["plain", "a b", "it's", 'say "x"', "$HOME", "`id`", "a;b", "-n", "new\nline", "\\", "ü", "{name}", "*"]


@pytest.mark.parametrize("name", ODD)
def test_a_path_reaches_the_command_unchanged(name: str, tmp_path: Path) -> None:
    """A shell is started, because its rules of quoting are the point."""
    values = {"path": f"/x/{name}", "name": name, "step": "10", "out": "/o"}
    command = """printf '%s|' {path} pre={path},post {name} {step} {out} "$PMERGE_PATH" "$PMERGE_NAME" "$PMERGE_RESULT" '{other}'"""
    assert check_command(command) == []
    environment = {**os.environ, **variables(values, tmp_path / "result")}
    done = subprocess.run(["sh", "-c", fill(command, values)], env=environment, capture_output=True, check=True)
    path = f"/x/{name}"
    expected = [path, f"pre={path},post", name, "10", "/o", path, name, str(tmp_path / "result"), "{other}", ""]
    assert done.stdout.decode() == "|".join(expected)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval '{path}'", "inside single quotes"),
        ('eval "{path}/x"', "inside double quotes"),
        ('eval --a "b {out}"', "inside double quotes"),
        ('eval "it\'s {path}"', "inside double quotes"),
        ("eval ${path}", "variable of the shell"),
        (" ", "is empty"),
    ],
)
def test_commands_that_cannot_be_filled_in(command: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        check_command(command)
    assert error.value.hint


def test_quotes_beside_a_placeholder_are_fine() -> None:
    assert check_command("eval 'a' {path} \"b\" it\\'s {out}") == []


def test_warnings_of_commands() -> None:
    assert "neither {path} nor $PMERGE_PATH" in check_command("python eval.py")[0]
    assert check_command("python eval.py $PMERGE_PATH") == []
    assert "cache" in check_command("lm_eval --model_args pretrained={path} --use_cache /tmp/c")[0]
    assert "cache" in check_command("lm-eval run --model_args pretrained={path} -c /tmp/c")[0]
    assert check_command("lm_eval --model_args pretrained={path} --cache_requests true") == []


def result(tmp_path: Path, stdout: str = "", file: object = None) -> Any:
    path = tmp_path / "result.json"
    if file is not None:
        path.write_text(file if isinstance(file, str) else json.dumps(file))
    (tmp_path / "out").mkdir(exist_ok=True)
    return read_result(path, tmp_path / "out", stdout)


LM_EVAL = {
    "results": {
        "hellaswag": {
            "alias": "hellaswag",
            "acc,none": 0.3125,
            "acc_stderr,none": 0.0146,
            "acc_norm,none": 0.375,
            "acc_norm_stderr,none": "N/A",
            "sample_len": 1000,
        },
        "wikitext": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A", "bits_per_byte,none": 0.7},
    },
    "config": {"model_num_parameters": 123, "batch_size": 8},
    "date": 1732620000.1,
    "total_evaluation_time_seconds": "12.3",
}


def test_lm_eval(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "__tmp__merged"
    folder.mkdir(parents=True)
    (folder / "results_2026-11-26T10-00-00.json").write_text(json.dumps({"results": {"old": {"acc,none": 0.0}}}))
    os.utime(folder / "results_2026-11-26T10-00-00.json", (1, 1))
    (folder / "results_2026-11-26T11-00-00.json").write_text(json.dumps(LM_EVAL))
    (folder / "samples_x.json").write_text("[]")
    found = result(tmp_path, "1.5")
    assert found.metrics == {
        "hellaswag.acc,none": 0.3125,
        "hellaswag.acc_norm,none": 0.375,
        "wikitext.word_perplexity,none": 12.5,
        "wikitext.bits_per_byte,none": 0.7,
    }
    assert found.errors == {"hellaswag.acc,none": 0.0146}
    assert pick(found.metrics, ["results.hellaswag.acc,none", "wikitext.bits_per_byte,none"]) == [
        "hellaswag.acc,none",
        "wikitext.bits_per_byte,none",
    ]
    with pytest.raises(ResultError, match="no metric mmlu"):
        pick(found.metrics, ["mmlu"])
    assert main_metric(list(found.metrics)) == "wikitext.bits_per_byte,none"


@pytest.mark.parametrize(
    ("stdout", "expected"),
    [
        ("1.25", {"value": 1.25}),
        ("loading\n1.25\n\n", {"value": 1.25}),
        ("7\n{'not': json}\n", {"value": 7.0}),
        ('{"loss": 2, "n": true, "deep": {"acc": 0.5}}\nbye\n', {"loss": 2.0, "deep.acc": 0.5}),
        ("[1]\n  3e-1  \n", {"value": 0.3}),
    ],
)
def test_stdout(stdout: str, expected: dict[str, float], tmp_path: Path) -> None:
    assert result(tmp_path, stdout).metrics == expected


def test_the_result_file_comes_first_and_may_hold_documents(tmp_path: Path) -> None:
    found = result(tmp_path, "9", {"loss": 1.5, "loss_stderr": 0.1, "documents": [[3.0, 2, 8]]})
    assert found.metrics == {"loss": 1.5} and found.errors == {"loss": 0.1}
    assert found.documents == ((3.0, 2, 8),) and found.source == "PMERGE_RESULT"


@pytest.mark.parametrize(
    ("stdout", "file", "message"),
    [
        ("done", None, "left no result"),
        ("5\nnan", None, "value is nan"),
        ('{"loss": Infinity}', None, "loss is inf"),
        ("1" + "0" * 400, None, "value is inf"),
        ('{"name": "x"}', None, "no numbers"),
        ("", "{", "not valid JSON"),
        ("", {"documents": [1], "loss": 1}, "a document"),
    ],
)
def test_results_that_are_none(stdout: str, file: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=message):
        result(tmp_path, stdout, file)


def test_kinds_of_metrics() -> None:
    losses = ["loss", "eval_loss", "val.loss", "lm_loss", "nll", "wikitext.bits_per_byte,none", "held-out loss"]
    others = ["hellaswag.acc,none", "value", "word_perplexity,none", "lossless", "em", "glossary", "pass@1"]
    assert all(map(is_loss, losses)) and not any(map(is_loss, others))
    assert all(map(lower_is_better, [*losses, "word_perplexity,none", "error_rate"])) and not lower_is_better("acc")
    assert digits({"a": 0.125}) == 3 and digits({"a": 1.0, "b": 0.1}) == 2 and digits({"a": 0.0}) == 0
