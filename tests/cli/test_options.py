"""The flags that are made from the specs, and their way to the command."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from merge_cli.cli.options import Given, Quiet, flags, method_flags, takes
from merge_cli.request.methods import METHODS
from merge_cli.request.option import options_of
from merge_cli.request.spec import MergeSpec, RunConfig, Selection


def given_to_a_command(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    @takes(*flags(Selection), *flags(MergeSpec), *flags(RunConfig))
    def command(place: str, *, given: Given, quiet: Quiet = False) -> None:
        found.update(given, place=place, quiet=quiet)

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return found


def test_what_is_typed_is_given_and_nothing_else() -> None:
    assert given_to_a_command("run") == {"place": "run", "quiet": False}
    typed = given_to_a_command("run", "-q", "--last", "3", "--include", "a", "--include", "b", "--requantize", "--from", "2k")
    assert typed == {"place": "run", "quiet": True, "last": "3", "include": ["a", "b"], "requantize": True, "from_step": "2k"}
    assert given_to_a_command("run", "--base", "", "--floor", "0", "--alpha", "-1")["alpha"] == "-1"


def test_a_help_text_names_choices_and_default() -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(takes(*flags(MergeSpec))(lambda given: None))
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    assert "--dtype keep|bf16|fp16|fp32 Dtype of the floats in the result. [default: keep]" in shown
    assert "--shard-size SIZE Split anew, as 5GB. [default: the base's shards]" in shown
    assert "--half-life X ema: steps after which" in shown


def test_methods_with_a_parameter_of_one_name_share_the_flag() -> None:
    ema = METHODS["ema"]
    (alpha, *_) = method_flags([ema, METHODS["sma"], ema])
    assert alpha.help == f"ema: {ema.parameters['alpha'].help}; ema: {ema.parameters['alpha'].help}"


@pytest.mark.parametrize("spec", [Selection, RunConfig])
def test_a_command_may_take_some_options_only(spec: type[Any]) -> None:
    first, *others = [each.name for each in options_of(spec)]
    assert [each.name for each in flags(spec, only=[first])] == [first]
    assert [each.name for each in flags(spec, skip=[first])] == others
