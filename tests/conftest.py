"""The tiers of the tests: `slow` ones run with `--all`, or when a file or test is named on the
command line.
"""

from __future__ import annotations

import command
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", dest="all_tiers", help="run the slow tests too")


def pytest_configure(config: pytest.Config) -> None:
    named = config.args_source == config.ArgsSource.ARGS
    if not hasattr(config, "workerinput") and (named or config.option.markexpr):
        config.option.all_tiers = True  # the workers of pytest-xdist take it from here


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if (mark := item.get_closest_marker("slow")) and _reason(item, mark)]
    if slow and not config.option.all_tiers:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


def pytest_unconfigure() -> None:
    command.stop_server()


def _reason(item: pytest.Item, mark: pytest.Mark) -> str:
    reason = mark.kwargs.get("reason")
    if not isinstance(reason, str):
        raise pytest.UsageError(f"{item.nodeid}: slow needs a reason: why it is slow, and the fast test of the same promise")
    return reason
