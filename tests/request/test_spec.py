"""The options: read from text and from Python values alike, checked when a spec is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merge_cli.cli.weights import split_weights
from merge_cli.errors import UsageError
from merge_cli.request.destination import destination_of
from merge_cli.request.discovery import discover
from merge_cli.request.labels import Candidate
from merge_cli.request.option import Options, options_of
from merge_cli.request.selection import select
from merge_cli.request.spec import MergeSpec, Processes, RunConfig, Selection, read_options

SPECS: list[type[Options]] = [Selection, MergeSpec, RunConfig, Processes]


def test_text_and_numbers_mean_the_same() -> None:
    assert RunConfig(memory="1GiB", threads="3", chunk_size="4MB") == RunConfig(memory=2**30, threads=3, chunk_size=4_000_000)  # type: ignore[arg-type]
    assert Selection(last="3", tokens_per_step="4M") == Selection(last=3, tokens_per_step=4_000_000)  # type: ignore[arg-type]
    assert MergeSpec(include="*.norm", exclude=["a", "b"]) == MergeSpec(include=("*.norm",), exclude=("a", "b"))  # type: ignore[arg-type]
    assert Processes(workers="2") == Processes(workers=2)
    assert Processes(workers="auto").workers == "auto"


def test_every_option_has_a_flag_of_its_own_and_a_help_text() -> None:
    found = [each for spec in SPECS for each in options_of(spec)]
    assert all(each.help and each.flag.startswith("--") for each in found)
    assert len({each.flag for each in found}) == len({each.name for each in found}) == len(found)


@pytest.mark.parametrize("spec", SPECS)
def test_defaults_are_valid_and_given_as_they_are_kept(spec: type[Options]) -> None:
    made = spec()
    for each in options_of(spec):
        assert getattr(made, each.field) == each.default, each.name


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (MergeSpec, {"dtype": "int8"}, "--dtype cannot be 'int8'"),
        (MergeSpec, {"dtype": None}, "--dtype cannot be None"),
        (MergeSpec, {"requantize": "yes"}, "--requantize cannot be 'yes'"),
        (MergeSpec, {"shard_bytes": "5 pounds"}, "--shard-size cannot be '5 pounds'"),
        (Selection, {"last": 0}, "--last must be at least 1, not 0"),
        (Selection, {"last": 2.5}, "--last cannot be 2.5"),
        (Selection, {"last": True}, "--last cannot be True"),
        (Selection, {"every": 1.5}, "--every cannot be 1.5"),
        (RunConfig, {"memory": 0}, "--memory must be more than 0 bytes"),
        (RunConfig, {"memory": None}, "--memory cannot be None"),
        (RunConfig, {"threads": 257}, "--threads must be at most 256, not 257"),
        (Processes, {"workers": 0}, "--workers cannot be 0"),
        (Processes, {"rank": -1}, "--rank must be at least 0, not -1"),
    ],
)
def test_a_value_that_cannot_be_names_the_flag(spec: type[Options], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match="^" + message.replace("(", r"\(")):
        spec(**options)


@pytest.mark.parametrize(
    ("field", "typed", "meant"),
    [
        ("method", "EMA", "--method ema"),
        ("method", "mean", "--method sma"),
        ("dtype", "bfloat16", "--dtype bf16"),
        ("dtype", "BF16", "--dtype bf16"),
        ("accumulate", "double", "--accumulate fp64"),
    ],
)
def test_a_choice_that_is_nearly_right_gets_the_right_one(field: str, typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as error:
        MergeSpec(**{field: typed})  # type: ignore[arg-type]
    assert error.value.hint == f"did you mean  {meant}"


def test_keywords_are_laid_over_specs() -> None:
    given = MergeSpec(method="ema", parameters={"alpha": 0.3}, dtype="fp32")
    assert read_options({"last": 2, "memory": "1GiB"}, spec=given) == (Selection(last=2), given, RunConfig(memory=2**30))
    assert read_options({"alpha": 0.5}, spec=given)[1] == MergeSpec(method="ema", parameters={"alpha": 0.5}, dtype="fp32")
    assert read_options({"method": "sma"}, spec=given)[1] == MergeSpec(dtype="fp32")
    assert read_options({"dtype": None}, spec=given)[1] == given
    assert read_options({"shard_size": "5GB"})[1].shard_bytes == 5_000_000_000


def test_weights_alone_mean_the_method_of_weights() -> None:
    assert read_options({"weights": "0.25,0.75"})[1] == MergeSpec(method="weights", parameters={"weights": [0.25, 0.75]})
    with pytest.raises(UsageError, match="method sma does not take --weights"):
        read_options({"weights": [1.0], "method": "sma"})
    with pytest.raises(UsageError, match="method sma does not take --alpha"):
        read_options({"alpha": 0.5})


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no option 'lst'; there are"):
        read_options({"lst": 2})


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="--at ends a selection"):
        Selection(at=1, before=2)
    with pytest.raises(UsageError, match="--requantize keeps"):
        MergeSpec(dtype="bf16", requantize=True)
    with pytest.raises(UsageError, match="--alpha and --half-life"):
        MergeSpec(method="ema", parameters={"alpha": 0.1, "half_life": 2})


def test_a_selection_ends_at_a_checkpoint_of_this_step() -> None:
    run = [Candidate(f"ckpt_{step}", step, None, None, 0) for step in (1000, 2000, 3000)]
    assert [each.step for each in select(run, Selection(at="2k", last=1)).candidates] == [2000]
    with pytest.raises(UsageError, match="no checkpoint at step 2500"):
        select(run, Selection(at=2500))
    assert [each.step for each in select(run, Selection(at="10k", tokens_per_step=4)).candidates] == [1000, 2000]


def test_paths_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for step in (1, 2):
        (tmp_path / "run" / f"step_{step}").mkdir(parents=True)
        (tmp_path / "run" / f"step_{step}" / "model.safetensors").write_bytes(b"")
    expected = [str(tmp_path / "run" / f"step_{step}") for step in (1, 2)]
    assert discover("~/run") == discover(["~/run/step_1", Path("~/run/step_2")]) == expected
    assert split_weights(["~/run/step_1:0.5", "~/run/step_2:0.5"]) == (["~/run/step_1", "~/run/step_2"], [0.5, 0.5])
    assert destination_of("~/merged") == tmp_path / "merged"
    assert destination_of("./~") == Path("~")
