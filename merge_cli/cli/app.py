"""The command line: one module a command. Only that of the command that was typed is imported:
the flags of all take a third of the time to start.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated

import typer

from merge_cli.errors import UsageError
from merge_cli.version import __version__

COMMANDS = {
    "analyze": "Judge by weights alone whether merging is likely to help.",
    "average": "Average checkpoints into a new one; prints its path.",
    "evaluate": "Measure checkpoints and merges into a ledger.",
    "finalize": "Publish a result whose files are all finished.",
    "forecast": "Predict the annealed loss and the best merge.",
    "inspect": "Show checkpoints and the differences between them.",
    "methods": "List the methods, with formulas and coefficients.",
    "push": "Send a result to the Hub or an object store.",
    "report": "Write one HTML file about a run.",
    "sweep": "Make many averages from one read of the checkpoints.",
    "verify": "Check a result against its records and its inputs.",
    "watch": "Merge a run while it trains.",
}
"""Name of a command -> its line in `pmerge --help`."""


def make_app(commands: Collection[str] = COMMANDS) -> typer.Typer:
    """The application with some of its commands. `NAME_command` in the module `NAME` is one."""
    app = typer.Typer(
        name="pmerge",
        help="Average the checkpoints of one training run: streamed, exact, crash-safe.\n\n"
        "Example:  pmerge average ckpt_*/ --method ema",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in commands:
        app.command(name, short_help=COMMANDS[name])(getattr(import_module(f"merge_cli.cli.{name}"), f"{name}_command"))
    return app


def run() -> int:
    """Run the command line and return its exit status. Raises PmergeError, also for flags that do
    not exist.
    """
    typed = [name for name in COMMANDS if sys.argv[1:2] == [name]]
    try:
        status = make_app(typed or COMMANDS)(standalone_mode=False)
    except Exception as error:  # typer's own error, whose module differs between versions of typer
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        message = error.format_message()
        command = getattr(getattr(error, "ctx", None), "command_path", "pmerge")
        near = get_close_matches(getattr(error, "option_name", ""), getattr(error, "possibilities", None) or [], 1)
        meant = re.search(r"Did you mean '(\w+)'", message)
        hint = f"did you mean  {meant[1] if meant else near[0]}" if meant or near else f"{command} --help"
        message = message.partition(" Did you mean")[0]
        raise UsageError(message[:1].lower() + message[1:].rstrip("."), hint=hint) from error
    return status if isinstance(status, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pmerge {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options before the command."""
