"""The command line: one module a command."""

from __future__ import annotations

from typing import Annotated

import typer

from merge_cli.cli.analyze import analyze_command
from merge_cli.cli.average import average_command
from merge_cli.cli.evaluate import evaluate_command
from merge_cli.cli.finalize import finalize_command
from merge_cli.cli.forecast import forecast_command
from merge_cli.cli.inspect import inspect_command
from merge_cli.cli.methods import methods_command
from merge_cli.cli.push import push_command
from merge_cli.cli.report import report_command
from merge_cli.cli.sweep import sweep_command
from merge_cli.cli.verify import verify_command
from merge_cli.cli.watch import watch_command
from merge_cli.errors import UsageError
from merge_cli.version import __version__

app = typer.Typer(
    name="pmerge",
    help="Average the checkpoints of one training run: streamed, exact, crash-safe.\n\n"
    "Example:  pmerge average ckpt_*/ --method ema",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("analyze")(analyze_command)
app.command("average")(average_command)
app.command("evaluate")(evaluate_command)
app.command("finalize")(finalize_command)
app.command("forecast")(forecast_command)
app.command("inspect")(inspect_command)
app.command("methods")(methods_command)
app.command("push")(push_command)
app.command("report")(report_command)
app.command("sweep")(sweep_command)
app.command("verify")(verify_command)
app.command("watch")(watch_command)


def run() -> int:
    """Run the command line and return its exit status. Raises PmergeError, also for flags that do
    not exist.
    """
    try:
        status = app(standalone_mode=False)
    except Exception as error:  # typer's own error, whose module differs between versions of typer
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        message = error.format_message()
        command = getattr(getattr(error, "ctx", None), "command_path", "pmerge")
        raise UsageError(message[:1].lower() + message[1:].rstrip("."), hint=f"{command} --help") from error
    return status if isinstance(status, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pmerge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options before the command."""
