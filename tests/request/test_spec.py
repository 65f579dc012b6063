"""The options: read from text and from Python values alike, checked when a spec is made."""

from __future__ import annotations

from typing import Any

import pytest

from merge_cli.errors import UsageError
from merge_cli.request.option import Options, options_of
from merge_cli.request.spec import MergeSpec, Processes, RunConfig, Selection

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
        MergeSpec(**{field: typed})
    assert error.value.hint == f"did you mean  {meant}"
